"""From scores and drafts to what each sequence emits: rejection sampling with every sequence's own settings."""

import numpy as np
from torch import Tensor

from drafters.base import Proposal, locked
from pipeline.engine.generator import KeptIds
from pipeline.engine.native.batch import Batch
from pipeline.engine.native.scoring import Scores
from pipeline.engine.native.sequence import Emission
from pipeline.engine.native.small_model import SmallModel
from pipeline.errors import RunFailed, UsageError
from pipeline.sampling.plain import verify_plain
from pipeline.sampling.processors import Processors
from pipeline.sampling.uniforms import salted
from pipeline.sampling.verification import TokenUniforms, VerifiedTokens, verify


class Verifier:
    """Verifies a batch's drafts by one rule."""

    def __init__(self, processors: Processors, small: SmallModel | None, rule: str, entropy: bool) -> None:
        """
        Args:
            processors: settings of the live sequences.
            small: the model beside the policy, None: there is none.
            rule: for drafts that bring probabilities: "standard", token by token, or "block".
            entropy: whether to record entropies.

        Raises:
            UsageError: an unknown rule.
        """
        if rule not in ("standard", "block"):
            raise UsageError(f"verification {rule!r} is unknown; use standard or block")
        self._processors, self._small, self._entropy = processors, small, entropy
        self._block = rule == "block"
        self._salt = False
        """whether numbers depend on the sequence beside the seed: from the first drafts with probabilities on"""

    def emissions(self, batch: Batch, scores: Scores, proposal: Proposal, version: int) -> list[Emission]:
        """What each sequence emits: its accepted draft tokens and one token more, up to a stop or a switch of models.

        `version` is the publication that gave the scores.

        Raises:
            RunFailed: log-probs are not numbers.
        """
        verified = self._verify(batch, scores.logits, proposal)
        accepted, logprobs = verified.accepted.cpu().numpy(), verified.logprobs.cpu().numpy()
        if not np.isfinite(logprobs).all():
            what = "the model" if version < 0 else f"publication {version}"
            raise RunFailed(f"{what} gives log-probs that are not numbers; its weights are broken")
        tokens = locked(verified.tokens.cpu().numpy())  # emissions are views of it, which drafters are shown
        entropies = None if verified.entropies is None else verified.entropies.cpu().numpy()
        emissions, kept = [], _kept_by_row(verified)
        counts, lengths = accepted.tolist(), proposal.lengths.tolist()
        before = None  # any setting, which is what a switch of models goes by
        if self._small:
            before = self._small.entropies(list(batch), scores.logits, scores.starts, proposal.lengths + 1)
        for row, sequence in enumerate(batch):
            n = counts[row]
            emission = Emission(
                tokens[row, : n + 1],
                logprobs[row, : n + 1],
                None if entropies is None else entropies[row, : n + 1],
                lengths[row],
                n,
                kept[row].first(n + 1) if kept and sequence.request.sampling.truncates else None,
            )
            if self._small and before is not None:
                emission = self._small.cut(sequence, emission, before[scores.starts[row] :])
            emissions.append(sequence.cut_at_stop(emission))
        return emissions

    def _verify(self, batch: Batch, logits: Tensor, proposal: Proposal) -> VerifiedTokens:
        positions, slots, token_ids, lengths = batch.counts, batch.slots, proposal.token_ids, proposal.lengths
        seeds = np.array([s.seed for s in batch], np.int64)
        probabilistic = proposal.probabilities is not None
        # From here on no seed has a text of its own anyway, and a drafter that remembers what a seed led to must not
        # meet the same numbers again.
        self._salt = self._salt or probabilistic
        if self._salt:
            seeds = salted(seeds, np.array(batch.ids, np.int64) + 1)
        temperatures = self._processors.temperatures(slots)
        if temperatures is not None and logits.device.type == "cpu" and not (probabilistic and self._block):
            return verify_plain(
                logits, temperatures, token_ids, lengths, seeds, positions, self._entropy, proposal.probabilities,
                proposal.sampled,
            )  # fmt: skip
        return verify(
            self._processors.target(logits, slots, positions, token_ids, lengths, self._entropy),
            token_ids,
            lengths,
            TokenUniforms.draw(seeds, positions, lengths, probabilistic, logits.device, self._block),
            proposal.probabilities,
            proposal.sampled,
            self._block,
        )


def _kept_by_row(verified: VerifiedTokens) -> list[KeptIds]:
    """Of each row's columns; empty where nothing was truncated."""
    if verified.kept_counts is None or verified.kept_ids is None:
        return []
    counts, ids = verified.kept_counts.cpu().numpy(), verified.kept_ids.cpu().numpy()
    parts = np.split(ids, counts.sum(1).cumsum()[:-1])
    return [KeptIds(row, part) for row, part in zip(counts, parts, strict=True)]
