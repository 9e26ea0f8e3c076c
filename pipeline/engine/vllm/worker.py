"""What runs inside vLLM's worker processes: a mixin of its worker class, called by name over its collective RPC.

Importing this module in a worker corrects the rejection sampler, and seeds of prompts in several passes, where the
installed version is known to need it.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec.structs import asdict

from drafters.mtp.head import head_files, is_mimos
from drafters.mtp.vllm_form import ARCHITECTURE, head_tensors
from pipeline.engine.vllm import chunked_seeds, head_config, rejection
from pipeline.engine.vllm.install import installed_version, needs_correction
from pipeline.engine.vllm.proposer import DrafterProposer
from pipeline.engine.vllm.refusals import reason
from pipeline.errors import RollaheadError, RunFailed
from pipeline.messages import WeightsGroup, WeightsManifest
from pipeline.weights.base import WeightsError
from pipeline.weights.group import TransferFailed, TransferGroup, device_name, join
from pipeline.weights.receiving import Incoming


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


def head_of(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """Tensors of the head in a checkpoint directory, for a model with that `ModelConfig`; none where it has no head.

    Raises:
        UsageError: the head does not fit the model.
        RunFailed: it is MiMo's and the one loaded is not, or the other way round.
    """
    if not (files := head_files(folder)):
        return {}
    if is_mimos(files) != config.hf_config.normed_goes_round:
        raise RunFailed(f"the head in {folder} feeds itself another state than the one vLLM was started with; restart")
    return head_tensors(folder, folder)


def load_head(model: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """A publication's multi-token-prediction head in place of the one loaded; the target's embedding and output layer,
    which it shares, stay as they are.

    Args:
        model: `RollaheadMTP`, of vLLM's proposer.
        config: its `ModelConfig`.
        tensors: of the head, by our names.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    parts = [part for name, part in model.model.named_children() if name != "embed_tokens"]
    for part in parts:
        initialize_layerwise_reload(part)
    model.load_weights(tensors.items())
    for part in parts:
        finalize_layerwise_reload(part, config)


def _problem_of(work: Callable[[], None]) -> str:
    """Why it failed, in a sentence; empty when it did not."""
    try:
        work()
    except Exception as error:  # whatever vLLM's loaders raise at weights that they did not expect
        said = reason(error)
        known = isinstance(error, (RollaheadError, WeightsError, OSError))
        return said if known else f"{type(error).__name__}: {said}"
    return ""


class RollaheadWorker:
    """Methods carry our name: a mixin of vLLM's must not hide one of the worker's own."""

    model_runner: Any
    rank: int
    device: torch.device
    _rollahead_group: TransferGroup | None = None

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
        return _problem_of(lambda: self._rollahead_load(Path(folder), version))

    def rollahead_receiver(self) -> tuple[str, str]:
        """Which of the engine's workers this is, and its device as `pipeline.weights.group` calls it."""
        return self._rollahead_name(), device_name(torch.device(self.device))

    def rollahead_join_group(self, group: bytes, ranks: Mapping[str, int]) -> str:
        """Joins a process group for broadcasts of weights.

        Args:
            group: a `WeightsGroup`, encoded.
            ranks: of all workers, by what `rollahead_receiver` calls them.

        Returns:
            Why it cannot, or nothing.
        """
        self.rollahead_leave_group()
        message = msgspec.msgpack.decode(group, type=WeightsGroup)
        rank, device = ranks[self._rollahead_name()], torch.device(self.device)

        def join_it() -> None:
            self._rollahead_group = join(message, rank, device)

        return _problem_of(join_it)

    def rollahead_receive_weights(self, manifest: bytes) -> str:
        """As `rollahead_load_weights`, of what is broadcast in the group now.

        Args:
            manifest: a `WeightsManifest`, encoded.
        """
        message = msgspec.msgpack.decode(manifest, type=WeightsManifest)
        problem = _problem_of(lambda: self._rollahead_receive(message))
        if problem:
            self.rollahead_leave_group()  # at once: those who wait for this worker hear of it
        return problem

    def rollahead_leave_group(self) -> None:
        group, self._rollahead_group = self._rollahead_group, None
        if group is not None:
            group.close()

    def _rollahead_name(self) -> str:
        parallel = self.model_runner.vllm_config.parallel_config
        return f"{parallel.data_parallel_rank}.{self.rank}"

    def _rollahead_load(self, folder: Path, version: int) -> None:
        self.model_runner.reload_weights(weights_path=str(folder))
        drafting = self._rollahead_drafting()
        self._rollahead_loaded(version, {} if drafting is None else head_of(folder, drafting))

    def _rollahead_receive(self, manifest: WeightsManifest) -> None:
        if self._rollahead_group is None:
            raise TransferFailed("this worker has left the group")
        from pipeline.engine.vllm.loading import without_head

        incoming = Incoming(self._rollahead_group, manifest)
        head: dict[str, torch.Tensor] = {}
        self.model_runner.reload_weights(weights_iterator=without_head(incoming, self.model_runner.get_model(), head))
        for _ in incoming:  # what vLLM's loader did not want to see: the others of the group see it
            pass
        self._rollahead_loaded(manifest.version, {} if self._rollahead_drafting() is None else head)

    def _rollahead_drafting(self) -> Any:
        """`ModelConfig` of our head where it drafts here, else None."""
        config = self.model_runner.vllm_config.speculative_config
        drafting = None if config is None else config.draft_model_config  # none of drafters without a model ("suffix")
        return drafting if drafting is not None and ARCHITECTURE in drafting.architectures else None

    def _rollahead_loaded(self, version: int, head: Mapping[str, torch.Tensor]) -> None:
        """The policy's weights are in place; `head`: a draft head's that came with them."""
        runner = self.model_runner
        tied = getattr(runner.model_config.hf_text_config, "tie_word_embeddings", False)
        refresh_tied_head(runner.get_model(), bool(tied))
        if head:
            load_head(runner.drafter.model, self._rollahead_drafting(), head)
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
