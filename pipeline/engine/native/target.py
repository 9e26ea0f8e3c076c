"""What the native generator shows its drafter of the target model."""

from collections.abc import Sequence as Items
from pathlib import Path

from drafters.base import Places
from pipeline.engine.native.batch import Batch
from pipeline.engine.native.memory import Memory
from pipeline.errors import UsageError
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import KVCache
from pipeline.models.tokenizer import Tokenizer


class PolicyTarget:
    """`drafters.base.Target`: the policy, its cache, its tokenizer, and where live sequences are."""

    def __init__(
        self, decoder: Decoder, memory: Memory, batch: Batch, folder: Path | None, tokenizer: Tokenizer | None
    ) -> None:
        """`folder`: of the checkpoint, None where there is none; `tokenizer`: to use in place of the folder's."""
        self.decoder = decoder
        self._memory, self._batch, self._folder, self._tokenizer = memory, batch, folder, tokenizer

    @property
    def cache(self) -> KVCache:
        return self._memory.cache

    @property
    def tokenizer(self) -> Tokenizer | None:
        if self._tokenizer is None and (self._folder is None or not (self._folder / "tokenizer.json").exists()):
            return None
        return self.need_tokenizer()

    def need_tokenizer(self) -> Tokenizer:
        """For stop strings.

        Raises:
            UsageError: there is none.
        """
        if self._tokenizer is None:
            if self._folder is None:
                raise UsageError("stop strings need a tokenizer; give NativeGenerator one, or a checkpoint directory")
            self._tokenizer = Tokenizer(self._folder)
        return self._tokenizer

    @property
    def max_sequences(self) -> int:
        return self._batch.max_sequences

    def places(self, ids: Items[int]) -> Places:
        return self._batch.places(ids, self._memory.compresses)
