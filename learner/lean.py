"""Layers that keep less for the backward pass, with the values of those modules of transformers that they replace.

Eager autograd keeps every step's input: of a gated MLP four tensors of its inner width a token where two suffice, of a
root-mean-square norm three where one does. Of an embedding it makes a gradient as large as the vocabulary for every
micro-batch, beside the one that it is then added to.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from learner import ranks

_PROBE_TOKENS = 3


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4),
    in float32; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        of_normed = gradient.float() * weight
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
        inner = (of_normed * normed).mean(-1, keepdim=True)
        return of_normed.sub_(normed.mul_(inner)).mul_(scale).to(x.dtype), of_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202, equation 6); keeps both arguments and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate: torch.Tensor = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, F.silu(gate).mul_(gradient)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """Where a parameter's gradient accumulates; zeros at first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class _Embedding(torch.autograd.Function):
    """Rows of a weight, whose gradient is added to `weight.grad` in place."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding = padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ids, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2).to(weight.dtype)
        rows = torch.where(ids.flatten()[:, None] == ctx.padding, 0.0, rows)  # as torch's, which never trains this row
        gradient_of(weight).index_add_(0, ids.flatten(), rows)
        return None, None, None


class Embedding(nn.Embedding):
    """An embedding of torch that makes no gradient of the whole vocabulary."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padding = -1 if self.padding_idx is None else self.padding_idx
        y: torch.Tensor = _Embedding.apply(input, self.weight, padding)
        return y


class RMSNorm(nn.Module):
    """A norm of transformers, in one step."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return y


class GatedMLP(nn.Module):
    """A gated MLP of transformers, whose activation is computed again in the backward pass."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
        return y


def keep_less(model: nn.Module) -> int:
    """Replace the norms and MLPs of a model that are of these forms, by what they compute and not by their names: one
    that gives other values on a random input stays as it is. Returns how many were replaced."""
    for module in model.modules() if ranks.world_size() == 1 else ():  # FSDP takes gradients from autograd
        if type(module) is nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
            module.__class__ = Embedding
    return sum(_replaced(module) for module in model.modules())


@torch.no_grad()
def _replaced(module: nn.Module) -> bool:
    if hasattr(module, "variance_epsilon") and isinstance(getattr(module, "weight", None), nn.Parameter):
        lean: type[nn.Module] = RMSNorm
        weight = module.get_parameter("weight")
    elif all(isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        lean, weight = GatedMLP, module.get_parameter("gate_proj.weight")
    else:
        return False
    width = weight.shape[-1]
    probe = torch.linspace(-2, 2, _PROBE_TOKENS * width, device=weight.device).view(_PROBE_TOKENS, width)
    original = type(module)
    expected = module(probe)
    module.__class__ = lean
    if torch.allclose(module(probe), expected, rtol=1e-4, atol=1e-5):
        return True
    module.__class__ = original
    return False
