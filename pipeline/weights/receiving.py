"""A publication as it is broadcast, tensor by tensor, in a process that computes with it."""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.failpoints import failpoint
from pipeline.messages import WeightsManifest
from pipeline.weights.buckets import Bucket, buckets, seal
from pipeline.weights.group import TransferFailed, TransferGroup


class Incoming:
    """Tensors in the order of a manifest. Each is alive as long as somebody keeps it, or another one of its bucket;
    whoever asks for them in the manifest's order has one bucket in memory, and no second copy of the model."""

    def __init__(self, group: TransferGroup, manifest: WeightsManifest, asked: Iterable[str] = ()) -> None:
        """
        Args:
            group: in which it is broadcast.
            manifest: of the publication.
            asked: names that `take` will be called with, where some are asked for more than once.
        """
        self.manifest = manifest
        self._group = group
        self._asked = Counter(asked)
        self._here: dict[str, Tensor] = {}
        self._coming = self._tensors()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, before the first has come."""
        return {tensor.name: tuple(tensor.shape) for tensor in self.manifest.tensors}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that were not taken.

        Raises:
            TransferFailed: the learner is gone, or what came is not what was announced.
        """
        while self._here:
            yield self._here.popitem()
        yield from self._coming

    def take(self, name: str) -> Tensor:
        """The tensor of that name; what comes before it is kept until it is asked for.

        Raises:
            TransferFailed: as of iteration.
            KeyError: there is none of that name, or it was taken as often as had been said.
        """
        while name not in self._here:
            found = next(self._coming, None)
            if found is None:
                raise KeyError(name)
            self._here[found[0]] = found[1]
        self._asked[name] -= 1
        return self._here[name] if self._asked[name] > 0 else self._here.pop(name)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in buckets(self.manifest.tensors, self.manifest.bucket_bytes):
            content = self._received(bucket)
            for slot in bucket.slots:
                values = content[slot.offset : slot.offset + slot.bytes]
                yield slot.tensor.name, values.view(getattr(torch, slot.tensor.dtype)).view(slot.tensor.shape)

    def _received(self, bucket: Bucket) -> Tensor:
        content = torch.empty(bucket.bytes, dtype=torch.uint8, device=self._group.device)
        for begin, end in bucket.pieces(self.manifest.bucket_bytes):
            self._group.broadcast(content[begin:end])
            failpoint("weights.received")
        words = content.view(torch.int64)
        found, last = int(words[:-1].sum()), int(words[-1])
        if last != seal(found, self.manifest.version, bucket):
            raise TransferFailed(
                f"bucket {bucket.number} is not what was announced of version {self.manifest.version}; see that "
                "learner and engine are of the same version of Rollahead"
            )
        return content
