"""Our sampling parameters as vLLM's."""

from collections.abc import Collection
from typing import Any

import msgspec

from pipeline.config.check_vllm import temperature_refusal
from pipeline.engine.vllm.refusals import reason
from pipeline.errors import UsageError
from pipeline.messages import SamplingParams

PENALTY, BIAS = 2.0, 100.0
"""vLLM takes presence and frequency penalties, and logit biases, no larger than these"""


def refusal(params: SamplingParams, speculating: bool) -> str | None:
    """Why vLLM cannot sample so, in one sentence; None when it can."""
    if (why := temperature_refusal("sampling.temperature", params.temperature)) is not None:
        return why
    if speculating and params.min_p > 0:
        return (
            f"sampling.min_p = {params.min_p} does not work together with drafting in vLLM; set engine.drafter = "
            '"none" or sampling.min_p = 0'
        )
    if speculating and params.logit_bias:
        return (
            'sampling.logit_bias does not work together with drafting in vLLM; set engine.drafter = "none" or remove it'
        )
    if any(abs(value) > BIAS for _, value in params.logit_bias):
        return f"sampling.logit_bias has a value beyond ±{BIAS:g}, which vLLM would clip; choose a smaller one"
    for key in ("presence_penalty", "frequency_penalty"):
        if abs(value := getattr(params, key)) > PENALTY:
            return f"sampling.{key} = {value} is beyond ±{PENALTY:g}, the most that vLLM takes; choose a smaller one"
    return None


def allowed_tokens(params: SamplingParams, vocab_size: int) -> list[int] | None:
    """The tokens that can be drawn, in order; None: all, for which vLLM would also take an empty list.

    Raises:
        UsageError: there is none.
    """
    if not (params.allowed_token_ids or params.bad_token_ids):
        return None
    allowed = set(params.allowed_token_ids or range(vocab_size)) - set(params.bad_token_ids)
    if not allowed:
        raise UsageError(
            "no token can be drawn: sampling.bad_token_ids holds all of sampling.allowed_token_ids, or the whole "
            "vocabulary; allow others"
        )
    return sorted(allowed)


def translated(
    params: SamplingParams,
    *,
    seed: int,
    temperature: float,
    max_tokens: int,
    stop: Collection[int],
    vocab_size: int,
    speculating: bool,
    extra: dict[str, Any],
) -> Any:
    """`vllm.SamplingParams` of one sample.

    Args:
        params: of the group.
        seed, temperature: of the sample.
        max_tokens: longest response.
        stop: ids that end it, all of them.
        vocab_size: of the model.
        speculating: whether vLLM drafts.
        extra: for the drafter.

    Raises:
        UsageError: settings that vLLM does not have.
    """
    import vllm
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    if (why := refusal(msgspec.structs.replace(params, temperature=temperature), speculating)) is not None:
        raise UsageError(why)
    allowed = allowed_tokens(params, vocab_size)
    try:
        return vllm.SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            min_tokens=min(params.min_new_tokens, max_tokens),
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=dict(params.logit_bias) or None,
            allowed_token_ids=allowed,
            stop_token_ids=sorted(stop),
            ignore_eos=True,
            stop=list(params.stop_strings) or None,
            detokenize=bool(params.stop_strings),
            seed=seed % (1 << 63),
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra,
        )
    except (ValueError, VLLMValidationError) as error:
        raise UsageError(f"vLLM does not take sampling = {msgspec.to_builtins(params)}: {reason(error)}") from error
