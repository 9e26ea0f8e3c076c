"""vLLM's asynchronous engine, its event loop in a thread of its own, behind calls that return when they are done."""

import asyncio
import queue
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pipeline.engine.generator import GeneratorLost
from pipeline.engine.vllm.refusals import reason
from pipeline.errors import RollaheadError, RunFailed, UsageError
from pipeline.messages import WeightsGroup, WeightsManifest
from pipeline.weights.group import TransferFailed

T = TypeVar("T")
Key = tuple[int, int, int]
"""of a sample: group, index, and which time it is generated"""
_DYING_SECONDS = 10.0
_LOOK_SECONDS = 1.0
"""between two looks whether the engine that a call waits for has died; given up at the second that finds it dead"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over: with vLLM's `CompletionOutput`, or with what it failed of."""

    key: Key
    output: Any
    error: BaseException | None = None


class EngineClient:
    """Driven by one thread; requests end in `ended`."""

    def __init__(self, arguments: Any) -> None:
        """
        Args:
            arguments: `vllm.AsyncEngineArgs`.

        Raises:
            UsageError: vLLM does not take the arguments or the model.
            RunFailed: its engine did not start.
        """
        self.ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm client", daemon=True)
        self._thread.start()
        self._engine: Any = None
        try:
            self._engine = self._call(self._start(arguments))
        except BaseException:
            self._stop_loop()
            raise

    async def _start(self, arguments: Any) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            config = arguments.create_engine_config()
        except Exception as error:  # whatever one of vLLM's types raises at a value that it did not expect
            names = [field.name for field in fields(arguments)]
            raise UsageError(
                f"vLLM does not take {arguments.model} with these options: {reason(error, names)}; change engine.vllm, "
                'or use engine.generator = "native"'
            ) from error
        try:
            return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        except Exception as error:  # whatever a model of vLLM's raises while it is loaded
            raise RunFailed(
                f"vLLM's engine did not start: {reason(error)}. The reason is in its own lines above; too little "
                "memory is a matter of engine.kv_bytes and engine.max_sequences"
            ) from error

    @property
    def vocab_size(self) -> int:
        return int(self._engine.model_config.get_vocab_size())

    def submit(self, key: Key, prompt_ids: list[int], params: Any, salt: str) -> None:
        """Queues a request.

        Args:
            key: by which it ends.
            prompt_ids: its prompt.
            params: `vllm.SamplingParams`.
            salt: requests share cached prompts only with those of the same salt.
        """

        def begin() -> None:
            prompt = {"prompt_token_ids": prompt_ids, "cache_salt": salt}
            self._tasks[key] = self._loop.create_task(self._generate(key, prompt, params))

        self._loop.call_soon_threadsafe(begin)

    async def _generate(self, key: Key, prompt: dict[str, Any], params: Any) -> None:
        output, failed = None, None
        try:
            async for found in self._engine.generate(prompt, params, "-".join(map(str, key))):
                output = found
        except Exception as error:  # raised again, by the thread that drives us
            failed = error
        finally:
            self._tasks.pop(key, None)
        self.ended.put(Ended(key, output.outputs[0] if output is not None else None, failed))

    def cancel(self, key: Key) -> None:
        """Aborts a request; it does not end in `ended`. Unknown ones are fine."""

        def stop() -> None:
            task = self._tasks.pop(key, None)
            if task is not None:
                task.cancel()

        self._loop.call_soon_threadsafe(stop)

    def workers(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every worker; what each returned."""
        return self._call(self._workers(method, *arguments))

    async def _workers(self, method: str, *arguments: Any) -> list[Any]:
        # Of engines in parallel (`data_parallel_size`), `AsyncLLM.collective_rpc` gives only the first one's answers.
        core = self._engine.engine_core
        engines = await core.call_utility_all_async("collective_rpc", method, None, arguments, None)
        return [answer for answers in engines for answer in answers]

    def load_weights(self, folder: Path, version: int, keep_cache: bool) -> None:
        """Between two steps; requests under way go on after it.

        Args:
            folder: checkpoint directory.
            version: that tokens from now on are stamped with.
            keep_cache: whether running requests keep keys and values of the old weights; else they compute them anew.

        Raises:
            GeneratorLost: vLLM's engine has died.
            RunFailed: a worker could not load them; generation stays paused.
        """
        if problem := self._call(self._update(version, keep_cache, "rollahead_load_weights", str(folder), version)):
            raise RunFailed(f"publication {version} cannot be loaded: {problem}")

    def receive_weights(self, manifest: WeightsManifest, keep_cache: bool) -> None:
        """As `load_weights`, of what is broadcast in the group that was joined.

        Raises:
            GeneratorLost: vLLM's engine has died.
            TransferFailed: not every worker has all of it; generation stays paused.
        """
        encoded = msgspec.msgpack.encode(manifest)
        if problem := self._call(self._update(manifest.version, keep_cache, "rollahead_receive_weights", encoded)):
            raise TransferFailed(problem)

    def receivers(self) -> dict[str, str]:
        """Workers, by the names they have among themselves, and the device of each."""
        return dict(sorted(self.workers("rollahead_receiver")))

    def join_group(self, group: WeightsGroup) -> None:
        """Every worker does.

        Raises:
            GeneratorLost: vLLM's engine has died.
            TransferFailed: one of them cannot.
        """
        ranks = {name: rank for rank, name in enumerate(self.receivers(), 1)}
        problems = self.workers("rollahead_join_group", msgspec.msgpack.encode(group), ranks)
        if problem := next(filter(None, problems), ""):
            raise TransferFailed(problem)

    async def _update(self, version: int, keep_cache: bool, method: str, *arguments: Any) -> str:
        """What a worker could not do, else nothing."""
        await self._engine.pause_generation(mode="keep", clear_cache=not keep_cache)
        problems = await self._workers(method, *arguments)
        if problem := next(filter(None, problems), ""):
            return str(problem)
        await self._engine.update_weight_version(str(version))
        await self._engine.resume_generation()
        return ""

    def stamp(self, version: int) -> None:
        """Tokens from now on are of this version."""
        self._call(self._engine.update_weight_version(str(version)))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return self._answer(asyncio.run_coroutine_threadsafe(work, self._loop))
        except RollaheadError:
            raise
        except EngineDeadError as error:
            raise GeneratorLost("vLLM's engine has died") from error
        except Exception as error:  # vLLM's own words for a call that its dying core could not answer
            if self._engine is not None and self.died():
                raise GeneratorLost("vLLM's engine has died") from error
            raise

    def _answer(self, call: Future[T]) -> T:
        """What the call returned; vLLM leaves one unanswered that reaches its core while that dies."""
        dead = False
        while True:
            try:
                return call.result(_LOOK_SECONDS)
            except TimeoutError:
                if call.done():
                    raise
            if dead:
                call.cancel()
                raise GeneratorLost("vLLM's engine has died")
            dead = self.errored

    @property
    def errored(self) -> bool:
        """Whether the engine is known to be dead; requests under way have ended, or never will."""
        return self._engine is not None and bool(self._engine.errored)

    def died(self) -> bool:
        """Whether the engine is dead, or dies within seconds: a core that has lost its workers still answers."""
        deadline = time.monotonic() + _DYING_SECONDS
        while not (dead := self.errored) and time.monotonic() < deadline:
            time.sleep(0.1)
        return dead

    def close(self) -> None:
        """Ends vLLM's processes; requests under way are forgotten."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            done = threading.Event()

            def shut() -> None:
                for task in self._tasks.values():
                    task.cancel()
                engine.shutdown()
                done.set()

            self._loop.call_soon_threadsafe(shut)
            done.wait(30.0)
        self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
