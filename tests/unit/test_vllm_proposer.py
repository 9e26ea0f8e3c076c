"""Our drafters behind vLLM's proposer contract, driven by a batch whose rows move, pause, return and vanish."""

import threading
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from msgspec.structs import asdict

from drafters.base import BaseDrafter, Needs, Proposal
from drafters.registry import build
from pipeline.engine.vllm.proposer import KEY, DrafterProposer, Tally, check_needs
from pipeline.errors import UsageError
from pipeline.messages import DraftCounts

K, LENGTH, VOCABULARY, ROWS = 4, 96, 40, 6
STOP = 7


class Batch:
    """vLLM's model runner as far as a proposer sees it, over texts that are known from the beginning."""

    def __init__(self, proposer: DrafterProposer, requests: int, seed: int) -> None:
        self.rng, self.proposer = np.random.default_rng(seed), proposer
        self.requests: dict[str, SimpleNamespace] = {}
        self.input_batch = SimpleNamespace(req_ids=[])
        self.texts: dict[str, np.ndarray] = {}
        self.waiting = [f"request-{n}" for n in range(requests)]
        self.paused: list[str] = []
        self.drafts: dict[str, list[int]] = {}
        self.accepted = self.drafted = 0
        proposer.bind(self)

    def start(self, name: str) -> None:
        group = int(name.split("-")[1]) // 4
        of_group = np.random.default_rng(group)
        prompt = of_group.integers(8, VOCABULARY, 5 + group)
        text = np.tile(of_group.integers(8, VOCABULARY, 9), 6)[: self.rng.integers(1, 50)]
        if self.rng.random() < 0.5:
            text[-1] = STOP
        self.texts[name] = np.concatenate([prompt, text])
        params = SimpleNamespace(
            extra_args={KEY: [group, int(name.split("-")[1])]},
            temperature=1.0,
            top_k=-1 if group % 2 else 5,
            top_p=1.0,
            min_p=0.0,
            max_tokens=len(text),
            stop_token_ids=[STOP],
        )
        self.requests[name] = SimpleNamespace(
            prompt_token_ids=prompt.tolist(), output_token_ids=[], sampling_params=params
        )

    def reschedule(self) -> None:
        """Finished rows leave, some pause, some come back or start, all move."""
        rows = self.input_batch.req_ids
        for name in list(rows):
            request = self.requests[name]
            if len(request.prompt_token_ids) + len(request.output_token_ids) >= len(self.texts[name]):
                rows.remove(name)
                del self.requests[name]
            elif self.rng.random() < 0.1:
                rows.remove(name)
                if self.rng.random() < 0.3:  # aborted
                    del self.requests[name]
                else:
                    self.paused.append(name)
        while len(rows) < ROWS and (self.waiting or self.paused):
            if self.paused and (not self.waiting or self.rng.random() < 0.5):
                rows.append(self.paused.pop(0))
            else:
                rows.append(self.waiting.pop(0))
                self.start(rows[-1])
        self.rng.shuffle(rows)

    def step(self) -> None:
        rows = self.input_batch.req_ids
        tokens, counts = np.zeros((ROWS, LENGTH), np.int32), np.zeros(ROWS, np.int32)
        sampled: list[list[int]] = []
        for row, name in enumerate(rows):
            request, text = self.requests[name], self.texts[name]
            have = len(request.prompt_token_ids) + len(request.output_token_ids)
            incomplete = not request.output_token_ids and self.rng.random() < 0.2  # its prompt is not computed yet
            new = [] if incomplete else self.emit(name, text, have)
            request.output_token_ids += new
            sampled.append(new)
            whole = np.array(request.prompt_token_ids + request.output_token_ids)
            tokens[row, : len(whole)], counts[row] = whole, len(whole)
        drafts = self.proposer.propose(sampled, counts, tokens)
        assert len(drafts) == len(rows)
        for row, name in enumerate(rows):
            assert len(drafts[row]) <= K and (sampled[row] or not drafts[row])
            room = len(self.texts[name]) - int(counts[row])
            assert len(drafts[row]) < max(1, room), "a draft where no token is left"
            self.drafts[name] = drafts[row]

    def emit(self, name: str, text: np.ndarray, have: int) -> list[int]:
        draft = self.drafts.pop(name, [])
        self.drafted += len(draft)
        good = 0
        while good < len(draft) and have + good < len(text) and draft[good] == text[have + good]:
            good += 1
        self.accepted += good
        return text[have : have + good + 1].tolist()


