"""Batches of worked answers to train on, and sampled answers to score, for the embedded model's warm start."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, Qwen3ForCausalLM

from learner.embedded import EOS_ID, PAD_ID
from pipeline.tasks.arithmetic import ArithmeticTask, worked_answer
from pipeline.tasks.base import REFERENCE, Example
from pipeline.tasks.rewards import numeric_answer

IGNORED = -100
"""Target of positions without loss (`cross_entropy`'s default `ignore_index`)."""


def training_batch(
    examples: Sequence[Example], tokenizer: Tokenizer, slip_rate: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, targets), both int64 [B, T], padded on the right; only answers and their end token have targets.

    A share `slip_rate` of the answers' columns is wrong (`pipeline.tasks.arithmetic.worked_answer`).
    No attention mask is needed: under causal attention nothing real looks at padding on its right.
    """
    prompts = [tokenizer.encode(example.prompt).ids for example in examples]
    texts = [worked_answer(example, slip_rate, seed) for example in examples]
    answers = [[*tokenizer.encode(text).ids, EOS_ID] for text in texts]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids_BT = torch.full((len(examples), length), PAD_ID)
    targets_BT = torch.full((len(examples), length), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids_BT[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets_BT[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    return ids_BT, targets_BT


class AnswerSampler:
    """Samples continuations at temperature 1 with a key-value cache, all rows at once."""

    def __init__(self, model: Qwen3ForCausalLM, *, bfloat16: bool) -> None:
        self._model, self._bfloat16 = model, bfloat16

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], max_new_tokens: int, generator: torch.Generator) -> list[list[int]]:
        """Token ids of one answer a prompt, without the end token; prompts are padded on the left."""
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[PAD_ID] * (width - len(prompt)) + prompt for prompt in prompts])
        mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        cache, done_B = DynamicCache(), torch.zeros(len(prompts), dtype=torch.bool)
        sampled = []
        for _ in range(max_new_tokens):
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
                logits_B1V = self._model(
                    input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT,
                    past_key_values=cache, use_cache=True, logits_to_keep=1,
                ).logits  # fmt: skip
            probabilities_BV = logits_B1V[:, -1].float().softmax(-1)
            ids_BT = torch.multinomial(probabilities_BV, 1, generator=generator).masked_fill(done_B[:, None], EOS_ID)
            sampled.append(ids_BT)
            done_B |= ids_BT[:, 0] == EOS_ID
            if done_B.all():
                break
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(prompts), 1)], 1)
            positions_BT = positions_BT[:, -1:] + 1
        rows = torch.cat(sampled, 1).tolist()
        return [row[: row.index(EOS_ID)] if EOS_ID in row else row for row in rows]


class ProbeSet:
    """A fixed set of held-out prompts that rewards are measured on."""

    def __init__(self, task: ArithmeticTask, tokenizer: Tokenizer, size: int) -> None:
        held_out = task.held_out
        self._examples = [held_out[index % len(held_out)] for index in range(size)]
        self._tokenizer = tokenizer
        self._prompts = [tokenizer.encode(example.prompt).ids for example in self._examples]
        lengths = [len(worked_answer(example)) + 1 for example in self._examples]
        self.answer_length = sum(lengths) / size
        """mean over the right answers, in tokens"""
        # A right answer fits; a rambling one is cut off and earns nothing.
        self._max_new_tokens = max(lengths)

    def reward(self, sampler: AnswerSampler, generator: torch.Generator) -> float:
        """Mean reward of one sampled answer a prompt."""
        answers = sampler.sample(self._prompts, self._max_new_tokens, generator)
        completions = self._tokenizer.decode_batch(answers)
        references = [example.columns[REFERENCE] for example in self._examples]
        rewards = numeric_answer([example.prompt for example in self._examples], completions, reference=references)
        return sum(rewards) / len(rewards)
