"""What a head is trained on: texts, and the target's hidden states of them, computed once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from torch import Tensor

from drafters.suffix.documents import read_documents
from pipeline.errors import UsageError
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache
from pipeline.models.tokenizer import Tokenizer

LONGEST = 1024
"""Longer texts are cut into pieces."""
PIECE = 256
"""tokens, at most, of a piece of a text file, each of which is a text of its own"""
_PASS = 8192
"""tokens of a forward pass of the target"""


class Rollout(msgspec.Struct, frozen=True):
    """A line of rollouts.jsonl."""

    token_ids: list[Annotated[int, msgspec.Meta(ge=0)]]
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """how many of them, at the beginning, are not trained on"""


def read_rollouts(files: Sequence[Path], tokenizer: Tokenizer, template: str, vocabulary: int) -> list[Rollout]:
    """Texts of files: lines of `Rollout`, or whatever `drafters.suffix.documents` reads; a text file in pieces.

    Args:
        files: of texts.
        tokenizer: the model's.
        template: of a line of a .jsonl file.
        vocabulary: tokens that the model has embeddings for.

    Raises:
        UsageError: a file or line cannot be read, or there is no text.
    """
    found: list[Rollout] = []
    for path in files:
        if path.name == "rollouts.jsonl":
            found += load_rollouts(path, vocabulary, "mend that line, or give another file")
            continue
        begin = tokenizer.encode("")
        for number, ids in enumerate(read_documents([path], tokenizer, template), 1):
            texts = [ids.tolist()] if path.suffix == ".jsonl" else _cut(ids, begin)
            for text in texts:
                rollout = Rollout(text)
                if wrong := _wrong(rollout, vocabulary):
                    raise UsageError(f"{path} cannot be used: text {number} {wrong}; give texts of this model")
                found.append(rollout)
    if not found:
        raise UsageError(f"drafter.texts {', '.join(map(str, files))} hold no text")
    return found


def load_rollouts(path: Path, vocabulary: int, remedy: str) -> list[Rollout]:
    """
    Args:
        path: of a rollouts.jsonl.
        vocabulary: tokens that the model has embeddings for.
        remedy: what to do about a file that cannot be used.

    Raises:
        UsageError: the file cannot be read, or a line is no text of the model.
    """
    try:
        found = msgspec.json.Decoder(Rollout).decode_lines(path.read_bytes())
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise UsageError(f"{path} cannot be used: {error}; {remedy}") from error
    for number, rollout in enumerate(found, 1):
        if wrong := _wrong(rollout, vocabulary):
            raise UsageError(f"{path} cannot be used: text {number} {wrong}; {remedy}")
    return found


def _wrong(rollout: Rollout, vocabulary: int) -> str:
    """What keeps a text from being trained on; empty: nothing."""
    ids, prompt = rollout.token_ids, rollout.prompt_tokens
    if (largest := max(ids, default=0)) >= vocabulary:
        return f"has token {largest}, outside the model's vocabulary of {vocabulary} tokens"
    return f"has prompt_tokens = {prompt}, more than its {len(ids)} tokens" if prompt > len(ids) else ""


def _cut(ids: np.ndarray, begin: list[int]) -> list[list[int]]:
    """A document in pieces of like length, of at most `PIECE` tokens behind `begin`, with which documents start."""
    body = ids[len(begin) :]
    return [[*begin, *part.tolist()] for part in np.array_split(body, max(1, -(-len(body) // PIECE)))]


@dataclass(frozen=True, slots=True)
class Batch:
    """B texts, padded to T tokens at their ends."""

    tokens: Tensor
    """int64 [B, T]"""
    hidden: Tensor
    """[B, T, H], the target's final-norm hidden states"""
    rows: Tensor
    """int64 [N], places b * T + t of rows whose chain is trained: x_{t+2} exists and is not of the prompt"""
    valid: Tensor
    """bool [N, K], whether the token that depth d from 0 predicts, x_{t+2+d}, exists"""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device) for t in (self.tokens, self.hidden, self.rows, self.valid)))


