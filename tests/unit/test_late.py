"""Steps that are told together tell what they would have told one by one."""

import numpy as np
import torch

from drafters.base import Verified
from drafters.late import MOST_BYTES, Backlog, merged

DIM = 3


def _step(rng: np.random.Generator, ids: list[int], places: dict[int, list[torch.Tensor]]) -> Verified:
    """A step with drafts; the states behind emitted tokens are noted in `places`."""
    drafted = rng.integers(0, 4, len(ids))
    accepted = np.array([rng.integers(0, d + 1) for d in drafted])
    cut = rng.integers(0, 2, len(ids))  # a stop token may cut what was accepted
    emitted = [rng.integers(0, 99, max(a + 1 - c, 1)) for a, c in zip(accepted, cut, strict=True)]
    hidden = torch.from_numpy(rng.normal(size=(int((drafted + 1).sum()), DIM)))
    starts = np.cumsum([0, *(drafted + 1)])[:-1]
    for i, tokens, start in zip(ids, emitted, starts, strict=True):
        places.setdefault(i, []).append(hidden[start : start + len(tokens)])
    return Verified(ids, emitted, accepted, hidden=hidden, starts=starts, seconds=0.5)


def test_merged_steps_hold_what_each_said_of_every_sequence() -> None:
    rng = np.random.default_rng(0)
    places: dict[int, list[torch.Tensor]] = {}
    steps = [_step(rng, ids, places) for ids in ([7, 3, 5], [3, 7, 5], [5, 9], [9, 3])]
    whole = merged(steps, hidden_states=True)
    assert whole.hidden is not None and whole.starts is not None
    assert set(whole.ids) == {3, 5, 7, 9} and whole.seconds == 2.0
    for row, i in enumerate(whole.ids):
        alone = [(step, step.ids.index(i)) for step in steps if i in step.ids]
        tokens = np.concatenate([step.emitted[at] for step, at in alone])
        assert whole.emitted[row].tolist() == tokens.tolist()
        assert whole.accepted[row] == sum(step.accepted[at] for step, at in alone)
        states = whole.hidden[whole.starts[row] : whole.starts[row] + len(tokens)]
        torch.testing.assert_close(states, torch.cat(places[i]))


def test_each_reader_takes_every_step_once() -> None:
    rng = np.random.default_rng(1)
    steps = [_step(rng, [1, 2], {}) for _ in range(5)]
    backlog = Backlog(3)
    backlog.add(steps[0])
    assert backlog.take(0) == [steps[0]] and backlog.take(0) == []
    backlog.add(steps[1], told=[0])
    for step in steps[2:4]:
        backlog.add(step)
    for reader, missed in ((0, steps[2:4]), (1, steps[:4]), (2, steps[:4])):
        assert backlog.take(reader) == missed
    backlog.add(steps[4], told=[0, 1, 2])
    assert [backlog.take(reader) for reader in range(3)] == [[]] * 3


def test_states_that_wait_are_bounded() -> None:
    none = np.zeros(1, np.int64)
    wide = Verified([1], [np.ones(1, np.int64)], none, torch.zeros(1, MOST_BYTES // 4 + 1), starts=none)
    backlog = Backlog(2)
    backlog.add(wide)
    assert backlog.full
    backlog.take(0)
    assert backlog.full
    backlog.take(1)
    assert not backlog.full
