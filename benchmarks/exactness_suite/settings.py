"""The sampling settings that are tested, one of a kind and all together."""

from pipeline.messages import SamplingParams


def settings(vocabulary: int) -> dict[str, SamplingParams]:
    """By name, for token ids below `vocabulary` (at least 8)."""
    return {
        "plain": SamplingParams(),
        "temperature 0.6": SamplingParams(temperature=0.6),
        "temperature 1.4": SamplingParams(temperature=1.4),
        "top-k": SamplingParams(top_k=max(3, vocabulary // 8)),
        "top-p": SamplingParams(top_p=0.85),
        "min-p": SamplingParams(min_p=0.08),
        "repetition": SamplingParams(repetition_penalty=1.4),
        "presence and frequency": SamplingParams(presence_penalty=0.5, frequency_penalty=0.4),
        "bias": SamplingParams(logit_bias=((1, 1.5), (3, -2.0))),
        "allowed": SamplingParams(allowed_token_ids=(*range(0, vocabulary, 2), 1)),
        "bad": SamplingParams(bad_token_ids=(0, 2, 5)),
        "minimum length": SamplingParams(min_new_tokens=4),
        "everything": SamplingParams(
            temperature=0.8, top_k=vocabulary // 2, top_p=0.95, min_p=0.01, repetition_penalty=1.2,
            presence_penalty=0.2, frequency_penalty=0.3, logit_bias=((1, 0.7),), bad_token_ids=(3,), min_new_tokens=3,
        ),
    }  # fmt: skip


SOME = {
    "plain": "standard",
    "temperature 0.6": "block",
    "top-p": "standard",
    "presence and frequency": "deterministic",
    "everything": "block",
}
"""Settings that between them use every code path, and the kind of draft each is tried with in the short form."""


def chosen(vocabulary: int, every: bool) -> dict[str, SamplingParams]:
    """All settings, or some."""
    return {name: params for name, params in settings(vocabulary).items() if every or name in SOME}
