"""Plain decoding as a share of what memory bandwidth allows, on random models of real sizes: a script for a GPU.

    rollahead bench decode-bandwidth --models random-1.5b,random-7b --batch 1,16,64 --out DIR

At batch 1 every token reads every weight once, so bandwidth over bytes bounds tokens a second. Published engines reach
about half of it for 1B parameters on an H100. Without a GPU it runs the same code on small models.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bandwidth import read_bandwidth
from benchmarks.options import Parser, at_least, integers
from benchmarks.random_model import shape_of
from benchmarks.results import spread, write_results
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.messages import SamplingParams
from pipeline.models.checkpoint import compute_device
from pipeline.models.config import ModelConfig, RopeParameters
from pipeline.models.decoder import Decoder

PROMPT = 32


def main(arguments: list[str]) -> int:
    """Measures, prints a line a batch size, writes `results.json`; the exit code."""
    parser = Parser(prog="rollahead bench decode-bandwidth", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="", help="random-1.5b,random-7b (default on a GPU) or random-LxHxV")
    parser.add_argument("--batch", type=integers(), default=[1, 16, 64], help="sequences at once, comma between")
    parser.add_argument("--tokens", type=at_least(1), default=128, help="tokens a sequence that are timed")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-decode-bandwidth"))
    options = parser.parse_args(arguments)
    device = compute_device(options.device)
    names = options.models or ("random-1.5b,random-7b" if device.type == "cuda" else "random-4x256x4096")
    bandwidth = read_bandwidth(str(device), size=(4 << 30) if device.type == "cuda" else (256 << 20))
    rows = []
    for name in names.split(","):
        decoder = random_decoder(name, device)
        for batch in options.batch:
            rows.append(_row(name, decoder, batch, options.tokens, options.repeats, bandwidth))
            print(
                f"{name} batch {batch}: {rows[-1]['tokens_per_second']['median']:.0f} tokens/s, "
                f"{rows[-1]['share_of_bound']['median']:.0%} of the bandwidth bound",
                flush=True,
            )
        del decoder
    path = write_results(
        options.out, "decode-bandwidth", rows, model=names, device=str(device), bandwidth_bytes_per_second=bandwidth
    )
    print(f"written {path}; {bandwidth / 1e9:.0f} GB/s read")
    return 0


def random_decoder(name: str, device: torch.device) -> Decoder:
    """A bf16 decoder of a shape of `benchmarks.random_model`, its weights made on the device."""
    layers, hidden, intermediate, heads, kv_heads, vocabulary = shape_of(name)
    config = ModelConfig(
        architecture="Qwen3ForCausalLM", vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        layers=layers, heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, rms_norm_eps=1e-6,
        rope=RopeParameters(), tied_head=True, qk_norm=True, qkv_bias=False, output_bias=False, max_positions=4096,
        dtype="bfloat16", bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip
    decoder = Decoder(config, torch.bfloat16, device)
    shapes = decoder.shapes
    decoder.load(lambda tensor: torch.randn(shapes[tensor], device=device, dtype=torch.bfloat16) * 0.02)
    return decoder


def _row(name: str, decoder: Decoder, batch: int, tokens: int, repeats: int, bandwidth: float) -> dict[str, Any]:
    speeds = [_speed(decoder, batch, tokens, seed) for seed in range(repeats + 1)][1:]  # the first warms up
    config = decoder.config
    kv = config.layers * 2 * config.kv_heads * config.head_dim * 2 * (PROMPT + tokens // 2)
    read = decoder.read_bytes + batch * kv
    return {
        "system": "rollahead", "generator": "native", "drafter": "none", "model": name, "batch": batch,
        "temperature": 1.0, "tokens": tokens * batch, "tokens_per_second": spread(speeds),
        "share_of_bound": spread(speed / batch * read / bandwidth for speed in speeds),
        "memory": {"weights_bytes": decoder.bytes, "kv_bytes": batch * kv},
    }  # fmt: skip


def _speed(decoder: Decoder, batch: int, tokens: int, seed: int) -> float:
    """Tokens a second of all sequences together once their prompts are computed."""
    generator = NativeGenerator(
        decoder, max_sequences=batch, max_length=PROMPT + tokens + 2, stop_token_ids=(), entropy=False
    )
    prompts = np.random.default_rng(seed).integers(3, decoder.config.vocab_size, (batch, PROMPT))
    sampling = SamplingParams(temperature=1.0, max_new_tokens=tokens + 2)
    for row, prompt in enumerate(prompts):
        generator.add(GroupRequest(row, prompt, sampling, (seed * batch + row,)))
    while not generator.stats().verifications >= batch:
        generator.step()
    before, start = generator.stats().generated_tokens, time.perf_counter()
    while generator.has_work():
        generator.step()
    return (generator.stats().generated_tokens - before) / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
