"""A user's reward function in a process of its own, with limits on time and memory.

The process is this file run as a program. Requests and answers are msgpack with a length before them, on two pipes;
what the user's code prints goes to the log. A call that takes too long, or kills the process, costs the samples that do
it: a group whose call ends so is scored once more, one sample a call, each in a process that works.
"""

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from struct import Struct
from typing import IO, Any

import msgspec

from pipeline.errors import UsageError
from pipeline.parent import end_with_parent
from pipeline.tasks.rewards import Scored, load_reward, score_group

_LENGTH = Struct("<I")
_IMPORT_SECONDS = 300.0
_LARGEST = 1 << 30


class _Request(msgspec.Struct, array_like=True):
    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]


class _Answer(msgspec.Struct, array_like=True):
    scored: list[Scored]
    problem: str = ""
    """why the function could not be loaded"""


_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(_Request)
_answers = msgspec.msgpack.Decoder(_Answer)


class _Ended(Exception):
    """The process did not answer; the text says why."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class ProcessScorer:
    """Scores in a process, which is started anew when it has ended; for one thread."""

    def __init__(self, name: str, seconds: float, memory_mb: int) -> None:
        """
        Args:
            name: of the reward, as `load_reward` takes it.
            seconds: that one call may take; 0: no limit.
            memory_mb: MiB of data that the process may have; 0: no limit.
        """
        self._name, self._seconds, self._memory_mb = name, seconds, memory_mb
        self._process: subprocess.Popen[bytes] | None = None
        self.restarts = 0

    def start(self) -> None:
        """Start the process and load the function.

        Raises:
            UsageError: the function cannot be loaded.
        """
        if self._process is not None:
            return
        command = [sys.executable, "-m", "pipeline.tasks.reward_process", self._name, str(self._memory_mb)]
        paths = [path or os.getcwd() for path in sys.path]
        # A session of its own: the terminal's Ctrl-C is for the engine, which ends this process when it is done.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        try:
            answer = _answers.decode(self._receive(_IMPORT_SECONDS))
        except _Ended as error:
            raise UsageError(
                f"task.reward = {self._name!r} could not be loaded in a process of its own: {error}"
            ) from error
        if answer.problem:
            self.close()
            raise UsageError(answer.problem)

    def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[Scored]:
        """Rewards of a group. Samples that take too long or end the process carry the error, the others a reward."""
        try:
            return self._call(prompts, completions, columns)
        except _Ended as error:
            if len(completions) == 1:
                return [Scored(None, f"sample 0: {error}", error.reason)]
        scored = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            own = {key: [values[index]] for key, values in columns.items()}
            try:
                (one,) = self._call([prompt], [completion], own)
                if one.reward is None:
                    one = Scored(None, one.error.replace("sample 0", f"sample {index}", 1), one.reason)
                scored.append(one)
            except _Ended as error:
                scored.append(Scored(None, f"sample {index}: {error}", error.reason))
        return scored

    def close(self) -> None:
        """End the process and those it started; they are not asked whether they are busy."""
        process, self._process = self._process, None
        if process is not None:
            # Its session is its own, so what it started is in its group, unless that left it on purpose. The group's
            # id stays taken until the process itself has been waited for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # what it did not read is written once more, to nobody
                    pipe.close()

    def _call(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[Scored]:
        if self._process is not None and _has_ended(self._process):
            self.close()  # while it had nothing to do: no sample is to blame
        if self._process is None:
            self.restarts += 1
        try:
            self.start()
        except UsageError as error:
            raise _Ended("reward_died", str(error)) from error
        assert self._process is not None and self._process.stdin is not None
        try:
            _write(self._process.stdin, _encoder.encode(_Request(prompts, completions, columns)))
        except OSError as error:
            raise self._ended() from error
        return _answers.decode(self._receive(self._seconds)).scored

    def _receive(self, seconds: float) -> bytes:
        """The next answer; ends the process when it does not come in time."""
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + seconds if seconds else None
        data, wanted = bytearray(), _LENGTH.size
        descriptor = self._process.stdout.fileno()
        while len(data) < wanted:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left)[0]:
                self.close()
                raise _Ended(
                    "reward_timeout", f"reward {self._name} took longer than {seconds:g} s (task.reward_seconds)"
                )
            block = os.read(descriptor, 1 << 20)
            if not block:
                raise self._ended()
            data += block
            if len(data) >= _LENGTH.size:
                wanted = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        return bytes(data[_LENGTH.size : wanted])

    def _ended(self) -> _Ended:
        process = self._process
        assert process is not None
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # known still, so that its group is
        self.close()
        code = process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return _Ended(
            "reward_died", f"the process of reward {self._name} {how} (task.reward_memory_mb limits its memory)"
        )


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without waiting for it, so that its group is known still."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Iterator[bytes]:
    while len(header := pipe.read(_LENGTH.size)) == _LENGTH.size:
        yield pipe.read(min(_LENGTH.unpack(header)[0], _LARGEST))


def _serve(name: str, memory_mb: int) -> None:
    """The process: load the function, say so, answer requests until the engine is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the user's code prints belongs into the log
    end_with_parent()  # an engine that is killed cannot end a function that hangs
    if memory_mb:
        limit = memory_mb << 20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        reward = load_reward(name)
    except UsageError as error:
        _write(answers, _encoder.encode(_Answer([], str(error))))
        return
    _write(answers, _encoder.encode(_Answer([])))
    for data in _read(sys.stdin.buffer):
        request = _requests.decode(data)
        scored = score_group(reward, request.prompts, request.completions, request.columns)
        _write(answers, _encoder.encode(_Answer(scored)))


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
