"""Matrix products of training on a CPU, by whichever library is faster on it.

torch's float32 products go to MKL, which on some processors (measured: AMD Zen 5) has less than half of the speed that
oneDNN has. Both compute in float32 with float32 sums; only the order of the sums differs. bfloat16 is oneDNN's anyway.
"""

import time
from functools import cache
from typing import Any

import torch
from torch import nn

_MARGIN = 1.2
"""oneDNN must be this much faster: with two libraries that are close, a run would use now one, now the other, and not
repeat bit for bit."""


@cache
def onednn_pays() -> bool:
    """Whether oneDNN's float32 product is clearly faster here than torch's own; measured once, some milliseconds."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.ones(512, 512), torch.ones(512, 512)
    seconds: dict[str, float] = {}
    for _ in range(5):
        for name, product in (("torch", _torch), ("onednn", _onednn)):
            began = time.thread_time()
            product(a, b)
            taken = time.thread_time() - began
            seconds[name] = min(taken, seconds.get(name, taken))
    return seconds["onednn"] * _MARGIN < seconds["torch"]


def times_transposed(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """a b^T, [M, N], not differentiable; either may be a transposed view."""
    if a_MK.dtype == torch.float32 and a_MK.device.type == "cpu" and a_MK.numel() and onednn_pays():
        return _onednn(a_MK, b_NK)
    return _torch(a_MK, b_NK)


def _torch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b.t()


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


class _Affine(torch.autograd.Function):
    """x W^T + b and its gradients, all three products by `times_transposed`."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        y_NO = times_transposed(x_NI, weight_OI)
        return y_NO if bias_O is None else y_NO.add_(bias_O)

    @staticmethod
    def backward(ctx: Any, gradient_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, weight_OI = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            times_transposed(gradient_NO, weight_OI.t()) if of_x else None,
            times_transposed(gradient_NO.t(), x_NI.t()) if of_weight else None,
            gradient_NO.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """`torch.nn.Linear` whose float32 products on a CPU are `times_transposed`; the rest, autocast too, is as there."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.float32 or input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        rows = input.reshape(-1, input.shape[-1])
        y: torch.Tensor = _Affine.apply(rows, self.weight, self.bias)
        return y.view(*input.shape[:-1], -1)


def use_fast_products(model: nn.Module) -> None:
    """Make every plain linear layer of a model on the CPU a `Linear`, where that pays; parameters stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and onednn_pays():
            module.__class__ = Linear