def proposer(drafter: str, seconds: float = 20.0, **options: object) -> DrafterProposer:
    return DrafterProposer(
        SimpleNamespace(
            additional_config={KEY: {"drafter": {"name": drafter, **options}, "seconds": seconds}},
            model_config=SimpleNamespace(max_model_len=LENGTH, get_vocab_size=lambda: VOCABULARY),
            speculative_config=SimpleNamespace(num_speculative_tokens=K),
        )
    )


@pytest.mark.parametrize("drafter", ["tests.vllm.watching:Watching", "arbiter", "prompt-lookup"])
def test_a_drafter_follows_requests_whatever_the_batch_does(drafter):
    made = proposer(drafter)
    batch = Batch(made, requests=60, seed=3)
    while batch.waiting or batch.paused or batch.input_batch.req_ids:
        batch.reschedule()
        batch.step()
        assert not made.events, made.events
    if drafter.endswith("Watching"):
        seen = made.counters()
        assert seen["begun"] > 40 and seen["ended"] >= seen["begun"] - ROWS
        assert seen["preempted"] > 0 and seen["restored"] > 0
        # texts of a group repeat: what its members said before is what is drafted
        assert batch.accepted > 0.5 * batch.drafted > 100


class Told(BaseDrafter):
    name = "told"

    def begin(self, sequences):
        self.groups = getattr(self, "groups", {}) | {s.id: s.group for s in sequences}

    def propose(self, request):
        expected = [0 if self.groups[i] % 2 else 5 for i in request.ids]
        assert (request.truncation.top_k.tolist() if request.truncation else [0] * len(request.ids)) == expected
        return Proposal.empty(len(request.ids))


class Late(BaseDrafter):
    name = "late"

    def propose(self, request):
        time.sleep(0.02)
        return Proposal.empty(len(request.ids))


@pytest.mark.parametrize("seconds", [0.01, 20.0])
def test_a_call_that_is_too_long_switches_a_drafter_off(seconds):
    made = proposer(f"{__name__}:Late", seconds=seconds)
    batch = Batch(made, requests=3, seed=5)
    while not batch.input_batch.req_ids:
        batch.reschedule()
    for _ in range(8):
        batch.step()
    said = "drafter late is switched off after TooSlow: a call took 0.0"
    assert [event[: len(said)] for event in made.events] == ([said] if seconds < 1 else [])


def test_a_drafter_is_told_what_truncates_each_request():
    made = proposer(f"{__name__}:Told")
    batch = Batch(made, requests=30, seed=5)
    while batch.waiting or batch.paused or batch.input_batch.req_ids:
        batch.reschedule()
        batch.step()
    assert not made.events and len(made._guard._drafter.groups) > 20


@pytest.mark.parametrize(
    ("drafter", "options"), [("suffix-automaton", {}), ("arbiter", {"measure": False})], ids=["alone", "arbiter"]
)
def test_drafts_are_counted_by_sample_drafter_and_depth(drafter, options):
    """What the arbiter measures here is a batch that computes nothing, so that it would rest."""
    made = proposer(drafter, **options)
    batch = Batch(made, requests=60, seed=3)
    while batch.waiting or batch.paused or batch.input_batch.req_ids:
        batch.reschedule()
        batch.step()
    samples = list(made._tallies)
    found = made.taken_drafts(samples)
    assert made.taken_drafts(samples) == [{}] * len(samples), "they are handed out once"
    tallies = [tally for of in found for name, tally in of.items() if name == "suffix-automaton"]
    assert len(tallies) == sum(map(len, found)) > 10
    for tally in tallies:
        assert sum(tally.accepted_at) == tally.accepted <= tally.drafted
        assert len(tally.tried_at) == len(tally.accepted_at) <= K
        assert all(tried >= of for tried, of in zip(tally.tried_at, tally.accepted_at, strict=True))
        assert all(later <= of for later, of in zip(tally.tried_at[1:], tally.accepted_at, strict=False))
        assert msgspec.convert(asdict(tally), DraftCounts).accepted == tally.accepted
    # what the batch itself saw of the same drafts; those of a row that paused before they were verified are not counted
    assert 0.7 * batch.accepted < sum(t.accepted for t in tallies) <= batch.accepted
    assert 0.7 * batch.drafted < sum(t.drafted for t in tallies) <= batch.drafted


