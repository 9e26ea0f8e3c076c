"""What a run shows of itself beside metrics.jsonl."""

import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from rich.console import Console

from pipeline.codec import decode_from_engine, encode_trajectory
from pipeline.config import load_config
from pipeline.errors import UsageError
from pipeline.messages import SCHEMA, BadMessage, DraftCounts, SamplingParams, Trajectory, TrajectoryHeader
from pipeline.telemetry.live import COLUMNS, EngineView, RunView, sample_text
from pipeline.telemetry.log import Log
from pipeline.telemetry.prometheus import CLIENT_SECONDS, PrometheusSink, _Quiet
from pipeline.telemetry.report.samples import samples_section
from pipeline.telemetry.samples import SampleLog, describe, describe_batch
from pipeline.telemetry.scalars import scalars
from pipeline.telemetry.sinks import Sinks
from pipeline.telemetry.tensorboard import TensorBoardSink
from pipeline.telemetry.trace import StateClock, Trace, merge

ROW = {
    "step": 3, "policy_version": 4, "reward_mean": 0.5, "tokens_per_second": 1234.0, "engines": 2,
    "acceptance_rate": 0.61, "tokens_per_verification": 2.5, "staleness_mean": 0.5, "staleness_max": 2.0,
    "entropy": 0.3, "importance_weight_ess": 0.9, "mismatch_k3": None, "dropped_total": {"stale": 3},
    "drafters": {"suffix-automaton": {"drafted": 80, "accepted": 60}, "prompt-lookup": {"drafted": 20, "accepted": 1}},
    "samples": {"in_flight": 12, "buffered": 7}, "learner_time": {"learning": 3.0, "waiting for samples": 1.0},
    "engine_time": {"generating": 3.5, "reward": 9.0, "waiting for leases": 0.5},
}  # fmt: skip


def trajectory(origins=(0, 1, 1, 2, 3), sources=(0, 1, 1, 0, 0), tokens=5, lease=7) -> Trajectory:
    """Token i decodes as the i-th letter."""
    header = TrajectoryHeader(
        schema=SCHEMA, producer="p", incarnation=0, sequence=0, lease=lease, sample=0, prompt_tokens=1,
        response_tokens=tokens, has_entropy=False, reward=0.5, reward_parts={}, finish_reason="stop",
        sampling=SamplingParams(), drafters={"mtp": DraftCounts(drafted=4, accepted=2)}, verifications=3,
        origins=bytes(origins), draft_sources=bytes(sources),
    )  # fmt: skip
    return Trajectory(
        header=header, prompt_ids=np.zeros(1, np.uint32), token_ids=np.arange(tokens, dtype=np.uint32),
        logprobs=np.zeros(tokens, np.float32), entropies=None, versions=np.full(tokens, 4, np.uint32),
        samplers=np.zeros(tokens, np.uint8), roles=np.zeros(tokens, np.uint8),
    )  # fmt: skip


def letters(ids):
    return "".join(chr(ord("a") + i) for i in ids)


def test_a_line_becomes_flat_numbers_and_what_was_not_measured_is_left_out():
    flat = scalars({"a": 1, "b": None, "c": {"d": {"e": 2.5}}, "f": [1.0], "g": "text"})
    assert flat == {"a": 1.0, "c/d/e": 2.5}


def test_origins_travel_and_wrong_ones_are_refused():
    sent = trajectory()
    assert decode_from_engine(encode_trajectory(sent)).header == sent.header
    for wrong in (trajectory(origins=(0, 1)), trajectory(origins=(0, 1, 1, 2, 4)), trajectory(sources=(0, 2, 1, 0, 0))):
        with pytest.raises(BadMessage, match="origin"):
            decode_from_engine(encode_trajectory(wrong))


