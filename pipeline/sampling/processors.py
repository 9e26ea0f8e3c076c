"""From the target's logits to the distribution that is sampled, for a batch of sequences with settings of their own.

In this order, for every verified position with the drafted tokens before it as context: logit bias, allowed and bad
tokens, stop tokens while a response is too short; repetition, frequency and presence penalties; temperature; min-p,
top-k, top-p, each on what the one before it left, renormalised. vLLM takes the same order. A greedy row takes the
largest logit before the temperature.

A setting that no row uses costs nothing; rows that do not use one are left out of its arithmetic.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config.types import LEAST_TEMPERATURE
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams
from pipeline.sampling.bias import BiasTable
from pipeline.sampling.distribution import entropy, log_probabilities
from pipeline.sampling.penalties import TokenCounts, penalise
from pipeline.sampling.target import Kept, Target, make_greedy
from pipeline.sampling.truncation import Truncation, truncate
from pipeline.sampling.verification import packed_rows

_SETTINGS = np.dtype(
    [
        ("temperature", np.float32), ("top_k", np.int64), ("top_p", np.float64), ("min_p", np.float64),
        ("repetition", np.float32), ("presence", np.float32), ("frequency", np.float32),
        ("truncates", np.bool_), ("min_new_tokens", np.int64),
        ("bias", np.int64),  # row of the bias table; -1: none
        ("counts", np.int64),  # row of the token counts; -1: none
    ],
    align=True,  # torch reads columns only with strides that are multiples of an element
)  # fmt: skip


def check_temperature(name: str, value: float) -> None:
    """Refuse what is neither greedy nor large enough to divide by.

    Raises:
        UsageError: it is neither; `name` is the option it came by.
    """
    if 0 < value < LEAST_TEMPERATURE:
        raise UsageError(
            f"{name} = {value:g} is too small to divide logits by; use 0 (greedy) or at least {LEAST_TEMPERATURE:g}"
        )


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """
    Raises:
        UsageError: a setting names a token that the model does not have.
    """
    named = {
        "logit_bias": tuple(token for token, _ in params.logit_bias),
        "allowed_token_ids": params.allowed_token_ids,
        "bad_token_ids": params.bad_token_ids,
        "stop_token_ids": params.stop_token_ids,
    }
    for name, ids in named.items():
        if ids and max(ids) >= vocab_size:
            raise UsageError(f"sampling.{name} has token id {max(ids)}, outside the vocabulary of {vocab_size}")


class Processors:
    """Settings of the sequences under way, and for those with penalties the counts of their tokens.

    A sequence is named by the slot that `add` gives it until `remove`, whatever row of a batch it sits in and whether
    or not it is in the batch at all.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._settings = np.zeros(0, _SETTINGS)
        self._temperatures, self._plain = np.zeros(0, np.float32), np.zeros(0, np.bool_)
        """of `_settings`: by far the most common question, and fields of a structured array are slow to gather"""
        self._free: list[int] = []
        self._bias = BiasTable(vocab_size, device)
        self._counts = TokenCounts(vocab_size, device)

    def check(self, params: SamplingParams, stop: Collection[int]) -> None:
        """Refuse settings that no response can have.

        Raises:
            UsageError: an id outside the vocabulary, no token that could be drawn, a temperature too small to divide
                by, or a least length above the greatest.
        """
        check_temperature("sampling.temperature", params.temperature)
        if params.min_new_tokens > params.max_new_tokens:
            raise UsageError(
                f"sampling.min_new_tokens = {params.min_new_tokens} is more than sampling.max_new_tokens = "
                f"{params.max_new_tokens}; lower the one or raise the other"
            )
        check_token_ids(params, self._vocab_size)
        if not params.masks:
            return
        possible = set(params.allowed_token_ids) or set(range(self._vocab_size))
        possible -= set(params.bad_token_ids)
        if params.min_new_tokens:
            possible -= set(stop)
        if not possible:
            raise UsageError(
                "no token can be drawn: sampling.allowed_token_ids are all among sampling.bad_token_ids, or end the "
                "response before sampling.min_new_tokens; allow others"
            )

    def add(self, params: SamplingParams, stop: Collection[int], prompt_ids: np.ndarray) -> int:
        """A sequence begins, with its settings (see `check`), the tokens that end it, and its prompt; its slot."""
        if not self._free:
            size = len(self._settings)
            more = max(16, size)
            self._settings = np.concatenate([self._settings, np.zeros(more, _SETTINGS)])
            self._temperatures = np.concatenate([self._temperatures, np.zeros(more, np.float32)])
            self._plain = np.concatenate([self._plain, np.zeros(more, np.bool_)])
            self._free = list(range(len(self._settings) - 1, size - 1, -1))
        slot = self._free.pop()
        self._settings[slot] = (
            params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty,
            params.presence_penalty, params.frequency_penalty, params.truncates, params.min_new_tokens,
            self._bias.add(params, stop) if params.masks else -1,
            self._counts.add(prompt_ids) if params.penalises else -1,
        )  # fmt: skip
        self._temperatures[slot] = params.temperature
        self._plain[slot] = not (params.masks or params.penalises or params.truncates)
        return slot

    def temperatures(self, slots: np.ndarray) -> np.ndarray | None:
        """float32 [B] of the sequences in `slots` where none has another setting; else None."""
        return self._temperatures[slots] if self._plain[slots].all() else None

    def observe(self, slots: np.ndarray, emitted: Sequence[np.ndarray]) -> None:
        """The responses in `slots` [B] grew by these tokens."""
        rows = self._settings["counts"][slots]
        if (rows >= 0).any():
            self._counts.observe(rows, emitted)

    def remove(self, slot: int) -> None:
        """The sequence is over; its slot may be given to another."""
        if self._settings["bias"][slot] >= 0:
            self._bias.remove(int(self._settings["bias"][slot]))
        if self._settings["counts"][slot] >= 0:
            self._counts.remove(int(self._settings["counts"][slot]))
        self._free.append(slot)

    def target(
        self,
        logits: Tensor,
        slots: np.ndarray,
        positions: np.ndarray,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        with_entropy: bool = True,
    ) -> Target:
        """What is sampled at the N = sum(lengths + 1) scored positions of B sequences.

        Args:
            logits: [N, V], packed row by row; not changed. float64 is kept, else float32 is used.
            slots: int64 [B].
            positions: int64 [B], tokens of each response so far.
            token_ids: drafts, int64 [B, K]; row b holds `lengths[b]` tokens.
            lengths: int64 [B].
            with_entropy: whether to compute entropies.
        """
        row, depth = packed_rows(lengths)
        settings = self._settings[slots][row]
        logits = self._edited(logits, settings, positions[row] + depth, token_ids, lengths)
        temperature = settings["temperature"]
        same = bool(((temperature == 1) | (temperature == 0)).all())
        logprobs = log_probabilities(logits, None if same else self._tensor(temperature))
        probabilities = logprobs.exp()
        entropies = entropy(probabilities, logprobs) if with_entropy else None
        kept = self._truncate(logprobs, probabilities, settings)
        make_greedy(probabilities, logits, self._tensor(np.flatnonzero(temperature == 0)))
        return Target(probabilities, logprobs, entropies, kept)

    def _edited(
        self, logits: Tensor, settings: np.ndarray, index: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray
    ) -> Tensor:
        """Logits with bias, masks and penalties."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        biased = np.flatnonzero(settings["bias"] >= 0)
        if len(biased):
            chosen = settings[biased]
            rows = self._bias.rows(chosen["bias"], index[biased] < chosen["min_new_tokens"])
            wide = wide.index_add(0, self._tensor(biased), rows.to(wide.dtype))
        penalised = np.flatnonzero(settings["counts"] >= 0)
        if len(penalised):
            chosen, where = settings[penalised], self._tensor(penalised)
            counts, seen = self._counts.with_drafts(chosen["counts"], penalised, token_ids, lengths)
            changed = penalise(
                wide[where], counts, seen,
                *(self._tensor(chosen[name]) for name in ("repetition", "presence", "frequency")),
            )  # fmt: skip
            wide = wide.index_copy(0, where, changed)
        return wide

    def _truncate(self, logprobs: Tensor, probabilities: Tensor, settings: np.ndarray) -> Kept | None:
        """Overwrites the rows that truncate, renormalised."""
        truncated = np.flatnonzero(settings["truncates"])
        if not len(truncated):
            return None
        chosen, where = settings[truncated], self._tensor(truncated)
        mask = truncate(logprobs[where], Truncation(chosen["top_k"], chosen["top_p"], chosen["min_p"]))
        logprobs[where] = torch.log_softmax(logprobs[where].masked_fill(~mask, float("-inf")), dim=-1)
        probabilities[where] = logprobs[where].exp()
        return Kept(where, mask)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)
