"""Chooses, for every sequence and step, which drafter drafts and how far, by what it has measured.

Every drafter follows every sequence, and proposes where its usual gain is worth its time; `drafters.allocation` decides
what of it is verified, from `drafters.acceptance` and `drafters.cost_model`.

A draft that was drawn must be chosen and cut without regard to what was drawn: a token that is verified only where it,
or what was drawn after it, looks good is not distributed as its probabilities say (`decision.blind`).
"""

import functools
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from drafters.acceptance import CONFIDENCES, DEPTHS, MATCHES, learn, refresh
from drafters.allocation import REASONS, allocate, promised
from drafters.base import Drafter, DraftRequest, Needs, Proposal, SequenceStart, Target, Verified
from drafters.composite import CompositeDrafter, Ensemble, beginnings, joined
from drafters.cost_model import CostModel
from drafters.decision import Step, as_if_all, blind, drawn_rows
from drafters.delegation import Delegation, Lull, Outlook
from drafters.late import WAITS, Backlog, merged
from drafters.plain_steps import PlainSteps
from drafters.stack import Stack
from drafters.standing import DEAR, SAMPLE, Standing, Standings
from drafters.step_times import StepTimes
from drafters.urgency import GroupProgress
from pipeline.errors import UsageError

_TRIAL_EVERY = 24
"""asked-for drafts in a row that did not pay, after which some are verified to see whether they still do not"""
_URGENCY_EVERY = 8
"""steps after which urgency is computed anew: a few tokens more do not change who is ahead"""
_LEARNT_EVERY = 8
"""steps without a decision of which one is learnt from: what it took, and what became of its drafts"""
_FEW = 2
"""sequences of a step at most where a prompt that begins, perhaps of another kind, is a reason to ask sleepers again"""
_ONE = np.ones(1)
"""urgency of a sequence alone"""
_READS = Needs.TARGET_LAYERS | Needs.HIDDEN_STATES
"""what drafters ask for that compute a model"""


