"""The `rollahead` command: parse and call. Nothing heavy is imported before it is needed."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import RollaheadError, UsageError

EXAMPLES = """\
examples:
  rollahead run                                     train the embedded model, no download, no GPU
  rollahead run --set model.path=DIR --set task.kind=jsonl --set task.path=FILE --out runs/mine
  rollahead learner c.toml                          in one shell, and in one or more others:
  rollahead engine c.toml
  rollahead generate DIR --prompt "Question: 3 bags of 4?\\nAnswer:" --drafter suffix-automaton
"""

COMMAND_EXAMPLES = {
    "run": """\
  rollahead run --out runs/demo
  rollahead run c.toml --set learner.batch_size=128 --out runs/mine     the same command again resumes it
  rollahead run c.toml --dry-run                                        check, and print every option
""",
    "learner": "  rollahead learner c.toml\n",
    "engine": """\
  rollahead engine c.toml
  rollahead engine c.toml --connect tcp://10.0.0.1:5757 --set transport.keys=keys
""",
    "generate": """\
  rollahead generate DIR --prompt "What is 12 + 34?" --samples 4
  rollahead generate DIR --prompt "..." --drafter prompt-lookup --temperature 0
""",
    "export": """\
  rollahead export runs/mine --out final --dtype bfloat16
  rollahead export MODEL --drafter runs/head --out head-for-vllm
""",
    "train-drafter": """\
  rollahead train-drafter --set model.path=DIR --set task.kind=jsonl --set task.path=FILE --out runs/head
  rollahead train-drafter c.toml --set 'drafter.texts=["answers.jsonl"]' --set drafter.steps=2000 --out runs/head
  rollahead train-drafter c.toml --dry-run                              check, and print every option
