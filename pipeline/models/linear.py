"""Matrix products of the decoder's layers: weights loaded from a checkpoint's tensors, packed where that pays."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_pointwise = torch.ops.mkldnn._linear_pointwise


class Linear:
    """y = x W^T + b for rows x [N, in]; W [out, in] is one or more tensors of a checkpoint, one below the other.

    On a CPU the weight is kept in oneDNN's blocked layout, which its kernels otherwise make anew from the plain one at
    every call (measured on AVX-512: 2.5 times as fast at 1 to 16 rows, float32 2.3 times at any number of rows).
    """

    def __init__(
        self,
        weights: Mapping[str, int],
        inputs: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        bias: bool = False,
        tied: Tensor | None = None,
    ) -> None:
        """
        Args:
            weights: name of each tensor, without `.weight`, and its rows.
            inputs: columns.
            bias: whether each tensor has a bias beside it.
            tied: somebody else's weight [out, in] that is the same; used as it is where weights are not packed, and in
                bfloat16, of which few rows are multiplied as fast unpacked (`pipeline.models.cpu_products`): packed, a
                third of a model with 32,000 tokens of 512 would be kept twice. Products of float32 take four times as
                long unpacked.
        """
        self._rows, self._inputs, self._dtype = dict(weights), inputs, dtype
        doubled = tied is not None and dtype == torch.bfloat16
        self._packed = device.type == "cpu" and torch.backends.mkldnn.is_available() and not doubled
        outputs = sum(weights.values())
        self._borrowed = tied is not None and not self._packed
        if tied is not None and self._borrowed:
            self._weight = tied
        else:
            self._weight = torch.zeros(outputs, inputs, dtype=dtype, device=device)
        self._bias = torch.zeros(outputs, dtype=dtype, device=device) if bias else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each checkpoint tensor it needs, and its shape."""
        shapes: dict[str, tuple[int, ...]] = {f"{n}.weight": (rows, self._inputs) for n, rows in self._rows.items()}
        if self._bias is not None:
            shapes |= {f"{n}.bias": (rows,) for n, rows in self._rows.items()}
        return shapes

    @property
    def loads(self) -> list[str]:
        """Names of the tensors that `load` asks for, in that order."""
        return [name for name in self.shapes if not (self._borrowed and name.endswith(".weight"))]

    def load(self, tensor: Callable[[str], Tensor]) -> None:
        """Overwrites the weight from the named tensors, cast to the compute type.

        A plain weight keeps its address, for captured graphs; a packed one is replaced, so that no more than one
        matrix exists twice at any time.
        """
        if self._packed:
            plain = torch.cat([tensor(f"{name}.weight").to(self._dtype) for name in self._rows])
            self._weight = torch.ops.mkldnn._reorder_linear_weight(plain, None)
        elif not self._borrowed:
            for name, view in zip(self._rows, self._weight.split(list(self._rows.values())), strict=True):
                view.copy_(tensor(f"{name}.weight"))
        if self._bias is not None:
            for name, view in zip(self._rows, self._bias.split(list(self._rows.values())), strict=True):
                view.copy_(tensor(f"{name}.bias"))

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the checkpoint tensors, in the compute type."""
        weight = self._weight.to_dense() if self._weight.is_mkldnn else self._weight.clone()
        found = {
            f"{n}.weight": part for n, part in zip(self._rows, weight.split(list(self._rows.values())), strict=True)
        }
        if self._bias is not None:
            parts = self._bias.clone().split(list(self._rows.values()))
            found |= {f"{n}.bias": part for n, part in zip(self._rows, parts, strict=True)}
        return found

    @property
    def bytes(self) -> int:
        """Of its own weights in memory."""
        rows = 0 if self._borrowed else sum(self._rows.values())
        return rows * (self._inputs + (self._bias is not None)) * torch.empty(0, dtype=self._dtype).element_size()

    @property
    def weight(self) -> Tensor:
        """[out, in], packed or not"""
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """[out]"""
        return self._bias

    def __call__(self, x: Tensor) -> Tensor:
        """[N, out]"""
        if self._weight.is_mkldnn:
            y: Tensor = _pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu(y)"""
        if self._weight.is_mkldnn:
            y: Tensor = _pointwise(x, self._weight, self._bias, "swish", [], "")
            return y
        return F.silu(F.linear(x, self._weight, self._bias))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """y * factor, [N, out]"""
        if self._weight.is_mkldnn:
            y: Tensor = _pointwise.binary(x, factor, self._weight, self._bias, "mul")
            return y
        return F.linear(x, self._weight, self._bias) * factor

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        """y + addend, [N, out]"""
        if self._weight.is_mkldnn:
            y: Tensor = _pointwise.binary(x, addend, self._weight, self._bias, "add")
            return y
        return addend + F.linear(x, self._weight, self._bias)
