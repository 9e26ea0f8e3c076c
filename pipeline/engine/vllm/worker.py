"""What runs inside vLLM's worker processes: a mixin of its worker class, called by name over its collective RPC.

Importing this module in a worker corrects the rejection sampler, and seeds of prompts in several passes, where the
installed version is known to need it.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import asdict

from drafters.mtp.head import head_files, is_mimos
from drafters.mtp.vllm_form import ARCHITECTURE, head_tensors
from pipeline.engine.vllm import chunked_seeds, head_config, rejection
from pipeline.engine.vllm.install import installed_version, needs_correction
from pipeline.engine.vllm.proposer import DrafterProposer
from pipeline.engine.vllm.refusals import reason
from pipeline.errors import RollaheadError, RunFailed


def _correct() -> None:
    from vllm.platforms import current_platform

    if needs_correction(installed_version() or "", current_platform.device_type):
        from vllm.v1.sample import rejection_sampler
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        rejection.correct(rejection_sampler)
        chunked_seeds.correct(CPUModelRunner)


def _prepare() -> None:
    head_config.register()
    importlib.import_module("pipeline.engine.vllm.loading")


_prepare()
if not os.environ.get(rejection.STOCK):
    _correct()


def refresh_tied_head(model: torch.nn.Module, tied: bool) -> None:
    """After a reload: vLLM 0.32 leaves a tied output layer, which no checkpoint has weights for, with its old ones; on
    a CPU that is a packed copy of them."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [table for table in tables if isinstance(table, ParallelLMHead)]
    inputs = [table for table in tables if not isinstance(table, ParallelLMHead)]
    if tied and inputs:
        for head in heads:
            head.tie_weights(inputs[0])
            head.quant_method.process_weights_after_loading(head)


def load_head(model: Any, config: Any, folder: Path) -> None:
    """A publication's multi-token-prediction head in place of the one loaded; the target's embedding and output layer,
    which it shares, stay as they are.

    Args:
        model: `RollaheadMTP`, of vLLM's proposer.
        config: its `ModelConfig`.
        folder: checkpoint directory with a head.

    Raises:
        UsageError: the head does not fit the model.
        RunFailed: it is MiMo's and the one loaded is not, or the other way round.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    if is_mimos(head_files(folder)) != config.hf_config.normed_goes_round:
        raise RunFailed(f"the head in {folder} feeds itself another state than the one vLLM was started with; restart")
    tensors = head_tensors(folder, folder)
    parts = [part for name, part in model.model.named_children() if name != "embed_tokens"]
    for part in parts:
        initialize_layerwise_reload(part)
    model.load_weights(tensors.items())
    for part in parts:
        finalize_layerwise_reload(part, config)


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
        """p-values of the sampler in this very process, by setting, with drafts that are certain and drawn ones."""
        device = torch.device(self.device)
        drawn = rejection.check(device, drawn=True)
        return rejection.check(device) | {f"{name}, drawn drafts": p for name, p in drawn.items()}

    def rollahead_load_weights(self, folder: str, version: int) -> str:
        """A checkpoint's weights in place of those loaded; between steps, while generation is paused.

        Returns:
            Why they cannot be loaded, or nothing: as an answer it reaches the engine's process whole, and alone.
        """
        try:
            self._rollahead_load(folder, version)
        except Exception as error:  # whatever vLLM's loaders raise at a checkpoint that they did not expect
            said = reason(error)
            return said if isinstance(error, (RollaheadError, OSError)) else f"{type(error).__name__}: {said}"
        return ""

    def _rollahead_load(self, folder: str, version: int) -> None:
        runner = self.model_runner
        runner.reload_weights(weights_path=folder)
        tied = getattr(runner.model_config.hf_text_config, "tie_word_embeddings", False)
        refresh_tied_head(runner.get_model(), bool(tied))
        config = runner.vllm_config.speculative_config
        drafting = None if config is None else config.draft_model_config  # none of drafters without a model ("suffix")
        if drafting is not None and ARCHITECTURE in drafting.architectures and head_files(folder):
            load_head(runner.drafter.model, drafting, Path(folder))
        proposer = self._rollahead_proposer()
        if proposer is not None:
            proposer.weights_changed(version)

    def rollahead_drafter(
        self, finished: Sequence[Sequence[int]] = ()
    ) -> tuple[list[str], dict[str, float], list[dict[str, dict[str, Any]]]] | None:
        """What the drafter has said since the last call, its figures, and how its drafts for finished samples fared,
        by drafter. None where no drafter of ours is at work, or none whose drafts are verified: of the workers of the
        last pipeline stage, which all have one, vLLM takes the first one's.

        Args:
            finished: group and seed of each of these.
        """
        proposer = self._rollahead_proposer()
        if proposer is None:
            return None
        events = list(proposer.events)
        proposer.events.clear()
        drafts = proposer.taken_drafts([(group, seed) for group, seed in finished])
        if not self._rollahead_is_first():
            return None
        return events, proposer.counters(), [{n: asdict(tally) for n, tally in of.items()} for of in drafts]

    def _rollahead_is_first(self) -> bool:
        """Of those that share a stage's tensors."""
        from vllm.distributed.parallel_state import get_tp_group

        return bool(get_tp_group().is_first_rank)

    def _rollahead_proposer(self) -> DrafterProposer | None:
        proposer = getattr(self.model_runner, "drafter", None)
        return proposer if isinstance(proposer, DrafterProposer) else None
