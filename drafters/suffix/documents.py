"""Documents for a corpus: text files and JSON lines, as token ids."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from pipeline.errors import UsageError
from pipeline.models.tokenizer import Tokenizer

_FIELD = re.compile(r"\{(\w+)\}")
TokenId = Annotated[int, msgspec.Meta(ge=0)]


def read_documents(files: Sequence[Path], tokenizer: Tokenizer | None, template: str) -> Iterator[np.ndarray]:
    """Documents as int64 token ids, closed by the end-of-text token where there is a tokenizer.

    Args:
        files: `.jsonl`, one document a line: a list `token_ids`, or else the text that `template` makes of its fields;
            any other name: one text, a document.
        tokenizer: the model's; None where every line has `token_ids`.
        template: text in which `{field}` stands for a field of the line.

    Raises:
        UsageError: a template without a field, a file that cannot be read, a line that is no object or lacks a field,
            a token id outside the tokenizer's vocabulary, text without a tokenizer.
    """
    if not _FIELD.search(template):
        raise UsageError(f"--template {template!r} names no field, so that all lines are one text; write {{question}}")
    for path in files:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        if path.suffix != ".jsonl":
            yield _encoded(content, tokenizer, str(path))
            continue
        # not str.splitlines: it parts a line at U+2028 and U+0085 too, which JSON has inside of texts
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield _document(line, tokenizer, template, f"{path}:{number}")


def _document(line: str, tokenizer: Tokenizer | None, template: str, place: str) -> np.ndarray:
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UsageError(f"{place} is not a JSON object: {error}") from None
    if "token_ids" in fields:
        try:
            ids = np.array(msgspec.convert(fields["token_ids"], list[TokenId]), np.int32).astype(np.int64)
        except (msgspec.ValidationError, OverflowError) as error:
            raise UsageError(f"{place}: token_ids is not a list of token ids: {error}") from None
        if tokenizer is not None and ids.max(initial=0) >= tokenizer.vocab_size:
            raise UsageError(
                f"{place} has token id {ids.max()}, outside the tokenizer's vocabulary of {tokenizer.vocab_size}; give "
                "the tokenizer that made the token ids"
            )
        return ids

    def value(found: re.Match[str]) -> str:
        if found[1] not in fields:
            raise UsageError(f"{place} has no field {found[1]!r}; it has {', '.join(fields)}; give another --template")
        return str(fields[found[1]])

    return _encoded(_FIELD.sub(value, template), tokenizer, place)


def _encoded(text: str, tokenizer: Tokenizer | None, place: str) -> np.ndarray:
    if tokenizer is None:
        raise UsageError(f"{place} is text: give the model's folder with --tokenizer, or lines with token_ids")
    return np.array([*tokenizer.encode(text), *tokenizer.eos_token_ids[:1]], np.int64)
