"""Log-probs of trained tokens and full-vocabulary entropies, without ever holding all their logits."""

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from learner.attention import segment_arguments
from learner.packing import Kept, Pack

CHUNK_ELEMENTS = 1 << 22
"""Logits in memory at once: 16 MiB of float32 for each of the few buffers a chunk needs."""


def pack_logprobs(
    model: PreTrainedModel,
    pack: Pack,
    temperature: float,
    entropy_gradient: bool = False,
    compute: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy at the T trained tokens of a pack, at the sampling temperature.

    A token that was drawn from a truncated distribution has its log-prob among the ids that were kept then; entropies
    are of the whole vocabulary.

    Args:
        model: a causal language model loaded by `learner.policy.load_policy`.
        entropy_gradient: whether the entropy is differentiated too.
        compute: bfloat16 for the layers' matrix products; logits, log-probs and entropies are float32 in any case,
            since ratios and entropy ratios near 1 would be lost to rounding.

    Returns:
        log-probs, float32 [T], and entropies, float32 [T], in nats.
    """
    with torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
        hidden_LH = model.base_model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            use_cache=False,
            **segment_arguments(pack.cu_seq_lens),
        ).last_hidden_state[0].float()  # fmt: skip
    head = model.get_output_embeddings()
    return token_logprobs(
        hidden_LH[pack.predictor],
        head.weight,
        pack.target,
        temperature,
        head.bias,
        entropy_gradient=entropy_gradient,
        kept=pack.kept,
    )


def token_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    temperature: float,
    bias_V: torch.Tensor | None = None,
    *,
    entropy_gradient: bool = False,
    chunk_tokens: int | None = None,
    kept: Kept | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden W^T / temperature) of the targets, and the entropy of that distribution, both float32 [T].

    With `kept` the softmax behind a log-prob runs over the ids kept for its token; the entropy's does not.

    Works on `chunk_tokens` tokens at a time (default: `CHUNK_ELEMENTS` logits) and computes the logits again in the
    backward pass, so memory does not grow with T * V.
    """
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // weight_VH.shape[0])
    logps, entropies = [], []
    for start in range(0, len(target_T), chunk):
        stop = min(start + chunk, len(target_T))
        arguments = (
            hidden_TH[start:stop], weight_VH, bias_V, target_T[start:stop], temperature, entropy_gradient,
            None if kept is None else kept.padded(start, stop),
        )  # fmt: skip
        if torch.is_grad_enabled():
            logp, entropy = checkpoint(_chunk_logprobs, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            logp, entropy = _chunk_logprobs(*arguments)
        logps.append(logp)
        entropies.append(entropy)
    if not logps:
        empty = hidden_TH.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat(logps), torch.cat(entropies)


def _chunk_logprobs(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_C: torch.Tensor,
    temperature: float,
    entropy_gradient: bool,
    kept_CK: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V).float() / temperature
    logprobs_CV = logits_CV.log_softmax(dim=-1)
    logp_C = logprobs_CV.gather(1, target_C[:, None]).squeeze(1)
    if kept_CK is not None:
        left_CK = logprobs_CV.gather(1, kept_CK.clamp_min(0)).masked_fill(kept_CK < 0, float("-inf"))
        # A token without kept ids was drawn from all of them, whose mass is 1.
        whole_C = (kept_CK < 0).all(-1)
        left_CK = torch.where(whole_C[:, None], 0.0, left_CK)
        logp_C = logp_C - torch.where(whole_C, 0.0, left_CK.logsumexp(-1))
    # Summed as -p log p, all terms of one sign: log Z - E[logit] cancels to noise where the entropy is small.
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_C = -(logprobs_CV.exp() * logprobs_CV).sum(dim=-1)
    return logp_C, entropy_C
