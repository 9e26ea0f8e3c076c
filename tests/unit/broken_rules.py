"""Verification broken on purpose, in the compiled pass and beside it."""

import inspect

import torch
from numba import njit

from pipeline.engine.native import verifier
from pipeline.sampling import plain, verification
from pipeline.sampling.target import plain_target

REUSE_THE_UNIFORM = "residuals[n] * left", "accepts[n] * left"
SKIP_THE_RESIDUAL = "if left > 0:", "if left > 2:"
ACCEPT_TOO_MUCH = "q[b, k, token] < share", "q[b, k, token] < 3 * share"
FORGET_THE_DRAFT = "accepts[n] * q[b, k, token]", "accepts[n] * 0.3"
COMPILED = [REUSE_THE_UNIFORM, SKIP_THE_RESIDUAL, ACCEPT_TOO_MUCH, FORGET_THE_DRAFT]


def change_the_compiled_pass(monkeypatch, old, new):
    """Compiled anew with one piece of its source replaced."""
    source = inspect.getsource(plain._verify.py_func)
    assert source.count(old) == 1, old
    lines = source.replace(old, new).partition("\n")[2]  # without its decorator
    space = vars(plain).copy()
    exec(lines, space)
    monkeypatch.setattr(plain, "_verify", njit(space["_verify"]))


def without_the_compiled_pass(monkeypatch):
    """The general rules where the compiled pass would serve."""

    def general(logits, temperatures, token_ids, lengths, seeds, positions, with_entropy, probabilities, sampled):
        row, _ = verification.packed_rows(lengths)
        draws = verification.TokenUniforms.draw(seeds, positions, lengths, probabilities is not None, logits.device)
        target = plain_target(logits, torch.from_numpy(temperatures[row]), with_entropy)
        return verifier.verify(target, token_ids, lengths, draws, probabilities, sampled)

    monkeypatch.setattr(verifier, "verify_plain", general)


def skip_residual(monkeypatch):
    monkeypatch.setattr(verification, "residual", lambda p, q: p)
