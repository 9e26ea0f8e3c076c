"""Log-probs of trained tokens and full-vocabulary quantities, without ever holding all their logits."""

from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from learner import ranks
from learner.attention import attention_entropies, segment_arguments
from learner.lean import gradient_of
from learner.linear import times_transposed
from learner.packing import Kept, Pack

CHUNK_ELEMENTS = 1 << 22
"""Logits in memory at once: 16 MiB of float32 for each of the two buffers that a chunk needs."""
MIN_CHUNK_TOKENS = 64
"""With fewer tokens, reading the weight takes longer than the product."""
WEIGHT_ROWS = 1 << 14
"""Rows of the weight's gradient that are computed at once, before they are added to those of other chunks."""
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

    Args:
        model: a causal language model loaded by `learner.policy.load_policy`.
        temperature: of all tokens, or of each, float32 [T].
        compute: bfloat16 for the layers' matrix products; logits, log-probs and entropies are float32 in any case,
            since ratios and entropy ratios near 1 would be lost to rounding.
    """
    return ranks.with_weights(model, _pack_logprobs, pack, temperature, wanted, compute)


def _pack_logprobs(
    model: PreTrainedModel, pack: Pack, temperature: float | torch.Tensor, wanted: Wanted, compute: torch.dtype
) -> TokenValues:
    device = model.device.type
    with (
        torch.autocast(device, compute, enabled=compute != torch.float32),
        attention_entropies(model, wanted.attention_entropy) as attention,
    ):
        hidden_LH = model.base_model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            use_cache=False,
            **segment_arguments(pack.cu_seq_lens, pack.prefixes, pack.input_ids.device),
        ).last_hidden_state[0].float()  # fmt: skip
    head = model.get_output_embeddings()
    values = token_logprobs(
        hidden_LH[pack.predictor],
        head.weight,
        pack.target,
        temperature,
        head.bias,
        wanted=wanted,
        gradient_products=compute,
        accumulate=ranks.world_size() == 1,  # FSDP takes gradients from autograd
        kept=pack.kept,
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
    gradient_products: torch.dtype | None = None,
    accumulate: bool = False,
    kept: Kept | None = None,
) -> TokenValues:
    """log softmax(hidden W^T / temperature) of the targets, the entropy of that distribution, and what else is wanted.

    With `kept` the softmax behind a log-prob runs over the ids kept for its token; the entropy's does not.

    Works on `chunk_tokens` tokens at a time (default: `CHUNK_ELEMENTS` logits) and computes the logits again in the
    backward pass, so memory does not grow with T * V. Liger's fused linear cross-entropy saves the second computation
    of the logits, but gives no entropies; so this is used on GPUs too.

    Args:
        gradient_products: type of the two products of the backward pass that make the gradients of hidden states and
            weight, and that no value depends on; default: that of `hidden_TH`.
        accumulate: add the weight's gradient to `weight_VH.grad` in place of handing it to autograd, which would hold
            one more tensor of the weight's size.
    """
    tokens, chunk = len(target_T), chunk_tokens or max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // weight_VH.shape[0])
    empty = hidden_TH.new_zeros(0, dtype=torch.float32)
    if not tokens:
        # Nothing, but with a gradient of zeros: FSDP reduces the gradients of all ranks, also of one without tokens.
        nothing = hidden_TH.sum(-1) + weight_VH[:0].sum()
        nothing = nothing if bias_V is None else nothing + bias_V[:0].sum()
        return TokenValues(nothing, empty, empty, empty, empty)
    temperature_T1 = torch.as_tensor(temperature, device=hidden_TH.device).to(hidden_TH.dtype)
    temperature_T1 = temperature_T1.expand(tokens)[:, None]
    with torch.autocast(hidden_TH.device.type, enabled=False):
        logp, entropy, score = _FullVocabulary.apply(
            hidden_TH, weight_VH, bias_V, target_T, temperature_T1, wanted, chunk, gradient_products, accumulate
        )
        head = weight_VH, bias_V
        nucleus = [
            _again(_chunk_nucleus, hidden_TH[part], *head, temperature_T1[part], wanted.nucleus)
            for part in _parts(tokens if wanted.nucleus else 0, chunk)
        ]
        mass = []
        for part in _parts(tokens if kept is not None else 0, chunk):
            assert kept is not None
            ids_CK = kept.padded(part.start, part.stop)
            mass.append(_again(_chunk_log_mass, hidden_TH[part], *head, temperature_T1[part], ids_CK))
    return TokenValues(logp - torch.cat(mass) if mass else logp, entropy, score, torch.cat([empty, *nucleus]), empty)


def _again(function: Any, *arguments: Any) -> torch.Tensor:
    """A chunk's values, computed again in the backward pass."""
    values: torch.Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return values