""",
    "drafters": "  rollahead drafters\n",
    "doctor": "  rollahead doctor\n",
    "corpus": "  rollahead corpus build answers.jsonl --tokenizer DIR --out corpus\n",
    "keygen": "  rollahead keygen keys --engine gpu-1 --engine gpu-2\n",
    "bench": "  rollahead bench list\n  rollahead bench exactness --short\n  rollahead bench end-to-end --short\n",
    "report": "  rollahead report runs/demo\n  rollahead report runs/bench-end-to-end --out end-to-end.html\n",
    "completion": "  source <(rollahead completion bash)\n",
}
"""shown by `rollahead COMMAND --help`; a test parses each"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit codes: 0 done, 1 the run failed, 2 command or configuration wrong, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.call
    try:
        return command(options)
    except RollaheadError as error:
        sys.stderr.write(f"rollahead: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("rollahead: interrupted\n")
        return 130
    except Exception as error:
        return _unexpected(error)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a test freezes it."""
    parser = argparse.ArgumentParser(
        prog="rollahead",
        description="Reinforcement learning of language models whose rollouts run ahead.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rollahead {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = _command(commands, "run", "learner and engine(s) on this machine, until the run is done", _run)
    run.add_argument("config", nargs="?", type=Path, help="TOML file; without it the embedded default")
    _configuration_options(run)
    _insecure_option(run)
    run.add_argument("--out", help="run directory (run.out); an existing run in it is resumed")
    _evaluation_option(run)

    learner = _command(commands, "learner", "the learner alone", _learner)
    learner.add_argument("config", type=Path, help="TOML file")
    _configuration_options(learner)
    _insecure_option(learner)
    _evaluation_option(learner)

    engine = _command(commands, "engine", "an engine alone; start as many as you like, whenever you like", _engine)
    engine.add_argument("config", type=Path, help="TOML file, the same as the learner's")
    engine.add_argument("--connect", metavar="ADDR", help="the learner's address (transport.address)")
    engine.add_argument(
        "--connect-timeout", type=_seconds, metavar="S", help="give up after S seconds without the learner; 0: never"
    )
    _configuration_options(engine)

    generate = _command(commands, "generate", "sample from a model and show what drafting did", _generate)
    _generate_options(generate)

    export = _command(commands, "export", "a checkpoint of a run as a plain Hugging Face folder", _export)
    export.add_argument("run", type=Path, help="run directory; with --drafter the checkpoint directory of the model")
    export.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: float32")
    export.add_argument(
        "--drafter", type=Path, metavar="DIR", help="write this multi-token-prediction head in the form that vLLM runs"
    )

    train = _command(commands, "train-drafter", "fit a multi-token-prediction head to a frozen model", _train_drafter)
    train.add_argument("config", nargs="?", type=Path, help="TOML file: model, task, sampling, engine, drafter, run")
    _configuration_options(train)
    train.add_argument("--out", help="folder of the head and its training (run.out); resumed where it holds one")

    corpus = _command(commands, "corpus", "build a memory of texts for the suffix automaton", _corpus)
    corpus.add_argument("action", choices=["build"])
    corpus.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".jsonl, a document a line, or a text")
    corpus.add_argument("--out", required=True, type=Path, metavar="CORPUS", help="folder to write")
    corpus.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="checkpoint directory; not for lines of token_ids"
    )
    corpus.add_argument("--template", default="{text}", help="text of a line; {field} is replaced")

    _command(commands, "drafters", "list the drafters that are installed", _drafters)
    _command(commands, "doctor", "what this machine can do for a run, and what to set", _doctor)

    completion = _command(
        commands, "completion", "a script that completes commands and options in a shell", _completion
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])

    keys = _command(commands, "keygen", "make keys for engines on other machines, or add engines to them", _keygen)
    keys.add_argument("folder", type=Path, help="where the keys are kept (transport.keys)")
    keys.add_argument(
        "--engine",
        action="append",
        metavar="NAME",
        help="an engine to make a key for; may be repeated (default: engine)",
    )

    report = _command(commands, "report", "one HTML file of a run or a benchmark, for a browser, no network", _report)
    report.add_argument("folder", type=Path, help="run directory, or --out of a benchmark")
    report.add_argument("--out", type=Path, metavar="FILE", help="file to write; default: report.html in it")

    bench = _command(commands, "bench", "measure or prove something; `rollahead bench WHAT --help` tells more", _bench)
    bench.add_argument("what", help="name of the benchmark; `rollahead bench list` shows them")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="the benchmark's own options")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    call: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    shown = COMMAND_EXAMPLES.get(name, "")
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"examples:\n{shown}" if shown else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(call=call)
    return parser


def _generate_options(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("model", type=Path, help="Hugging Face checkpoint directory, or a folder weights/vN of a run")
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument(
        "--drafter",
        default="suffix-automaton",
        help="drafter by name, module:Class, or a table {name = ..., option = ...}",
    )
    generate.add_argument("--small-model", type=Path, metavar="DIR", help="samples where entropy is low")
    generate.add_argument(
        "--threshold", type=float, default=0.1, metavar="H", help="of the mean entropy, in nats (with --small-model)"
    )
    generate.add_argument(
        "--rule", default="5:10", metavar="W:D", help="window and least run of switching; 1:1:before looks ahead"
    )
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--kv-compression", metavar="POLICY", help="keep part of the cache: sinks-window, snapkv, r-kv"
    )
    generate.add_argument("--kv-budget", type=int, default=512, metavar="N", help="cached tokens that are kept")
    generate.add_argument("--kv-every", type=int, default=128, metavar="N", help="tokens between two compressions")
    generate.add_argument("--samples", type=int, default=1, metavar="N", help="responses, with seeds from --seed on")
    _sampling_options(generate)


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options of `pipeline.messages.SamplingParams`, under their own names; what is not given is its default."""
    add = parser.add_argument
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="draw from the fewest tokens that have probability P together")
    add("--min-p", type=float, metavar="P", help="draw from tokens P times as likely as the most likely one")
    add("--repetition-penalty", type=float, metavar="R", help="divides logits of tokens of prompt and response")
    add("--presence-penalty", type=float, metavar="X", help="taken off logits of tokens of the response")
    add("--frequency-penalty", type=float, metavar="X", help="the same for each time a token occurs")
    add("--logit-bias", action="append", metavar="ID=X", help="add X to the logit of a token; may be repeated")
    add("--allowed-token-ids", nargs="+", type=int, metavar="ID", help="draw only these")
    add("--bad-token-ids", nargs="+", type=int, metavar="ID", help="never draw these")
    add("--stop-token-ids", nargs="+", type=int, metavar="ID", help="end at these, beside the model's own")
    add("--stop-strings", nargs="+", metavar="TEXT", help="end with the token that completes one of these")
    add("--min-new-tokens", type=int, metavar="N", help="do not stop before N tokens")


