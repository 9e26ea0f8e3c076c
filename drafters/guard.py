"""A drafter behind a guard: whatever it does wrong costs speed, not text, and is said once."""

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numba import njit

from drafters.base import Drafter, DraftRequest, Needs, Proposal, SequenceStart, Target, Verified
from pipeline.errors import UsageError
from pipeline.models.cpu_kernels import highest

T = TypeVar("T")

CALL_SECONDS = 20.0
"""A call that takes longer costs the drafter its place: no draft is worth this, and something is wrong."""


class BadProposal(ValueError):
    """A drafter proposed something the protocol does not allow; the text says what."""


class TooSlow(RuntimeError):
    """A drafter took longer over a call than it may."""


@runtime_checkable
class Host(Protocol):
    """A drafter that hands out other drafters' drafts and guards each of them: one failure costs one drafter."""

    failures: int
    """of its drafters"""
    at_work: str | None
    """which of them is called at the moment"""
    hands_on: bool
    """whether it proposes nothing but what its drafters do, which has been checked then"""

    def host(self, vocab_size: int, on_event: Callable[[str], None], call_seconds: float) -> None:
        """What guarding them takes; before anything else."""


class Guard:
    """Calls a drafter; the first exception, bad proposal or overlong call switches it off for good.

    Attributes:
        name, needs: the drafter's.
        on_event: told in one sentence when the drafter is switched off.
        calling: since when the drafter is at work (`time.monotonic`), for a watchdog; None: it is not.
    """

    def __init__(
        self,
        drafter: Drafter,
        vocab_size: int,
        on_event: Callable[[str], None],
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        self.name, self.needs = drafter.name, drafter.needs
        self.on_event = on_event
        self.calling: float | None = None
        self._drafter: Drafter | None = drafter
        self._vocab_size = vocab_size
        self._call_seconds = call_seconds
        self._failed = 0
        self._hosts = isinstance(drafter, Host)
        """whether it guards the calls of others, each with its own limit"""
        self._hands_on = False
        _compile()
        if isinstance(drafter, Host):
            drafter.host(vocab_size, on_event, call_seconds)
            self._hands_on = drafter.hands_on

    @property
    def active(self) -> bool:
        return self._drafter is not None

    @property
    def failures(self) -> int:
        """Drafters switched off: this one, and those it hosted."""
        return self._failed + (self._drafter.failures if isinstance(self._drafter, Host) else 0)

    @property
    def at_work(self) -> str:
        """The name of what is called: of a drafter that hosts others, also which of them."""
        within = self._drafter.at_work if isinstance(self._drafter, Host) else None
        return f"{self.name} (in {within})" if within else self.name

    def attach(self, target: Target) -> None:
        """Hands the target over to a drafter that needs it; loading and measuring may take their time.

        Raises:
            UsageError: the drafter does not fit the target.
        """
        refused: list[UsageError] = []

        def hand_over(drafter: Drafter) -> None:
            try:
                drafter.attach(target)
            except UsageError as error:
                refused.append(error)

        if Needs.TARGET_LAYERS in self.needs:
            self._call(hand_over, None, limited=False)
        if refused:
            raise refused[0]  # a setting that cannot work is the user's to mend before anything is generated

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        if sequences:
            self._call(lambda d: d.begin(sequences), None)

    def propose(self, request: DraftRequest) -> Proposal:
        """A checked proposal, no wider than its longest draft; empty where nothing may or can be drafted."""
        rows = len(request.ids)
        if self._drafter is None or not request.budgets.any():
            return Proposal.empty(rows)
        if self._hands_on:
            proposal = self._call(lambda d: d.propose(request), None)
        else:
            # What it is held to must not be what it can write to.
            own = DraftRequest(
                tuple(request.ids), request.budgets.copy(), request.temperatures.copy(),
                request.truncation and request.truncation.copy(),
            )  # fmt: skip
            proposal = self._call(lambda d: checked(d.propose(own), request, self._vocab_size), None)
        return Proposal.empty(rows) if proposal is None else proposal

    def observe(self, verified: Verified) -> None:
        self._call(lambda d: d.observe(verified), None)

    def preempt(self, ids: Sequence[int]) -> None:
        if ids:
            self._call(lambda d: d.preempt(ids), None)

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        if sequences:
            self._call(lambda d: d.restore(sequences), None)

    def weights_changed(self, version: int) -> None:
        self._call(lambda d: d.weights_changed(version), None)

    def end(self, ids: Sequence[int]) -> None:
        if ids:
            self._call(lambda d: d.end(ids), None)

    def counters(self) -> dict[str, float]:
        """The drafter's own figures, none of one that keeps none, and how many drafters are switched off, if any is;
        what is no figure is left out."""
        found: Any = self._call(lambda d: d.counters() if hasattr(d, "counters") else {}, {})
        figures = found.items() if isinstance(found, Mapping) else ()
        off: dict[str, float] = {"switched off": self.failures} if self.failures else {}
        numbers = {str(name): f.item() if isinstance(f, np.number) else f for name, f in figures}
        return off | {name: figure for name, figure in numbers.items() if _is_figure(figure)}

    def _call(self, action: Callable[[Drafter], T], otherwise: T, limited: bool = True) -> T:
        if self._drafter is None:
            return otherwise
        self.calling = began = time.monotonic()
        try:
            result = action(self._drafter)
            seconds = time.monotonic() - began
            if limited and not self._hosts and seconds > self._call_seconds:
                raise TooSlow(f"a call took {seconds:.1f} s, more than {self._call_seconds:g}")
            return result
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # a stranger's code may raise anything; generation goes on without it
            self._failed += 1 + (self._drafter.failures if isinstance(self._drafter, Host) else 0)
            self._drafter = None
            self.on_event(f"drafter {self.name} is switched off after {type(error).__name__}: {error}")
            return otherwise
        finally:
            self.calling = None


def _is_figure(value: Any) -> bool:
    """Whether it is a float, or an integer that fits one."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)


def checked(proposal: Proposal, request: DraftRequest, vocab_size: int) -> Proposal:
    """The proposal, trimmed to its longest draft; the arrays are the caller's.

    Raises:
        BadProposal: shapes, lengths, ids or probabilities the protocol does not allow.
    """
    _check_types(proposal)
    rows, ids, lengths = len(request.ids), proposal.token_ids, proposal.lengths
    if ids.shape == (rows, 0) and lengths.shape == (rows,) and not np.count_nonzero(lengths):
        return Proposal.empty(rows)
    if ids.ndim != 2 or len(ids) != rows or lengths.shape != (rows,):
        raise BadProposal(f"token_ids {ids.shape} and lengths {lengths.shape} for {rows} rows")
    if ids.dtype.kind != "i" or lengths.dtype.kind != "i":
        raise BadProposal(f"token_ids are {ids.dtype} and lengths {lengths.dtype}, not signed integers")
    if proposal.parents is not None:
        raise BadProposal("parents are reserved for trees")
    by, matches, confidences = _notes(proposal, rows)
    fault, ids, lengths, confident = _tidied(
        _int64(ids), _int64(lengths), _int64(request.budgets), vocab_size,
        _NO_MATCHES if matches is None else matches, _NO_CONFIDENCES if confidences is None else confidences,
    )  # fmt: skip
    if fault:
        raise BadProposal(_fault(fault, proposal, request, vocab_size))
    width = ids.shape[1]
    q, sampled = proposal.probabilities if width else None, None
    if q is not None:
        sampled = _checked_mask(proposal.sampled, lengths)
        if sampled.any():
            q, peaks = _checked_probabilities(q, ids, lengths, sampled, vocab_size)
            if confidences is not None:
                # Who chooses among drafts looks at it: it must not depend on the token that was drawn.
                confident[sampled, 0] = peaks[sampled]
        else:
            q = sampled = None
    return Proposal(ids, lengths, q, None, sampled, by, matches, None if confidences is None else confident)


def _check_types(proposal: Proposal) -> None:
    """A Struct takes anything; what is no array would fail with words of its own."""
    if not isinstance(proposal, Proposal):
        raise BadProposal(f"propose gave {type(proposal).__name__}, not drafters.base.Proposal")
    for name in ("token_ids", "lengths", "matches", "confidences", "sampled"):
        value = getattr(proposal, name)
        if not isinstance(value, np.ndarray) and (value is not None or name in ("token_ids", "lengths")):
            raise BadProposal(f"{name} is {type(value).__name__}, not a numpy array")
    if proposal.probabilities is not None and not isinstance(proposal.probabilities, torch.Tensor):
        raise BadProposal(f"probabilities is {type(proposal.probabilities).__name__}, not a torch tensor")


def _int64(values: np.ndarray) -> np.ndarray:
    """The one layout that the compiled check is compiled for."""
    if values.dtype == np.int64 and values.flags.c_contiguous and values.flags.writeable:
        return values
    return np.array(values, np.int64, order="C")


_SOUND, _OVER_BUDGET, _UNKNOWN_ID, _TOO_FEW_CONFIDENCES, _NEGATIVE_MATCH, _NO_CHANCE = range(6)
_NO_MATCHES, _NO_CONFIDENCES = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)


@njit(cache=True)
def _tidied(
    ids: np.ndarray, lengths: np.ndarray, budgets: np.ndarray, vocab_size: int, matches: np.ndarray,
    confidences: np.ndarray,
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """What is wrong, and copies: ids and confidences [B, K] up to the longest draft, with zeros for padding, and
    lengths. Without matches or confidences these have no rows."""
    rows, width = len(lengths), 0
    for b in range(rows):
        if lengths[b] < 0 or lengths[b] > min(budgets[b], ids.shape[1]):
            return _OVER_BUDGET, ids, lengths, confidences
        width = max(width, lengths[b])
    tokens, confident = np.zeros((rows, width), np.int64), np.zeros((len(confidences), width), np.float32)
    for b in range(rows):
        for k in range(lengths[b]):
            if not 0 <= ids[b, k] < vocab_size:
                return _UNKNOWN_ID, ids, lengths, confidences
            tokens[b, k] = ids[b, k]
    if len(confidences) and confidences.shape[1] < width:
        return _TOO_FEW_CONFIDENCES, ids, lengths, confidences
    for b in range(len(matches)):
        if matches[b] < 0:
            return _NEGATIVE_MATCH, ids, lengths, confidences
    for b in range(len(confidences)):
        for k in range(lengths[b]):
            if not 0 <= confidences[b, k] <= 1.001:  # up to rounding
                return _NO_CHANCE, ids, lengths, confidences
            confident[b, k] = confidences[b, k]
    return _SOUND, tokens, lengths.copy(), confident


def _fault(fault: int, proposal: Proposal, request: DraftRequest, vocab_size: int) -> str:
    """In words."""
    if fault == _OVER_BUDGET:
        return f"lengths {proposal.lengths.tolist()} where budgets are {request.budgets.tolist()}"
    if fault == _UNKNOWN_ID:
        return f"a token id is outside the vocabulary of {vocab_size}"
    if fault == _TOO_FEW_CONFIDENCES:
        assert proposal.confidences is not None
        return f"confidences {proposal.confidences.shape} for drafts of up to {proposal.lengths.max()} tokens"
    if fault == _NEGATIVE_MATCH:
        return "matches are negative; a draft without a match has 0"
    return "a draft token's confidence is no number between 0 and 1"


def _notes(proposal: Proposal, rows: int) -> tuple[Sequence[str] | None, np.ndarray | None, np.ndarray | None]:
    """What is said about the drafts beside the drafts: names, int64 [B], float32 [B, K]."""
    by, matches, confidences = proposal.drafted_by, proposal.matches, proposal.confidences
    if by is not None and (len(by) != rows or not all(isinstance(name, str) for name in by)):
        raise BadProposal(f"drafted_by has {len(by)} entries for {rows} rows, or some that are no names")
    if matches is not None:
        if matches.shape != (rows,) or matches.dtype.kind != "i":
            raise BadProposal(f"matches are {matches.dtype} {matches.shape} for {rows} rows, not one integer each")
        matches = _int64(matches)
    if confidences is not None:
        if confidences.ndim != 2 or len(confidences) != rows:
            raise BadProposal(f"confidences {confidences.shape} for {rows} drafts")
        if confidences.dtype.kind != "f":
            raise BadProposal(f"confidences are {confidences.dtype}, not floating-point numbers")
        confidences = np.ascontiguousarray(confidences, np.float32)
        if not confidences.flags.writeable:
            confidences = confidences.copy()  # for read-only arrays it would be compiled once more
    return by, matches, confidences


@functools.cache
def _compile() -> None:
    """The compiled checks, before the first call's time counts."""
    ints, one = np.ones(1, np.int64), np.ones((1, 1), np.int64)
    _tidied(one, ints, ints, 2, ints, one.astype(np.float32))
    _are_distributions(np.ones((1, 1, 1), np.float32), 0 * one, ints, ints > 0, np.zeros(1, np.float32))


def _checked_mask(sampled: np.ndarray | None, lengths: np.ndarray) -> np.ndarray:
    """Rows with a draft that was drawn from probabilities."""
    if sampled is None:
        return lengths > 0
    if sampled.shape != lengths.shape or sampled.dtype != np.bool_:
        raise BadProposal(f"sampled is {sampled.dtype} {sampled.shape} for {len(lengths)} rows, not bool")
    return sampled & (lengths > 0)


def _checked_probabilities(
    q: torch.Tensor, ids: np.ndarray, lengths: np.ndarray, sampled: np.ndarray, vocab_size: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Verification is exact only for the distribution the token was drawn from, so q must at least be one with it; with
    the peaks float32 [B] of the first ones."""
    (rows, width), shape = ids.shape, q.shape
    if len(shape) != 3 or shape[0] != rows or shape[1] < width or shape[2] != vocab_size:
        raise BadProposal(f"probabilities {tuple(shape)} for {rows} drafts of up to {width} tokens")
    if shape[1] > width:
        q = q[:, :width]
    if q.dtype != torch.float32:
        q = q.float()
    peaks = np.zeros(rows, np.float32)
    if q.is_cpu:
        if not _are_distributions(q.contiguous().numpy(), ids, lengths, sampled, peaks):
            raise BadProposal(_NO_DISTRIBUTION)
        return q, peaks
    inside = (np.arange(width) < lengths[:, None]) & sampled[:, None]
    drawn = q.gather(2, torch.from_numpy(ids).to(q.device).unsqueeze(2)).squeeze(2)
    good = (q.min(-1).values >= 0) & ((q.sum(-1) - 1).abs() < 1e-3) & (drawn > 0)
    if not bool(good[torch.from_numpy(inside).to(q.device)].all()):
        raise BadProposal(_NO_DISTRIBUTION)
    peaks[sampled] = q[:, 0].max(-1).values.cpu().numpy()[sampled]
    return q, peaks


_NO_DISTRIBUTION = "probabilities of a draft token are negative, do not sum to 1, or give the token itself none"


@njit(fastmath={"contract", "reassoc", "nsz"}, cache=True)
def _are_distributions(
    q: np.ndarray, ids: np.ndarray, lengths: np.ndarray, sampled: np.ndarray, peaks: np.ndarray
) -> bool:
    """Whether q [B, K, V] are distributions that give the tokens ids [B, K] something, for the first `lengths` [B] of
    the rows that were `sampled` [B]; fills the `peaks` [B] of their first ones."""
    words = q.view(np.int32)  # loops over bits become vector instructions
    for b in range(q.shape[0]):
        if sampled[b]:
            for k in range(lengths[b]):
                row, signs, total = q[b, k], words[b, k, 0], np.float32(0)
                for v in range(len(row)):
                    total += row[v]
                    signs |= words[b, k, v]
                if signs < 0 and row.min() < 0:  # and not a zero with a sign
                    return False
                if not (abs(total - np.float32(1)) < np.float32(1e-3) and row[ids[b, k]] > 0):
                    return False
                if k == 0:
                    peaks[b] = highest(row)
    return True
