"""Text to token ids and back, from a checkpoint's `tokenizer.json`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers.decoders import DecodeStream

from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig


class Tokenizer:
    """Encodes documents as the model was trained on them: with a begin-of-text token where the checkpoint has one."""

    eos_token_ids: tuple[int, ...]
    """ends of a text, from `generation_config.json` or `config.json`"""
    vocab_size: int
    """largest token id, plus one"""
    digest: str
    """sha256 of `tokenizer.json`, hexadecimal"""

    def __init__(self, folder: str | Path, add_bos: bool | None = None) -> None:
        """
        Args:
            folder: Hugging Face checkpoint directory with `config.json` and `tokenizer.json`.
            add_bos: whether a text starts with the begin-of-text token; None: as the checkpoint's files say.

        Raises:
            UsageError: a file is missing or broken, or the tokenizer has ids the model has no embedding for.
        """
        folder = Path(folder)
        config = ModelConfig.from_folder(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise UsageError(f"{path} is missing; save the model's tokenizer beside its weights")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # tokenizers raises plain Exception for a file it cannot parse
            raise UsageError(f"{path} cannot be used: {error}") from None
        self.digest = hashlib.sha256(content).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > config.vocab_size:
            raise UsageError(
                f"{path}: tokenizer does not match the model: its largest token id is {self.vocab_size - 1}, "
                f"the model's vocabulary has {config.vocab_size} tokens; use the checkpoint's own tokenizer"
            )
        self.eos_token_ids = config.eos_token_ids
        self._bos = self._begin(folder, config.bos_token_id, add_bos)

    def _begin(self, folder: Path, models: int | None, add_bos: bool | None) -> int | None:
        """The begin-of-text id that texts start with: the one that `tokenizer.json` itself puts first, or that of
        `tokenizer_config.json`; the model's own where neither names one."""
        with_special, plain = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        if with_special[:1] != plain[:1]:
            return None if add_bos is False else with_special[0]
        path = folder / "tokenizer_config.json"
        settings = _tokenizer_config(path)
        if not (_adds_bos(settings) if add_bos is None else add_bos):
            return None
        named = settings.get("bos_token")
        token = named.get("content") if isinstance(named, dict) else named
        bos = models if token is None else self._tokenizer.token_to_id(str(token))
        if bos is None and token is not None:
            raise UsageError(
                f"{path}: bos_token {token!r} is not in tokenizer.json; use the checkpoint's own tokenizer"
            )
        if bos is None and add_bos is not None:
            raise UsageError(
                f"{path} has no bos_token and {folder / 'config.json'} no bos_token_id, so texts cannot start with it"
            )
        return bos

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, the begin-of-text token first where the model's documents start with it."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._bos is None or ids[:1] == [self._bos]:
            return ids
        return [self._bos, *ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, id: int) -> str | None:
        """The token of an id, as the vocabulary spells it."""
        token: str | None = self._tokenizer.id_to_token(id)
        return token

    def first_difference(self, other: "Tokenizer") -> int | None:
        """The least id that means another token in `other`, or none; None: all ids mean the same. How texts are divided
        into tokens is not compared: it may differ where ids alone are exchanged."""
        if self.digest == other.digest:
            return None
        size = max(self.vocab_size, other.vocab_size)
        return next((id for id in range(size) if self.token(id) != other.token(id)), None)

    def vocabulary_digest(self) -> str:
        """Alike where all ids mean the same, whatever else `tokenizer.json` says."""
        tokens = sorted((id, token) for token, id in self._tokenizer.get_vocab().items())
        return hashlib.blake2b(msgspec.json.encode(tokens), digest_size=16).hexdigest()

    def stream(self) -> "TextStream":
        """The text of a response that grows token by token."""
        return TextStream(self._tokenizer)


class TextStream:
    """Decodes one token after the other; a character that spans tokens comes with its last one."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """The text that this token completes."""
        return self._stream.step(self._tokenizer, token) or ""


def check_same_tokenizer(folder: Path, other: Path, option: str) -> None:
    """Two models that take turns at a text must mean the same by every token id.

    Args:
        folder: the policy's checkpoint.
        other: the other model's, which `option` names.

    Raises:
        UsageError: they differ, and where first; or one has no tokenizer.
    """
    one, two = Tokenizer(folder), Tokenizer(other)
    id = one.first_difference(two)
    if id is not None:
        raise UsageError(
            f"{option} = {str(other)!r} has another tokenizer than {folder}: token id {id} is {two.token(id)!r} there "
            f"and {one.token(id)!r} here; give a model that was trained with the same tokenizer"
        )


def _adds_bos(settings: dict[str, Any]) -> bool:
    """Whether `tokenizer_config.json` has texts start with the begin-of-text token."""
    if "add_bos_token" in settings:
        return bool(settings["add_bos_token"])
    # Qwen writes a bos_token_id that its texts never start with, and says so by a null bos_token. Where a class of its
    # own is named, as GPT-2's, the class adds none by itself.
    return (
        settings.get("bos_token", "unsaid") is not None
        and settings.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend"
    )


def _tokenizer_config(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} cannot be used: {error}") from None
