"""The distribution that settings ask for, step by step in float64: what the batched code is compared with."""

from collections.abc import Collection, Sequence

import numpy as np

from pipeline.messages import SamplingParams


def processed_law(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    response_ids: Sequence[int] = (),
    stop: Collection[int] = (),
) -> np.ndarray:
    """Probabilities float64 [V] of the token after prompt and response, from its logits [V].

    Follows the definitions token by token (order as `pipeline.sampling.processors` says); slow on purpose.
    """
    z = [float(value) for value in logits]
    for token, value in params.logit_bias:
        z[token] += value
    for token in range(len(z)):
        barred = token in params.bad_token_ids or (
            bool(params.allowed_token_ids) and token not in params.allowed_token_ids
        )
        if barred or (token in stop and len(response_ids) < params.min_new_tokens):
            z[token] = -np.inf
    for token in {*prompt_ids, *response_ids}:
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token in response_ids:
        z[token] -= params.frequency_penalty
    for token in set(response_ids):
        z[token] -= params.presence_penalty
    if params.temperature == 0:
        return np.eye(len(z))[int(np.argmax(z))]
    return _truncated(_softmax(np.array(z) / params.temperature), params)


def _softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.max())
    return weights / weights.sum()


def _truncated(p: np.ndarray, params: SamplingParams) -> np.ndarray:
    if params.min_p > 0:
        p = np.where(p >= params.min_p * p.max(), p, 0)
        p = p / p.sum()
    if params.top_k > 0:
        p = np.where(p >= np.sort(p)[::-1][min(params.top_k, len(p)) - 1], p, 0)
        p = p / p.sum()
    if params.top_p < 1:
        mass = 0.0
        smallest = p.max()
        for value in np.sort(p)[::-1]:
            if mass >= params.top_p or value == 0:
                break
            mass, smallest = mass + value, value
        p = np.where(p >= smallest, p, 0)
        p = p / p.sum()
    return p
