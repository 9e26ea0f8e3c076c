"""A drafter of ours inside vLLM: the `custom_class` proposer of its worker.

vLLM names rows, which move; `RollaheadWorker` binds the model runner after loading, whose batch and request table name
them. Of those requests the drafter hears what the protocol promises.
"""

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec import Struct

from drafters.base import Drafter, DraftRequest, Proposal, SequenceStart, Verified, locked
from drafters.composite import CompositeDrafter
from drafters.guard import CALL_SECONDS, Guard
from drafters.registry import build
from drafters.watchdog import WATCH_SECONDS, watch
from pipeline.engine.vllm.own_drafters import runs_itself
from pipeline.errors import UsageError
from pipeline.plugins import search_working_directory
from pipeline.sampling.truncation import Truncation

KEY = "rollahead"
"""of what is ours in vLLM's additional configuration and in a request's extra arguments"""
CLASS = f"{__name__}.DrafterProposer"


def speculative_config(most: int) -> dict[str, Any]:
    """vLLM's, for drafts of up to `most` tokens by the drafter that its additional configuration names under `KEY`."""
    return {"method": "custom_class", "model": CLASS, "num_speculative_tokens": most}


def check_needs(drafter: Drafter) -> None:
    """
    Raises:
        UsageError: the drafter, or one that it hands out, needs what vLLM's proposers are not given, and vLLM does not
            run it itself.
    """
    if not runs_itself(drafter):
        _check_needs(drafter)


def _check_needs(drafter: Drafter) -> None:
    if isinstance(drafter, CompositeDrafter):  # its own needs are its parts', and measuring, which it can do without
        for part in drafter.ensemble.drafters:
            _check_needs(part)
    elif drafter.needs:
        names = ", ".join((need.name or "").lower().replace("_", " ") for need in drafter.needs)
        raise UsageError(
            f'drafter {drafter.name} needs the target\'s {names}, which engine.generator = "vllm" cannot give it'
            f"{' here' if runs_itself(drafter) else ''}; use suffix-automaton or prompt-lookup, or engine.generator = "
            '"native"'
        )


@dataclass(slots=True)
class _Followed:
    """A request that the drafter knows as a sequence."""

    id: int
    start: SequenceStart
    sampling: Any
    """vLLM's parameters"""
    stop: frozenset[int]
    last: int
    """tokens it can have, prompt included"""
    seen: int
    """tokens observed, prompt included"""
    absent: bool = False
    over: bool = False
    """it stopped; vLLM takes it out of the batch after this step"""


Sample = tuple[int, int]
"""group and seed, by which the engine's process names a request"""
_KEPT = 4096
"""samples whose drafts are counted and not yet asked for, at most: cancelled ones never are"""


class Tally(Struct):
    """Drafts of one drafter for one sample, as in `pipeline.messages.DraftCounts`."""

    drafted: int = 0
    accepted: int = 0
    tried_at: list[int] = []
    accepted_at: list[int] = []

    def add(self, length: int, accepted: int) -> None:
        """A draft of `length` tokens, of which the first `accepted` were."""
        self.drafted, self.accepted = self.drafted + length, self.accepted + accepted
        tried = min(length, accepted + 1)
        missing = [0] * (tried - len(self.tried_at))
        self.tried_at += missing
        self.accepted_at += missing
        for depth in range(tried):
            self.tried_at[depth] += 1
            self.accepted_at[depth] += depth < accepted


@dataclass(slots=True)
class _Step:
    """What was asked for, until it is verified."""

    drafted_by: Sequence[str] = ()
    """of each request; empty: the drafter itself"""
    requests: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    since: float = 0.0


def _say_and_keep(events: list[str], event: str) -> None:
    """While a drafter does not return, nobody can ask the worker what there is to tell."""
    print(f"rollahead: {event}", file=sys.stderr, flush=True)
    events.append(event)