def test_a_sample_is_told_in_stretches_of_tokens_that_came_in_the_same_way():
    told = describe("q", trajectory(), letters)
    assert told["pieces"] == [
        ["a", "sampled", None, "policy", 1],
        ["bc", "accepted", "mtp", "policy", 2],
        ["d", "bonus", None, "policy", 1],
        ["e", "residual", None, "policy", 1],
    ]
    assert (told["prompt"], told["reward"], told["version"], told["lease"]) == ("q", 0.5, 4, 7)


def test_only_samples_with_origins_are_told_and_a_resumed_run_cuts_them_back(tmp_path):
    silent = trajectory(origins=(), sources=())
    batch = [("p", silent), ("p", trajectory(lease=1)), ("p", trajectory(lease=2)), ("p", trajectory(lease=3))]
    for step in (1, 2):
        log = SampleLog(tmp_path / "samples.jsonl", resume_step=1)
        for sample in describe_batch(step, batch, 2, letters):
            log.write(sample)
        log.close()
    SampleLog(tmp_path / "samples.jsonl", resume_step=1).close()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["lease"]) for row in rows] == [(1, 1), (1, 2)]


def test_samples_of_an_engine_that_records_no_origins_are_plain_text():
    """vLLM's: they are shown where there are no others."""
    untold = [("q", trajectory(origins=(), sources=(), lease=lease)) for lease in range(4)]
    found = describe_batch(3, untold, 2, letters)
    assert [(s["step"], s["lease"], s["pieces"]) for s in found] == [
        (3, lease, [["abcde", "unknown", None, "policy", 5]]) for lease in range(2)
    ]
    assert sample_text(found[0], []).plain == "sample +0.50 q → abcde"
    assert "not recorded" in samples_section(found) and "abcde</span>" in samples_section(found)
    told = describe_batch(3, [*untold, ("q", trajectory(lease=9))], 2, letters)
    assert [s["lease"] for s in told] == [9] and "not recorded" not in samples_section(told)


def test_the_clock_gives_every_second_to_one_state_and_the_trace_agrees(tmp_path):
    trace = Trace(tmp_path, "engine")
    times = iter((0.0, 0.0, 0.5, 0.501, 1.0, 1.25))
    clock = StateClock("waiting", trace, lambda: next(times))
    for state in ("generating", "transport", "generating", "waiting"):
        clock.enter(state)
    clock.close()
    trace.close()
    assert clock.seconds == pytest.approx({"waiting": 0.25, "generating": 0.999, "transport": 0.001})
    (file,) = tmp_path.iterdir()
    spans = [event for event in json.loads(file.read_text()) if event["ph"] == "X"]
    # a short transport is no span of its own
    assert [(span["name"], round(span["dur"])) for span in spans[1:]] == [("generating", 1e6), ("waiting", 0.25e6)]
    assert spans[0]["dur"] == 0


def test_traces_merge_also_when_a_process_was_killed_while_writing(tmp_path):
    for name in ("learner", "engine"):
        trace = Trace(tmp_path, name)
        trace.span("work", time.perf_counter(), time.perf_counter() + 1)
    with next(tmp_path.glob("engine*")).open("a") as file:
        file.write(',\n{"name": "cut')
    events = merge(tmp_path.glob("*.json"))
    assert sorted(event["args"].get("name", "") for event in events) == ["", "", "engine", "learner"]
    assert len({event["pid"] for event in events}) == 2


