"""The compressed sampler written down plainly: one token at a time, a list of keys for each layer and head."""

import numpy as np
import torch

from pipeline.engine.native.eviction.base import kept
from pipeline.models.rope import inverse_frequencies


class _Attention:
    """`pipeline.models.attention.Attention` of one sequence, float64, whose keys and values can be dropped."""

    def __init__(self, config):
        self.config = config
        self.keys = [[[] for _ in range(config.kv_heads)] for _ in range(config.layers)]
        self.values = [[[] for _ in range(config.kv_heads)] for _ in range(config.layers)]
        self.queries = [[] for _ in range(config.layers)]
        self.position = 0

    def norm(self, x, weight):
        wide = x.double()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt() * weight).float()

    def _rotated(self, x):
        """[heads, D], by complex numbers"""
        half = self.config.head_dim // 2
        angle = self.position * inverse_frequencies(self.config.rope, self.config.head_dim).double()
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def __call__(self, layer, qkv, qk_norm, plan, cache):
        c = self.config
        parts = qkv.view(-1, c.head_dim).double()
        qk = parts[: c.heads + c.kv_heads]
        if qk_norm is not None:
            rows = torch.tensor([0] * c.heads + [1] * c.kv_heads)
            qk = qk * (qk.square().mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * qk_norm[rows].double()
        qk = self._rotated(qk)
        self.queries[layer].append(qk[: c.heads])
        out = []
        for head in range(c.heads):
            kv = head * c.kv_heads // c.heads
            if head % (c.heads // c.kv_heads) == 0:
                self.keys[layer][kv].append(qk[c.heads + kv])
                self.values[layer][kv].append(parts[c.heads + c.kv_heads + kv])
            scores = torch.stack(self.keys[layer][kv]) @ qk[head] * c.head_dim**-0.5
            out.append(scores.softmax(0) @ torch.stack(self.values[layer][kv]))
        return torch.cat(out)[None].float()

    def held(self):
        return len(self.keys[0][0])

    def compress(self, plan):
        for layer in range(self.config.layers):
            keys = torch.stack([torch.stack(k) for k in self.keys[layer]])[None].float()
            newest = self.queries[layer][len(self.queries[layer]) - plan.policy.queries :]
            queries = torch.stack(newest, 1)[None].float() if newest else keys.new_zeros(1, self.config.heads, 0, 1)
            stay = kept(plan.policy, keys, queries, plan.budget)[0]
            for kv, indices in enumerate(stay.tolist()):
                self.keys[layer][kv] = [self.keys[layer][kv][i] for i in indices]
                self.values[layer][kv] = [self.values[layer][kv][i] for i in indices]


@torch.no_grad()
def expected_logprobs(decoder, plan, prompt, response, temperature=1.0):
    """Log-prob of each response token, and whether something had been dropped by then, float64 [T] and bool [T]."""
    attention, text = _Attention(decoder.config), [*map(int, prompt), *map(int, response)]
    found, dropped, compressed = [], [], False
    for position, token in enumerate(text[:-1]):
        attention.position = position
        hidden = decoder.forward(torch.tensor([token]), None, None, attention=attention)
        if position >= len(prompt) - 1:
            logits = decoder.logits(hidden)[0].double() / temperature
            found.append(float(logits.log_softmax(-1)[text[position + 1]]))
            dropped.append(compressed)
        border = plan.budget + plan.every
        if attention.held() >= (border if compressed else max(border, len(prompt) - 1)):
            attention.compress(plan)
            compressed = True
    return np.array(found), np.array(dropped)
