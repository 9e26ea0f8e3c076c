"""The command line of `rollahead`, and the examples that its help shows."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from pipeline import commands

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


AddCommand = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""adds a command: its name, what it does, what it calls"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a test freezes it."""
    parser = argparse.ArgumentParser(
        prog="rollahead",
        description="Reinforcement learning of language models whose rollouts run ahead.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rollahead {_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = functools.partial(_command, subparsers)
    _process_commands(add)
    _model_commands(add)
    _tool_commands(add)
    return parser


def _process_commands(add: AddCommand) -> None:
    run = add("run", "learner and engine(s) on this machine, until the run is done", commands.run)
    run.add_argument("config", nargs="?", type=Path, help="TOML file; without it the embedded default")
    _configuration_options(run)
    _insecure_option(run)
    run.add_argument("--out", help="run directory (run.out); an existing run in it is resumed")
    _evaluation_option(run)

    learner = add("learner", "the learner alone", commands.learner)
    learner.add_argument("config", type=Path, help="TOML file")
    _configuration_options(learner)
    _insecure_option(learner)
    _evaluation_option(learner)

    engine = add("engine", "an engine alone; start as many as you like, whenever you like", commands.engine)
    engine.add_argument("config", type=Path, help="TOML file, the same as the learner's")
    engine.add_argument("--connect", metavar="ADDR", help="the learner's address (transport.address)")
    engine.add_argument(
        "--connect-timeout", type=_seconds, metavar="S", help="give up after S seconds without the learner; 0: never"
    )
    _configuration_options(engine)


def _model_commands(add: AddCommand) -> None:
    generate = add("generate", "sample from a model and show what drafting did", commands.generate)
    _generate_options(generate)

    export = add("export", "a checkpoint of a run as a plain Hugging Face folder", commands.export)
    export.add_argument("run", type=Path, help="run directory; with --drafter the checkpoint directory of the model")
    export.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: float32")
    export.add_argument(
        "--drafter", type=Path, metavar="DIR", help="write this multi-token-prediction head in the form that vLLM runs"
    )

    train = add("train-drafter", "fit a multi-token-prediction head to a frozen model", commands.train_drafter)
    train.add_argument("config", nargs="?", type=Path, help="TOML file: model, task, sampling, engine, drafter, run")
    _configuration_options(train)
    train.add_argument("--out", help="folder of the head and its training (run.out); resumed where it holds one")

    corpus = add("corpus", "build a memory of texts for the suffix automaton", commands.corpus)
    corpus.add_argument("action", choices=["build"])
    corpus.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".jsonl, a document a line, or a text")
    corpus.add_argument("--out", required=True, type=Path, metavar="CORPUS", help="folder to write")
    corpus.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="checkpoint directory; not for lines of token_ids"
    )
    corpus.add_argument("--template", default="{text}", help="text of a line; {field} is replaced")


def _tool_commands(add: AddCommand) -> None:
    add("drafters", "list the drafters that are installed", commands.drafters)
    add("doctor", "what this machine can do for a run, and what to set", commands.doctor)

    completion = add("completion", "a script that completes commands and options in a shell", commands.completion)
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])

    keys = add("keygen", "make keys for engines on other machines, or add engines to them", commands.keygen)
    keys.add_argument("folder", type=Path, help="where the keys are kept (transport.keys)")
    keys.add_argument(
        "--engine",
        action="append",
        metavar="NAME",
        help="an engine to make a key for; may be repeated (default: engine)",
    )

    report = add("report", "one HTML file of a run or a benchmark, for a browser, no network", commands.report)
    report.add_argument("folder", type=Path, help="run directory, or --out of a benchmark")
    report.add_argument("--out", type=Path, metavar="FILE", help="file to write; default: report.html in it")

    bench = add("bench", "measure or prove something; `rollahead bench WHAT --help` tells more", commands.bench)
    bench.add_argument("what", help="name of the benchmark; `rollahead bench list` shows them")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="the benchmark's own options")


def _command(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    call: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    shown = COMMAND_EXAMPLES.get(name, "")
    parser = subparsers.add_parser(
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
        "--threshold", type=float, metavar="H", help="of the mean entropy, in nats (with --small-model; default 0.1)"
    )
    generate.add_argument(
        "--rule", metavar="W:D", help="window and least run of switching, default 5:10; 1:1:before looks ahead"
    )
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--kv-compression", metavar="POLICY", help="keep part of the cache: sinks-window, snapkv, r-kv"
    )
    generate.add_argument("--kv-budget", type=int, metavar="N", help="cached tokens that are kept (default 512)")
    generate.add_argument("--kv-every", type=int, metavar="N", help="tokens between two compressions (default 128)")
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


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rollahead")
    except PackageNotFoundError:
        return "unknown"
