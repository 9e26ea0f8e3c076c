"""Samples of one prompt that share it in a row: the same values and gradients as each sample alone."""

import numpy as np
import pytest
import torch
from torch import nn

from learner import attention, cpu_attention, linear
from learner.logprobs import pack_logprobs
from learner.objective import Objective
from learner.packing import SHARED_PROMPT_TOKENS, pack
from learner.policy import checkpoint_activations
from learner.trainer import Trainer
from pipeline.config.types import LearnerSection, ObjectiveSection
from tests.unit.learner_samples import tiny_policy, trajectory

LONG_PROMPT = SHARED_PROMPT_TOKENS + 4


def group(seed, lease=0, prompt=LONG_PROMPT, responses=(6, 1, 9, 4), **more):
    """Samples of one prompt, the second of a single token."""
    rng = np.random.default_rng(seed)
    samples = [
        trajectory(rng, lease=lease, sample=index, prompt=prompt, response=length, reward=float(index % 2), **more)
        for index, length in enumerate(responses)
    ]
    for sample in samples:
        sample.prompt_ids = samples[0].prompt_ids
    return samples


def test_a_prompt_stands_in_the_row_once_and_its_responses_behind_it():
    samples = [*group(0, responses=(3, 1, 2)), trajectory(np.random.default_rng(1), prompt=2, response=2)]
    (row,) = pack(samples, range(4), 100, "cpu", share_prompts=True)
    prompt = samples[0].prompt_ids.tolist()
    n = len(prompt)
    responses = [sample.token_ids.tolist() for sample in samples]
    alone = samples[3].prompt_ids.tolist() + responses[3][:-1]
    assert row.input_ids[0].tolist() == prompt + responses[0][:2] + responses[2][:1] + alone
    assert row.position_ids[0].tolist() == [*range(n), n, n + 1, n, 0, 1, 2]
    assert row.cu_seq_lens.tolist() == [0, n, n + 2, n + 3, n + 6]
    assert row.prefixes == ((0, 0), (0, n), (0, n), (0, 0))
    assert row.predictor.tolist() == [n - 1, n, n + 1, n - 1, n - 1, n + 2, n + 4, n + 5]
    assert row.target.tolist() == [*responses[0], *responses[1], *responses[2], *responses[3]]
    assert row.sequence.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]


def test_short_prompts_single_samples_and_other_prompts_are_not_shared():
    samples = [*group(0, prompt=SHARED_PROMPT_TOKENS - 1), *group(1, responses=(5,)), *group(2, responses=(5,))]
    (row,) = pack(samples, range(len(samples)), 1000, "cpu", share_prompts=True)
    assert row.prefixes is None
    assert row.input_ids.numel() == sum(len(s.prompt_ids) + len(s.token_ids) - 1 for s in samples)


def test_a_group_that_no_row_holds_is_divided_within_the_token_limit():
    samples = group(0, responses=(9,) * 7)
    rows = pack(samples, range(7), LONG_PROMPT + 20, "cpu", share_prompts=True)
    assert sorted(index for row in rows for index in set(row.sequence.tolist())) == list(range(7))
    assert [row.input_ids.numel() for row in rows] == [LONG_PROMPT + 16] * 3 + [LONG_PROMPT + 8]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("frugal", [True, False])
@pytest.mark.parametrize("prompt", [LONG_PROMPT, cpu_attention.LONG - 4])
def test_log_probs_and_gradients_are_those_of_samples_without_sharing(tmp_path, monkeypatch, prompt, frugal, onednn):
    """Short and long sequences, with torch's attention and with blocks, with and without gradient checkpointing."""
    for module in (linear, attention):
        monkeypatch.setattr(module, "onednn_pays", lambda: onednn)
    samples = [*group(0, prompt=prompt, environment=(1,), responses=(6, 2, 9, 4)), *group(1, lease=1)]
    weight = torch.randn(200, generator=torch.Generator().manual_seed(2))
    found = {}
    for share in (True, False):
        model = tiny_policy(tmp_path / str(share))
        if frugal:
            checkpoint_activations(model)
        (row,) = pack(samples, range(8), 4000, "cpu", share_prompts=share)
        values = pack_logprobs(model, row, 1.0)
        order = row.sequence.argsort(stable=True)
        ((values.logp + 0.3 * values.entropy.detach())[order] * weight[: len(row)]).sum().backward()
        found[share] = values.logp[order].detach(), values.entropy[order].detach(), row, model
    assert found[True][2].input_ids.numel() < 0.6 * found[False][2].input_ids.numel()
    for index in (0, 1):
        torch.testing.assert_close(found[True][index], found[False][index], rtol=1e-5, atol=1e-5)
    for (name, shared), plain in zip(found[True][3].named_parameters(), found[False][3].parameters(), strict=True):
        scale = float(plain.grad.abs().max())
        torch.testing.assert_close(shared.grad / scale, plain.grad / scale, rtol=0, atol=1e-5, msg=name)


