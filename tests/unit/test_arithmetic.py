"""The built-in task: right answers, repeatable prompts, a held-out set that training never sees."""

import re

import pytest

from pipeline.config.types import TaskSection
from pipeline.tasks import load_task
from pipeline.tasks.arithmetic import HELD_OUT_SIZE, TRAIN_SIZE, ArithmeticTask, is_held_out, worked_answer
from pipeline.tasks.base import Example
from pipeline.tasks.rewards import numeric_answer


def test_worked_answer_of_a_known_sum() -> None:
    example = Example("", {"operands": [347, 58, 912], "reference": "1317"})
    assert worked_answer(example) == "ones: 7+8+2=17\ntens: 4+5+1+1=11\nhundreds: 3+9+1=13\n#### 1317"


@pytest.mark.parametrize(("digits", "operands"), [(1, 2), (3, 3), (12, 8)])
def test_every_line_of_a_worked_answer_adds_up(digits: int, operands: int) -> None:
    task = ArithmeticTask(digits, operands, seed=5)
    for example in task.train[:200]:
        *lines, final = worked_answer(example).splitlines()
        total = 0
        for place, line in enumerate(lines):
            addends, stated = re.fullmatch(r"[a-z ]+: ([0-9+]+)=(\d+)", line).groups()
            assert sum(int(digit) for digit in addends.split("+")) == int(stated)
            # The last column keeps its carry; the others hand it on.
            kept = int(stated) if place == len(lines) - 1 else int(stated) % 10
            total += kept * 10**place
        asked = sum(int(number) for number in re.findall(r"\d+", example.prompt))
        assert final == f"#### {asked}"
        assert total == asked


def test_worked_answers_earn_the_reward() -> None:
    examples = ArithmeticTask(3, 3, seed=1).train[:50]
    answers = [worked_answer(example) for example in examples]
    references = [example.columns["reference"] for example in examples]
    assert numeric_answer([""] * 50, answers, reference=references) == [1.0] * 50


def test_training_prompts_depend_on_seed_and_index_alone() -> None:
    task, again, other = (ArithmeticTask(3, 3, seed) for seed in (7, 7, 8))
    indices = [999_999, 0, 123_456, 5]
    assert [task.train[index] for index in indices] == [again.train[index] for index in reversed(indices)][::-1]
    assert [task.train[index].prompt for index in range(50)] != [other.train[index].prompt for index in range(50)]
    assert task.train[-1] == task.train[TRAIN_SIZE - 1]


def test_training_prompts_end() -> None:
    task = ArithmeticTask(3, 3, seed=7)
    assert len(task.train) == TRAIN_SIZE
    with pytest.raises(IndexError):
        task.train[TRAIN_SIZE]


def test_held_out_is_disjoint_from_training_in_any_operand_order() -> None:
    task = ArithmeticTask(2, 2, seed=3)
    held_out = {tuple(sorted(example.columns["operands"])) for example in task.held_out}
    seen = {tuple(sorted(example.columns["operands"])) for example in task.train[:5000]}
    assert len(held_out) == len(task.held_out) == HELD_OUT_SIZE
    assert held_out.isdisjoint(seen)
    assert is_held_out([5, 17, 300]) == is_held_out([300, 5, 17])


def test_held_out_is_the_same_for_every_seed() -> None:
    assert ArithmeticTask(3, 3, seed=1).held_out == ArithmeticTask(3, 3, seed=2).held_out


@pytest.mark.parametrize("digits", range(1, 13))
@pytest.mark.parametrize("operands", [2, 3, 8])
def test_every_difficulty_has_held_out_and_training_prompts(digits: int, operands: int) -> None:
    task = ArithmeticTask(digits, operands, seed=0)
    assert 1 <= len(task.held_out) <= HELD_OUT_SIZE
    assert len({task.train[index].prompt for index in range(200)}) > 10
    assert digits * operands < 5 or len(task.held_out) == HELD_OUT_SIZE


def test_no_prompt_is_longer_than_the_one_named_longest() -> None:
    task = ArithmeticTask(3, 4, seed=11)
    lengths = [len(example.prompt) for example in task.train[:3000]]
    assert max(lengths) == len(task.longest_prompt)


def test_difficulty_is_mixed_up_to_the_configured_maximum() -> None:
    task = load_task(TaskSection(digits=2, operands=4), seed=0)
    operands = [example.columns["operands"] for example in task.train[:300]]
    assert {len(numbers) for numbers in operands} == {2, 3, 4}
    assert {len(str(number)) for numbers in operands for number in numbers} == {1, 2}


def test_slips_change_columns_and_the_answer_follows_from_what_was_written() -> None:
    columns = wrong = 0
    for example in ArithmeticTask(3, 3, seed=1).train[:400]:
        right, slipped = worked_answer(example).splitlines(), worked_answer(example, 0.3, seed=5).splitlines()
        assert slipped == worked_answer(example, 0.3, seed=5).splitlines()
        carry = answer = 0
        for place, line in enumerate(slipped[:-1]):
            addends, _, total = line.partition(": ")[2].partition("=")
            written = sum(map(int, addends.split("+")))
            columns, wrong = columns + 1, wrong + (int(total) != written)
            assert abs(int(total) - written) <= 2
            # the carry written into this column is the one of the column before, right or wrong
            assert (addends.split("+")[-1] == str(carry)) or carry == 0
            carry, digit = divmod(int(total), 10)
            answer += digit * 10**place
        assert slipped[-1] == f"#### {answer + carry * 10 ** len(slipped[:-1])}"
        assert len(slipped) == len(right)
    assert abs(wrong / columns - 0.3) < 4 * (0.3 * 0.7 / columns) ** 0.5 + 0.02  # 0 - 1 stays 0
