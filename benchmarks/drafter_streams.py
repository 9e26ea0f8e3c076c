"""Text for `rollahead bench drafters`: what drafters learn from and draft for, and a peer behind our protocol."""

import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from drafters.base import BaseDrafter, Drafter, DraftRequest, Proposal, SequenceStart, Verified
from drafters.replay import RecordedText
from drafters.suffix import matching
from drafters.suffix_automaton import SuffixAutomatonDrafter
from pipeline.errors import UsageError
from pipeline.models.tokenizer import Tokenizer

LENGTH = 8
"""longest draft"""


def recorded(files: Sequence[Path], model: Path) -> list[RecordedText]:
    """Questions and reference answers of `.jsonl` files with `question` and `answer`, those of the files by turns.

    Raises:
        UsageError: a file cannot be read or has other fields.
    """
    tokenizer, texts = Tokenizer(model), []
    for path in files:
        try:
            lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            pairs = [(line["question"], line["answer"]) for line in lines]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{path} cannot be used as a stream of questions and answers: {error!r}") from error
        if not pairs:
            raise UsageError(f"{path} is empty; give lines of JSON with the fields question and answer")
        texts.append([_text(tokenizer, question, answer) for question, answer in pairs])
    count = max(map(len, texts))
    mixed = [part[i] for i in range(count) for part in texts if i < len(part)]
    return [RecordedText(text.prompt_ids, text.response_ids, group) for group, text in enumerate(mixed)]


def _text(tokenizer: Tokenizer, question: str, answer: str) -> RecordedText:
    prompt = tokenizer.encode(f"Question: {question}\nAnswer:")
    whole = [*tokenizer.encode(f"Question: {question}\nAnswer: {answer}"), *tokenizer.eos_token_ids[:1]]
    return RecordedText(np.array(prompt, np.int64), np.array(whole[len(prompt) :], np.int64))


def teach(drafter: Drafter, texts: Sequence[RecordedText], tokens: int, first_id: int = 1 << 40) -> int:
    """Lets a drafter follow texts until it has seen so many tokens; returns how many texts that were."""
    seen = 0
    for n, text in enumerate(texts):
        if seen >= tokens:
            return n
        i = first_id + n
        drafter.begin([SequenceStart(i, text.prompt_ids, i, 1.0, i)])
        drafter.observe(Verified([i], [text.response_ids], np.zeros(1, np.int64)))
        drafter.end([i])
        seen += len(text.prompt_ids) + len(text.response_ids)
    return len(texts)


def seconds_a_token(drafter: Drafter, texts: Sequence[RecordedText], rows: int) -> float:
    """Of proposing up to `LENGTH` tokens and observing one, for `rows` sequences at once: the least fruitful case."""
    began, tokens = time.perf_counter(), 0
    for first in range(0, len(texts) - rows + 1, rows):
        batch = texts[first : first + rows]
        ids = list(range(first, first + rows))
        drafter.begin([SequenceStart(i, t.prompt_ids, i, 1.0, i) for i, t in zip(ids, batch, strict=True)])
        request = DraftRequest(ids, np.full(rows, LENGTH), np.ones(rows, np.float32))
        accepted = np.zeros(rows, np.int64)
        for step in range(min(len(t.response_ids) for t in batch)):
            drafter.propose(request)
            drafter.observe(Verified(ids, [t.response_ids[step : step + 1] for t in batch], accepted))
            tokens += rows
        drafter.end(ids)
    return (time.perf_counter() - began) / tokens


def core_seconds_a_token(drafter: SuffixAutomatonDrafter, texts: Sequence[RecordedText]) -> float:
    """The same for one sequence at a time without Python between two tokens."""
    memory, seconds, tokens = drafter.memory, 0.0, 0
    for i, text in enumerate(texts):
        memory.begin([SequenceStart(i, text.prompt_ids, i, 1.0, i)])
        row, done, position = memory.rows([i]), np.zeros((1, len(memory.own)), np.int64), 0
        while position < len(text.response_ids):
            began = time.perf_counter()
            position, full = _follow(
                memory.pool.heads, memory.automata, memory.places, memory.lengths, memory.own, row,
                text.response_ids, position, done, LENGTH,
            )  # fmt: skip
            seconds += time.perf_counter() - began
            if full >= 0:
                memory.pool.grow(full)
        tokens += len(text.response_ids)
        memory.end([i])
    return seconds / tokens


@njit(cache=True)
def _follow(  # type: ignore[no-untyped-def]
    heads, automata, places, lengths, own, row, text, position, done, most
):
    """Proposes and appends token by token from `position` on; returns where it stopped, and the automaton that must
    grow, -1 at the end."""
    budgets, biases, borders = np.full(1, most), np.zeros(len(own), np.int64), np.array([0, 1])
    while position < len(text):
        if done.sum() == 0:
            matching.propose(heads, automata, places, lengths, row, budgets, biases, 1, 1.0, 1.0, 0.1, most)
        full = matching.observe(
            heads, automata, places, lengths, own, row, text[position : position + 1], borders, done, False
        )
        if full >= 0:
            return position, full
        done[:] = 0
        position += 1
    return position, -1


class ArcticDrafter(BaseDrafter):
    """The suffix decoding cache of the arctic-inference package, with its defaults, behind our protocol."""

    name = "arctic-inference"

    def __init__(self) -> None:
        try:
            cache = importlib.import_module("arctic_inference.suffix_decoding").SuffixDecodingCache
        except ImportError as error:
            raise UsageError(
                "the comparison needs arctic-inference: pip install --no-deps arctic-inference==0.3.0"
            ) from error
        self._cache: Any = cache()
        self._texts: dict[int, np.ndarray] = {}
        self._requests: dict[int, int] = {}
        self._next = 0

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        for start in sequences:
            self._requests[start.id], self._next = self._next, self._next + 1
            self._texts[start.id] = start.prompt_ids.astype(np.int32)
            self._cache.start_request(self._requests[start.id], self._texts[start.id])

    def propose(self, request: DraftRequest) -> Proposal:
        rows, width = len(request.ids), int(request.budgets.max(initial=0))
        tokens, lengths = np.zeros((rows, width), np.int64), np.zeros(rows, np.int64)
        depth = self._cache.max_tree_depth
        for row, i in enumerate(request.ids):
            if request.budgets[row]:
                draft = self._cache.speculate(
                    self._requests[i], self._texts[i][-depth:], max_spec_tokens=int(request.budgets[row])
                )
                lengths[row] = len(draft.token_ids)
                tokens[row, : lengths[row]] = draft.token_ids
        return Proposal(tokens, lengths)

    def observe(self, verified: Verified) -> None:
        for i, emitted in zip(verified.ids, verified.emitted, strict=True):
            new = emitted.astype(np.int32)
            self._cache.add_active_response(self._requests[i], new)
            self._texts[i] = np.concatenate([self._texts[i], new])

    def end(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._cache.stop_request(self._requests.pop(i))
            del self._texts[i]
