"""The signatures of an objective's pieces, one Protocol a kind.

A surrogate, gate or regulariser may have a `plan(tokens) -> Tensor [M, ...]` beside its `__call__`: it is given the M
tokens of the whole optimiser mini-batch under the policy now, detached, and what it returns comes back to its call as
`tokens.planned`, cut to the micro-batch. Statistics over tokens (means, quantiles, the largest k) belong there.

Any piece may have `begin(batch: BatchTokens)`, called once a batch before its first optimiser step, and, if it
remembers anything between batches, `state() -> dict[str, float]` and `restore(state)`, which checkpoints keep.
"""

from typing import Protocol

import torch

from learner.tokens import BatchMetrics, BatchTokens, GroupRewards, Layout, MicroBatchTokens, Needs, TokenMetrics


class Shaping(Protocol):
    name: str
    needs: Needs

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """Changed reward of each sample, float32 [S]."""


class Advantage(Protocol):
    name: str
    needs: Needs

    def __call__(self, samples: GroupRewards) -> torch.Tensor:
        """Advantage of each sample, float32 [S]."""


class Modulator(Protocol):
    name: str
    needs: Needs

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """Changed advantage of each token, float32 [N]; and metrics of the batch."""


class Correction(Protocol):
    name: str
    needs: Needs

    def __call__(self, weight: torch.Tensor, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """Importance weight of each token, float32 [N], finite and detached, from those that the corrections before
        have left; and metrics of the batch."""


class Surrogate(Protocol):
    name: str
    needs: Needs

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """Loss of each token, float32 [T], to minimise, before the correction's weight."""


class Gate(Protocol):
    name: str
    needs: Needs

    def __call__(self, loss: torch.Tensor, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """The loss [T] with gradient only where, or as far as, the gate lets it through."""


class Regulariser(Protocol):
    name: str
    needs: Needs

    def __call__(self, tokens: MicroBatchTokens) -> tuple[torch.Tensor, TokenMetrics]:
        """A term [T] added to the loss, its coefficient included."""


class Aggregation(Protocol):
    name: str
    needs: Needs

    def __call__(self, layout: Layout) -> torch.Tensor:
        """The coefficient of each token's loss in the loss of the mini-batch, float32 [M]; counts are over all ranks,
        and tokens that a gate or a weight of 0 takes out are among them."""
