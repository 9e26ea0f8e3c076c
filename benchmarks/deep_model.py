"""Makes a deep model for layer skip: a reference model grown to 32 layers, trained with layer dropout.

    rollahead bench deep-model --base models/reference-4m --texts word-problems.jsonl --out models/deep

What layer skip gains grows with depth (the papers' models have 32 to 126 layers), and a deep model that is trained from
nothing takes more than minutes. So the base's layers are spread over the new depth, and between them stand copies of
them whose output is damped (block expansion, as in LLaMA Pro, arXiv 2401.02415, which starts from zero): at first the
model says nearly what its base does. Training then drops each added layer at random (stochastic depth, Huang et al.,
arXiv 1603.09382; LayerSkip, arXiv 2404.16710), so that the model gets better with all of its layers and stays good with
some left out.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.options import SEED, Parser, at_least
from pipeline.errors import UsageError
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import Tokenizer

DAMPING = 0.2
"""of an added layer's output at the start"""
DROPOUT = 0.5
"""chance that an added layer is left out of a training step"""


def main(arguments: list[str]) -> int:
    """Trains and writes the checkpoint directory; the exit code."""
    parser = Parser(prog="rollahead bench deep-model", description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="Qwen3 checkpoint directory")
    parser.add_argument("--texts", type=Path, required=True, help=".jsonl with question and answer")
    parser.add_argument("--layers", type=at_least(1), default=32)
    parser.add_argument("--steps", type=at_least(1), default=150)
    parser.add_argument("--batch", type=at_least(1), default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    depth = ModelConfig.from_folder(options.base).layers
    if options.layers <= depth:
        raise UsageError(f"--layers {options.layers} adds none to the {depth} of {options.base}; give more")
    answered(options.texts)  # refused before the base is loaded
    model, added = grown(options.base, options.layers)
    texts = batches(options.base, options.texts, options.batch, options.seed)
    held_out = [next(texts) for _ in range(2)]
    print(f"before: loss {loss_of(model, held_out):.3f}", flush=True)
    train(model, added, texts, options.steps, options.learning_rate)
    with left_out(model, set(added)):
        without = loss_of(model, held_out)
    print(f"after: loss {loss_of(model, held_out):.3f}, without the added layers {without:.3f}", flush=True)
    model.bfloat16().save_pretrained(options.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(options.base / name, options.out / name)
    return 0


def grown(base: Path, layers: int) -> tuple[transformers.PreTrainedModel, list[int]]:
    """The base with `layers` layers in float32, and which of them are added."""
    source = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(base)
    depth, config.num_hidden_layers = config.num_hidden_layers, layers
    config.layer_types = ["full_attention"] * layers
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kept = {round(i * (layers - 1) / (depth - 1)): i for i in range(depth)}
    tensors = source.state_dict()
    state = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    nearest = 0
    for layer in range(layers):
        nearest = kept.get(layer, nearest)
        prefix = f"model.layers.{nearest}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                damped = layer not in kept and name.endswith(("o_proj.weight", "down_proj.weight"))
                state[f"model.layers.{layer}.{name.removeprefix(prefix)}"] = tensor * (DAMPING if damped else 1.0)
    model.load_state_dict(state)
    return model, [layer for layer in range(layers) if layer not in kept]


def answered(path: Path) -> list[tuple[str, str]]:
    """Questions and answers of a .jsonl file.

    Raises:
        UsageError: it cannot be read, or a line lacks one of them.
    """
    found = []
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            sample = json.loads(line)
            if not isinstance(sample, dict) or not {"question", "answer"} <= sample.keys():
                raise UsageError(f"{path}:{number} has no question and answer; give lines such as GSM8K's")
            found.append((str(sample["question"]), str(sample["answer"])))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no .jsonl file of questions and answers: {error}") from None
    if not found:
        raise UsageError(f"{path} is empty; give a .jsonl file of questions and answers")
    return found


def batches(folder: Path, path: Path, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels [size, L] of questions with their answers, in random order, again and again."""
    tokenizer, eos = Tokenizer(folder), Tokenizer(folder).eos_token_ids[0]
    texts = [[*tokenizer.encode(f"Question: {q}\nAnswer: {a}"), eos] for q, a in answered(path)]
    generator = torch.Generator().manual_seed(seed)
    while True:
        # Texts of like length together: padding would be most of the work otherwise.
        drawn = torch.randperm(len(texts), generator=generator)[: 8 * size].tolist()
        order = sorted(drawn, key=lambda i: len(texts[i]))
        for start in torch.randperm(8, generator=generator).tolist():
            some = [texts[i] for i in order[start * size : (start + 1) * size]]
            width = max(map(len, some))
            ids = torch.tensor([text + [0] * (width - len(text)) for text in some])
            labels = torch.tensor([text + [-100] * (width - len(text)) for text in some])
            yield ids, labels


@contextmanager
def left_out(model: transformers.PreTrainedModel, which: set[int]) -> Iterator[None]:
    """Some layers pass on what they get."""
    layers = [model.model.layers[i] for i in which]
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def train(
    model: transformers.PreTrainedModel,
    added: list[int],
    texts: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
) -> None:
    """Trains the layers; the embedding, which is the head, stays."""
    parameters = [p for name, p in model.named_parameters() if "layers" in name]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10, (steps - step) / (0.3 * steps))
        dropped = {layer for layer in added if torch.rand(()) < DROPOUT}
        ids, labels = next(texts)
        with left_out(model, dropped):
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)


@torch.no_grad()
def loss_of(model: transformers.PreTrainedModel, held_out: list[tuple[Tensor, Tensor]]) -> float:
    return sum(model(input_ids=ids, labels=labels).loss.item() for ids, labels in held_out) / len(held_out)
