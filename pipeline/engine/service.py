"""The engine process: leases in, trajectories out.

A lease waits until the policy version it asks for is loaded; its group is generated, scored as a whole, and every
sample goes to the spool and from there to the learner. New versions are picked up between two generation steps.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.capabilities import capabilities_of
from pipeline.config import Config, check_config
from pipeline.digest import run_digest
from pipeline.engine.generator import Generator, GeneratorLost, ReceivesWeights, Stopped
from pipeline.engine.leased import LeaseWork, request_of, trajectory_of
from pipeline.engine.link import Drained, Failed, Granted, Link, Revoked, VersionHint
from pipeline.engine.live_weights import LiveWeights
from pipeline.engine.observer import EngineObserver
from pipeline.engine.rewarding import FinishedGroup, RewardWorker, Scorer, build_scorers
from pipeline.engine.startup import build_generator, check_connection, check_pieces
from pipeline.errors import RollaheadError, RunFailed, UsageError
from pipeline.messages import WeightsAnswer, WeightsChunk, WeightsFiles
from pipeline.run_directory import RunDirectory
from pipeline.stop import INTERRUPTED, StopSignal
from pipeline.telemetry import Log
from pipeline.transport.dealer import ZmqEngineSocket
from pipeline.transport.keys import load_engine_keys
from pipeline.transport.options import is_local
from pipeline.transport.spool import Spool
from pipeline.watchdog import Watchdog
from pipeline.weights import FilesystemFollower, StreamFollower, WeightsError, WeightsFollower, WeightsPending

REPORT_SECONDS = 0.1
WORKING_SECONDS, IDLE_SECONDS = 0.02, 0.1
"""between two rounds while the learner says nothing: with rewards or weights to wait for, and without work"""
FLUSH_SECONDS = 20.0
WEIGHTS_RETRY_SECONDS = 1.0
MOST_LOST = 3
"""generators that may die in a row, without a finished sample between"""


def run_engine(config: Config, connect: str | None, connect_timeout: float | None) -> int:
    """Serve one learner until it drains us, we are told to stop, or it stays away too long; returns the exit code."""
    check_config(config)
    stop, log = StopSignal(), Log("engine")
    Log.structured = config.telemetry.log_format == "json"
    scorers = build_scorers(config.task)
    check_pieces(config)  # before anything waits
    link, follower, live = _connect(config, connect, connect_timeout, log)
    watchdog = Watchdog(config.transport.stall_seconds, lambda why, where: _stalled(link, why, where))
    observer = EngineObserver(config, log)
    engine = Engine(config, link, follower, scorers, stop, log, watchdog.beat, observer, live)
    link.start()
    try:
        engine.run()
        return INTERRUPTED if stop.requested and not stop.left_in_order else 0
    except RollaheadError as error:
        if not isinstance(error, LearnerEnded):
            link.fatal(str(error))
        raise
    except Exception as error:
        link.fatal(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    finally:
        observer.close()
        watchdog.close()
        link.stop()
        if engine.generator is not None:
            engine.generator.close()
        if isinstance(follower, StreamFollower):
            follower.close()
        for scorer in scorers:
            scorer.close()


def _connect(
    config: Config, connect: str | None, connect_timeout: float | None, log: Log
) -> tuple[Link, WeightsFollower, LiveWeights | None]:
    """The link to the learner, and what follows its weights: a folder both see, or the link itself; and broadcasts
    before either, if that is asked for."""
    transport, run = config.transport, RunDirectory(Path(config.run.out))
    address = connect or transport.address
    check_connection(config, connect)
    keys = load_engine_keys(Path(transport.keys), transport.engine_key) if transport.keys else None
    if keys is None and not is_local(address):
        log(f"WARNING: connecting to {address} without keys: what is sent can be read and changed on the way")
    owner = keys.fingerprint if keys else ""
    spool = Spool.acquire(run.spool, config.engine.spool_bytes, owner=owner, fsync=transport.fsync)
    stream: StreamFollower | None = None
    live: LiveWeights | None = None
    link = Link(
        ZmqEngineSocket(
            address, heartbeat_seconds=transport.heartbeat_seconds, max_message_bytes=transport.max_message_bytes,
            keys=keys,
        ),
        spool,
        digest=run_digest(config),
        capabilities=capabilities_of(config),
        heartbeat_seconds=transport.heartbeat_seconds,
        connect_timeout=transport.connect_timeout if connect_timeout is None else connect_timeout,
        on_event=log,
        on_weights=lambda message: receive(message),
    )  # fmt: skip
    if config.weights.transfer == "collective":
        seconds = config.weights.transfer_seconds
        live = LiveWeights(
            link.ask_for_weights, lambda: link.broadcasts, lambda: link.connections, seconds, log
        )  # fmt: skip
    if config.weights.transport == "stream":
        stream = StreamFollower(run.received / spool.producer, link.ask_for_weights, log, lambda: link.connections)

    def receive(message: WeightsAnswer) -> None:
        if stream is not None and isinstance(message, (WeightsFiles, WeightsChunk)):
            stream.receive(message)
        elif live is not None:
            live.receive(message)

    return link, stream or FilesystemFollower(run.weights), live


def _stalled(link: Link, why: str, where: str) -> None:
    """The main loop hangs: the learner is told, and gives the leases to others. What is spooled stays."""
    sys.stderr.write(f"{where}\nrollahead: {why}\n")
    link.fatal(why, where)
    time.sleep(1.0)  # for the message to leave
    os._exit(1)


class LearnerEnded(RunFailed):
    """The learner failed, refused us or stayed away; there is nobody to tell."""


class LearnerRefused(LearnerEnded, UsageError):
    """The learner does not want this engine's configuration."""

    exit_code = 2


