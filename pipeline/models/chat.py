"""Conversational prompts as text, by the chat template of a checkpoint's tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

Message = dict[str, Any]


def chat_template(folder: Path | str) -> Callable[[Sequence[Message]], str]:
    """Of a Hugging Face checkpoint directory; read when it is first used.

    A begin-of-text token that the template writes and the tokenizer puts before every text is left to the tokenizer.
    """
    known: list[Any] = []

    def render(messages: Sequence[Message]) -> str:
        if not known:
            known.append(_tokenizer(folder))
        tokenizer = known[0]
        try:
            text: str = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of the checkpoint's, and refuses roles in words of its own
            raise UsageError(
                f"the chat template of {folder} does not take the messages {str(messages)[:80]} ({error}); give "
                "prompts as text, or a conversation that it takes"
            ) from error
        begin = tokenizer.bos_token
        doubled = begin and text.startswith(begin) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(begin) if doubled else text

    return render


def _tokenizer(folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer of {folder} cannot be read: {error}") from error
    if not tokenizer.chat_template:
        raise UsageError(
            f"{folder} has no chat template, which prompts that are lists of messages need; give prompts as text, or a "
            "checkpoint with a chat_template"
        )
    return tokenizer
