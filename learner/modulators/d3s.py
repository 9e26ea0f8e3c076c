"""Down-sampling of samples and tokens to those with the most signal."""

from typing import Annotated

import torch
from msgspec import Meta

from learner.pieces import Piece
from learner.tokens import BatchMetrics, BatchTokens, Needs
from pipeline.config.types import PositiveInt, Section, option

Share = Annotated[float, Meta(gt=0, le=1)]


class D3S(Piece):
    """Keeps the samples whose advantages vary most, and of their tokens those with the largest |A_t| H_t; A_t <- 0 of
    all others, which stay in the denominator.

    D3S, arXiv 2509.22115. Of each prompt's n samples those N_s that maximise Var(A): the k most positive and N_s - k
    most negative for the best k; then, over all prompts, those N that maximise it in the same way, without normalising
    again; then the top share of tokens. The shares move linearly from the first to the second value. Reconstructed: the
    paper's first and last values are not known to us, those here are ours.
    """

    name = "d3s"
    needs = Needs.OLD_ENTROPY
    reconstructed = True

    class Options(Section):
        samples_a_prompt: Annotated[tuple[Share, Share], option("share of a prompt's samples, first and last")] = (
            0.5,
            1.0,
        )
        samples: Annotated[tuple[Share, Share], option("share of the samples kept before, first and last")] = (0.5, 1.0)
        tokens: Annotated[tuple[Share, Share], option("share of the tokens of those, first and last")] = (0.2, 1.0)
        steps: Annotated[PositiveInt, option("batches from the first to the last value")] = 100

    def __call__(self, batch: BatchTokens) -> tuple[torch.Tensor, BatchMetrics]:
        """float32 [N]"""
        assert batch.samples is not None
        if not len(batch.sequence):
            return batch.advantage, {}
        groups, of_sample = batch.samples.groups, _sample_advantages(batch)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        for group in groups.unique():
            members = (groups == group).nonzero()[:, 0]
            wanted = max(1, round(self._share(self.options.samples_a_prompt, batch.step) * len(members)))
            kept[members[most_varied(of_sample[members], wanted)]] = True
        members = kept.nonzero()[:, 0]
        wanted = max(1, round(self._share(self.options.samples, batch.step) * len(members)))
        kept = torch.zeros_like(kept)
        kept[members[most_varied(of_sample[members], wanted)]] = True

        score = torch.where(kept[batch.sequence], batch.advantage.abs() * batch.entropy_old, -1.0)
        candidates = score
        candidates = candidates[candidates >= 0].sort(descending=True).values
        wanted = max(1, round(self._share(self.options.tokens, batch.step) * len(candidates)))
        threshold = candidates[min(wanted, len(candidates)) - 1] if len(candidates) else score.new_tensor(0.0)
        chosen = (score >= threshold) & (score >= 0)
        return torch.where(chosen, batch.advantage, torch.zeros_like(batch.advantage)), {
            "samples_kept": float(kept.float().mean()),
            "tokens_kept": float(chosen.float().mean()),
        }

    def _share(self, ends: tuple[float, float], step: int) -> float:
        progress = min(step / self.options.steps, 1.0)
        return ends[0] + (ends[1] - ends[0]) * progress


def most_varied(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` values with the largest variance: the k greatest and count - k least, best k.

    No other subset of that size varies more ("PODS", arXiv 2504.13818).
    """
    order = values.argsort(descending=True, stable=True)
    choices = [torch.cat([order[:k], order[len(order) - (count - k) :]]) for k in range(count + 1)]
    variances = torch.stack([values[chosen].double().var(correction=0) for chosen in choices])
    return choices[int(variances.argmax())]


def _sample_advantages(batch: BatchTokens) -> torch.Tensor:
    """Advantage of each sample [S], that of its first token; 0 without one."""
    assert batch.samples is not None
    values = batch.advantage.new_zeros(len(batch.samples.groups))
    # From the last token to the first: the first one's value stays.
    return values.index_copy(0, batch.sequence.flip(0), batch.advantage.flip(0))