def test_a_response_that_does_not_see_its_prompt_would_be_noticed(tmp_path):
    samples = group(0)
    model = tiny_policy(tmp_path)
    (row,) = pack(samples, range(4), 4000, "cpu", share_prompts=True)
    (plain,) = pack(samples, range(4), 4000, "cpu")
    blind = pack_logprobs(model, type(row)(**{n: getattr(row, n) for n in row.__slots__} | {"prefixes": None}), 1.0)
    expected = pack_logprobs(model, plain, 1.0).logp[plain.sequence.argsort(stable=True)]
    assert (blind.logp[row.sequence.argsort(stable=True)] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("window", [None, 30])
def test_a_sliding_window_reaches_back_into_the_prompt(window):
    generator = torch.Generator().manual_seed(0)
    prompt, lengths = 40, (7, 25)
    total = prompt + sum(lengths)
    q, k, v = (torch.randn(1, heads, total, 8, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, prompt, *lengths]).cumsum(0).int()
    prefixes = ((0, 0), (0, prompt), (0, prompt))
    found, _ = attention.packed_sdpa(
        nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, prefixes=prefixes, sliding_window=window
    )
    for start, end in ((40, 47), (47, 72)):
        rows = [*range(prompt), *range(start, end)]
        parts = [tensor[:, :, rows] for tensor in (q, k, v)]
        alone, _ = attention.packed_sdpa(nn.Module(), *parts, None, sliding_window=window)
        torch.testing.assert_close(found[:, start:end], alone[:, prompt:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(5, 200), (130, 300), (300, 301)])
@pytest.mark.parametrize("window", [None, 50])
def test_block_attention_of_the_last_positions_is_that_of_all(queries, keys, window):
    generator = torch.Generator().manual_seed(keys)
    q, k, v, weight = (torch.randn(n, keys, 8, generator=generator).requires_grad_() for n in (4, 2, 2, 4))
    last = slice(keys - queries, keys)
    some = cpu_attention.BlockAttention.apply(q[:, last], k, v, 0.3, window)
    whole = cpu_attention.BlockAttention.apply(q, k, v, 0.3, window)[:, last]
    torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((out * weight[:, last]).sum(), (q, k, v)) for out in (some, whole)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_trains_the_same_policy_with_and_without_sharing(tmp_path):
    groups = [group(seed, lease=seed) for seed in range(3)]
    found = []
    for share in (True, False):
        model = tiny_policy(tmp_path / str(share))
        section = LearnerSection(micro_batch_tokens=128, learning_rate=1e-3, max_grad_norm=1e9)
        trainer = Trainer(model, Objective.from_config(ObjectiveSection()), section, temperature=1.0)
        assert trainer.shares_prompts
        trainer.shares_prompts = share
        gradients = []
        trainer.optimizer.register_step_pre_hook(
            lambda *a, model=model, to=gradients: to.append([p.grad.clone() for p in model.parameters()])
        )
        metrics = trainer.train(groups, publication=0)
        found.append((metrics, gradients))
    (shared, first), (plain, second) = found
    for key in ("loss", "entropy", "tokens_trained", "mismatch_k3", "importance_weight_mean"):
        assert shared[key] == pytest.approx(plain[key], abs=1e-5), key
    for a, b in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_entropies_are_of_whole_sequences(tmp_path):
    section = ObjectiveSection(modulators=[{"name": "attention-entropy"}], reconstructed=True)
    trainer = Trainer(tiny_policy(tmp_path), Objective.from_config(section), LearnerSection(), temperature=1.0)
    assert not trainer.shares_prompts