class TrainingTexts:
    """Texts with their hidden states, on disk: a file that disappears with the process."""

    def __init__(self, target: Decoder, rollouts: Sequence[Rollout], folder: Path) -> None:
        """
        Args:
            target: the frozen policy.
            rollouts: texts, of which those under three tokens are passed over.
            folder: for the file.
        """
        self._pieces = [piece for rollout in rollouts for piece in _pieces(rollout)]
        if not self._pieces:
            raise UsageError("all texts to train on are shorter than three tokens; give longer ones")
        self.lengths = np.array([len(tokens) for tokens, _ in self._pieces])
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens, width = int(self._starts[-1]), target.config.hidden_size
        path = folder / ".hidden"
        self._hidden = torch.from_file(str(path), shared=True, size=self.tokens * width, dtype=target.dtype).view(
            self.tokens, width
        )
        path.unlink()
        self._compute(target)

    def _compute(self, target: Decoder) -> None:
        cache = KVCache(target.config, target.dtype, target.device, 2 * (_PASS // PAGE + LONGEST // PAGE + 1))
        for chosen in _by_length(self.lengths, _PASS):
            counts = self.lengths[chosen]
            pages = -(-int(counts.max()) // PAGE)
            while len(chosen) * pages > cache.free:
                cache.extend(cache.free)
            held = cache.take(len(chosen) * pages)
            tables = np.array(held, np.int64).reshape(len(chosen), pages)
            tokens = torch.from_numpy(np.concatenate([self._pieces[i][0] for i in chosen])).to(target.device)
            hidden = target.forward(tokens, cache.plan(tables, np.zeros(len(chosen), np.int64), counts), cache).cpu()
            for i, own in zip(chosen, hidden.split(counts.tolist()), strict=True):
                self._hidden[self._starts[i] : self._starts[i + 1]] = own
            cache.release(held)

    def batches(self, tokens: int, seed: int) -> Iterator[list[int]]:
        """Texts of like length, about `tokens` tokens a batch with padding, in an order of `seed`."""
        rng = np.random.default_rng(seed)
        batches = _by_length(self.lengths + rng.uniform(0, 0.2 * self.lengths.mean(), len(self.lengths)), tokens)
        for index in rng.permutation(len(batches)):
            yield batches[index]

    def batch(self, chosen: Sequence[int], depths: int) -> Batch:
        """Texts `chosen`, to be trained to `depths`; on the CPU."""
        hidden = [self._hidden[self._starts[i] : self._starts[i + 1]] for i in chosen]
        return padded_batch([self._pieces[i] for i in chosen], hidden, depths)


def padded_batch(texts: Sequence[tuple[np.ndarray, int]], hidden: Sequence[Tensor], depths: int) -> Batch:
    """A batch of B texts.

    Args:
        texts: int64 tokens of each, at least three, and the first of them that is trained on.
        hidden: [its tokens, H] of each, on the device that the batch is for.
        depths: to be trained to.
    """
    length = max(len(ids) for ids, _ in texts)
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    padded = hidden[0].new_zeros(len(texts), length, hidden[0].shape[1])
    rows: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for b, (ids, first) in enumerate(texts):
        tokens[b, : len(ids)] = torch.from_numpy(ids)
        padded[b, : len(ids)] = hidden[b]
        t = np.arange(max(0, first - 2), len(ids) - 2)
        rows.append(b * length + t)
        left.append(len(ids) - 2 - t)
    valid = np.concatenate(left)[:, None] > np.arange(depths)
    device = padded.device
    return Batch(
        tokens.to(device), padded, torch.from_numpy(np.concatenate(rows)).to(device), torch.from_numpy(valid).to(device)
    )


def _pieces(rollout: Rollout) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens and the first of them to train on; pieces in which there is none are left out."""
    ids = np.array(rollout.token_ids, np.int64)
    for begin in range(0, len(ids), LONGEST):
        piece, first = ids[begin : begin + LONGEST], max(0, rollout.prompt_tokens - begin)
        if len(piece) >= 3 and first < len(piece):
            yield piece, first


def _by_length(lengths: np.ndarray, tokens: int) -> list[list[int]]:
    """Indices, by length, in lists of at most `tokens` tokens with padding, and at least one text."""
    batches: list[list[int]] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * math.ceil(lengths[index]) > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
