"""The seam: a policy scores cached tokens, for each layer and KV head by itself; the best ones are kept."""

from abc import ABC, abstractmethod
from traceback import extract_tb
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.config.types import Section
from pipeline.errors import RunFailed, UsageError


class EvictionPolicy(ABC):
    """Scores the T cached tokens of B sequences; of each KV head those with the highest scores stay.

    The first `sinks` tokens and the last `recent` ones stay whatever their scores are. A policy keeps no state: what it
    says depends on what is cached and on the text alone, so that a sequence that was preempted can be computed again.
    """

    Options: ClassVar[type[Section]]

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def queries(self) -> int:
        """Newest tokens whose queries `scores` gets; at most `recent`."""
        return 0

    @property
    def sinks(self) -> int:
        return 0

    @property
    @abstractmethod
    def recent(self) -> int:
        """At least 1 and fewer than the budget."""

    @abstractmethod
    def scores(self, keys: Tensor, queries: Tensor) -> Tensor:
        """float32 [B, kv_heads, T], higher for what is worth more.

        Args:
            keys: [B, kv_heads, T, D], rotated to their positions, oldest first; the oldest are the sinks.
            queries: [B, heads, W, D] of the newest W = `queries` tokens, rotated; W is 0 where none were asked for.
        """


def kept(policy: EvictionPolicy, keys: Tensor, queries: Tensor, budget: int) -> Tensor:
    """int64 [B, kv_heads, budget], which tokens stay of those `EvictionPolicy.scores` describes, oldest first.

    Raises:
        RunFailed: the policy has none, or they are of another shape or no numbers.
    """
    try:
        found = policy.scores(keys, queries)
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        place = extract_tb(error.__traceback__)[-1]
        raise RunFailed(
            f"eviction policy {title(policy)} raised {error!r} for scores ({place.filename}, line {place.lineno}); "
            "mend it, or take another engine.kv_compression.policy"
        ) from error
    _check_scores(policy, found, keys.shape[:3])
    # No score may be as high as those of the tokens that always stay.
    highest = torch.finfo(torch.float32).max
    scores = found.float().clamp(-highest, highest)
    scores[..., : policy.sinks] = torch.inf
    scores[..., keys.shape[2] - policy.recent :] = torch.inf
    return scores.topk(budget, dim=-1, sorted=False).indices.sort(dim=-1).values


def _check_scores(policy: EvictionPolicy, scores: Any, shape: torch.Size) -> None:
    wanted = f"give a tensor of float32 {list(shape)}: sequences, KV heads, cached tokens"
    if not isinstance(scores, Tensor):
        raise RunFailed(f"eviction policy {title(policy)} returned {scores!r:.80} for scores; {wanted}")
    if scores.shape != shape:
        raise RunFailed(f"eviction policy {title(policy)} returned scores of shape {list(scores.shape)}; {wanted}")
    if count := int(scores.isnan().sum()):
        raise RunFailed(
            f"eviction policy {title(policy)} returned {count} scores of {scores.numel()} that are NaN, which have no "
            "order; give numbers"
        )


def title(policy: EvictionPolicy) -> str:
    """As a configuration can name it: module:Class."""
    return f"{type(policy).__module__}:{type(policy).__qualname__}"


def check_counts(policy: EvictionPolicy) -> None:
    """Raises UsageError where `sinks`, `recent` or `queries` are not what EvictionPolicy says of them."""
    try:
        counts = {"sinks": policy.sinks, "recent": policy.recent, "queries": policy.queries}
    except (Exception, SystemExit) as error:  # as in `kept`
        raise UsageError(
            f"eviction policy {title(policy)} raised {error!r} instead of saying its sinks, recent and queries; mend it"
        ) from error
    for key, least in (("sinks", 0), ("recent", 1), ("queries", 0)):
        if type(counts[key]) is not int or counts[key] < least:
            raise UsageError(
                f"eviction policy {title(policy)} has {key} = {counts[key]!r}; give a whole number of at least {least}"
            )
    if counts["queries"] > counts["recent"]:
        raise UsageError(
            f"eviction policy {title(policy)} asks for queries = {counts['queries']} of its recent = "
            f"{counts['recent']} latest tokens; ask for no more than stay, or keep more"
        )


def attention_scores(keys: Tensor, queries: Tensor) -> Tensor:
    """Scaled products float32 [B, kv_heads, group, W, T] of queries [B, heads, W, D] and keys [B, kv_heads, T, D]."""
    folded = queries.float().unflatten(1, (keys.shape[1], -1))
    return folded @ keys.float().transpose(-1, -2).unsqueeze(2) * keys.shape[-1] ** -0.5


def check_kernel(kernel: int) -> None:
    """Raises UsageError where a mean or maximum over so many neighbours has no token in its middle."""
    if kernel % 2 == 0:
        raise UsageError(f"kernel = {kernel} has no middle; take {kernel - 1} or {kernel + 1}")
