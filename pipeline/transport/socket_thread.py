"""A thread with an event loop of its own, which the sockets run in."""

import asyncio
import importlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any


class SocketThread:
    """A thread with an event loop that runs one coroutine, and a way to call into it from other threads."""

    def __init__(self, name: str, tick_seconds: float) -> None:
        self._name = name
        self._tick_seconds = tick_seconds
        self.loop = _new_event_loop()
        self.stopping = asyncio.Event()
        self.linger = 0.0
        self._thread: threading.Thread | None = None

    def run_until_ready(
        self, main: Callable[[Future], Coroutine[Any, Any, None]], on_error: Callable[[Exception], None]
    ) -> None:
        """Start the thread; returns when `main` has set its future's result, or raises what it failed with."""
        ready: Future = Future()

        def run() -> None:
            try:
                self.loop.run_until_complete(main(ready))
            except Exception as error:
                if ready.done():
                    on_error(error)
                else:
                    ready.set_exception(error)
            finally:
                self.loop.close()

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()
        ready.result()

    def call(self, function: Callable[[], object]) -> bool:
        """Run a function in the loop's thread soon; False when the loop has ended."""
        try:
            self.loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def stop_thread(self, linger_seconds: float) -> None:
        if self._thread is None:
            self.loop.close()
            return
        self.linger = linger_seconds
        self.call(self.stopping.set)
        self._thread.join(2 * linger_seconds + 5.0)

    async def tick(self, on_tick: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(self._tick_seconds)
            on_tick()


async def first_of(*parts: Coroutine[Any, Any, Any]) -> None:
    """Run all parts until one of them ends; a part that fails fails the whole."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        return importlib.import_module("uvloop").new_event_loop()
    except ImportError:  # not made for Windows
        return asyncio.new_event_loop()
