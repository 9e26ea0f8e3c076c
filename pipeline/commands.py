"""What each command of `rollahead` calls. Nothing heavy is imported before it is needed."""

import argparse
import sys

from pipeline.errors import UsageError


def run(options: argparse.Namespace) -> int:
    from pipeline.config import EMBEDDED, load_config

    config = load_config(options.config, options.set)
    demo = options.config is None and not config.model.path
    if demo:
        config = load_config(EMBEDDED, options.set)
    if options.out:
        config.run.out = options.out
    config.transport.insecure |= options.insecure
    if options.dry_run:
        return _dry_run(config, ("learner", "engine"), evaluate_only=options.eval_only)
    from pipeline import launcher

    return launcher.run(config, demo=demo, evaluate_only=options.eval_only)


def learner(options: argparse.Namespace) -> int:
    from pipeline.config import load_config

    config = load_config(options.config, options.set)
    config.transport.insecure |= options.insecure
    if options.dry_run:
        return _dry_run(config, ("learner",), evaluate_only=options.eval_only)
    from learner.service import run_learner

    return run_learner(config, evaluate_only=options.eval_only)


def engine(options: argparse.Namespace) -> int:
    from pipeline.config import load_config

    config = load_config(options.config, options.set)
    if options.dry_run:
        return _dry_run(config, ("engine",), connect=options.connect)
    from learner.composition import check_engine_gives
    from pipeline.engine.service import run_engine

    check_engine_gives(config)

    return run_engine(config, options.connect, options.connect_timeout)


def generate(options: argparse.Namespace) -> int:
    from pipeline.engine import show

    return show.generate(
        options.model,
        options.prompt,
        drafter=options.drafter,
        sampling=vars(options),
        seed=options.seed,
        samples=options.samples,
        small_model=options.small_model,
        threshold=options.threshold,
        rule=options.rule,
        kv_compression=(options.kv_compression, options.kv_budget, options.kv_every),
    )


def export(options: argparse.Namespace) -> int:
    if options.drafter is not None:
        for name in ("step", "dtype"):
            if (value := getattr(options, name)) is not None:
                raise UsageError(
                    f"--{name} {value} is a run's; with --drafter the head is written as it is, so leave it out"
                )
        from drafters.mtp.vllm_form import write_for_vllm

        write_for_vllm(options.run, options.drafter, options.out)
        print(f'{options.out} is written; vllm serve {options.run} --speculative-config \'{{"method": "mtp", "model": '
              f'"{options.out}", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}}\'')  # fmt: skip
        return 0
    from drafters.mtp.head import FILE
    from learner.export import export as write_checkpoint

    source = write_checkpoint(options.run, options.step, options.out, options.dtype or "float32")
    head = f", with its draft head in {FILE}" if (options.out / FILE).exists() else ""
    print(f"{options.out} is written from {source}{head}")
    return 0


def train_drafter(options: argparse.Namespace) -> int:
    from pipeline.config import load_config, render

    config = load_config(options.config, options.set)
    if options.out:
        config.run.out = options.out
    from pipeline import drafter_training

    if options.dry_run:
        drafter_training.check_training(config)
        sys.stdout.write(render(config))
        return 0

    return drafter_training.train_drafter(config)


def drafters(options: argparse.Namespace) -> int:
    from drafters.registry import available

    rows = [(info.name, info.source, f"needs {info.needs}", info.summary) for info in available()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def corpus(options: argparse.Namespace) -> int:
    import time

    from drafters.suffix.corpus import build_corpus
    from drafters.suffix.documents import read_documents
    from pipeline.models.tokenizer import Tokenizer

    began = time.perf_counter()
    tokenizer = Tokenizer(options.tokenizer) if options.tokenizer else None
    documents = read_documents(options.files, tokenizer, options.template)
    size = build_corpus(documents, options.out, tokenizer.vocabulary_digest() if tokenizer else None)
    print(
        f"{options.out}: {size.tokens:,} tokens of {size.documents:,} documents, "
        f"{size.bytes / size.tokens:.0f} bytes a token, {time.perf_counter() - began:.1f} s; use it with "
        f'engine.drafter = {{name = "suffix-automaton", corpora = ["{options.out}"]}}'
    )
    return 0


def keygen(options: argparse.Namespace) -> int:
    from pipeline.transport.keys import DEFAULT_ENGINE, keygen

    print("\n".join(keygen(options.folder, options.engine or [DEFAULT_ENGINE])))
    return 0


def doctor(options: argparse.Namespace) -> int:
    from pipeline.doctor import doctor as examine

    return examine()


def completion(options: argparse.Namespace) -> int:
    import shtab

    from pipeline.command_line import build_parser

    print(shtab.complete(build_parser(), options.shell))
    return 0


def report(options: argparse.Namespace) -> int:
    from pipeline.telemetry.report import write_report

    print(f"written {write_report(options.folder, options.out)}")
    return 0


def bench(options: argparse.Namespace) -> int:
    from pipeline import bench as benchmarks

    if options.what == "list":
        print(benchmarks.overview())
        return 0
    return benchmarks.bench(options.what, options.arguments)


def _dry_run(config: object, parts: tuple[str, ...], *, evaluate_only: bool = False, connect: str | None = None) -> int:
    from pipeline.config import Config, check_config, render

    assert isinstance(config, Config)
    check_config(config)
    if "learner" in parts:
        from learner.composition import build_objective
        from learner.startup import check_startup

        build_objective(config)
        check_startup(config, evaluate_only)
    if "engine" in parts:
        from learner.composition import check_engine_gives
        from pipeline.engine.startup import check_connection, check_pieces
        from pipeline.tasks.rewards import load_reward, reward_name

        check_engine_gives(config)
        check_pieces(config)
        if parts == ("engine",):
            check_connection(config, connect)
        load_reward(reward_name(config.task))
    if "learner" in parts:
        from learner.startup import check_inputs

        check_inputs(config)
    sys.stdout.write(render(config))
    return 0
