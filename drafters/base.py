"""The drafter protocol.

A drafter guesses continuations; verification alone decides what is sampled, so a drafter can make generation faster or
slower but never different. Sequences are named by an integer that stays theirs from `begin` to `end`, whatever row of
a batch they sit in. Life of a sequence: `begin`, then `propose` and `observe` by turns, perhaps `preempt` and later
`restore`, and `end`.

What a drafter is given is for reading. Arrays of `SequenceStart` and `Verified` are read-only, those of `DraftRequest`
a drafter's own copies; tensors cannot be locked, and a drafter that writes to one that it is shown spoils its own view,
but for the target itself (TARGET_LAYERS), which it is trusted with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from msgspec import Struct

from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import KVCache
from pipeline.models.tokenizer import Tokenizer
from pipeline.sampling.truncation import Truncation


class Needs(Flag):
    """What a drafter asks of the generator; what it does not ask for is not computed."""

    NOTHING = 0
    HIDDEN_STATES = auto()
    """final-norm hidden states: of a sequence's first tokens in `SequenceStart.hidden`, then of verified positions in
    `Verified.hidden`"""
    LOGITS = auto()
    """the target's logits of verified positions, in `Verified.logits`; none of steps in which an arbiter let the
    drafter sleep"""
    TARGET_LAYERS = auto()
    """the target model itself, through `attach`"""
    LAYER_STATES = auto()
    """what each layer of the target read and the last one gave, in `Verified.layers`"""


class Target(Protocol):
    """The target model, for drafters that run it or must fit it."""

    @property
    def decoder(self) -> Decoder:
        """Its weights; new ones are loaded in place."""

    @property
    def cache(self) -> KVCache:
        """Its keys and values. A drafter may write those of drafted positions, for which there are pages: verification
        overwrites them. It may take free pages within a call."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the target is no checkpoint directory."""

    @property
    def max_sequences(self) -> int:
        """Rows of the largest batch."""

    def places(self, ids: Sequence[int]) -> "Places":
        """Of live sequences; a draft begins behind them."""


class Places(NamedTuple):
    """Where the keys and values of B sequences are, of all tokens but the last one."""

    tables: np.ndarray
    """int64 [B, most], pages of each"""
    held: np.ndarray
    """int64 [B], tokens in them"""
    evicted: np.ndarray | None = None
    """int64 [B], tokens that were in them before their keys and values were dropped; None: no sequence has any"""


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence begins."""

    id: int
    prompt_ids: np.ndarray
    """int64 [P]"""
    group: int
    """sequences with the same group share their prompt"""
    temperature: float
    seed: int
    response_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [T], tokens it has already; empty but in `restore`"""
    hidden: torch.Tensor | None = None
    """[P + T - 1, H], final-norm hidden states after each token but the last, on the target's device, for drafters that
    ask for HIDDEN_STATES; sequences of a group share the prompt's memory"""


class DraftRequest(Struct, frozen=True, eq=False):
    """Sequences to draft for, in the order of the batch's B rows."""

    ids: Sequence[int]
    budgets: np.ndarray
    """int64 [B], most tokens that can be used for each row; 0: none"""
    temperatures: np.ndarray
    """float32 [B]"""
    truncation: Truncation | None = None
    """top-k, top-p and min-p of each row, which a distribution that tokens are drawn from should follow: what they
    leave out is rejected. None: no row has any"""


class Proposal(Struct, frozen=True, eq=False):
    """Drafts for B rows, ragged: row b holds `lengths[b]` tokens (at most its budget), the rest is padding."""

    token_ids: np.ndarray
    """int64 [B, K]"""
    lengths: np.ndarray
    """int64 [B]"""
    probabilities: torch.Tensor | None = None
    """float32 [B, K, V], the distribution each draft token was drawn from, on the target's device; None: the drafts
    are deterministic and count as one-hot"""
    parents: np.ndarray | None = None
    """reserved for trees: int64 [B, K], index of each token's parent in the row, -1 for the root"""
    sampled: np.ndarray | None = None
    """bool [B], rows whose tokens were drawn from `probabilities`; the other rows are deterministic. None: all rows
    where there are probabilities"""
    drafted_by: Sequence[str] | None = None
    """B names, for a drafter that hands out others' drafts; None: the drafter's own"""
    matches: np.ndarray | None = None
    """int64 [B], tokens of context each draft was found with; None: the drafter has no such notion"""
    confidences: np.ndarray | None = None
    """float32 [B, K], the drafter's own guess that each token is accepted if those before it are. Of a draft that was
    drawn the peak of the first distribution stands for the first: who chooses must not see what was drawn"""

    @staticmethod
    def empty(rows: int) -> "Proposal":
        return Proposal(np.zeros((rows, 0), np.int64), np.zeros(rows, np.int64))


