"""Prompts and reference answers from files with one JSON object a line (GSM8K's form is the default)."""

from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from decimal import Decimal
from math import isfinite
from pathlib import Path
from string import Formatter
from typing import Any

import msgspec

from pipeline.config.types import TaskSection
from pipeline.errors import UsageError
from pipeline.tasks.base import REFERENCE, Example
from pipeline.tasks.rewards import CONVERSATION, reference_number

_ARGUMENTS = ("prompts", "completions", CONVERSATION)
Chat = Callable[[Sequence[dict[str, Any]]], str]
"""messages with role and content -> the text that an answer is to follow"""
_decoder = msgspec.json.Decoder(dict[str, Any])


class JsonlTask:
    """Every field of a line travels as a column; the answer field also as `reference`.

    Raises:
        UsageError: a file or line cannot be used; the text names file, line and remedy.
    """

    def __init__(self, section: TaskSection, chat: Chat | None = None) -> None:
        self.train: Sequence[Example] = read_examples(Path(section.path), section, chat)
        self.held_out: Sequence[Example] = (
            read_examples(Path(section.held_out_path), section, chat) if section.held_out_path else []
        )

    @property
    def longest_prompt(self) -> None:
        return None


def read_examples(path: Path, section: TaskSection, chat: Chat | None = None) -> list[Example]:
    """All examples of a file; blank lines are passed over."""
    fields = template_fields(section.prompt_template)
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
    except OSError as error:
        raise UsageError(f"task file {str(path)!r} cannot be read ({error.strerror}); check the path") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"{path}:{number}"
            examples.append(example(_record(line, origin), origin, fields, section, chat))
    if not examples:
        raise UsageError(f"task file {str(path)!r} is empty; it needs one JSON object a line")
    return examples


def _record(line: bytes, origin: str) -> dict[str, Any]:
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{origin}: not a JSON object in UTF-8 ({error}); write one object a line") from error


def example(
    record: dict[str, Any], origin: str, named_fields: list[str], section: TaskSection, chat: Chat | None = None
) -> Example:
    """One line or row as a prompt and its columns. A question that is a list of messages is a conversation,
    whose text is the chat template's, not `task.prompt_template`'s.

    Args:
        named_fields: that the template names.
        chat: makes text of such a prompt.

    Raises:
        UsageError: it lacks a field, or has one that cannot be used.
    """
    messages = record.get(section.question_field)
    conversational = isinstance(messages, list)
    question = "" if conversational else _text(record, section.question_field, "task.question_field", origin)
    reference = _text(record, section.answer_field, "task.answer_field", origin) if section.answer_field else ""
    rewards = [section.reward] if isinstance(section.reward, str) else section.reward
    if "numeric-answer" in rewards and reference_number(reference) is None:
        raise UsageError(
            f"{origin}: the answer {reference[-40:]!r} states no number; end it in '#### 42', "
            "or set task.reward to a function of your own"
        )
    if conversational:
        text = _conversation(messages, chat, origin, section.question_field)
        return Example(text, {**_columns(record, reference, section, origin), CONVERSATION: messages}, origin)
    named = {**record, "question": question}
    for field in named_fields:
        if field not in named:
            raise UsageError(
                f"{origin}: task.prompt_template uses {{{field}}}, which this line lacks; it has {_names(record)}"
            )
    return Example(section.prompt_template.format(**named), _columns(record, reference, section, origin), origin)


def _conversation(messages: Any, chat: Chat | None, origin: str, field: str) -> str:
    for message in messages or [None]:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UsageError(
                f"{origin}: field {field!r} is a list, and {str(message)[:80]} in it is no message; write objects with "
                "role and content, or a text"
            )
    if chat is None:
        raise UsageError(
            f"{origin}: field {field!r} is a conversation, which needs a model's chat template here; give text"
        )
    try:
        return chat(messages)
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from error


def _columns(record: dict[str, Any], reference: str, section: TaskSection, origin: str) -> dict[str, Any]:
    taken = [*_ARGUMENTS, *([REFERENCE] if section.answer_field != REFERENCE else [])]
    for name in taken:
        if name in record:
            raise UsageError(f"{origin}: a field named {name!r} stands in the way of a reward argument; rename it")
    try:
        msgspec.msgpack.encode(record)
    except OverflowError as error:
        raise UsageError(f"{origin}: a field holds an integer beyond 64 bits; write it as text") from error
    except TypeError as error:
        raise UsageError(f"{origin}: a field cannot be sent to the reward ({error}); leave it out") from error
    return {**record, REFERENCE: reference}


def _text(record: dict[str, Any], field: str, option: str, origin: str) -> str:
    if field not in record:
        raise UsageError(f"{origin}: no field {field!r}; set {option} to one of {_names(record)}")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{origin}: field {field!r} is {type(value).__name__}, not text; set {option} to a text field")
    # a float in digits alone: 0.00001, not 1e-05
    return format(Decimal(repr(float(value))), "f") if isinstance(value, float) and isfinite(value) else str(value)


def template_fields(template: str) -> list[str]:
    """The fields that a prompt template names.

    Raises:
        UsageError: it is not one.
    """
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UsageError(f"task.prompt_template = {template!r}: {error}; write {{{{ for a brace of its own") from error
    if not parts:
        raise UsageError(f"task.prompt_template = {template!r} has no field; it needs {{question}}")
    for name, layout, conversion in parts:
        if layout or conversion or not str(name).isidentifier():
            raise UsageError(f"task.prompt_template = {template!r}: write plain field names in braces, as {{question}}")
    return [str(name) for name, _, _ in parts]


def _names(record: dict[str, Any]) -> str:
    return ", ".join(sorted(record)) or "nothing"
