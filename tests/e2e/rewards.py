"""Reward functions that tests name in a configuration as tests.e2e.rewards:NAME."""

import random

from pipeline.tasks.rewards import numeric_answer


def _shuffling(seed):
    generator = random.Random(seed)

    def shuffled(prompts, completions, **columns):
        """The right rewards of a group, given to the wrong samples: there is nothing to learn."""
        rewards = list(numeric_answer(prompts, completions, **columns))
        generator.shuffle(rewards)
        return rewards

    return shuffled


shuffled_0, shuffled_1, shuffled_2 = map(_shuffling, range(3))


def fails_on_some(prompts, completions, **columns):
    """Raises wherever a completion's length is a multiple of three."""
    if any(len(completion) % 3 == 0 for completion in completions):
        raise ValueError("length is a multiple of three")
    return [1.0] * len(completions)


def checksum(prompts, completions, **columns):
    """Differs between any two texts, also those of a policy that can do nothing yet."""
    return [sum(i * ord(c) for i, c in enumerate(completion, 1)) % 97 / 97 for completion in completions]


def constant(prompts, completions, **columns):
    return [1.0] * len(completions)


async def judged(prompts, completions, reference, **columns):
    """In TRL's conversational form: whether an answer that thought ends as the reference; no judgement of others."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [
        float(message["content"].endswith(stated)) if "<think>" in message["content"] else None
        for (message,), stated in zip(completions, reference, strict=True)
    ]