class ArbiterDrafter(CompositeDrafter):
    """Measures what drafting costs and brings, and drafts where, with whom and as far as it pays."""

    name = "arbiter"
    needs = Needs.TARGET_LAYERS
    hands_on = True

    class Options(Struct, kw_only=True, forbid_unknown_fields=True):
        """`drafters` to choose from, names or tables; `calibration_seconds` bounds measuring at the start, 0 leaves it
        to the steps themselves; `measure` false decides by a fixed guess of costs, which makes decisions repeat;
        `urgency` is what a token of the last or longest sequence of a group is worth more than another."""

        drafters: list[dict[str, Any] | str] = msgspec.field(default_factory=lambda: ["suffix-automaton"])
        calibration_seconds: Annotated[float, Meta(ge=0)] = 2.0
        measure: bool = True
        urgency: Annotated[float, Meta(ge=0, le=1)] = 0.1

    def __init__(
        self,
        options: Options | None = None,
        costs: CostModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
        drafters: Sequence[Drafter] = (),
    ) -> None:
        """
        Args:
            options: from the configuration.
            costs: what verifications cost, where that is known; None: it is measured.
            clock: seconds, to measure drafters with.
            drafters: to choose from, made already, in place of those that the options name.
        """
        self.options = options or self.Options()
        if not self.options.drafters:
            raise UsageError(f"drafter {self.name} has an empty list of drafters; name at least one, or use none")
        super().__init__(Ensemble(drafters) if drafters else Ensemble.build(self.options.drafters))
        self.costs = costs or CostModel(learns=self.options.measure)
        self._calibrates = costs is None and self.options.measure and self.options.calibration_seconds > 0
        if self._calibrates:
            self.needs |= Needs.TARGET_LAYERS
        self._clock = clock if self.options.measure else lambda: 0.0
        count = len(self.ensemble)
        self._names = [guard.name for guard in self.ensemble]
        self._counts = np.zeros((count, MATCHES, CONFIDENCES, DEPTHS, 2))
        self._chances = np.zeros((count, MATCHES, CONFIDENCES, DEPTHS))
        refresh(self._counts, self._chances)
        _compile()
        self._progress = GroupProgress()
        self._standings_by_size = [Standings(bool(guard.needs & _READS)) for guard in self.ensemble]
        self._must_know = {index for index, guard in enumerate(self.ensemble) if guard.needs & ~WAITS}
        """who is told every step"""
        self._standings: list[Standing] = []
        """of each drafter, with as many sequences as in the current step"""
        self._backlog = Backlog(count + 1)
        """read by every drafter, and last by the groups' progress"""
        self._times = StepTimes(self._clock)
        self._urgencies: tuple[tuple[int, ...], np.ndarray, int] = (), np.ones(0), 0
        """of which sequences, what they are, since which step"""
        self._price, self._idle, self._steps = 0.1, 0, 0
        self._plain_steps = PlainSteps(self.costs)
        self._reasons, self._unused = np.zeros(len(REASONS), np.int64), np.zeros(len(REASONS), np.int64)
        self._resting = self._not_asked = self._measuring = self._delegated = self._spared = 0
        self._trial = False
        """whether this step is one to learn what drafting costs"""
        self._drawing: set[int] = set()
        """drafters that have drawn tokens of a draft"""
        self._sampled: dict[int, np.ndarray] = {}
        """drafters that were asked for a few sequences alone, bool [B]"""
        self._step: Step | None = None
        self._unused_step: Step | None = None
        """of another delegate, whose drafts are not verified: what was drawn would teach nothing"""
        self._delegation, self._lull = Delegation(), Lull()
        self._promise = 0.0
        """accepted tokens that this draft promises, if it is learnt from"""
        self._drafting: int | None = None
        """who drafts in a step without a decision"""
        self._rows, self._group = 0, -1
        """sequences of the last step, and the group of the one that began last"""

    def attach(self, target: Target) -> None:
        super().attach(target)
        if self._calibrates:
            from drafters.calibration import measure_verifications

            self.costs.fit(
                measure_verifications(target.decoder, self.options.calibration_seconds, target.max_sequences)
            )

    def begin(self, sequences: Sequence[SequenceStart]) -> None:
        self._times.disturb()
        super().begin(sequences)
        self._progress.begin(sequences)
        known, self._group = self._group, sequences[-1].group
        sleepers = [standing for standing in self._standings if not standing.reads and standing.asleep]
        if sleepers and self._rows <= _FEW and self._group != known:
            self._end_lull()
            for standing in sleepers:
                standing.reconsider()

    def preempt(self, ids: Sequence[int]) -> None:
        self._times.disturb()
        self._deliver()
        super().preempt(ids)

    def restore(self, sequences: Sequence[SequenceStart]) -> None:
        self._times.disturb()
        super().restore(sequences)
        self._progress.begin(sequences)

    def weights_changed(self, version: int) -> None:
        self._times.disturb()
        self._deliver()
        self._end_lull()
        self._delegation.stop()
        super().weights_changed(version)

    def end(self, ids: Sequence[int]) -> None:
        self._times.disturb()
        self._deliver()
        super().end(ids)
        self._progress.end(ids)

    # ---- a step --------------------------------------------------------------------------------------------------

    def propose(self, request: DraftRequest) -> Proposal:
        proposal = self._proposed(request, self._times.proposing())
        self._times.left()
        return proposal

    def observe(self, verified: Verified) -> None:
        self._times.observing(verified.seconds)
        self._observed(verified)
        self._times.done()

    def _proposed(self, request: DraftRequest, began: float) -> Proposal:
        self._steps += 1
        rows = self._rows = len(request.ids)
        self._step = self._unused_step = self._drafting = None
        if self._lull.goes_on(rows):
            return self._undecided(request)
        self._end_lull()
        if self._plain_steps.due(rows):
            self._measuring += rows
            return Proposal.empty(rows)
        self._standings = [standings.of(rows) for standings in self._standings_by_size]
        asked = [i for i, standing in enumerate(self._standings) if standing.begin_step(rows)]
        if not asked:
            self._lull.begin((), rows, min(standing.asleep for standing in self._standings))
            return self._undecided(request)
        for index in asked:
            self._standings[index].consider(self._counts[index], rows, self.costs.seconds, self._times.undecided)
        self._plain_steps.teach()
        self._not_asked += rows * (len(self._standings) - len(asked))
        others = [standing.asleep for i, standing in enumerate(self._standings) if i not in asked]
        awake = tuple(asked)
        if steps := self._delegation.take(awake, rows, others):
            self._lull.begin(tuple(self._in_turn(awake)), rows, steps - 1)
            return self._undecided(request)
        tried = self._idle > 0 and self._idle % _TRIAL_EVERY == 0
        self._trial = self.costs.learns and (tried or any(self._standings[i].tried for i in asked))
        # Side by side are those from the first to the last that is asked: mostly one.
        drafters = slice(asked[0], asked[-1] + 1)
        proposals, asking = self._ask_in_turn(asked, drafters, request)
        proposal = self._decided(request, proposals, awake, asked, drafters)
        self._idle = 0 if self._step and self._step.drafted and not self._trial else self._idle + 1
        self._times.has_decided(self._clock() - began - asking)
        return proposal

    def _end_lull(self) -> None:
        """With this step, or before."""
        delegates = self._lull.delegates
        if delegates:
            self._delegation.give_back(self._lull.left)
        if passed := self._lull.end():
            for index, standing in enumerate(self._standings):
                standing.pass_over(passed, index in delegates)

    def _undecided(self, request: DraftRequest) -> Proposal:
        """All that a delegate proposes: of two the second, where that usually brings more than the first's promises."""
        rows = len(request.ids)
        if not self._lull.delegates:
            self._resting += rows
            return Proposal.empty(rows)
        self._delegated += rows
        proposal = Proposal.empty(rows)
        learns = self._lull.left % _LEARNT_EVERY == 0
        for index in self._lull.delegates:
            if self._drafting is not None:
                at_hand = self._promised(self._drafting, proposal)
                if not self._standings[index].may_add(at_hand, self.costs.seconds(rows, rows) + self._times.beside):
                    break
            further, step = self._whole(index, request, learns)
            if further.token_ids.shape[1]:
                self._promise = self._expected(index, further) if learns else 0.0
                unused = self._step if self._step and self._step.drawn is None else None
                proposal, self._drafting, self._step, self._unused_step = further, index, step, unused
        return proposal if self._drafting is None else self._named(self._drafting, proposal)

    def _whole(self, index: int, request: DraftRequest, learns: bool) -> tuple[Proposal, Step | None]:
        """The draft of a delegate, with the step to learn from."""
        standing = self._standings[index]
        if not learns:
            standing.limit_to(standing.reach.tokens)
            self._tell(index)
            return self.ensemble.guards[index].propose(_limited(request, standing)), None
        standing.limit_to(standing.reach.next)
        proposal, _ = self._ask(index, request)
        rows, drawn, granted = len(request.ids), None, proposal.lengths
        if proposal.probabilities is not None:
            drawn = drawn_rows(proposal)[None]
            granted = standing.usual(request.budgets)
        stack, drafters, choice = Stack.of_one(proposal), slice(index, index + 1), np.zeros(rows, np.int64)
        return proposal, Step(request.ids, drafters, drawn, stack, choice, granted, int(proposal.lengths.sum()))

    def _expected(self, index: int, proposal: Proposal) -> float:
        """Accepted tokens of a draft: usual ones of a drafter that reads."""
        reach = self._standings[index].reach
        return len(proposal.lengths) * reach.accepted if reach.settled else float(self._promised(index, proposal).sum())

    def _promised(self, index: int, proposal: Proposal) -> np.ndarray:
        """Accepted tokens, float64 [B], that a draft promises; none if it was drawn: that must not be looked at."""
        if proposal.probabilities is not None:
            return np.zeros(len(proposal.lengths))
        one = Stack.of_one(proposal)
        return promised(self._chances[index], one.matches[0], one.confidences[0], one.lengths[0])

    def _in_turn(self, indices: Iterable[int]) -> list[int]:
        """Those who read come last: what is at hand then may promise as much."""
        return sorted(indices, key=lambda index: self._standings[index].reads)

    def _named(self, index: int, proposal: Proposal) -> Proposal:
        """Says whose it is, unless it does."""
        if proposal.drafted_by is not None:
            return proposal
        by = [self._names[index] if length else "" for length in proposal.lengths.tolist()]
        return msgspec.structs.replace(proposal, drafted_by=by)

    def _ask_in_turn(self, asked: list[int], drafters: slice, request: DraftRequest) -> tuple[list[Proposal], float]:
        """Proposals of all `drafters`, and seconds; those who read come last, and leave `asked` where what is at hand
        promises as much as they usually bring."""
        rows, total = len(request.ids), 0.0
        proposals, at_hand = [Proposal.empty(rows)] * (drafters.stop - drafters.start), np.zeros(rows)
        self._sampled.clear()
        for index in self._in_turn(asked):
            standing = self._standings[index]
            if at_hand.any() and not standing.may_add(at_hand, self.costs.seconds(rows, rows) + self._times.beside):
                asked.remove(index)
                self._spared += rows
                continue
            proposal, seconds = self._ask(index, request)
            proposals[index - drafters.start], total = proposal, total + seconds
            if len(asked) > 1 and not standing.reads:
                at_hand = np.maximum(at_hand, self._promised(index, proposal))
        return proposals, total

    def _ask(self, index: int, request: DraftRequest) -> tuple[Proposal, float]:
        rows, standing = len(request.ids), self._standings[index]
        reads = standing.reads and rows > SAMPLE
        whole = not (reads and standing.samples(self.costs.seconds(rows, rows)))
        if not whole:
            # By their ids: which sequences these are must not depend on what is drafted for them.
            newest = np.asarray(request.ids) >= np.partition(request.ids, -SAMPLE)[-SAMPLE]
            self._sampled[index] = newest
            request = msgspec.structs.replace(request, budgets=np.where(newest, request.budgets, 0))
        whole = whole and self._backlog.waiting(index) <= 1
        began = self._clock()
        self._tell(index)
        proposal = self.ensemble.guards[index].propose(_limited(request, standing))
        seconds = self._clock() - began
        if proposal.probabilities is not None:
            self._drawing.add(index)
        standing.was_asked(rows, seconds, proposal.token_ids.shape[1], whole)
        return proposal, seconds

    def _decided(
        self, request: DraftRequest, proposals: list[Proposal], awake: tuple[int, ...], asked: list[int],
        drafters: slice,
    ) -> Proposal:  # fmt: skip
        """What is to be verified of the proposals of these drafters, who of those awake were asked."""
        rows, drawn = len(request.ids), None
        if any(p.probabilities is not None for p in proposals):
            drawn = np.stack([drawn_rows(p) for p in proposals])
        if len(proposals) == 1 and drawn is None:
            stack = Stack.of_one(proposals[0])
        else:
            width = max(p.token_ids.shape[1] for p in proposals)
            if drawn is not None:
                width = max(width, int(request.budgets.max(initial=0)))
            stack = Stack(len(proposals), rows, width)
            for place, proposal in enumerate(proposals):
                stack.put(place, proposal)
        assumed = stack.lengths
        if drawn is not None:
            assumed = assumed.copy()
            for index in asked:
                place = index - drafters.start
                usual = self._standings[index].usual(request.budgets)
                blind(drawn[place], usual, assumed[place], stack.matches[place], stack.confidences[place])
        urgency = self._urgency(request.ids)
        seen = drafters, stack.matches, stack.confidences
        choice, granted, drafted, decided, plain, whole = self._allocated(
            *seen, assumed, request, urgency, self._reasons
        )
        by_turns: dict[int, Outlook] = {}
        if self._may_delegate(awake, rows):
            asking = sum(self._standings[index].seconds for index in asked)
            undrafted = Outlook(float(urgency.sum()), plain + self._times.beside)
            wholes = self._wholes(awake, drafters, stack) if len(awake) > 1 else {}
            if wholes:
                whole = wholes[self._in_turn(asked)[-1]]
            whole = whole.longer(self._times.undecided)
            if self._delegation.compare(awake, rows, undrafted, decided.longer(asking), whole.longer(asking)):
                decided, by_turns = whole, wholes
            if len(awake) == 1:
                decided = Outlook(decided.tokens, decided.seconds / self._delegation.bias)
        if by_turns:
            self._judge_turns(asked, by_turns, decided, plain)
        else:
            self._judge(asked, drafters, stack, assumed, request, urgency, decided, plain)
        if not drafted:
            proposal = Proposal.empty(rows)
        elif drawn is None:
            proposal = stack.chosen(choice, granted, self._names[drafters])
        else:
            lengths = np.where(choice >= 0, np.minimum(granted, stack.lengths[choice, np.arange(rows)]), 0)
            if len(proposals) == 1:
                proposal = beginnings(proposals[0], self._names[drafters.start], lengths)
            else:
                proposal = joined(proposals, self._names[drafters], choice, lengths)
            drafted = int(lengths.sum())
        self._step = Step(request.ids, drafters, drawn, stack, choice, granted, drafted)
        return proposal if drafted else Proposal.empty(rows)

    def _may_delegate(self, awake: tuple[int, ...], rows: int) -> bool:
        """Whether steps may go without a decision: where one drafter is asked, or two by turns, of whom one reads, for
        a single sequence, whose steps are so short that deciding weighs much."""
        if self._sampled or self._trial:
            return False
        if len(awake) != 2 or rows > 1:
            return len(awake) == 1
        indices = self._in_turn(awake)
        first, second = (self._standings[index] for index in indices)
        if first.doubted or second.doubted or indices[0] in self._drawing:
            return False
        return second.reads and not first.reads and second.reach.settled

    def _wholes(self, awake: tuple[int, ...], drafters: slice, stack: Stack) -> dict[int, Outlook]:
        """Of each of two that may draft by turns for a single sequence: what its whole draft promises, the one that it
        has, or, of the one that reads, its usual one."""
        first, second = self._in_turn(awake)
        place = first - drafters.start
        seen = stack.matches[place], stack.confidences[place], stack.lengths[place]
        accepted, verifying = promised(self._chances[first], *seen)[0], self.costs.seconds(1, 1 + int(seen[2][0]))
        usual = self._standings[second].average(1, self.costs.seconds)
        return {first: Outlook(1 + float(accepted), verifying), second: usual}

    def _judge_turns(self, asked: list[int], wholes: dict[int, Outlook], found: Outlook, plain: float) -> None:
        """What taking turns brought each of two drafters, against the other one's whole drafts alone."""
        deciding = self._times.own
        asking = sum(self._standings[index].seconds for index in asked)
        for index, other in zip(wholes, reversed(wholes), strict=True):
            if index in asked:
                beside = self._standings[other].seconds + self._times.undecided
                otherwise = wholes[other].longer(beside)
                self._standings[index].judged(found.longer(asking), otherwise, plain, 1, deciding, len(self._standings))

    def _urgency(self, ids: Sequence[int]) -> np.ndarray:
        """float64 [B]; of some steps ago while the batch is the same, and alike for all while nothing is drafted."""
        if len(ids) == 1:
            return _ONE
        if self.options.urgency == 0 or self._idle > 0:
            return np.ones(len(ids))
        known, values, step = self._urgencies
        if known != tuple(ids) or self._steps - step >= _URGENCY_EVERY:
            self._follow_groups()
            values, step = self._progress.urgency(ids, self.options.urgency), self._steps
            self._urgencies = tuple(ids), values, step
        return values

    def _observed(self, verified: Verified) -> None:
        rows, step = len(verified.ids), self._step
        drafted = step.drafted if step else 0
        self._plain_steps.count(drafted > 0 or bool(self._lull.delegates), verified.seconds)
        if self._lull.rests and not self._must_know:
            self._plain_steps.keep(rows, verified.seconds)
            self._keep(verified)
            return
        if self._lull.delegates:
            if step and self._drafting is not None and verified.seconds > 0:
                usual = self.costs.seconds(rows, rows + drafted)
                beyond = self._standings[self._drafting].was_verified(drafted / rows, verified.seconds, usual)
                self.costs.observe(rows, rows + drafted, verified.seconds - beyond)
                asking = sum(self._standings[i].seconds for i in self._lull.delegates) + self._times.undecided
                kept = Outlook(sum(map(len, verified.emitted)), min(verified.seconds, 2 * usual) + asking)
                self._delegation.learn(Outlook(rows + self._promise, usual + asking), kept)
            self._tell_delegates(verified)
            self._learn(verified)
            return
        entered = self._clock()
        self._plain_steps.teach()
        if drafted or self._plain_steps.settled:
            self.costs.observe(rows, rows + drafted, verified.seconds)
        telling = self._tell_awake(verified)
        self._learn(verified)
        self._times.has_learnt(self._clock() - entered - telling)

    def _learn(self, verified: Verified) -> None:
        """What became of the drafts."""
        steps, self._step, self._unused_step = (self._step, self._unused_step), None, None
        for step in steps:
            if step is not None and tuple(step.ids) == tuple(verified.ids):
                stack = step.stack
                learn(
                    self._counts[step.drafters], self._chances[step.drafters], stack.tokens, step.taught_lengths(),
                    stack.matches, stack.confidences, *verified.flat(),
                )  # fmt: skip

    def _tell_delegates(self, verified: Verified) -> None:
        """And those who must know, but not the second of two before it is asked again."""
        first, *others = self._lull.delegates
        told = {first, *(i for i in others if i == self._drafting), *self._must_know}
        for index in told:
            self._tell(index)
            self.ensemble.guards[index].observe(verified)
        self._keep(verified, told)

    def _tell_awake(self, verified: Verified) -> float:
        """Seconds that it took."""
        rows, told, telling = len(verified.ids), [], 0.0
        for index, (guard, standings) in enumerate(zip(self.ensemble, self._standings_by_size, strict=True)):
            standing = standings.of(rows)
            if index in self._must_know or standing.awake(rows):
                began = self._clock()
                self._tell(index)
                guard.observe(verified)
                seconds = self._clock() - began
                standing.was_told(seconds)
                telling += seconds
                told.append(index)
        self._keep(verified, told)
        return telling

    def _allocated(
        self, drafters: slice, matches: np.ndarray, confidences: np.ndarray, drafts: np.ndarray, request: DraftRequest,
        urgency: np.ndarray, reasons: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, int, Outlook, float, Outlook]:  # fmt: skip
        """Choice and lengths, int64 [B], the lengths' sum, what that promises, seconds without drafts, and what whole
        drafts promise where nothing is decided; seconds are without those of asking."""
        choice, lengths, count, self._price, tokens, seconds, plain, all_tokens, longest = allocate(
            self._chances[drafters], matches, confidences, drafts, request.budgets, urgency, self.costs.table,
            self.costs.scale[0], self._times.decided, self._price, self._trial, reasons,
        )  # fmt: skip
        return choice, lengths, count, Outlook(tokens, seconds), plain, Outlook(all_tokens, longest)

    def _judge(
        self, asked: list[int], drafters: slice, stack: Stack, drafts: np.ndarray, request: DraftRequest,
        urgency: np.ndarray, decided: Outlook, plain: float,
    ) -> None:  # fmt: skip
        """What asking a drafter brought, its time included, against deciding without it, or where nobody else is asked
        against deciding nothing: of dear ones, and those that have slept, in every step, of the others by turns."""
        price, deciding, alone = self._price, self._times.own, len(asked) == 1
        for index in asked:
            standing = self._standings[index]
            dear = standing.part_of(plain) > DEAR
            if dear or standing.doubted or self._steps % (2 * len(asked)) == 2 * asked.index(index):
                matches, confidences, found = stack.matches, stack.confidences, decided
                if index in self._sampled:
                    matches, confidences, all_drafts = as_if_all(
                        index - drafters.start, self._sampled[index], matches, confidences, drafts
                    )
                    _, _, _, found, _, _ = self._allocated(
                        drafters, matches, confidences, all_drafts, request, urgency, self._unused
                    )
                otherwise = Outlook(float(urgency.sum()), plain + self._times.beside)
                if len(asked) > 1:
                    without = drafts.copy()
                    without[index - drafters.start] = 0
                    _, _, _, otherwise, _, _ = self._allocated(
                        drafters, matches, confidences, without, request, urgency, self._unused
                    )
                found, steps = found.longer(standing.seconds), 1 if dear else 2 * len(asked)
                standing.judged(found, otherwise, plain, steps, deciding, len(self._standings), alone)
        self._price = price

    def _keep(self, verified: Verified, told: Collection[int] = ()) -> None:
        """For those who have not been told."""
        self._backlog.add(verified, told)
        if self._backlog.full:
            self._deliver()

    def _tell(self, index: int) -> None:
        if missed := self._backlog.take(index):
            guard = self.ensemble.guards[index]
            guard.observe(merged(missed, Needs.HIDDEN_STATES in guard.needs))

    def _deliver(self) -> None:
        same: dict[tuple[int, bool], Verified] = {}
        for index, guard in enumerate(self.ensemble):
            if missed := self._backlog.take(index):
                with_states = Needs.HIDDEN_STATES in guard.needs
                together = same.get((len(missed), with_states)) or merged(missed, with_states)
                same[len(missed), with_states] = together
                guard.observe(together)
        self._follow_groups()

    def _follow_groups(self) -> None:
        self._progress.observe(self._backlog.take(len(self.ensemble)))

    def counters(self) -> dict[str, float]:
        """Sequence steps by what was decided and why, and what the drafters say."""
        decisions = {reason: int(count) for reason, count in zip(REASONS, self._reasons, strict=True)}
        own = {
            "resting": self._resting, "not asked": self._not_asked, "measuring": self._measuring,
            "not decided": self._delegated, "spared": self._spared,
        }  # fmt: skip
        return decisions | own | super().counters()


