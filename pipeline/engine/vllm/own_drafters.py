"""Drafters of ours that vLLM runs itself, since they need what its plug point does not give: their models become its
speculative models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafters.base import Drafter
from drafters.draft_model import DraftModelDrafter
from drafters.mtp.drafter import MTPDrafter
from drafters.mtp.vllm_form import write_for_vllm
from pipeline.errors import UsageError
from pipeline.models.tokenizer import Tokenizer

HEAD = "mtp-head"
KINDS = (MTPDrafter, DraftModelDrafter)


def runs_itself(drafter: Drafter) -> bool:
    """Whether vLLM has this drafter as a method of its own."""
    return isinstance(drafter, KINDS)


def speculative_config(
    drafter: Drafter, given: Mapping[str, Any], folder: Path, most: int, scratch: Path
) -> dict[str, Any]:
    """vLLM's `speculative_config` for a drafter that it runs itself.

    Args:
        drafter: built of `given`.
        given: options that were set, by name.
        folder: the target's checkpoint directory.
        most: tokens of the longest draft.
        scratch: where a head is written in vLLM's form.

    Raises:
        UsageError: an option that vLLM has no counterpart for, no head or draft model, or one that does not fit.
    """
    for key in ("stop_below", "dtype", "kv_mb"):
        if given.get(key, 0) not in (0, "auto"):
            raise UsageError(
                f'{key} = {given[key]!r} of drafter {drafter.name} is the native generator\'s; remove it, or use '
                'engine.generator = "native"'
            )  # fmt: skip
    if isinstance(drafter, MTPDrafter):
        from pipeline.engine.vllm.head_config import register

        register()
        method, model = "mtp", scratch / HEAD
        write_for_vllm(folder, Path(drafter.options.path or folder), model)
    elif isinstance(drafter, DraftModelDrafter):
        method, model = "draft_model", Path(drafter.options.path).absolute()
        _check_tokenizer(model, folder)
    else:
        raise TypeError(f"{drafter.name} is not vLLM's own")
    return {
        "method": method,
        "model": str(model),
        "num_speculative_tokens": min(most, drafter.options.max_tokens),
        "draft_sample_method": "greedy" if drafter.options.greedy else "probabilistic",
    }


def _check_tokenizer(draft: Path, folder: Path) -> None:
    """vLLM compares sizes of vocabularies; tokens must be the same as well."""
    if not all((path / "tokenizer.json").exists() for path in (draft, folder)):
        return
    theirs, mine = Tokenizer(folder), Tokenizer(draft)
    differing = theirs.first_difference(mine)
    if differing is not None:
        raise UsageError(
            f"draft model {draft} has another tokenizer than the policy: the first token that differs is {differing}, "
            f"{mine.token(differing)!r} there and {theirs.token(differing)!r} in the policy's; give a checkpoint with "
            "the policy's tokenizer"
        )
