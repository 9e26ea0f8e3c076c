"""The report, as a reader's browser shows it."""

import json
import shutil

import pytest
from plotly.offline import get_plotlyjs

from pipeline.config import Config, render
from pipeline.errors import UsageError
from pipeline.telemetry.environment import environment
from pipeline.telemetry.metrics import StepMetrics, as_row
from pipeline.telemetry.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
STEPS = 12
NASTY = "</script><script>window.broken = 1</script><b>2 < 3 & 4</b>"


def row(step: int) -> dict:
    metrics = StepMetrics(
        step=step, policy_version=step, loss=0.1, grad_norm=1.0, learning_rate=1e-5, reward_mean=step / 20,
        reward_std=0.1, reward_mean_unfiltered=step / 20, groups_without_signal=1, response_length_mean=30.0,
        truncated_fraction=0.0, tokens_trained=100, tokens_per_second=50.0, staleness_mean=0.5, staleness_max=1.0,
        entropy=1.0 / step, entropy_ratio_kept=0.9, clip_fraction=0.1, importance_weight_mean=1.0,
        importance_weight_ess=0.8, mismatch_k3=None if step % 2 else 1e-6, dropped_total={"stale": step},
        acceptance_rate=0.5 + step / 40, drafters={"suffix-automaton": {"drafted": 100, "accepted": 50 + step}},
        acceptance_by_depth={"suffix-automaton": [0.9, 0.5]}, wall_seconds=2.0,
        learner_time={"learning": 1.5, "waiting for samples": 0.5}, engine_time={"generating": 1.75},
        samples={"in_flight": 3, "buffered": 4}, extra={"erc/below": 0.05, "erc/above": 0.05},
        evaluation={"eval_reward_mean": 0.9} if step == STEPS else {},
    )  # fmt: skip
    return as_row(metrics)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(render(Config()))
    (folder / "environment.json").write_text(json.dumps(environment()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, STEPS + 1)))
    sample = {
        "lease": 1, "sample": 0, "version": 2, "prompt": "What is 1 + 2?\n", "reward": 1.0, "reward_parts": {},
        "finish_reason": "stop", "tokens": 4, "verifications": 2,
        "pieces": [["three", "accepted", "suffix-automaton", "policy", 2], [NASTY, "residual", None, "policy", 2]],
    }  # fmt: skip
    lines = [json.dumps({"step": step, **sample}) + "\n" for step in (1, STEPS)]
    (folder / "samples.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium that can reach nothing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install rollahead[browser])")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a Chromium: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def open_page(browser, path):
    """The page once it has drawn everything, and what its console complained of."""
    context = browser.new_context(offline=True, viewport={"width": 1400, "height": 900})
    page = context.new_page()
    complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else complaints.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready='1']", timeout=60000)
    return page, complaints


