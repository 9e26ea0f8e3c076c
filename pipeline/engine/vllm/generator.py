"""The vLLM generator: continuous batching, paged memory and parallel devices are vLLM's, the seam is ours."""

import queue
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from drafters.guard import CALL_SECONDS
from pipeline.capabilities import GENERATORS
from pipeline.engine.generator import FinishedSample, GeneratorLost, GroupRequest
from pipeline.engine.native.stop_strings import StopStrings
from pipeline.engine.vllm import environment, proposer, rejection
from pipeline.engine.vllm.arguments import engine_arguments
from pipeline.engine.vllm.client import Ended, EngineClient, Key
from pipeline.engine.vllm.install import require_vllm
from pipeline.engine.vllm.sampling import translated
from pipeline.errors import RunFailed, UsageError
from pipeline.messages import DraftCounts, Sampler, WeightsGroup, WeightsJoin, WeightsManifest
from pipeline.models.tokenizer import Tokenizer
from pipeline.sampling.processors import check_token_ids

WAIT_SECONDS = 0.1


@dataclass(slots=True)
class _Group:
    """A request whose samples are under way."""

    request: GroupRequest
    stop: frozenset[int]
    keys: set[Key] = field(default_factory=set)
    updated: bool = False
    """whether weights changed since it was added"""


