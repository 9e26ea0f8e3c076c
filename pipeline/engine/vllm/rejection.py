"""vLLM's rejection sampler: what is wrong with it on a CPU is corrected, and the installed one is tested.

In vLLM 0.32 on a CPU, `expand_batch_to_tokens` writes into a converted copy of its output, so that temperature, top-k
and top-p of drafted positions are uninitialised memory and what is sampled follows the draft; a draft of -1, which
stands for "none", indexes in front of a row of probabilities; and a step whose drafts are all empty, as of the last
tokens that sequences have room for, ends the worker where there is a top-k.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.messages import SamplingParams
from pipeline.sampling.exactness import chi_square_p_value, processed_law

STOCK = "ROLLAHEAD_VLLM_STOCK_SAMPLER"
"""environment variable that leaves the sampler as it is, and what `chunked_seeds` corrects, to show what is wrong"""
CHECK_LEVEL = 1e-7
"""p-value below which a sampler is refused; a right one is, once in ten million starts and setting"""


def correct(sampler: Any) -> None:
    """Puts the corrections into `vllm.v1.sample.rejection_sampler`; twice is as good as once."""
    if sampler.expand_batch_to_tokens is not expand_batch_to_tokens:
        sampler.expand_batch_to_tokens = expand_batch_to_tokens
        sampler.rejection_sample = without_missing_drafts(sampler.rejection_sample)
        sampler.apply_sampling_constraints = with_nothing_to_constrain(sampler.apply_sampling_constraints)


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """x[b] once for each of row b's tokens.

    Args:
        x: [B].
        cu_num_tokens: [B], tokens of the rows up to and including each.
        num_tokens: of all rows.
        replace_from: value that becomes `replace_to`.
        replace_to: the value instead.
    """
    if replace_from != replace_to:
        x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return x.repeat_interleave(counts.long(), output_size=num_tokens)


def with_nothing_to_constrain(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`apply_sampling_constraints` of logits [0, V] as well."""

    def apply_sampling_constraints(logits: Tensor, *rest: Any, **named: Any) -> Tensor:
        return stock(logits, *rest, **named) if len(logits) else logits

    return apply_sampling_constraints


def without_missing_drafts(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`rejection_sample` in which a draft of -1 is a token of its own that the target never samples: it is rejected,
    and what is drawn in its place follows the target."""

    def rejection_sample(
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_logits: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        missing = draft_token_ids < 0
        if bool(missing.any()):
            draft_token_ids = draft_token_ids.masked_fill(missing, target_logits.shape[1])
            target_logits = torch.nn.functional.pad(target_logits, (0, 1), value=float("-inf"))
            if draft_probs is not None:
                draft_probs = torch.nn.functional.pad(draft_probs.masked_fill(missing[:, None], 0.0), (0, 1))
        return stock(
            draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits,
            *rest, **named,
        )  # fmt: skip

    return rejection_sample


# ---- the test ----------------------------------------------------------------------------------------------------

SETTINGS = {
    "temperature 0.6": SamplingParams(temperature=0.6),
    "temperature 1": SamplingParams(),
    "top-k 3": SamplingParams(temperature=0.8, top_k=3),
    "top-p 0.8": SamplingParams(top_p=0.8),
}
"""what a sampler is tested with"""
LOGITS = (1.5, 1.0, 0.5, 0.0, -0.5, -1.0)


def prepare() -> None:
    """What a worker does before its first step, for a process that tests the sampler without an engine."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()


def check(device: torch.device, rows: int = 20_000, missing: bool = False, drawn: bool = False) -> dict[str, float]:
    """Chi-square p-values of the first token that vLLM's rejection sampler emits for one drafted token, by setting.

    The draft is the least likely token that can be drawn, so that a sampler which follows it fails by much. A sampler
    that raises has p-value 0.

    Args:
        device: where to sample.
        rows: sequences in the batch.
        missing: whether the drafts are -1, which stands for none.
        drawn: whether the drafts are drawn, from a distribution unlike the target's that the sampler is given.
    """
    found = {}
    for name, params in SETTINGS.items():
        law = processed_law(np.array(LOGITS), params, (), (), ())
        q = np.exp(-np.array(LOGITS)) / np.exp(-np.array(LOGITS)).sum() if drawn else None
        if q is None:
            drafts = np.full(rows, -1 if missing else int(np.where(law > 0, law, 2.0).argmin()))
        else:
            drafts = np.random.default_rng(0).choice(len(q), rows, p=q)
        tokens = _sampled(params, drafts, q, device)
        if tokens is None or tokens.min() < 0 or tokens.max() >= len(law):
            found[name] = 0.0
        else:
            found[name] = chi_square_p_value(np.bincount(tokens, minlength=len(law)), law * rows)
    return found


def _sampled(
    params: SamplingParams, drafts: np.ndarray, q: np.ndarray | None, device: torch.device
) -> np.ndarray | None:
    """Tokens int64 [rows] for as many drafts, drawn from `q` [V] if it is given; None: the sampler raised."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    rows = len(drafts)

    def each(value: float, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=kind, device=device)

    cumulative, none = torch.arange(1, rows + 1, dtype=torch.int32, device=device), each(0.0)
    metadata = SamplingMetadata(
        temperature=each(params.temperature), all_greedy=False, all_random=True,
        top_p=each(params.top_p) if params.top_p < 1 else None,
        top_k=each(params.top_k, torch.int32) if params.top_k else None,
        generators={}, max_num_logprobs=None, no_penalties=True, prompt_token_ids=None, frequency_penalties=none,
        presence_penalties=none, repetition_penalties=none, output_token_ids=[], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip
    logits = torch.tensor(LOGITS, device=device).repeat(rows, 1)
    bonus = torch.zeros((rows, 1), dtype=torch.int64, device=device)
    proposed = torch.from_numpy(drafts).to(device, torch.int32)
    given = None if q is None else torch.from_numpy(q).to(device, torch.float32).repeat(rows, 1)
    try:
        target = rejection_sampler.apply_sampling_constraints(logits, cumulative, metadata)
        emitted = rejection_sampler.rejection_sample(
            proposed, [1] * rows, 1, cumulative, given, target, bonus, metadata
        )
    except RuntimeError:  # uninitialised memory makes some settings raise
        return None
    tokens: np.ndarray = emitted[:, 0].long().cpu().numpy()
    return tokens