def test_a_tally_counts_what_was_tried_at_each_depth():
    tally = Tally()
    for length, accepted in ((3, 0), (3, 2), (2, 2), (1, 1)):
        tally.add(length, accepted)
    assert asdict(tally) == {"drafted": 9, "accepted": 5, "tried_at": [4, 2, 1], "accepted_at": [3, 2, 0]}


class Recording(BaseDrafter):
    """Writes down what it is told of which sequences."""

    name = "recording"

    def __init__(self) -> None:
        self.told: list[tuple[str, list[int]]] = []

    def begin(self, sequences):
        self.told.append(("begin", [start.id for start in sequences]))

    def observe(self, verified):
        assert all(map(len, verified.emitted))
        self.told.append(("observe", list(verified.ids)))

    def preempt(self, ids):
        self.told.append(("preempt", list(ids)))

    def restore(self, sequences):
        self.told.append(("restore", [start.id for start in sequences]))

    def end(self, ids):
        self.told.append(("end", list(ids)))


def test_what_a_step_emitted_is_said_before_who_pauses_returns_or_is_gone():
    made = proposer("tests.unit.test_vllm_proposer:Recording")
    batch = Batch(made, requests=0, seed=0)
    batch.rng = SimpleNamespace(random=lambda: 1.0, integers=lambda low, high: 40)
    told = made._guard._drafter.told
    for name in ("request-0", "request-1", "request-2"):
        batch.start(name)

    def step(*names):
        told.clear()
        batch.input_batch.req_ids = list(names)
        batch.step()
        return told

    assert step("request-0", "request-1") == [("begin", [0, 1]), ("observe", [0, 1])]
    assert step("request-1", "request-0") == [("observe", [0, 1])]
    assert step("request-0") == [("observe", [0]), ("preempt", [1])]
    assert step("request-1", "request-0") == [("observe", [0]), ("restore", [1]), ("observe", [1])]
    del batch.requests["request-0"]
    assert step("request-1", "request-2") == [("observe", [1]), ("end", [0]), ("begin", [2]), ("observe", [2])]
    del batch.requests["request-1"], batch.requests["request-2"]
    batch.start("request-3")
    assert step("request-3") == [("end", [1, 2]), ("begin", [3]), ("observe", [3])]
    assert not made.events


class Stuck(BaseDrafter):
    name = "stuck"
    release = threading.Event()

    def propose(self, request):
        self.release.wait(20)
        return super().propose(request)


def test_a_drafter_that_does_not_return_is_named_on_stderr_while_nobody_can_ask(monkeypatch, capsys):
    monkeypatch.setattr("pipeline.engine.vllm.proposer.WATCH_SECONDS", 0.1)
    made = proposer("tests.unit.test_vllm_proposer:Stuck")
    batch = Batch(made, requests=1, seed=0)
    batch.reschedule()
    batch.rng = SimpleNamespace(random=lambda: 1.0)
    caller = threading.Thread(target=batch.step)
    caller.start()
    deadline = time.monotonic() + 10
    while not made.events and time.monotonic() < deadline:
        time.sleep(0.01)
    Stuck.release.set()
    caller.join()
    assert made.events[0].startswith("drafter stuck has not returned for")
    assert f"rollahead: {made.events[0]}\n" in capsys.readouterr().err


def test_before_the_first_request_nothing_is_drafted():
    drafts = proposer("suffix-automaton").propose([[1], [2]], np.ones(2, np.int32), np.zeros((2, 4), np.int32))
    assert drafts == [[], []]


def test_drafters_that_vllm_cannot_serve_are_refused_wherever_they_hide():
    check_needs(build({"name": "arbiter"}))
    check_needs(build({"name": "suffix-automaton"}))
    for piece in (
        {"name": "token-recycling"},
        {"name": "suffix-automaton", "auxiliary": "token-recycling"},
        {"name": "arbiter", "drafters": ["suffix-automaton", "token-recycling"]},
    ):
        with pytest.raises(UsageError, match=r'token-recycling needs .*logits.*engine\.generator = "native"'):
            check_needs(build(piece))

    class Wants(BaseDrafter):
        name, needs = "wants", Needs.HIDDEN_STATES | Needs.TARGET_LAYERS

    with pytest.raises(UsageError, match="hidden states, target layers"):
        check_needs(Wants())
