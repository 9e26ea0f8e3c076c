"""Small models and trajectories that the learner's tests share."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config

from learner.policy import load_policy
from pipeline.messages import SCHEMA, Role, Sampler, SamplingParams, Trajectory, TrajectoryHeader

VOCABULARY = 64


def tiny_folder(folder: Path, *, tied: bool = True, seed: int = 0, sharpness: float = 6.0) -> Path:
    """A two-layer checkpoint with two heads a key-value head and entropies of language, not of noise."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    config = Qwen3Config(**shape) if tied else LlamaConfig(**shape)
    torch.manual_seed(seed)
    model = (transformers_class(tied))(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(sharpness)
        if not tied:
            model.get_output_embeddings().weight.mul_(sharpness)
    model.save_pretrained(folder)
    return folder


def transformers_class(tied: bool) -> type[PreTrainedModel]:
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM

    return Qwen3ForCausalLM if tied else LlamaForCausalLM


def tiny_policy(folder: Path, **options: object) -> PreTrainedModel:
    return load_policy(tiny_folder(folder, **options), "cpu")


def trajectory(
    rng: np.random.Generator,
    *,
    lease: int = 0,
    sample: int = 0,
    prompt: int = 5,
    response: int = 8,
    reward: float = 0.0,
    version: int = 0,
    environment: tuple[int, ...] = (),
    finish_reason: str = "stop",
) -> Trajectory:
    """Random tokens; `environment` names response positions that are not the policy's."""
    roles = np.full(response, Role.GENERATED, np.uint8)
    roles[list(environment)] = Role.ENVIRONMENT
    header = TrajectoryHeader(
        schema=SCHEMA, producer="engine-0", incarnation=1, sequence=0, lease=lease, sample=sample,
        prompt_tokens=prompt, response_tokens=response, has_entropy=False, reward=reward, reward_parts={},
        finish_reason=finish_reason, sampling=SamplingParams(), drafters={}, verifications=response,
    )  # fmt: skip
    return Trajectory(
        header=header,
        prompt_ids=rng.integers(0, VOCABULARY, prompt).astype(np.uint32),
        token_ids=rng.integers(0, VOCABULARY, response).astype(np.uint32),
        logprobs=np.log(rng.uniform(0.005, 0.05, response)).astype(np.float32),
        entropies=None,
        versions=np.full(response, version, np.uint32),
        samplers=np.full(response, Sampler.POLICY, np.uint8),
        roles=roles,
    )


def batch(seed: int = 0, groups: int = 4, size: int = 4, version: int = 0) -> list[list[Trajectory]]:
    """Groups with mixed rewards and lengths, one environment token in each first sample."""
    rng = np.random.default_rng(seed)
    return [
        [
            trajectory(
                rng, lease=g, sample=s, prompt=int(rng.integers(2, 9)), response=int(rng.integers(3, 14)),
                reward=float((s + g) % 3 == 0), version=version, environment=(1,) if s == 0 else (),
                finish_reason="length" if s == 1 else "stop",
            )
            for s in range(size)
        ]
        for g in range(groups)
    ]  # fmt: skip
