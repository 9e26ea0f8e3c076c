"""Weights that are broadcast, into the native generator's models as they come."""

from pipeline.engine.native.small_model import SmallModel
from pipeline.errors import UsageError
from pipeline.messages import WeightsGroup, WeightsJoin, WeightsManifest
from pipeline.models.checkpoint import MTP_LAYERS, SMALL_MODEL, check_shapes
from pipeline.models.decoder import Decoder
from pipeline.weights.group import TransferFailed, TransferGroup, device_name, join
from pipeline.weights.receiving import Incoming


class WeightsReceiver:
    """The one member that this process is of its group."""

    def __init__(self, decoder: Decoder, small: SmallModel | None) -> None:
        self._decoder, self._small = decoder, small
        self._group: TransferGroup | None = None

    def request(self) -> WeightsJoin:
        """In the order in which they are loaded, tensors pass through memory one by one."""
        return WeightsJoin(devices=(device_name(self._decoder.device),), order=tuple(dict.fromkeys(self._asked())))

    def join(self, group: WeightsGroup) -> None:
        """As `Generator.join_group`."""
        self.leave()
        self._group = join(group, 1, self._decoder.device)

    def leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def receive(self, manifest: WeightsManifest) -> bool:
        """As `Generator.receive_weights`; what is no weight of a model here is in `Decoder.beside`.

        Returns:
            Whether there were weights of the small model.
        """
        if self._group is None:
            raise TransferFailed("this engine has left the group")
        incoming = Incoming(self._group, manifest, self._asked())
        try:
            return self._load(incoming, incoming.shapes, f"version {manifest.version}")
        except UsageError as error:  # not this model's; files of the same version say so again
            raise TransferFailed(str(error)) from error

    def _load(self, incoming: Incoming, found: dict[str, tuple[int, ...]], version: str) -> bool:
        decoder, small = self._decoder, self._small
        beside = any(name.startswith(SMALL_MODEL) for name in found)
        check_shapes(decoder.shapes, found, "model.", MTP_LAYERS, lambda name: version)
        if small and beside:
            wanted = {SMALL_MODEL + name: shape for name, shape in small.decoder.shapes.items()}
            check_shapes(wanted, found, SMALL_MODEL, None, lambda name: version)
        decoder.load(incoming.take)
        if small and beside:
            small.decoder.load(lambda name: incoming.take(SMALL_MODEL + name))
        decoder.source = None
        decoder.beside = {name: tensor for name, tensor in incoming if not name.startswith(SMALL_MODEL)}
        return small is not None and beside

    def _asked(self) -> list[str]:
        small = [] if self._small is None else [SMALL_MODEL + name for name in self._small.decoder.loads]
        return [*self._decoder.loads, *small]