class DrafterProposer:
    """Keeps vLLM's contract of `custom_class` on one side, `drafters.base.Drafter` on the other."""

    def __init__(self, vllm_config: Any) -> None:
        options: Mapping[str, Any] = vllm_config.additional_config[KEY]
        search_working_directory()
        self.events: list[str] = []
        """what to tell the user; taken by `RollaheadWorker`"""
        drafter = build(options["drafter"])
        check_needs(drafter)
        size = vllm_config.model_config.get_vocab_size()
        self._guard = Guard(drafter, size, self.events.append, options.get("seconds", CALL_SECONDS))
        watch(self._guard, WATCH_SECONDS, functools.partial(_say_and_keep, self.events))
        self._most = int(vllm_config.speculative_config.num_speculative_tokens)
        self._max_length = int(vllm_config.model_config.max_model_len)
        self._runner: Any = None
        self._followed: dict[str, _Followed] = {}
        self._absent = 0
        """followed requests that are not in the batch"""
        self._next_id = 0
        self._step = _Step()
        self._tallies: dict[Sample, dict[str, Tally]] = {}
        """of samples, by drafter, in the order in which they began"""
        self._disturbed = False
        """whether the time of the step under way says nothing of what steps cost"""

    def load_model(self, target_model: Any) -> None:
        """Part of the contract; drafters here need no target."""

    def bind(self, runner: Any) -> None:
        """The model runner, whose `input_batch.req_ids` and `requests` say which request sits in which row."""
        self._runner = runner

    def weights_changed(self, version: int) -> None:
        self._disturbed = True
        self._guard.weights_changed(version)

    def counters(self) -> dict[str, float]:
        return self._guard.counters()

    def taken_drafts(self, samples: Sequence[Sample]) -> list[dict[str, Tally]]:
        """How the drafts of each fared, by drafter; of samples that are over, which are forgotten with it."""
        return [self._tallies.pop((group, seed), {}) for group, seed in samples]

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row of the batch, empty where it emitted nothing (its prompt is not complete).

        Args:
            sampled_token_ids: tokens that each row emitted in this step.
            num_tokens_no_spec: int32 [rows or more], tokens of each row.
            token_ids_cpu: int32 [rows or more, max_model_len], those tokens.
            slot_mappings: not used.
        """
        if self._runner is None:  # a profiling run before the first request
            return [[] for _ in sampled_token_ids]
        seconds = time.perf_counter() - self._step.since
        rows = {
            request: row
            for row, request in enumerate(self._runner.input_batch.req_ids[: len(sampled_token_ids)])
            if sampled_token_ids[row]
        }
        new = [request for request in rows if request not in self._followed]
        asked = {
            r: self._emitted(r, rows[r], token_ids_cpu, num_tokens_no_spec) for r in self._step.requests if r in rows
        }
        self._observe(asked, 0.0 if new or self._disturbed else seconds)
        self._pause_and_resume(rows)
        others = [request for request in rows if request in self._followed and request not in asked]
        self._show({r: self._emitted(r, rows[r], token_ids_cpu, num_tokens_no_spec) for r in others})
        self._disturbed = False
        self._end()
        self._begin(new, rows, token_ids_cpu, num_tokens_no_spec)
        proposal = self._proposal([request for request in rows if not self._followed[request].over])
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for index, request in enumerate(self._step.requests):
            drafts[rows[request]] = proposal.token_ids[index, : proposal.lengths[index]].tolist()
        self._step.since = time.perf_counter()
        return drafts

    def _emitted(self, request: str, row: int, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Tokens not seen before, up to the one that ends the response."""
        followed = self._followed[request]
        new = tokens[row, followed.seen : min(int(counts[row]), followed.last)].astype(np.int64)
        # A few tokens, every step of every row: a loop is ten times as fast as numpy's search.
        stop = next((n for n, token in enumerate(new.tolist(), 1) if token in followed.stop), 0)
        if stop:
            new = new[:stop]
        followed.seen += len(new)
        followed.over = bool(stop) or followed.seen >= followed.last
        return locked(new)

    def _observe(self, emitted: Mapping[str, np.ndarray], seconds: float) -> None:
        """The rows that were asked for, in their order, less those that were not verified: they are gone, or pause."""
        step = self._step
        kept = [row for row, request in enumerate(step.requests) if len(emitted.get(request, ()))]
        if not kept:
            return
        found = [emitted[step.requests[row]] for row in kept]
        accepted = np.minimum(np.array([len(tokens) - 1 for tokens in found], np.int64), step.lengths[kept])
        self._count(step, kept, accepted)
        ids = [step.ids[row] for row in kept]
        # A step of fewer rows than were drafted for says nothing of what such a draft costs.
        seconds = seconds if len(kept) == len(step.ids) else 0.0
        self._guard.observe(Verified(ids, found, locked(accepted), seconds=seconds))

    def _show(self, emitted: Mapping[str, np.ndarray]) -> None:
        """Tokens of rows that were not asked for."""
        found = {self._followed[request].id: tokens for request, tokens in emitted.items() if len(tokens)}
        if found:
            self._guard.observe(Verified(list(found), list(found.values()), locked(np.zeros(len(found), np.int64))))

    def _count(self, step: _Step, rows: Sequence[int], accepted: np.ndarray) -> None:
        """Of the rows that were verified; a draft for one that was preempted before has come to nothing."""
        for row, right in zip(rows, accepted.tolist(), strict=True):
            if length := int(step.lengths[row]):
                name = step.drafted_by[row] if step.drafted_by else self._guard.name
                start = self._followed[step.requests[row]].start
                self._tallies.setdefault((start.group, start.seed), {}).setdefault(name, Tally()).add(length, right)
        while len(self._tallies) > _KEPT:
            del self._tallies[next(iter(self._tallies))]

    def _end(self) -> None:
        """Requests that stopped, or that vLLM has forgotten: finished or aborted."""
        known = self._runner.requests
        gone = [request for request in self._followed if request not in known]
        self._guard.end([self._followed[request].id for request in gone])
        for request in gone:
            self._absent -= self._followed.pop(request).absent

    def _pause_and_resume(self, rows: Mapping[str, int]) -> None:
        """Requests that vLLM knows and that are not in the batch, or were not before this step."""
        if len(self._runner.requests) == len(self._runner.input_batch.req_ids) and not self._absent:
            return
        away = self._runner.requests.keys() - set(self._runner.input_batch.req_ids)
        left = [request for request, f in self._followed.items() if request in away and not f.absent]
        back = [request for request, f in self._followed.items() if request in rows and f.absent]
        for request in (*left, *back):
            self._followed[request].absent = request in left
        self._absent += len(left) - len(back)
        self._guard.preempt([self._followed[request].id for request in left])
        self._guard.restore([self._restart(request) for request in back])

    def _restart(self, request: str) -> SequenceStart:
        followed = self._followed[request]
        start, text = followed.start, self._runner.requests[request].output_token_ids
        response = locked(np.array(text[: followed.seen - len(start.prompt_ids)], np.int64))
        return SequenceStart(start.id, start.prompt_ids, start.group, start.temperature, start.seed, response)

    def _begin(self, new: list[str], rows: Mapping[str, int], tokens: np.ndarray, counts: np.ndarray) -> None:
        for request in new:
            self._followed[request] = self._follow(self._runner.requests[request])
        if new:
            self._guard.begin([self._followed[request].start for request in new])
            self._show({r: self._emitted(r, rows[r], tokens, counts) for r in new})

    def _follow(self, request: Any) -> _Followed:
        params = request.sampling_params
        group, seed = (params.extra_args or {}).get(KEY, (-1 - self._next_id, 0))
        prompt = locked(np.array(request.prompt_token_ids, np.int64))
        start = SequenceStart(self._next_id, prompt, group, params.temperature, seed)
        self._next_id += 1
        last = min(self._max_length, len(prompt) + (params.max_tokens or self._max_length))
        return _Followed(start.id, start, params, frozenset(params.stop_token_ids or ()), last, len(prompt))

    def _proposal(self, requests: list[str]) -> Proposal:
        """Of the drafter, for `self._step`."""
        followed = [self._followed[request] for request in requests]
        room = np.array([f.last - f.seen - 1 for f in followed], np.int64)
        asked = DraftRequest(
            [f.id for f in followed],
            np.clip(room, 0, self._most),
            np.array([f.start.temperature for f in followed], np.float32),
            Truncation.of([f.sampling for f in followed]),
        )
        proposal = self._guard.propose(asked) if followed else Proposal.empty(0)
        self._step = _Step(proposal.drafted_by or (), requests, list(asked.ids), proposal.lengths)
        return proposal
