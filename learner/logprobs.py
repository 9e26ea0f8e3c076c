"""Log-probs of trained tokens and full-vocabulary quantities, without ever holding all their logits."""

from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from learner.attention import attention_entropies, segment_arguments
from learner.packing import Kept, Pack

CHUNK_ELEMENTS = 1 << 22
"""Logits in memory at once: 16 MiB of float32 for each of the few buffers a chunk needs."""
NUCLEUS_CANDIDATES = 10_000
"""Most tokens a nucleus may have; SIREN's bound."""


class Wanted(NamedTuple):
    """What is computed beside log-probs and entropies."""

    entropy_gradient: bool = False
    """differentiate the entropy too"""
    expected_score: bool = False
    nucleus: float = 0.0
    """mass of the nucleus whose entropy is wanted, with gradient; 0: none"""
    attention_entropy: bool = False


class TokenValues(NamedTuple):
    """Of T trained tokens, float32 [T] each, nats; what was not wanted is empty."""

    logp: torch.Tensor
    entropy: torch.Tensor
    expected_score: torch.Tensor
    """sum_v p_v^2 (log p_v + H)"""
    nucleus_entropy: torch.Tensor
    attention_entropy: torch.Tensor


def pack_logprobs(
    model: PreTrainedModel,
    pack: Pack,
    temperature: float | torch.Tensor,
    wanted: Wanted = Wanted(),  # noqa: B008 - immutable
    compute: torch.dtype = torch.float32,
) -> TokenValues:
    """Log-prob and entropy at the T trained tokens of a pack, at the sampling temperature.

    A token that was drawn from a truncated distribution has its log-prob among the ids that were kept then; entropies
    are of the whole vocabulary.

    Args:
        model: a causal language model loaded by `learner.policy.load_policy`.
        temperature: of all tokens, or of each, float32 [T].
        compute: bfloat16 for the layers' matrix products; logits, log-probs and entropies are float32 in any case,
            since ratios and entropy ratios near 1 would be lost to rounding.
    """
    device = model.device.type
    with (
        torch.autocast(device, compute, enabled=compute != torch.float32),
        attention_entropies(model, wanted.attention_entropy) as attention,
    ):
        hidden_LH = model.base_model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            use_cache=False,
            **segment_arguments(pack.cu_seq_lens),
        ).last_hidden_state[0].float()  # fmt: skip
    head = model.get_output_embeddings()
    values = token_logprobs(
        hidden_LH[pack.predictor], head.weight, pack.target, temperature, head.bias, wanted=wanted, kept=pack.kept
    )
    if wanted.attention_entropy:
        values = values._replace(attention_entropy=attention[0][pack.predictor])
    return values


def token_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    temperature: float | torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    wanted: Wanted = Wanted(),  # noqa: B008 - immutable
    chunk_tokens: int | None = None,
    kept: Kept | None = None,
) -> TokenValues:
    """log softmax(hidden W^T / temperature) of the targets, the entropy of that distribution, and what else is wanted.

    With `kept` the softmax behind a log-prob runs over the ids kept for its token; the entropy's does not.

    Works on `chunk_tokens` tokens at a time (default: `CHUNK_ELEMENTS` logits) and computes the logits again in the
    backward pass, so memory does not grow with T * V.
    """
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // weight_VH.shape[0])
    temperature_T1 = torch.as_tensor(temperature, device=hidden_TH.device).float().expand(len(target_T))[:, None]
    chunks = []
    for start in range(0, len(target_T), chunk):
        stop = min(start + chunk, len(target_T))
        arguments = (
            hidden_TH[start:stop], weight_VH, bias_V, target_T[start:stop], temperature_T1[start:stop], wanted,
            None if kept is None else kept.padded(start, stop),
        )  # fmt: skip
        if torch.is_grad_enabled():
            chunks.append(checkpoint(_chunk_logprobs, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(_chunk_logprobs(*arguments))
    empty = hidden_TH.new_zeros(0, dtype=torch.float32)
    if not chunks:
        return TokenValues(empty, empty, empty, empty, empty)
    logp, entropy, score, nucleus = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return TokenValues(logp, entropy, score, nucleus, empty)


def _chunk_logprobs(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_C: torch.Tensor,
    temperature_C1: torch.Tensor,
    wanted: Wanted,
    kept_CK: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V).float() / temperature_C1
    logprobs_CV = logits_CV.log_softmax(dim=-1)
    logp_C = logprobs_CV.gather(1, target_C[:, None]).squeeze(1)
    if kept_CK is not None:
        left_CK = logprobs_CV.gather(1, kept_CK.clamp_min(0)).masked_fill(kept_CK < 0, float("-inf"))
        # A token without kept ids was drawn from all of them, whose mass is 1.
        whole_C = (kept_CK < 0).all(-1)
        left_CK = torch.where(whole_C[:, None], 0.0, left_CK)
        logp_C = logp_C - torch.where(whole_C, 0.0, left_CK.logsumexp(-1))
    # Summed as -p log p, all terms of one sign: log Z - E[logit] cancels to noise where the entropy is small.
    with torch.set_grad_enabled(wanted.entropy_gradient and torch.is_grad_enabled()):
        entropy_C = -(logprobs_CV.exp() * logprobs_CV).sum(dim=-1)
    score_C = nucleus_C = logits_CV.new_zeros(0)
    if wanted.expected_score:
        with torch.no_grad():
            score_C = (logprobs_CV.exp().square() * (logprobs_CV + entropy_C[:, None])).sum(dim=-1)
    if wanted.nucleus:
        nucleus_C = _nucleus_entropy(logprobs_CV, wanted.nucleus)
    return logp_C, entropy_C, score_C, nucleus_C


def _nucleus_entropy(logprobs_CV: torch.Tensor, mass: float) -> torch.Tensor:
    """Entropy of the most probable tokens up to the one with which they hold `mass`, renormalised; [C]."""
    top_CK = logprobs_CV.topk(min(NUCLEUS_CANDIDATES, logprobs_CV.shape[-1]), dim=-1).values
    p_CK = top_CK.detach().exp()
    inside_CK = p_CK.cumsum(-1) - p_CK < mass
    kept_CK = top_CK.masked_fill(~inside_CK, -torch.inf).log_softmax(-1)
    # Outside the nucleus p log p is 0 times minus infinity, in the backward pass too: it must not be formed.
    kept_CK = kept_CK.masked_fill(~inside_CK, 0.0)
    return -(torch.where(inside_CK, kept_CK.exp(), 0.0) * kept_CK).sum(-1)
