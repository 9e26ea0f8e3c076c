"""Corpora: suffix automata built beforehand from texts and mapped into memory when they are used.

A corpus is a folder: `states.npy` and `slots.npy` (layout: `drafters.suffix.states`) and `corpus.json`.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit

from drafters.suffix import states as k
from drafters.suffix.pool import AutomatonPool
from pipeline.errors import UsageError

_FORMAT = 1
_HEADER = {"states": k.STATES, "transitions": k.SLOTS, "tokens": k.CLOCK, "widest": k.WIDEST}


@dataclass(frozen=True, slots=True)
class Corpus:
    """A finished automaton; its arrays are maps of the files, read as they are touched."""

    states: np.ndarray
    slots: np.ndarray
    header: np.ndarray
    """int64 [HEADER_WIDTH]"""
    vocabulary: str | None = None
    """digest of the tokenizer that made the tokens, if it is known"""


@dataclass(frozen=True, slots=True)
class CorpusSize:
    """What `build_corpus` wrote."""

    documents: int
    tokens: int
    bytes: int


def build_corpus(documents: Iterable[np.ndarray], folder: Path, vocabulary: str | None = None) -> CorpusSize:
    """The automaton of int64 token arrays, written to `folder`; no match reaches from one document into the next.

    Args:
        documents: texts.
        folder: made if it is not there.
        vocabulary: digest of the tokenizer that made the tokens; None: it is not known.

    Raises:
        UsageError: there is no text, or the folder cannot be written.
    """
    pool = AutomatonPool()
    number, count = pool.new(), 0
    for document in documents:
        pool.extend(number, np.ascontiguousarray(document, np.int64), counted=False)
        count += 1
    head = pool.heads[number]
    if not head[k.CLOCK]:
        raise UsageError("the corpus has no token; give files with text in them")
    k.spread_counts(head)
    states, slots = pool.blocks(number)
    sizes = {name: int(head[c]) for name, c in _HEADER.items()}
    description = {"format": _FORMAT, "documents": count, "vocabulary": vocabulary, **sizes}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "states.npy", states)
        _write(folder / "slots.npy", slots)
        (folder / "corpus.json").write_text(json.dumps(description, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"corpus {folder} cannot be written: {error}") from error
    return CorpusSize(count, int(head[k.CLOCK]), states.nbytes + slots.nbytes)


def load_corpus(folder: Path) -> Corpus:
    """Maps a corpus into memory and checks that following it cannot lead outside.

    Raises:
        UsageError: the folder is no corpus, or a damaged one.
    """
    remedy = "build it again with rollahead corpus build"
    try:
        description = json.loads((folder / "corpus.json").read_text())
        if description["format"] != _FORMAT:
            raise UsageError(
                f"corpus {folder} has format {description['format']}, this version reads {_FORMAT}; {remedy}"
            )
        # Mapped copy-on-write: the kernels take one type of array for what they follow and what they write.
        states, slots = (
            np.asarray(np.load(folder / name, mmap_mode="c", allow_pickle=False))
            for name in ("states.npy", "slots.npy")
        )
        header = np.zeros(k.HEADER_WIDTH, np.int64)
        for name, column in _HEADER.items():
            header[column] = int(description[name])
    except (OSError, EOFError, ValueError, OverflowError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder} is not a corpus ({error}); {remedy}") from error
    shapes = (states.dtype, states.shape[1:], slots.dtype, slots.shape[1:])
    if shapes != (np.int32, (k.STATE_WIDTH,), np.int32, (k.SLOT_WIDTH,)) or not _sound(states, slots, header):
        raise UsageError(f"corpus {folder} is damaged; {remedy}")
    return Corpus(states, slots, header, description.get("vocabulary"))


def _write(path: Path, array: np.ndarray) -> None:
    """Under another name first, so that who has the old file mapped keeps it whole."""
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)


@njit(cache=True)
def _sound(states: np.ndarray, slots: np.ndarray, header: np.ndarray) -> bool:
    """Every reference lies inside, every walk along links ends, every probe of the table meets a free slot."""
    count, room = len(states), len(slots)
    if count == 0 or header[k.STATES] != count or room == 0 or room & (room - 1) != 0 or states[0, k.LINK] != -1:
        return False
    for state in range(count):
        link, target, more = states[state, k.LINK], states[state, k.TARGET], states[state, k.MORE]
        if not (0 <= target < count and 0 <= more <= room and (state == 0 or 0 <= link < count)):
            return False
        if not 0 <= states[state, k.BEST] <= room:
            return False
        if state != 0 and states[link, k.LENGTH] >= states[state, k.LENGTH]:
            return False
        if (target == 0) != (states[state, k.TOKEN] < 0):
            return False
    free = 0
    for slot in range(room):
        free += slots[slot, k.OWNER] == 0
        if slots[slot, k.OWNER] != 0 and slots[slot, k.LABEL] < 0:
            return False
        if not (0 <= slots[slot, k.LEADS_TO] < count and 0 <= slots[slot, k.NEXT] <= room):
            return False
    return free > 0
