"""Samples as HTML: every token coloured by how it came."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.telemetry.report.page import text

HUES = (140, 45, 265, 215, 320, 20)
"""of drafters, in the order in which each is first met"""


def samples_section(samples: Sequence[Mapping[str, Any]]) -> str:
    """A key, a choice of step, and a card a sample."""
    names = list(dict.fromkeys(piece[2] for sample in samples for piece in sample["pieces"] if piece[2] is not None))
    samplers = {piece[3] for sample in samples for piece in sample["pieces"]} - {"policy"}
    key = "".join(
        f'<span class="o-accepted" style="{_hue(name, names)}">{text(name)}, accepted</span>' for name in names
    )
    key += '<span class="o-bonus">bonus</span><span class="o-residual">in place of a rejected draft</span>'
    key += "<span>sampled, nothing drafted</span>"
    if any(piece[1] == "unknown" for sample in samples for piece in sample["pieces"]):
        key += "<span>how a token came was not recorded (vLLM)</span>"
    key += "".join(f'<span class="s-{text(name)}">{text(name.replace("_", " "))}</span>' for name in sorted(samplers))
    cards = "".join(_card(sample, names) for sample in samples)
    return f'<p class="key">{key}</p><select id="sample-step" aria-label="step"></select>{cards}'


def _card(sample: Mapping[str, Any], names: Sequence[str]) -> str:
    parts = "".join(f" {text(name)} {value:.3g}" for name, value in sample["reward_parts"].items())
    head = (
        f"step {sample['step']}, lease {sample['lease']}, policy v{sample['version']}: "
        f"<b>reward {sample['reward']:.3g}</b>{parts}, {sample['tokens']} tokens in "
        f"{sample['verifications']} verifications, ended by {text(sample['finish_reason'])}"
    )
    body = "".join(_piece(piece, names) for piece in sample["pieces"])
    return (
        f'<div class="sample" data-step="{sample["step"]}"><div class="head">{head}</div>'
        f'<div class="text"><span class="prompt">{text(sample["prompt"])}</span>{body}</div></div>'
    )


def _piece(piece: Sequence[Any], names: Sequence[str]) -> str:
    said, origin, drafter, sampler, tokens = piece
    style = f' style="{_hue(drafter, names)}"' if drafter is not None else ""
    title = f"{tokens} token(s), {origin}" + (f", drafted by {drafter}" if drafter else "") + f", {sampler}"
    return f'<span class="k o-{text(origin)} s-{text(sampler)}"{style} title="{text(title)}">{text(said)}</span>'


def _hue(name: str, names: Sequence[str]) -> str:
    return f"--h:{HUES[names.index(name) % len(HUES)]}"