class VllmGenerator:
    """`pipeline.engine.generator.Generator` on vLLM's `AsyncLLM`."""

    def __init__(
        self,
        folder: Path,
        *,
        drafter: Mapping[str, Any],
        drafter_seconds: float = CALL_SECONDS,
        options: Mapping[str, Any] | None = None,
        max_sequences: int = 64,
        max_draft_tokens: int = 8,
        max_length: int,
        dtype: str = "auto",
        kv_bytes: int = 0,
        recompute_on_update: bool = False,
        stop_token_ids: Sequence[int] | None = None,
        version: int = -1,
        on_event: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            folder: Hugging Face checkpoint directory.
            drafter: by name or module:Class, with its options; it works in vLLM's worker process.
            drafter_seconds: longest call of it; after a longer one it is switched off.
            options: arguments of vLLM's engine.
            max_sequences: sequences running at once.
            max_draft_tokens: longest draft a verification.
            max_length: tokens of prompt and response together.
            dtype: compute type; "auto": the checkpoint's, of a float32 one a 16-bit type.
            kv_bytes: memory for keys and values; 0: chosen.
            recompute_on_update: whether new weights compute the keys and values of sequences under way anew.
            stop_token_ids: tokens that end every response, beside those of a request; None: the model's own.
            version: publication that `folder` is.
            on_event: told in one sentence when the drafter is switched off.

        Raises:
            UsageError: vLLM is not installed, or cannot do what is asked.
            RunFailed: it did not start, or its sampler is not exact.
        """
        found = require_vllm()
        self._scratch = tempfile.TemporaryDirectory(prefix="rollahead-vllm-")
        arguments = engine_arguments(
            folder, drafter=drafter, drafter_seconds=drafter_seconds, options=options or {},
            max_sequences=max_sequences, max_draft_tokens=max_draft_tokens, max_length=max_length,
            scratch=Path(self._scratch.name), dtype=dtype, kv_bytes=kv_bytes,
        )  # fmt: skip
        self.capabilities, self.version, self.max_length = GENERATORS["vllm"], version, max_length
        self._speculating = arguments.speculative_config is not None
        environment.prepare(self._speculating)
        self._drafter = str(drafter["name"])
        if "speculative_config" in (options or {}):
            self._drafter = f"vllm {arguments.speculative_config.get('method', 'draft_model')}"
        self._recompute, self._on_event, self._folder = recompute_on_update, on_event, folder
        self._stop = frozenset(_end_of_text(folder) if stop_token_ids is None else stop_token_ids)
        self._tokenizer: Tokenizer | None = None
        self._groups: dict[int, _Group] = {}
        self._times = 0
        self._client = EngineClient(arguments)
        try:
            self._vocab_size = self._client.vocab_size
            if self._speculating:
                self._check_sampler(found)
            self._client.workers("rollahead_bind")
            self._client.stamp(version)
        except BaseException:
            self._client.close()
            raise

    def _check_sampler(self, found: str) -> None:
        """A sampler that follows its drafts must not make training data."""
        for p_values in self._client.workers("rollahead_check_sampler"):
            failed = [name for name, p in p_values.items() if p < rejection.CHECK_LEVEL]
            if failed:
                raise RunFailed(
                    f"vLLM {found} does not sample the model's distribution where it drafts ({', '.join(failed)}); "
                    'set engine.drafter = "none", or use another version or engine.generator = "native"'
                )

    # ---- the seam ------------------------------------------------------------------------------------------------

    def load_weights(self, folder: Path, version: int) -> None:
        """In flight: sequences keep their keys and values, and say so, or compute them anew.

        Raises:
            GeneratorLost: vLLM's engine has died.
            RunFailed: it cannot load them.
        """
        self._client.load_weights(folder, version, keep_cache=not self._recompute)
        self._weights_changed(version)

    def receiving(self) -> WeightsJoin:
        return WeightsJoin(devices=tuple(self._client.receivers().values()))

    def join_group(self, group: WeightsGroup) -> None:
        self._client.join_group(group)

    def receive_weights(self, manifest: WeightsManifest) -> None:
        """As `load_weights`, by all workers together."""
        self._client.receive_weights(manifest, keep_cache=not self._recompute)
        self._weights_changed(manifest.version)

    def leave_group(self) -> None:
        self._client.workers("rollahead_leave_group")

    def _weights_changed(self, version: int) -> None:
        self.version = version
        for group in self._groups.values():
            group.updated = True

    def add(self, request: GroupRequest) -> None:
        """
        Raises:
            UsageError: the prompt does not fit, or it or the settings name a token that the model does not have, or
                vLLM does not have the settings.
            ValueError: the group's id is in use.
        """
        prompt = request.prompt_ids
        if not 0 < len(prompt) < self.max_length:
            raise UsageError(f"a prompt of {len(prompt)} tokens does not fit between 1 and {self.max_length - 1}")
        if prompt.min() < 0 or prompt.max() >= self._vocab_size:
            raise UsageError(f"prompt token id {prompt.max()} is outside the vocabulary of {self._vocab_size} tokens")
        check_token_ids(request.sampling, self._vocab_size)
        if request.id in self._groups:
            raise ValueError(f"group {request.id} is already running")
        if request.sampling.stop_strings and self._tokenizer is None:
            self._tokenizer = Tokenizer(self._folder)
        group = _Group(request, self._stop.union(request.sampling.stop_token_ids))
        temperatures = request.temperatures or (request.sampling.temperature,) * len(request.seeds)
        self._times += 1
        params = [
            translated(
                request.sampling, seed=seed, temperature=temperature,
                max_tokens=min(request.sampling.max_new_tokens, self.max_length - len(prompt)), stop=group.stop,
                vocab_size=self._vocab_size, speculating=self._speculating,
                extra={proposer.KEY: [request.id, seed]},
            )
            for seed, temperature in zip(request.seeds, temperatures, strict=True)
        ]  # fmt: skip
        self._groups[request.id] = group
        for index, each in enumerate(params):
            key = (request.id, index, self._times)
            group.keys.add(key)
            self._client.submit(key, prompt.tolist(), each, f"v{self.version}")

    def cancel(self, group: int) -> None:
        known = self._groups.pop(group, None)
        for key in known.keys if known is not None else ():
            self._client.cancel(key)

    def step(self) -> list[FinishedSample]:
        """What finished meanwhile; waits a little for the first.

        Raises:
            GeneratorLost: vLLM's engine has died.
            RunFailed: vLLM refused a request, or gave log-probs that are not numbers.
        """
        finished: list[FinishedSample] = []
        seeds: list[int] = []
        wait = WAIT_SECONDS
        while True:
            try:
                ended = self._client.ended.get(timeout=wait) if wait else self._client.ended.get_nowait()
            except queue.Empty:
                break
            wait = 0.0
            group = self._groups.get(ended.key[0])
            sample = self._finished(ended)
            if sample is not None and group is not None:
                finished.append(sample)
                seeds.append(group.request.seeds[sample.sample])
        if finished and self._speculating:
            self._hear(finished, seeds)
        if not finished and self._groups and self._client.errored and self._client.ended.empty():
            raise GeneratorLost("vLLM's engine has died")
        return finished

    def has_work(self) -> bool:
        return bool(self._groups)

    def running(self) -> int:
        return sum(len(group.keys) for group in self._groups.values())

    def close(self) -> None:
        self._groups.clear()
        self._client.close()
        self._scratch.cleanup()

    def drafter_counters(self) -> dict[str, float]:
        """The drafter's own figures so far, summed over engines that run in parallel."""
        return self._ask_drafters([])[1]

    # ---- results -------------------------------------------------------------------------------------------------

    def _hear(self, finished: Sequence[FinishedSample], seeds: Sequence[int]) -> None:
        """What a drafter of ours has to say, and who made which drafts for these samples; vLLM knows only how many."""
        samples = [[sample.group, seed] for sample, seed in zip(finished, seeds, strict=True)]
        events, _, drafts = self._ask_drafters(samples)
        for event in events:
            self._on_event(event)
        for sample, found in zip(finished, drafts, strict=True):
            if found:  # nothing where the drafter is vLLM's own
                sample.drafters = {name: msgspec.convert(counts, DraftCounts) for name, counts in found.items()}

    def _ask_drafters(
        self, samples: Sequence[Sequence[int]]
    ) -> tuple[list[str], dict[str, float], list[dict[str, Any]]]:
        """Of all workers that speak for a drafter: events, figures, and counts for each of the samples."""
        events: list[str] = []
        counters: dict[str, float] = {}
        drafts: list[dict[str, Any]] = [{} for _ in samples]
        for said, figures, found in filter(None, self._client.workers("rollahead_drafter", samples)):
            events += said
            for name, value in figures.items():
                counters[name] = counters.get(name, 0) + value
            for counts, more in zip(drafts, found, strict=True):
                counts.update(more)
        return events, counters, drafts

    def _finished(self, ended: Ended) -> FinishedSample | None:
        """None for a sample of a group that was cancelled."""
        index = ended.key[:2]
        group = self._groups.get(index[0])
        if group is None or ended.key not in group.keys:
            return None
        if ended.error is not None:
            self.cancel(index[0])
            self._raise(ended.error)
        group.keys.discard(ended.key)
        if not group.keys:
            del self._groups[index[0]]
        return self._sample(ended.output, group, *index)

    def _raise(self, error: BaseException) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, EngineDeadError) or self._client.died():
            raise GeneratorLost("vLLM's engine has died") from error
        raise RunFailed(f"vLLM failed a request: {error}") from error

    def _sample(self, output: Any, group: _Group, number: int, index: int) -> FinishedSample:
        tokens = np.array(output.token_ids, np.int64)
        logprobs = np.array(
            [place[token].logprob for token, place in zip(output.token_ids, output.logprobs, strict=True)], np.float32
        )
        if not np.isfinite(logprobs).all():
            raise RunFailed(f"publication {self.version} gives log-probs that are not numbers; its weights are broken")
        versions = np.empty(len(tokens), np.int64)
        for span in output.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        reason, end = output.finish_reason or "length", self._end(tokens, group)
        if end < len(tokens) or (end and int(tokens[end - 1]) in group.stop):
            reason = "stop"
        drafted, accepted = _draft_counts(output)
        return FinishedSample(
            group=number, sample=index, token_ids=tokens[:end], logprobs=logprobs[:end], entropies=None,
            versions=versions[:end], samplers=np.full(end, Sampler.POLICY, np.uint8), finish_reason=reason,
            verifications=max(1, len(tokens) - accepted),
            drafters={self._drafter: DraftCounts(drafted=drafted, accepted=accepted)} if drafted else {},
            kv_kept_across_update=group.updated and not self._recompute,
        )  # fmt: skip

    def _end(self, tokens: np.ndarray, group: _Group) -> int:
        """Tokens of the response: vLLM cuts the text at a stop string, not the tokens of the step that completed it."""
        params = group.request.sampling
        if not params.stop_strings:
            return len(tokens)
        assert self._tokenizer is not None
        strings = StopStrings(params.stop_strings, self._tokenizer.stream(), params.min_new_tokens)
        return strings.first_end(tokens.tolist()) or len(tokens)


def _draft_counts(output: Any) -> tuple[int, int]:
    metrics = output.spec_decode_metrics
    if metrics is None:
        return 0, 0
    return metrics.num_draft_tokens, sum(j * count for j, count in enumerate(metrics.histogram))


def _end_of_text(folder: Path) -> list[int]:
    """Ids that end a response, of the generation configuration, else of the model's."""
    from transformers import AutoConfig, GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        found = None
    if found is None:
        found = AutoConfig.from_pretrained(folder).eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)