def _fetch(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_prometheus_serves_the_newest_numbers_and_health():
    sink = PrometheusSink("127.0.0.1", 0, "learner", stall_seconds=0.2)
    try:
        sink.write(ROW)
        sink.write(ROW | {"reward_mean": 0.75})
        status, text = _fetch(f"{sink.address}/metrics")
        assert status == 200
        assert 'rollahead_reward_mean{process="learner"} 0.75' in text
        assert 'rollahead_drafters_suffix_automaton_accepted{process="learner"} 60.0' in text
        assert "mismatch_k3" not in text
        status, text = _fetch(f"{sink.address}/health")
        assert status == 200 and json.loads(text)["step"] == 3
        time.sleep(0.3)
        assert _fetch(f"{sink.address}/health")[0] == 503
        assert _fetch(f"{sink.address}/nothing")[0] == 404
    finally:
        sink.close()


def test_an_idle_connection_blocks_neither_health_nor_the_end(capfd):
    sink = PrometheusSink("127.0.0.1", 0, "learner", 0)
    with socket.create_connection(("127.0.0.1", int(sink.address.rpartition(":")[2]))):
        assert _fetch(f"{sink.address}/health")[0] == 200
        ended = threading.Thread(target=sink.close, daemon=True)
        ended.start()
        ended.join(CLIENT_SECONDS - 1)
        assert not ended.is_alive()
    assert "Traceback" not in capfd.readouterr().err


def test_a_connection_that_asks_nothing_is_closed(monkeypatch, capfd):
    monkeypatch.setattr(_Quiet, "timeout", 0.2)
    sink = PrometheusSink("127.0.0.1", 0, "learner", 0)
    with socket.create_connection(("127.0.0.1", int(sink.address.rpartition(":")[2])), timeout=5) as idle:
        assert idle.recv(1) == b""
    sink.close()
    assert "Traceback" not in capfd.readouterr().err


def test_ports_beyond_the_last_one_are_refused():
    with pytest.raises(UsageError, match=r"prometheus_port = 65536: .* \(ports end at 65535\); choose another port"):
        PrometheusSink("127.0.0.1", 65536, "engine", 0, ports=64)
    with pytest.raises(UsageError, match="prometheus_port"):
        load_config(None, ["telemetry.prometheus_port=65535"])  # leaves engines none


def test_a_port_that_is_taken_is_named_or_the_next_one_used():
    first = PrometheusSink("127.0.0.1", 0, "learner", 0)
    port = int(first.address.rpartition(":")[2])
    second = None
    try:
        with pytest.raises(UsageError, match=str(port)):
            PrometheusSink("127.0.0.1", port, "learner", 0)
        second = PrometheusSink("127.0.0.1", port, "engine", 0, ports=20)
        assert second.address != first.address
    finally:
        first.close()
        if second is not None:
            second.close()


def test_tensorboard_files_hold_the_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter

    assert RecordWriter  # the format's own writer: records are length, crc, data, crc
    sink = TensorBoardSink(tmp_path, 0)
    sink.write(ROW)
    sink.close()
    (file,) = tmp_path.iterdir()
    content, found = file.read_bytes(), {}
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        content = content[16 + length :]
    assert found["reward_mean"] == (3, 0.5)
    assert found["drafters/prompt-lookup/accepted"] == (3, 1.0)


@pytest.mark.slow
def test_weights_and_biases_get_the_numbers_also_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb (pip install rollahead[wandb])")
    from pipeline.telemetry.wandb import WandbSink

    for key, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONFIG_DIR", str(tmp_path))):
        monkeypatch.setenv(key, value)
    sink = WandbSink("project", "run1", str(tmp_path), {"learner": {"batch_size": 8}}, 0)
    sink.write(ROW)
    sink.close()
    (file,) = tmp_path.rglob("*.wandb")
    deadline = time.monotonic() + 30  # a process of its own writes it
    while b"reward_mean" not in (written := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"reward_mean" in written and b"drafters/suffix-automaton/accepted" in written and b"1234" in written


def test_a_sink_that_fails_is_left_out_with_one_warning():
    class Broken:
        def write(self, row):
            raise OSError("no space")

        def close(self): ...

    said = []
    sinks = Sinks([Broken()], said.append)
    sinks.write(ROW)
    sinks.write(ROW)
    assert said == ["warning: Broken fails and is left out: OSError: no space"]


def test_a_sink_that_cannot_be_closed_is_one_warning_and_the_others_are_closed():
    class Broken:
        def close(self):
            raise OSError("no space")

    class Sound:
        closed = False

        def close(self):
            self.closed = True

    said, sound = [], Sound()
    Sinks([Broken(), sound], said.append).close()
    assert sound.closed and said == ["warning: Broken cannot be closed: OSError: no space"]


def test_structured_log_lines_are_objects(monkeypatch, capsys):
    monkeypatch.setattr(Log, "structured", True)
    monkeypatch.setattr(Log, "about", {"run": "r", "version": 3})
    Log("learner")("warning: entropy is low")
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time") == pytest.approx(time.time(), abs=5)
    assert line == {
        "level": "warning",
        "process": "learner",
        "run": "r",
        "version": 3,
        "text": "warning: entropy is low",
    }


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_fits_80_columns_and_is_plain_where_there_is_no_terminal(terminal):
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=COLUMNS, height=40)
    view = RunView(steps=10, done=0, console=console)
    view.sample({"step": 3, **describe("What is 1 + 2?\n", trajectory(), letters)})
    view.warn("12:00:00 learner: warning: entropy is 0.01; " + "x" * 100)
    view.show(ROW)
    view.close()
    text = written.getvalue()
    assert ("\x1b" in text) == terminal
    if not terminal:
        assert "step 3/10  reward 0.500" in text
        return
    from rich.text import Text

    plain = [Text.from_ansi(line).plain for line in text.splitlines()]
    assert max(len(line) for line in plain) <= COLUMNS
    screen = "\n".join(plain)
    for words in (
        "suffix-automaton 80% of drafts, 75% kept", "12 generating, 7 waiting", "dropped: 3 stale", "warning",
        "v4, tokens 0.50 publications old", "learning 75%", "generating 88%", "abcde",
    ):  # fmt: skip
        assert words in screen, words


def test_the_engine_view_says_what_it_does(tmp_path):
    written = io.StringIO()
    view = EngineView(Console(file=written, force_terminal=False, width=COLUMNS))
    row = {
        "policy_version": 4, "generated_tokens_total": 1000, "tokens_per_second": 50.0, "sequences": 8, "leases": 2,
        "samples_total": 16, "tokens_per_verification": 2.0, "drafters": ROW["drafters"],
        "seconds": {"generating": 2.0}, "newest_version": 6, "staleness_mean": 0.5, "staleness_max": 2.0,
        "queue": {"waiting": 3, "scoring": 1}, "said": ["warning: " + 100 * "long "],
    }  # fmt: skip
    for _ in range(EngineView.EVERY):
        view.show(row)
    assert written.getvalue().count("\n") == 1 and "v4" in written.getvalue()
    drawn = io.StringIO()
    view = EngineView(Console(file=drawn, force_terminal=True, width=200, color_system=None))
    view.show(row)
    view.close()
    lines = [line.rstrip() for line in drawn.getvalue().replace("\x1b[?25l", "").splitlines()]
    assert any("v4, v6 is there, tokens 0.50 publications old, at most 2" in line for line in lines)
    assert any("3 leases to begin, 1 waiting for rewards" in line for line in lines)
    warned = [line for line in lines if "warning: long" in line]
    assert warned and all(len(line) <= COLUMNS for line in warned) and warned[0].endswith("…")


def test_a_peers_text_cannot_speak_to_the_terminal(capsys):
    Log("learner")("engine failed: \x1b[2J\x07gone\r\nat line 3\n\tin step")
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\x07" not in told and "\r" not in told and "gone?\nat line 3\n\tin step" in told


def test_a_trace_that_cannot_be_written_ends_and_says_so(tmp_path, capsys):
    trace = Trace(tmp_path, "engine")
    trace._file.close()
    trace._file = open("/dev/full", "w")  # noqa: SIM115
    for _ in range(2):
        trace.span("generating", 0.0, 1.0)
    trace.close()
    assert capsys.readouterr().err.count("cannot be written and ends here: No space left on device") == 1