def _parts(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


class _FullVocabulary(torch.autograd.Function):
    """Log-probs, entropies and expected scores, chunk by chunk.

    Only the inputs and the entropies are kept. The backward pass computes a chunk's logits once more, and only of those
    tokens that have a gradient at all: clipped and gated tokens and groups without signal have none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_T: torch.Tensor,
        temperature_T1: torch.Tensor,
        wanted: Wanted,
        chunk: int,
        gradient_products: torch.dtype | None,
        accumulate: bool,
    ) -> tuple[torch.Tensor, ...]:
        logp_T, entropy_T = hidden_TH.new_empty(len(target_T)), hidden_TH.new_empty(len(target_T))
        score_T = hidden_TH.new_empty(len(target_T) if wanted.expected_score else 0)
        for part in _parts(len(target_T), chunk):
            logits_CV = _logits(hidden_TH[part], weight_VH, bias_V, temperature_T1[part])
            logprobs_CV = logits_CV.log_softmax(-1)
            logp_T[part] = logprobs_CV.gather(1, target_T[part, None])[:, 0]
            p_CV = torch.exp(logprobs_CV, out=logits_CV)
            if wanted.expected_score:
                square_CV = p_CV.square()
            # Summed as -p log p, all terms of one sign: log Z - E[logit] cancels to noise where the entropy is small.
            entropy_T[part] = -p_CV.mul_(logprobs_CV).sum(-1)
            if wanted.expected_score:
                score_T[part] = square_CV.mul_(logprobs_CV.add_(entropy_T[part, None])).sum(-1)
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, target_T, temperature_T1, entropy_T)
        ctx.chunk, ctx.gradient_products, ctx.accumulate = chunk, gradient_products, accumulate
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([score_T] if wanted.entropy_gradient else [entropy_T, score_T]))
        return logp_T, entropy_T, score_T

    @staticmethod
    def backward(
        ctx: Any, of_logp_T: torch.Tensor | None, of_entropy_T: torch.Tensor | None, of_score_T: None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, bias_V, target_T, temperature_T1, entropy_T = ctx.saved_tensors
        gradients = [g for g in (of_logp_T, of_entropy_T) if g is not None]
        active_T = torch.stack([g != 0 for g in gradients]).any(0) if gradients else target_T < 0
        of_hidden_TH = torch.zeros_like(hidden_TH) if ctx.needs_input_grad[0] else None
        of_weight_VH = None
        if ctx.needs_input_grad[1]:
            of_weight_VH = gradient_of(weight_VH) if ctx.accumulate else torch.zeros_like(weight_VH)
        of_bias_V = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        dtype = ctx.gradient_products or hidden_TH.dtype
        weight = weight_VH.to(dtype)
        active = active_T.nonzero()[:, 0]
        for part in _parts(len(active), ctx.chunk):
            rows = active[part]
            hidden_CH = hidden_TH[rows]
            logits_CV = _logits(hidden_CH, weight_VH, bias_V, temperature_T1[rows])
            g = _logit_gradient(
                logits_CV,
                target_T[rows],
                None if of_logp_T is None else of_logp_T[rows, None],
                None if of_entropy_T is None else of_entropy_T[rows, None],
                entropy_T[rows, None],
            ).div_(temperature_T1[rows])
            if of_bias_V is not None:
                of_bias_V += g.sum(0)
            g, hidden = g.to(dtype), hidden_CH.to(dtype)
            if of_hidden_TH is not None:
                of_hidden_TH[rows] = times_transposed(g, weight.t()).to(hidden_TH.dtype)
            if of_weight_VH is not None:
                for vocabulary in _parts(len(weight_VH), WEIGHT_ROWS):
                    of_weight_VH[vocabulary] += times_transposed(g[:, vocabulary].t(), hidden.t())
        handed_VH = None if ctx.accumulate else of_weight_VH
        return of_hidden_TH, handed_VH, of_bias_V, None, None, None, None, None, None


def _logits(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, temperature_C1: torch.Tensor
) -> torch.Tensor:
    logits_CV = times_transposed(hidden_CH, weight_VH)
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV.div_(temperature_C1)


def _logit_gradient(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    of_logp_C1: torch.Tensor | None,
    of_entropy_C1: torch.Tensor | None,
    entropy_C1: torch.Tensor,
) -> torch.Tensor:
    """d log p_a / dz_v = [v = a] - p_v and dH / dz_v = -p_v (log p_v + H), each times its gradient; overwrites."""
    logprobs_CV = logits_CV.log_softmax(-1)
    g_CV = torch.exp(logprobs_CV, out=logits_CV)
    if of_entropy_C1 is None:
        assert of_logp_C1 is not None
        g_CV.mul_(-of_logp_C1)
    else:
        factor_CV = logprobs_CV.add_(entropy_C1).mul_(of_entropy_C1)
        if of_logp_C1 is not None:
            factor_CV += of_logp_C1
        g_CV.mul_(factor_CV.neg_())
    if of_logp_C1 is not None:
        g_CV.scatter_add_(1, target_C[:, None], of_logp_C1)
    return g_CV


def _chunk_nucleus(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature_C1: torch.Tensor,
    mass: float,
) -> torch.Tensor:
    logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V) / temperature_C1
    return _nucleus_entropy(logits_CV.log_softmax(dim=-1), mass)


def _chunk_log_mass(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature_C1: torch.Tensor,
    kept_CK: torch.Tensor,
) -> torch.Tensor:
    """Log of the probability of the ids kept for each token, [C]; 0 for a token without, drawn from all of them."""
    logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V) / temperature_C1
    left_CK = logits_CV.log_softmax(-1).gather(1, kept_CK.clamp_min(0)).masked_fill(kept_CK < 0, float("-inf"))
    whole_C = (kept_CK < 0).all(-1)
    left_CK = torch.where(whole_C[:, None], 0.0, left_CK)
    return torch.where(whole_C, 0.0, left_CK.logsumexp(-1))


def _nucleus_entropy(logprobs_CV: torch.Tensor, mass: float) -> torch.Tensor:
    """Entropy of the most probable tokens up to the one with which they hold `mass`, renormalised; [C]."""
    top_CK = logprobs_CV.topk(min(NUCLEUS_CANDIDATES, logprobs_CV.shape[-1]), dim=-1).values
    p_CK = top_CK.detach().exp()
    inside_CK = p_CK.cumsum(-1) - p_CK < mass
    kept_CK = top_CK.masked_fill(~inside_CK, -torch.inf).log_softmax(-1)
    # Outside the nucleus p log p is 0 times minus infinity, in the backward pass too: it must not be formed.
    kept_CK = kept_CK.masked_fill(~inside_CK, 0.0)
    return -(torch.where(inside_CK, kept_CK.exp(), 0.0) * kept_CK).sum(-1)
