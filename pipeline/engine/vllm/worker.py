"""What runs inside vLLM's worker processes: a mixin of its worker class, called by name over its collective RPC.

Importing this module in a worker corrects the rejection sampler where the installed version is known to need it.
"""

import os
from typing import Any

import torch

from pipeline.engine.vllm import rejection
from pipeline.engine.vllm.install import installed_version
from pipeline.engine.vllm.proposer import DrafterProposer

CLASS = f"{__name__}.RollaheadWorker"
STOCK = "ROLLAHEAD_VLLM_STOCK_SAMPLER"
"""environment variable that leaves the sampler as it is, to show what a guard is for"""


def _correct() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if rejection.needs_correction(installed_version() or "", current_platform.device_type):
        rejection.correct(rejection_sampler)


if not os.environ.get(STOCK):
    _correct()


class RollaheadWorker:
    """Methods carry our name: a mixin of vLLM's must not hide one of the worker's own."""

    model_runner: Any
    device: torch.device

    def rollahead_bind(self) -> bool:
        """After loading; whether a drafter of ours is at work here."""
        proposer = self._rollahead_proposer()
        if proposer is not None:
            proposer.bind(self.model_runner)
        return proposer is not None

    def rollahead_check_sampler(self) -> dict[str, float]:
        """p-values of the sampler in this very process, by setting."""
        return rejection.check(torch.device(self.device))

    def rollahead_load_weights(self, folder: str, version: int) -> None:
        """A checkpoint's weights in place of those loaded; between steps, while generation is paused."""
        self.model_runner.reload_weights(weights_path=folder)
        proposer = self._rollahead_proposer()
        if proposer is not None:
            proposer.weights_changed(version)

    def rollahead_drafter(self) -> tuple[list[str], dict[str, float]]:
        """What the drafter has said since the last call, and its figures."""
        proposer = self._rollahead_proposer()
        if proposer is None:
            return [], {}
        events = list(proposer.events)
        proposer.events.clear()
        return events, proposer.counters()

    def _rollahead_proposer(self) -> DrafterProposer | None:
        proposer = getattr(self.model_runner, "drafter", None)
        return proposer if isinstance(proposer, DrafterProposer) else None