class Engine:
    """State of the engine's main loop."""

    def __init__(
        self,
        config: Config,
        link: Link,
        follower: WeightsFollower,
        scorers: list[Scorer],
        stop: StopSignal,
        log: Log,
        beat: Callable[[], None],
        observer: EngineObserver,
        live: LiveWeights | None = None,
    ) -> None:
        self._live = live
        self.config, self.link, self.follower, self.stop, self.log = config, link, follower, stop, log
        self._scorers, self._beat, self.observer = scorers, beat, observer
        self._weights_due = 0.0
        self._standing: tuple[int, ...] = ()
        self._reported = 0.0
        self._lost = 0
        self._rewards: RewardWorker | None = None
        self.generator: Generator | None = None
        self.work: dict[int, LeaseWork] = {}
        self.wanted_version = -1
        self.generated_tokens = 0
        self.busy_seconds = 0.0
        self.draining = False

    def run(self) -> None:
        """Until drained, stopped, or failed."""
        while not (self.draining or self.stop.requested):
            self._beat()
            busy = self.generator is not None and self.generator.has_work()
            self.observer.enter("transport" if busy else "waiting for weights" if self.work else "waiting for leases")
            self._listen(0.0 if busy else WORKING_SECONDS if self.work else IDLE_SECONDS)
            try:
                self._follow_weights()
                self._start_leases()
                self._generate()
            except GeneratorLost as error:
                self._begin_again(error)
            except Stopped:
                break
            self._deliver()
            self._report()
        self._leave()

    def _listen(self, timeout: float) -> None:
        for event in self.link.poll(timeout):
            match event:
                case Granted(leases):
                    for lease in leases:
                        self.work.setdefault(lease.id, LeaseWork(lease))
                        self.wanted_version = max(self.wanted_version, lease.version)
                case VersionHint(version):
                    self.wanted_version = max(self.wanted_version, version)
                case Revoked(leases):
                    for lease_id in leases:
                        if self.work.pop(lease_id, None) is not None and self.generator is not None:
                            self.generator.cancel(lease_id)
                case Drained():
                    self.draining = True
                case Failed(message, refused):
                    raise LearnerRefused(message) if refused else LearnerEnded(message)

    def _follow_weights(self) -> None:
        """Load a newer version before the next step; sequences under way go on under it."""
        if self._receive_weights():
            return
        loaded = self.generator.version if self.generator is not None else -1
        if (self.wanted_version <= loaded and not self._torn) or time.monotonic() < self._weights_due:
            return
        if self.generator is None:
            self._check_run()
        self.observer.enter("loading weights")
        try:
            folder, publication = self.follower.fetch(self.wanted_version)
        except WeightsPending:
            return
        except WeightsError as error:
            meanwhile = "waiting for it" if self._torn else f"going on with version {loaded}"
            self.log(f"{error}; {meanwhile}, trying again")
            self._weights_due = time.monotonic() + WEIGHTS_RETRY_SECONDS
            return
        if publication.version <= loaded and not self._torn:
            return
        if self.generator is None:
            self._build(folder)
        assert self.generator is not None
        self.generator.load_weights(folder, publication.version)
        if self._live is not None:
            self._live.loaded()

    def _receive_weights(self) -> bool:
        """Whether the version that is wanted is here, or comes by broadcast."""
        if self._live is None or not isinstance(self.generator, ReceivesWeights):
            return False
        if self._live.arriving:
            self.observer.enter("loading weights")
        return self._live.follow(self.generator, self.wanted_version)

    @property
    def _torn(self) -> bool:
        """Whether a broadcast ended in the middle: nothing is sampled from such weights."""
        return self._live is not None and self._live.torn

    def _begin_again(self, error: GeneratorLost) -> None:
        """Leases stay ours; what is not finished of them is generated anew, under the newest weights."""
        self._lost += 1
        if self.generator is not None:
            self.generator.close()
            self.generator = None
        if self._live is not None:
            self._live.forget()
        if self._lost > MOST_LOST:
            raise RunFailed(
                f"{error}, {self._lost} times without a sample between; its own lines above say why"
            ) from error
        self.log(f"{error}; starting it again")
        for work in self.work.values():
            if work.unfinished:
                work.started = False
                work.samples.clear()

    def _check_run(self) -> None:
        """The weights in our run directory must be the connected learner's."""
        if isinstance(self.follower, StreamFollower):
            try:
                self.follower.bind(self.link.run)
            except OSError as error:
                why = error.strerror or error
                raise RunFailed(f"{self.follower.root} cannot be written ({why}); free space there") from error
            return
        found = RunDirectory(Path(self.config.run.out)).known_run_id()
        if found != self.link.run:
            raise LearnerRefused(
                f"the learner serves run {self.link.run}, but run.out = {self.config.run.out!r} holds run {found}; "
                "give the engine the learner's run directory, or transport.address of the right learner"
            )

    def _build(self, folder: Path) -> None:
        """The first version brings model configuration and tokenizer; from then on only weights change."""
        from pipeline.models.tokenizer import Tokenizer

        tokenizer = Tokenizer(folder)
        self.generator = build_generator(self.config, folder, self.log, self._goes_on)
        if self._live is not None and not isinstance(self.generator, ReceivesWeights):
            self.log('weights.transfer = "collective", but this generator takes no part in broadcasts: it reads files')
        if self._rewards is None:
            self._rewards = RewardWorker(self._scorers, tokenizer.decode)

    def _goes_on(self) -> bool:
        """Between two steps of a generator that has no lease yet; what the learner says meanwhile is heard."""
        self._beat()
        self._listen(0.0)
        return not (self.draining or self.stop.requested)

    def _start_leases(self) -> None:
        if self.generator is None or self._torn:
            return
        for work in self.work.values():
            lease = work.lease
            if not work.started and lease.version <= self.generator.version:
                work.started = True
                prompt_ids = np.asarray(lease.prompt_ids, np.int64)
                self.generator.add(request_of(lease, prompt_ids, self.config))

    def _generate(self) -> None:
        if self.generator is None or self._torn or not self.generator.has_work():
            return
        self.observer.enter("generating")
        began = time.perf_counter()
        finished = self.generator.step()
        self.busy_seconds += time.perf_counter() - began
        self.observer.enter("transport")
        for sample in finished:
            self.generated_tokens += len(sample.token_ids)
            work = self.work.get(sample.group)
            if work is None:
                continue
            self._lost = 0
            work.samples[sample.sample] = sample
            if not work.unfinished:
                assert self._rewards is not None
                samples = [work.samples[index] for index in range(work.lease.group_size)]
                self._rewards.submit(FinishedGroup(work.lease, samples))

    def _deliver(self) -> None:
        for scored in self._rewards.scored() if self._rewards is not None else ():
            lease = scored.group.lease
            if self.work.pop(lease.id, None) is None:
                continue  # revoked meanwhile
            self.observer.scored(scored)
            for index, score in enumerate(scored.scores):
                if score.reward is None:
                    self.log(f"lease {lease.id} sample {index} dropped: {score.error}")
                    self.link.fail_sample(lease.id, index, score.reason, score.error)
            rewarded = [index for index, score in enumerate(scored.scores) if score.reward is not None]
            self.link.submit(*(trajectory_of(scored, index) for index in rewarded))

    def _report(self) -> None:
        """How we stand: whenever leases or room change, else a few times a second."""
        held = sum(work.unfinished for work in self.work.values())
        version = self.generator.version if self.generator is not None else -1
        now, standing = time.monotonic(), (version, held, *self.work)
        if standing == self._standing and now - self._reported < REPORT_SECONDS:
            return
        self._standing, self._reported = standing, now
        self.link.update(
            running=tuple(self.work),
            credit=max(0, self.config.engine.max_sequences - held),
            version=version,
            generated_tokens=self.generated_tokens,
            busy_seconds=self.busy_seconds,
            seconds=self.observer.seconds(self._rewards),
        )
        self.observer.show(self)

    def _leave(self) -> None:
        """Hand back what is not finished, wait until what is finished is safe with the learner."""
        if self._rewards is not None:
            self._rewards.close()
            self._deliver()
        self.link.leave(tuple(self.work))
        if not self.link.flush(FLUSH_SECONDS):
            self.log("left before the learner had everything; the rest stays in the spool for the next engine")
