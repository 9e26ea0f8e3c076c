"""The one screen at the end of `rollahead run`: what was trained, what drafting did to speed, what to do next."""

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.run_directory import RunDirectory
from pipeline.telemetry.metrics import read_metrics
from pipeline.telemetry.progress import sparkline
from pipeline.telemetry.report import write_report

WINDOW = 10
PROMPTS = 8


def print_summary(config: Config, directory: RunDirectory, seconds: float, demo: bool) -> None:
    """Print the summary; with run.measure_drafting, time generation with and without the drafter first."""
    console = Console(soft_wrap=True, highlight=False)
    rows = read_metrics(directory.metrics)
    if not rows:
        console.print(f"nothing was trained; see {directory.logs}")
        return
    console.rule("Rollahead")
    for text in _trained(config, directory, rows, seconds):
        console.print(text)
    console.print(_drafting(config, directory, rows))
    console.print()
    for text in _next(config, directory, demo):
        console.print(text)


def _trained(config: Config, directory: RunDirectory, rows: list[dict[str, Any]], seconds: float) -> list[str]:
    rewards = [row["reward_mean"] for row in rows if row["reward_mean"] is not None]
    first, last = rewards[:WINDOW], rewards[-WINDOW:]
    reward = f"{statistics.fmean(first):.3f} -> {statistics.fmean(last):.3f}" if rewards else "none was finite"
    staleness = [row["staleness_mean"] for row in rows if row["staleness_mean"] is not None]
    name = config.model.path or "the embedded model"
    mismatch = [row["mismatch_k3"] for row in rows if row["mismatch_k3"] is not None]
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(rows[-1]["dropped_total"].items())) or "none"
    return [
        f"Trained {name} on {config.task.path or config.task.kind} for {rows[-1]['step']} steps, "
        f"{sum(row['tokens_trained'] for row in rows):,} tokens, in {seconds:.0f} s.",
        f"  reward     {reward}  {sparkline(rewards)}",
        f"  staleness  {statistics.fmean(staleness or [0.0]):.2f} publications on average; "
        f"samples dropped: {dropped}",
        "  mismatch   "
        + (f"k3 {statistics.median(mismatch):.1e} (median, learner against engine, equal version)" if mismatch else
           "k3 not measured: no token was trained at the version that sampled it"),
        f"  transport  {_transport(rows)}",
        f"  run        {directory.root}",
    ]  # fmt: skip


def _transport(rows: list[dict[str, Any]]) -> str:
    """What it costs the engines to get samples to the learner."""
    seconds: dict[str, float] = {}
    for row in rows:
        for state, value in row["engine_time"].items():
            seconds[state] = seconds.get(state, 0.0) + value
    sending = seconds.pop("sending", None)
    total = sum(value for state, value in seconds.items() if state != "reward")
    if sending is None or not total:
        return "not measured"
    held = seconds.get("transport", 0.0)
    return (
        f"{sending / total:.2%} of the engines' time in CPU seconds ({sending:.2f} of {total:.0f} s); their main loops "
        f"were at it for {held / total:.2%}"
    )


def _drafting(config: Config, directory: RunDirectory, rows: list[dict[str, Any]]) -> str:
    name = config.engine.drafter["name"]
    if name == "none":
        return "  drafting   off (engine.drafter = none)"
    if not config.run.measure_drafting:
        return f"  drafting   {name}: not measured (run.measure_drafting = false)"
    if config.engine.generator != "native":
        return f"  drafting   {name}: not measured here; rollahead bench rollouts times engine.generator = vllm"
    try:
        measured = _measure(config, directory)
    except Exception as error:  # the run is done: whatever stops the clock must not make it look failed
        return f"  drafting   {name}: not measured ({type(error).__name__}: {error})"
    ratio = measured["ratio"]
    verdict = "faster" if ratio["median"] > 1.02 else "slower" if ratio["median"] < 0.98 else "as fast"
    acceptance = measured["acceptance_rate"]
    return (
        f"  drafting   {name}: {ratio['median']:.2f}x the tokens/s of plain decoding "
        f"({ratio['min']:.2f} to {ratio['max']:.2f} over {measured['repeats']} interleaved repeats), {verdict}, on "
        "prompts it has met once before; "
        f"{measured['tokens_per_verification']:.2f} tokens a verification, "
        f"{'nothing drafted' if acceptance is None else f'{acceptance:.0%} of drafts accepted'}. "
        "Exact either way: the text is sampled from the same distribution."
    )


def _measure(config: Config, directory: RunDirectory) -> dict[str, Any]:
    import torch

    from pipeline.config import resolve_threads
    from pipeline.engine.measure import drafting_speedup
    from pipeline.models.chat import chat_template
    from pipeline.models.tokenizer import Tokenizer
    from pipeline.tasks import load_task
    from pipeline.tasks.prompts import rollout_sampling
    from pipeline.weights import FilesystemFollower

    torch.set_num_threads(resolve_threads(config.engine.threads, config))
    follower = FilesystemFollower(directory.weights)
    folder, _ = follower.fetch(follower.newest())
    tokenizer = Tokenizer(folder)
    task = load_task(config.task, config.run.seed, chat_template(folder))
    examples = [task.train[index] for index in range(min(PROMPTS, len(task.train)))]
    return drafting_speedup(
        folder,
        [tokenizer.encode(example.prompt)[: config.sampling.max_prompt_tokens] for example in examples],
        rollout_sampling(config.sampling, tokenizer.eos_token_ids),
        group_size=config.learner.group_size,
        drafter=config.engine.drafter,
        max_draft_tokens=config.engine.max_draft_tokens,
        dtype=config.engine.dtype,
        device=config.engine.device,
    )


def _report(directory: RunDirectory) -> str:
    try:
        return str(write_report(directory.root))
    except UsageError as error:  # the run is done
        return f"not written: {error}"


def _next(config: Config, directory: RunDirectory, demo: bool) -> list[str]:
    newest = max(directory.checkpoints.glob("step-*"), key=lambda path: int(path.name.split("-")[1]), default=Path())
    lines = [
        "Next:",
        f"  more steps         rollahead run {directory.config} --out {directory.root} --set run.steps="
        f"{2 * config.run.steps}",
        f"  look at drafting   rollahead generate {newest} --prompt '...'",
        f"  the report         {_report(directory)}",
    ]
    if demo:
        lines.insert(
            1,
            "  your own model     rollahead run --set model.path=DIR --set task.kind=jsonl --set task.path=FILE "
            "--out runs/mine",
        )
    return lines
