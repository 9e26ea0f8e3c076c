"""A decoding step of the model: the native decoder's packed products and kernels against `torch.compile`.

    rollahead bench compiled-decode --model DIR --batch 1,4,16 --out DIR

The compiled form has what helps a compiler: fixed shapes, one dense cache in place of pages, all sequences at one
length, weights frozen and packed by inductor. Its time to compile is stated, once for each batch size.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.options import Parser, at_least, integers
from benchmarks.random_model import checkpoint
from benchmarks.results import spread, write_results
from pipeline.models.checkpoint import load_decoder
from pipeline.models.decoder import Decoder
from pipeline.models.kv_cache import PAGE, KVCache
from pipeline.models.rope import inverse_frequencies

Step = Callable[[Tensor], Tensor]
"""float32 logits [B, V] of the sequences' last tokens int64 [B]"""


def main(arguments: list[str]) -> int:
    """Measures, prints a line a batch size, writes `results.json`; the exit code."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    decoder = load_decoder(checkpoint(options.model, options.out / "models"), options.dtype)
    rows = []
    for batch in options.batch:
        rows.append(_row(decoder, batch, options))
        row = rows[-1]
        native, compiled = (row[f"{kind}_seconds"]["median"] * 1e3 for kind in ("native", "compiled"))
        print(
            f"batch {batch}: native {native:.2f} ms a step, compiled {compiled:.2f} ms, native takes "
            f"{row['native_over_compiled']['median']:.2f} of its time; compiled in {row['compile_seconds']:.0f} s",
            flush=True,
        )
    print(f"written {write_results(options.out, 'compiled-decode', rows, model=str(options.model))}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rollahead bench compiled-decode", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="random-4x256x4096", help="checkpoint folder, or random-LAYERSxHIDDENxVOCAB")
    parser.add_argument("--batch", type=integers(), default=[1, 4, 16], help="sequences at once, comma between")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--length", type=at_least(1), default=128, help="cached tokens of each sequence")
    parser.add_argument("--steps", type=at_least(1), default=10, help="timed together")
    parser.add_argument("--repeats", type=at_least(1), default=15)
    parser.add_argument("--threads", type=at_least(0), default=0, help="0: torch's default")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-compiled-decode"))
    return parser


def _row(decoder: Decoder, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    native = native_step(decoder, batch, options.length)
    tokens = torch.arange(batch) % decoder.config.vocab_size
    began = time.perf_counter()
    compiled = compiled_step(decoder, batch, options.length)
    logits = compiled(tokens)
    compile_seconds = time.perf_counter() - began
    torch.testing.assert_close(logits, native(tokens), atol=0.05, rtol=0.05)  # the same model, or nothing is compared
    times: dict[Step, list[float]] = {native: [], compiled: []}
    for repeat in range(options.repeats + 1):
        for step in times if repeat % 2 else reversed(times):
            began = time.perf_counter()
            for _ in range(options.steps):
                step(tokens)
            if repeat:  # the first warms up
                times[step].append((time.perf_counter() - began) / options.steps)
    saved = statistics.median(times[native]) - statistics.median(times[compiled])
    return {
        "batch": batch, "dtype": str(decoder.dtype).removeprefix("torch."), "length": options.length,
        "threads": torch.get_num_threads(),
        "native_seconds": spread(times[native]), "compiled_seconds": spread(times[compiled]),
        "native_over_compiled": spread(n / c for n, c in zip(*times.values(), strict=True)),
        "compile_seconds": compile_seconds,
        "steps_until_compiling_pays": compile_seconds / saved if saved > 0 else None,
    }  # fmt: skip


def native_step(decoder: Decoder, batch: int, length: int) -> Step:
    """What the generator runs; the cache holds zeros for the `length` tokens before."""
    pages = -(-(length + 1) // PAGE)
    cache = KVCache(decoder.config, decoder.dtype, decoder.device, batch * pages)
    tables = np.arange(batch * pages).reshape(batch, pages)
    cached, ones = np.full(batch, length), np.ones(batch, np.int64)

    def step(tokens: Tensor) -> Tensor:
        return decoder.logits(decoder.forward(tokens, cache.plan(tables, cached, ones), cache))

    return step


def compiled_step(decoder: Decoder, batch: int, length: int) -> Step:
    """The same in one compiled graph over a dense cache of `length` + 1 tokens."""
    from torch._inductor import config as inductor

    graph = _Dense(decoder, batch, length).eval()
    compiled = torch.compile(graph, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(tokens: Tensor) -> Tensor:
        with inductor.patch(freezing=True):  # weights become constants, packed for their products
            logits: Tensor = compiled(tokens)
        return logits

    return step


class _Dense(torch.nn.Module):
    """The decoder's step, written for a compiler."""

    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, decoder: Decoder, batch: int, length: int) -> None:
        super().__init__()
        self.c, self.length = decoder.config, length
        tensors = decoder.tensors()
        self.named = torch.nn.ParameterDict(
            {name.replace(".", "_"): torch.nn.Parameter(tensor, False) for name, tensor in tensors.items()}
        )
        c = self.c
        shape = c.layers, batch, c.kv_heads, length + 1, c.head_dim
        self.register_buffer("keys", torch.zeros(shape, dtype=decoder.dtype))
        self.register_buffer("values", torch.zeros(shape, dtype=decoder.dtype))
        angles = length * inverse_frequencies(c.rope, c.head_dim)
        self.register_buffer("cos", torch.cat([angles.cos()] * 2).to(decoder.dtype))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2).to(decoder.dtype))

    def weight(self, name: str) -> Tensor:
        return self.named[name.replace(".", "_")]

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = f"{name}.bias".replace(".", "_")
        return F.linear(x, self.weight(f"{name}.weight"), self.named.get(bias))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight(f"{name}.weight").float(), self.c.rms_norm_eps).to(
            x.dtype
        )

    def rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def attend(self, layer: int, prefix: str, x: Tensor) -> Tensor:
        c = self.c
        query, key, value = (self.linear(f"{prefix}{part}_proj", x).unflatten(-1, (-1, c.head_dim)) for part in "qkv")
        if c.qk_norm:
            query, key = self.norm(f"{prefix}q_norm", query), self.norm(f"{prefix}k_norm", key)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length] = self.rotated(key)
        values[:, :, self.length] = value
        attended = F.scaled_dot_product_attention(self.rotated(query).unsqueeze(2), keys, values, enable_gqa=True)
        return self.linear(f"{prefix}o_proj", attended.flatten(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.weight("model.embed_tokens.weight")[tokens]
        for layer in range(self.c.layers):
            prefix = f"model.layers.{layer}."
            x = x + self.attend(layer, f"{prefix}self_attn.", self.norm(f"{prefix}input_layernorm", x))
            y = self.norm(f"{prefix}post_attention_layernorm", x)
            gate = F.silu(self.linear(f"{prefix}mlp.gate_proj", y))
            x = x + self.linear(f"{prefix}mlp.down_proj", gate * self.linear(f"{prefix}mlp.up_proj", y))
        head = "model.embed_tokens" if self.c.tied_head else "lm_head"
        return self.linear(head, self.norm("model.norm", x)).float()