def _evaluation_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate the newest checkpoint on held-out prompts, train nothing"
    )


def _configuration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override one option; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the resolved configuration, and stop")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time; give seconds, or 0")
    return value


def _insecure_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--insecure", action="store_true", help="listen for other machines without keys (transport.insecure)"
    )


def _run(options: argparse.Namespace) -> int:
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
    from pipeline.launcher import run

    return run(config, demo=demo, evaluate_only=options.eval_only)


def _learner(options: argparse.Namespace) -> int:
    from pipeline.config import load_config

    config = load_config(options.config, options.set)
    config.transport.insecure |= options.insecure
    if options.dry_run:
        return _dry_run(config, ("learner",), evaluate_only=options.eval_only)
    from learner.service import run_learner

    return run_learner(config, evaluate_only=options.eval_only)


def _engine(options: argparse.Namespace) -> int:
    from pipeline.config import load_config

    config = load_config(options.config, options.set)
    if options.dry_run:
        return _dry_run(config, ("engine",), connect=options.connect)
    from learner.composition import check_engine_gives
    from pipeline.engine.service import run_engine

    check_engine_gives(config)

    return run_engine(config, options.connect, options.connect_timeout)


def _generate(options: argparse.Namespace) -> int:
    from pipeline.engine.show import generate

    return generate(
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


def _export(options: argparse.Namespace) -> int:
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
    from learner.export import export

    dtype = options.dtype or "float32"
    print(f"{options.out} is written from {export(options.run, options.step, options.out, dtype)}")
    return 0


def _train_drafter(options: argparse.Namespace) -> int:
    from pipeline.config import load_config, render

    config = load_config(options.config, options.set)
    if options.out:
        config.run.out = options.out
    from pipeline.drafter_training import check_training, train_drafter

    if options.dry_run:
        check_training(config)
        sys.stdout.write(render(config))
        return 0

    return train_drafter(config)


def _drafters(options: argparse.Namespace) -> int:
    from drafters.registry import available

    rows = [(info.name, info.source, f"needs {info.needs}", info.summary) for info in available()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _corpus(options: argparse.Namespace) -> int:
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


def _keygen(options: argparse.Namespace) -> int:
    from pipeline.transport.keys import DEFAULT_ENGINE, keygen

    print("\n".join(keygen(options.folder, options.engine or [DEFAULT_ENGINE])))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from pipeline.doctor import doctor

    return doctor()


def _completion(options: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(build_parser(), options.shell))
    return 0


def _report(options: argparse.Namespace) -> int:
    from pipeline.telemetry.report import write_report

    print(f"written {write_report(options.folder, options.out)}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from pipeline.bench import bench, overview

    if options.what == "list":
        print(overview())
        return 0
    return bench(options.what, options.arguments)


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
        from pipeline.engine.service import check_connection, check_pieces
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


def _unexpected(error: Exception) -> int:
    """A defect of ours: one line first, the traceback below it for the report."""
    import traceback

    sys.stderr.write(f"rollahead: {type(error).__name__}: {error}\n")
    if os.environ.get("ROLLAHEAD_TRACEBACK", "1") != "0":
        sys.stderr.write("".join(traceback.format_exception(error)))
    return 1


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rollahead")
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