def _limited(request: DraftRequest, standing: Standing) -> DraftRequest:
    """As far as this drafter is asked."""
    if not standing.reads or request.budgets.max(initial=0) <= standing.limit:
        return request
    return msgspec.structs.replace(request, budgets=np.minimum(request.budgets, standing.limit))


@functools.cache
def _compile() -> None:
    """The compiled parts, before any step is measured."""
    counts, chances = np.zeros((1, MATCHES, CONFIDENCES, DEPTHS, 2)), np.zeros((1, MATCHES, CONFIDENCES, DEPTHS))
    costs, one, progress = CostModel(), np.ones(1, np.int64), GroupProgress()
    costs.observe(1, 2, 0.01)
    progress.begin([SequenceStart(i, one, 0, 1.0, 0) for i in range(2)])
    progress.observe([Verified([0], [one], one)])
    progress.urgency([0, 1], 0.5)
    stack = Stack(1, 1, 1)
    stack.put(0, Proposal(np.ones((1, 1), np.int64), one))
    choice, lengths, *_ = allocate(
        chances, stack.matches, stack.confidences, stack.lengths, one, np.ones(1), costs.table, costs.scale[0], 0.0,
        0.1, False, np.zeros(len(REASONS), np.int64),
    )  # fmt: skip
    stack.chosen(choice, lengths, [""])
    promised(chances[0], stack.matches[0], stack.confidences[0], stack.lengths[0])
    learn(counts, chances, stack.tokens, stack.lengths, stack.matches, stack.confidences, one, np.array([0, 1]))
