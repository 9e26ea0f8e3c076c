"""Prompt order, sample seeds and prompt lengths."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.types import TaskSection
from pipeline.errors import UsageError
from pipeline.tasks import load_task
from pipeline.tasks.base import Example
from pipeline.tasks.prompts import PromptOrder, check_prompts, mix64, sample_seed


def test_mix64_is_splitmix64() -> None:
    # The generator seeded with 1234567 gives these; its n-th output mixes seed + n * golden ratio.
    golden, known = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix64(1234567 + n * golden) for n in range(3)] == known


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=30, deadline=None)
def test_every_epoch_visits_every_prompt_once(size: int, seed: int) -> None:
    order = PromptOrder(size, seed)
    places = [order(lease) for lease in range(2 * size)]
    assert [epoch for epoch, _ in places] == [0] * size + [1] * size
    assert sorted(index for _, index in places[:size]) == list(range(size))
    assert sorted(index for _, index in places[size:]) == list(range(size))


def test_epochs_and_seeds_order_prompts_differently() -> None:
    orders = {
        tuple(PromptOrder(500, seed)(epoch * 500 + position)[1] for position in range(500))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 6


def test_prompt_order_spreads_over_a_large_task() -> None:
    order = PromptOrder(1_000_000, seed=4)
    indices = [order(lease)[1] for lease in range(4000)]
    assert len(set(indices)) == 4000
    # Uniform over ten bins: 400 each, standard deviation 19.
    assert all(300 < sum(index // 100_000 == bin_ for index in indices) < 500 for bin_ in range(10))
    assert order(1_000_000)[0] == 1


def test_sample_seeds_differ_and_fit_the_wire() -> None:
    seeds = {
        sample_seed(run, epoch, lease, sample)
        for run in range(5) for epoch in range(5) for lease in range(100) for sample in range(8)
    }  # fmt: skip
    assert len(seeds) == 5 * 5 * 100 * 8
    assert min(seeds) >= 0
    assert 2**61 < max(seeds) < 2**62


class Prompts:
    """A task of given prompts, as read from a file."""

    def __init__(self, prompts: list[str], longest: str | None = None) -> None:
        self.train = [Example(prompt, {}, f"f.jsonl:{line}") for line, prompt in enumerate(prompts, 1)]
        self.held_out: list[Example] = []
        self.longest_prompt = longest


def test_prompts_over_the_limit_are_refused_with_their_line_or_skipped() -> None:
    task = Prompts(["ab", "abcd", "abc"])
    assert list(check_prompts(task, list, 4, "error")) == [0, 1, 2]
    assert list(check_prompts(task, list, 3, "skip")) == [0, 2]
    with pytest.raises(UsageError, match=r"f.jsonl:2: the prompt has 4 tokens, above sampling.max_prompt_tokens = 3"):
        check_prompts(task, list, 3, "error")
    with pytest.raises(UsageError, match="all 3 training prompts are above"):
        check_prompts(task, list, 1, "skip")
    with pytest.raises(UsageError, match=r"f.jsonl:1: the prompt is empty"):
        check_prompts(Prompts([""]), list, 3, "skip")


def test_generated_prompts_are_checked_by_their_longest() -> None:
    task = load_task(TaskSection(digits=4, operands=3), seed=0)
    longest = len("What is 9999 + 9999 + 9999?\n")
    assert len(check_prompts(task, list, longest, "error")) == len(task.train)
    with pytest.raises(UsageError, match=f"have {longest} tokens, above sampling.max_prompt_tokens = {longest - 1}"):
        check_prompts(task, list, longest - 1, "skip")


def test_columns_travel() -> None:
    example = load_task(TaskSection(), seed=0).train[17]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(example.columns)) == example.columns
