"""The head as a differentiable module, unrolled as it will be used: its own outputs in place of hidden states.

Training rows are teacher-forced. With x_0..x_T a text and h_t the target's hidden states, the chain that begins at row
t has at depth 1 the input (h_t, x_{t+1}), and at depth d the input (h'_{t,d-1}, x_{t+d}) at position t + d - 1. It
attends as the drafter's does: to the true rows up to t and to its own rows of depths 2 to d.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafters.mtp.head import PREFIX, head_config
from pipeline.models.config import ModelConfig
from pipeline.models.rope import inverse_frequencies, rotate


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self._epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self._epsilon).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self._config = c
        self.q_proj = nn.Linear(c.hidden_size, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=c.output_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)
        self.register_buffer("_frequencies", inverse_frequencies(c.rope, c.head_dim), persistent=False)

    def project(self, x: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, D] of rows at positions `offset`, `offset` + 1, ..."""
        c = self._config
        q = self.q_proj(x).unflatten(-1, (c.heads, c.head_dim))
        k = self.k_proj(x).unflatten(-1, (c.kv_heads, c.head_dim))
        v = self.v_proj(x).unflatten(-1, (c.kv_heads, c.head_dim))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        frequencies: Tensor = self._frequencies  # type: ignore[assignment]
        angles = torch.outer(torch.arange(offset, offset + x.shape[1], device=x.device).float(), frequencies)
        cos, sin = torch.cat([angles.cos()] * 2, -1)[:, None], torch.cat([-angles.sin(), angles.sin()], -1)[:, None]
        q, k = (rotate(y.float(), cos, sin).to(v.dtype) for y in (q, k))
        group = c.heads // c.kv_heads
        k, v = (y.repeat_interleave(group, dim=2) for y in (k, v))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _MLP(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = _MLP(c)


class MTPModule(nn.Module):
    """Its parameters have the checkpoint's names without the prefix `mtp.`; embedding and output head are not its."""

    def __init__(self, config: ModelConfig) -> None:
        """
        Args:
            config: of the target.
        """
        super().__init__()
        self.config = c = head_config(config)
        self.pre_fc_norm_embedding = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.layers = nn.ModuleList([_Layer(c)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, embedded: Tensor, hidden: Tensor, depths: int) -> Iterator[Tensor]:
        """norm(h') [B, T, H] of depths 1 to `depths`, for the output head; row t is the chain that begins at t.

        Args:
            embedded: [B, T, H], embedding of the token after each row's position.
            hidden: [B, T, H], the target's hidden states; rows behind a text's end are not attended to by it.
            depths: how many.
        """
        layer: _Layer = self.layers[0]  # type: ignore[assignment]
        embedded = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, 1:]], 1)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for depth in range(depths):
            joined = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], -1)
            x = self.fc(joined)
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), depth)
            keys.append(k)
            values.append(v)
            x = x + layer.self_attn.o_proj(_attend(q, keys, values).transpose(1, 2).flatten(2))
            hidden = x + layer.mlp(layer.post_attention_layernorm(x))
            yield self.norm(hidden)
            embedded = F.pad(embedded[:, 1:], (0, 0, 0, 1))

    def weights(self) -> dict[str, Tensor]:
        """Under the checkpoint's names; detached, not copied."""
        return {PREFIX + name: tensor.detach() for name, tensor in self.state_dict().items()}

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """As `weights` gives them; other names are not read."""
        self.load_state_dict({n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)})

    @torch.no_grad()
    def start_from(self, tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        """A beginning for training: the target's last layer and final norm, fed the hidden state as it is.

        Args:
            tensors: the target's weights by name.
            generator: of the random part.
        """
        last = f"model.layers.{max(int(n.split('.')[2]) for n in tensors if n.startswith('model.layers.'))}."
        own = {n.removeprefix(last): t for n, t in tensors.items() if n.startswith(last)}
        self.layers[0].load_state_dict(own)
        self.norm.weight.copy_(tensors["model.norm.weight"])
        width = self.config.hidden_size
        self.fc.weight.normal_(0, 0.5 / math.sqrt(width), generator=generator)
        self.fc.weight[:, width:] += torch.eye(width)


def _attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """[B, heads, T, D]: row t sees the rows up to t of depth 1 and its own of the others."""
    if len(keys) == 1:
        return F.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True)
    scale = q.shape[-1] ** -0.5
    rows = q.shape[2]
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    true = (q @ keys[0].transpose(-1, -2)).float().masked_fill(future, float("-inf"))
    own = torch.stack([(q * k).float().sum(-1) for k in keys[1:]], -1)
    weights = torch.softmax(torch.cat([true, own], -1) * scale, -1).to(q.dtype)
    out = weights[..., :rows] @ values[0]
    for index, v in enumerate(values[1:]):
        out = out + weights[..., rows + index, None] * v
    return out