@pytest.mark.slow
def test_a_browser_draws_the_run_and_gives_its_values_back(run, browser):
    page, complaints = open_page(browser, write_report(run))
    curves = page.evaluate("document.getElementById('reward').data.map(t => [t.name, t.x, t.y])")
    named = {name: (x, y) for name, x, y in curves}
    assert named["reward_mean"] == ([*range(1, STEPS + 1)], [step / 20 for step in range(1, STEPS + 1)])
    assert named["eval_reward_mean"][1][-1] == 0.9
    assert page.evaluate("document.getElementById('depth').data[0].y") == [0.9, 0.5]
    band = page.evaluate("document.getElementById('entropy').data.map(t => t.y[1])")
    assert band == pytest.approx([0.5, 0.475, 0.525])  # entropy, and the default ERC band around it
    scatter = page.evaluate("document.getElementById('acceptance-entropy').data[0]")
    assert (scatter["x"][1], scatter["y"][1]) == (0.5, 0.55)
    drawn = page.evaluate("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
    assert drawn and page.locator(".figures").inner_text().count("0.2") >= 1
    page.select_option("#metric", "extra/erc/below")
    assert page.evaluate("document.getElementById('any-metric').data[0].y") == [0.05] * STEPS
    assert complaints == []
    page.close()


@pytest.mark.slow
def test_samples_are_coloured_by_origin_and_what_a_model_says_stays_text(run, browser):
    page, complaints = open_page(browser, write_report(run))
    assert page.locator(".sample:visible").count() == 1, "the last step's"
    page.select_option("#sample-step", "1")
    card = page.locator(".sample:visible")
    assert NASTY in card.inner_text()
    assert page.evaluate("window.broken") is None
    colours = [
        page.evaluate("e => getComputedStyle(e).backgroundColor", card.locator(f".o-{origin}").element_handle())
        for origin in ("accepted", "residual")
    ]
    assert colours[0] != colours[1] and "rgba(0, 0, 0, 0)" not in colours
    assert "drafted by suffix-automaton" in card.locator(".o-accepted").get_attribute("title")
    assert complaints == []
    page.close()


@pytest.mark.slow
def test_a_browser_draws_a_benchmark(tmp_path, browser):
    speed = {"median": 2.0, "min": 1.5, "max": 2.5}
    rows = [
        {"arm": arm, "seed": 0, "ratio": speed, "time_split": {"generating": 1.0, "learning": 2.0},
         "curves": {"step": [1, 2], "seconds": [3, 6], "reward": [0.1, level], "entropy": [2, 1], "acceptance": [0, 1]}}
        for arm, level in (("synchronous", 0.3), ("asynchronous", 0.4))
    ]  # fmt: skip
    results = {"what": "end-to-end", "machine": {"cpu": "x"}, "versions": {"torch": "2"}, "model": "m", "rows": rows}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page, complaints = open_page(browser, write_report(tmp_path))
    curves = page.evaluate("document.getElementById('reward').data.map(t => [t.name, t.y[1]])")
    assert curves == [["synchronous", 0.3], ["asynchronous", 0.4]]
    split = page.evaluate("document.getElementById('time-split').data.map(t => [t.name, t.y])")
    assert split == [["generating", [1, 1]], ["learning", [2, 2]]]
    assert page.evaluate("document.getElementById('spread-ratio').data[0].error_y.array") == [0.5, 0.5]
    assert complaints == []
    page.close()


def test_the_file_stands_alone(run):
    content = write_report(run).read_text()
    ours = content.replace(get_plotlyjs(), "")
    assert "http" not in ours and "@import" not in ours
    assert "Plotly" in content and "suffix-automaton" in content


def test_traces_of_the_processes_become_one_file(run):
    from pipeline.telemetry.trace import Trace

    for process in ("learner", "engine"):
        trace = Trace(run / "trace", process)
        trace.span("work", 0.0, 1.0)
    write_report(run)
    events = json.loads((run / "trace.json").read_text())
    assert sorted(event["args"].get("name", "") for event in events) == ["", "", "engine", "learner"]


def test_a_folder_with_nothing_in_it_is_named(tmp_path):
    with pytest.raises(UsageError, match="neither a run"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UsageError, match="not a benchmark's"):
        write_report(tmp_path)


def page_data(path):
    content = path.read_text()
    begin = content.index('<script type="application/json" id="data">')
    return json.loads(content[content.index(">", begin) + 1 : content.index("</script>", begin)])


def head_rows(count):
    """As `rollahead train-drafter` writes them: warm-up, then the loss; measured every other step."""
    rows = []
    for step in range(1, count + 1):
        row = {
            "step": step, "loss": 1 / step, "objective": "lk-lambda" if step <= 2 else "e2e-tv",
            "acceptance_by_depth": [0.5, 0.25], "learning_rate": 1e-3, "seconds": float(step),
        }  # fmt: skip
        if step % 2 == 0:
            row |= {"held_out_by_depth": [step / 10, step / 20], "held_out_accepted_share": step / 40}
        rows.append(row)
    return rows


@pytest.fixture
def head(tmp_path):
    folder = tmp_path / "head"
    folder.mkdir()
    (folder / "drafter.toml").write_text(render(Config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in head_rows(4)))
    return folder


def test_the_report_of_a_heads_training_draws_acceptance_by_depth_and_the_losses(head):
    page = page_data(write_report(head))
    curves = {trace["name"]: (trace["x"], trace["y"]) for trace in page["charts"]["depth"]["data"]}
    assert curves["token 1, held out"] == ([2, 4], [0.2, 0.4])
    assert curves["token 2, held out"] == ([2, 4], [0.1, 0.2])
    assert curves["token 2, in training"] == ([1, 2, 3, 4], [0.25] * 4)
    losses = {trace["name"]: (trace["x"], trace["y"]) for trace in page["charts"]["loss"]["data"]}
    assert losses == {"lk-lambda": ([1, 2], [1.0, 0.5]), "e2e-tv": ([3, 4], [1 / 3, 0.25])}
    text = (head / "report.html").read_text()
    assert "0.400 0.200" in text and "10.0%" in text and "held_out" in text


def test_the_report_of_a_head_leaves_out_what_its_texts_were_too_short_for(head):
    rows = [
        {key: value[:1] if isinstance(value, list) else value for key, value in row.items() if "share" not in key}
        for row in head_rows(4)
    ]
    (head / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_data(write_report(head))
    assert [trace["name"] for trace in page["charts"]["depth"]["data"]] == ["token 1, held out", "token 1, in training"]
    assert "of drafted tokens accepted" not in (head / "report.html").read_text()


@pytest.mark.parametrize("name", ["config.toml", "drafter.toml"])
def test_a_configuration_that_cannot_be_read_is_one_sentence(run, name):
    (run / name).write_text("[run\n")
    with pytest.raises(UsageError, match=rf"{name} cannot be read: .*; copy it again"):
        write_report(run)


def test_lines_of_another_version_are_one_sentence(run):
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl is not what this version"):
        write_report(run)


def results(folder, rows, **more):
    (folder / "results.json").write_text(json.dumps({"what": "x", "rows": rows, **more}))
    return page_data(write_report(folder))["charts"]


def test_curves_of_any_benchmark_are_drawn(tmp_path):
    rows = [
        {"setting": name, "staleness": 2, "seed": 0, "curves": {"reward_mean": [0.1, level], "grad_norm": [None, 2.0]}}
        for name, level in (("tis", 0.3), ("erc", 0.4))
    ]
    charts = results(tmp_path, rows)
    lines = [(trace["name"], trace["x"], trace["y"]) for trace in charts["curve-reward_mean"]["data"]]
    assert lines == [("tis 0", [1, 2], [0.1, 0.3]), ("erc 0", [1, 2], [0.1, 0.4])]
    assert charts["curve-grad_norm"]["data"][0]["y"] == [None, 2.0]
    trained = {"arm": "full", "policy": "", "budget": 0, "seed": 0, "curves": {"compressed/k3": [1e-3]}}
    assert results(tmp_path, [trained])["curve-compressed/k3"]["data"][0]["y"] == [1e-3]


def test_a_page_is_made_of_values_that_are_not_finite(tmp_path):
    rows = [{"arm": "a", "speed": {"median": float("nan"), "min": 1.0, "max": float("inf")}}, {"arm": "b"}]
    results(tmp_path, rows)
    assert '"speed median": [null, null]' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "content", [b"\xff{}", b"[1]", b"{", b'{"what": "x", "rows": [1]}', b'{"what": "x", "rows": [], "machine": 3}']
)
def test_results_that_cannot_be_read_are_one_sentence(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"results\.json is not a benchmark's"):
        write_report(tmp_path)


def test_a_damaged_line_is_left_out_and_said(run):
    for name in ("metrics", "samples"):
        lines = (run / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        (run / f"{name}.jsonl").write_bytes(b"".join([lines[0], b'{"step\xff\n', b'{"st\n', *lines[1:], b'{"step": 1']))
    page = page_data(write_report(run))
    assert page["steps"] == [*range(1, STEPS + 1)]
    text = (run / "report.html").read_text()
    assert "<dt>damaged lines of metrics.jsonl, left out</dt><dd>2</dd>" in text
    assert "2 damaged lines of samples.jsonl are left out" in text


def test_a_metric_that_is_not_finite_is_a_gap(run):
    line = json.dumps(row(STEPS + 1) | {"reward_mean": float("nan"), "grad_norm": float("inf")})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    page = page_data(write_report(run))
    assert page["scalars"]["reward_mean"][-1] is None and page["scalars"]["grad_norm"][-1] is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("environment.json", b'{"machine": {"cpu": \xff'), ("environment.json", b"{}"), ("samples.jsonl", b"{}\n")],
)
def test_what_stands_beside_the_metrics_is_left_out_where_it_cannot_be_read(run, name, content):
    (run / name).write_bytes(content)
    assert f"{name} cannot be read and is left out" in write_report(run).read_text()
