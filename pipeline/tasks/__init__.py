"""Prompts in, rewards out. Torch-free."""

from pipeline.config.types import TaskSection
from pipeline.tasks.arithmetic import ArithmeticTask
from pipeline.tasks.base import Example, Task
from pipeline.tasks.jsonl import JsonlTask
from pipeline.tasks.rewards import load_reward

__all__ = ["Example", "Task", "load_reward", "load_task"]


def load_task(section: TaskSection, seed: int) -> Task:
    """The configured task.

    Raises:
        UsageError: a file cannot be read or lacks what the task needs; the text names file and line.
    """
    if section.kind == "arithmetic":
        return ArithmeticTask(section.digits, section.operands, seed)
    return JsonlTask(section)
