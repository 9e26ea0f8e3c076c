"""Prompts in, rewards out. Torch-free."""

import importlib

from pipeline.config.types import TaskSection
from pipeline.errors import UsageError
from pipeline.plugins import search_working_directory
from pipeline.tasks.arithmetic import ArithmeticTask
from pipeline.tasks.base import Example, Task
from pipeline.tasks.jsonl import Chat, JsonlTask
from pipeline.tasks.rewards import load_reward

__all__ = ["Example", "Task", "load_reward", "load_task"]


def load_task(section: TaskSection, seed: int, chat: Chat | None = None) -> Task:
    """The configured task; a class of your own, named module:Class, is called with (section, seed).

    Args:
        chat: makes text of conversational prompts (`pipeline.models.chat`); None: these are refused.

    Raises:
        UsageError: a file cannot be read or lacks what the task needs; the text names file and line.
    """
    if section.kind == "arithmetic":
        return ArithmeticTask(section.digits, section.operands, seed)
    if section.kind == "jsonl":
        return JsonlTask(section, chat)
    if section.kind == "datasets":
        from pipeline.tasks.hub import DatasetsTask

        return DatasetsTask(section, chat)
    return _own(section, seed)


def _own(section: TaskSection, seed: int) -> Task:
    """A user's task, named module:Class.

    Raises:
        UsageError: it cannot be loaded, or has no prompts.
    """
    module, _, name = section.kind.partition(":")
    search_working_directory()
    try:
        task: Task = getattr(importlib.import_module(module), name)(section, seed)
        task.train[0], task.held_out, task.longest_prompt  # noqa: B018: what the protocol asks for is there
    except UsageError:
        raise
    except Exception as error:  # the class is the user's: it can raise anything
        raise UsageError(
            f"task.kind = {section.kind!r} cannot be used ({type(error).__name__}: {error}); it needs train with at "
            "least one Example, held_out and longest_prompt (pipeline.tasks.Task)"
        ) from error
    return task