class Verified(Struct, frozen=True, eq=False):
    """What one verification emitted, for the B rows of the request before it, also for those without a draft, but not
    for those whose sequence paused or ended before it was verified. Tokens that were not asked for come in one of their
    own (vLLM: the first of a response, and of one that was restored). Every sequence is live, not preempted, and has
    emitted something; which are preempted or ended in the same step is said afterwards."""

    ids: Sequence[int]
    emitted: Sequence[np.ndarray]
    """int64 arrays: tokens that now continue the sequence: accepted drafts, then one residual or bonus token, cut at a
    stop token or the length limit"""
    accepted: np.ndarray
    """int64 [B], accepted draft tokens"""
    hidden: torch.Tensor | None = None
    """[N, H], final-norm hidden states after each row's last token and after each of its draft tokens, row by row"""
    logits: torch.Tensor | None = None
    """[N, V], float32, at the same places"""
    starts: np.ndarray | None = None
    """int64 [B], where each row's places begin; given with either. The first `len(emitted[b])` of row b are those that
    its emitted tokens were sampled from"""
    seconds: float = 0.0
    """wall time of the verification: forward pass and sampling, without drafting; 0: not measured"""
    layers: torch.Tensor | None = None
    """[layers + 1, N, H] at the same places: the embedding, then what each layer gave, before the final norm"""

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """All emitted tokens, int64 [N], and where each row's begin and end, int64 [B + 1]; the caller's own arrays."""
        if len(self.emitted) == 1:
            return self.emitted[0].copy(), np.array([0, len(self.emitted[0])])
        borders = np.array([0, *accumulate(map(len, self.emitted))], np.int64)
        return np.concatenate(self.emitted) if len(self.emitted) else np.zeros(0, np.int64), borders


def locked(array: np.ndarray) -> np.ndarray:
    """The same array, which cannot be written to any more."""
    array.flags.writeable = False
    return array


@runtime_checkable
class Drafter(Protocol):
    """Implement these; `drafters.base.BaseDrafter` gives empty bodies for the ones you do not need.

    A class with options declares them as a nested `Options`, a `msgspec.Struct` with a default for every field, and
    takes one as its constructor's only argument; a class without `Options` is made without arguments.
    """

    name: str
    needs: Needs

    def attach(self, target: Target) -> None:
        """The target model, before the first sequence; only called when `needs` has TARGET_LAYERS. A drafter that does
        not fit it raises `UsageError`, and the engine does not start."""

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        """These sequences exist now."""

    def propose(self, request: DraftRequest) -> Proposal:
        """Drafts that continue each sequence after its last emitted token."""

    def observe(self, verified: Verified) -> None:
        """Tokens that were emitted, whoever drafted them."""

    def preempt(self, ids: Sequence[int]) -> None:
        """These sequences pause and give their place on the device back; `restore` or `end` follows."""

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        """These sequences, preempted before, go on; what was given up with their place is made again from
        `response_ids`."""

    def weights_changed(self, version: int) -> None:
        """The target runs publication `version` from the next verification on."""

    def end(self, ids: Sequence[int]) -> None:
        """These sequences are finished or cancelled."""


class BaseDrafter:
    """Empty bodies for the optional parts of the protocol."""

    name = "unnamed"
    needs = Needs.NOTHING

    def attach(self, target: Target) -> None:
        pass

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        pass

    def propose(self, request: DraftRequest) -> Proposal:
        return Proposal.empty(len(request.ids))

    def observe(self, verified: Verified) -> None:
        pass

    def preempt(self, ids: Sequence[int]) -> None:
        pass

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        pass

    def weights_changed(self, version: int) -> None:
        pass

    def end(self, ids: Sequence[int]) -> None:
        pass

    def check_policy(self, folder: Path | None, brings_head: bool) -> None:
        """Before anything is loaded; not part of the protocol.

        Args:
            folder: the policy's checkpoint directory; None: it is made when the run starts.
            brings_head: whether publications bring a draft head beside the policy.

        Raises:
            UsageError: this drafter cannot draft for such a policy.
        """

    def counters(self) -> dict[str, float]:
        """Figures worth showing to people, since the drafter was made; not part of the protocol."""
        return {}


def check_policy(drafter: Drafter, folder: Path | None, brings_head: bool) -> None:
    """`BaseDrafter.check_policy` of a drafter that has it."""
    check = getattr(drafter, "check_policy", None)
    if check is not None:
        check(folder, brings_head)
