import math

import numpy as np
import pytest
import torch

from learner.logprobs import Wanted, pack_logprobs, token_logprobs
from learner.packing import Kept, pack
from learner.policy import load_policy, policy_state
from pipeline.errors import UsageError
from tests.unit.learner_samples import VOCABULARY, batch, tiny_policy, trajectory


def direct(hidden, weight, target, temperature):
    """log Z and expectation written out, in float64."""
    logits = hidden.double() @ weight.double().T / temperature
    log_z = logits.logsumexp(-1)
    logp = logits[torch.arange(len(target)), target] - log_z
    entropy = log_z - (logits.softmax(-1) * logits).sum(-1)
    return logp, entropy


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_log_probs_and_gradients_equal_the_direct_computation(chunk, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, 16, generator=generator).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    target = torch.randint(0, 50, (30,), generator=generator)
    mix = torch.randn(2, 30, generator=generator)

    logp, entropy, *_ = token_logprobs(
        hidden, weight, target, temperature, wanted=Wanted(entropy_gradient=True), chunk_tokens=chunk
    )
    gradients = torch.autograd.grad((logp * mix[0] + entropy * mix[1]).sum(), (hidden, weight))
    expected_logp, expected_entropy = direct(hidden, weight, target, temperature)
    expected = torch.autograd.grad((expected_logp * mix[0] + expected_entropy * mix[1]).sum(), (hidden, weight))

    torch.testing.assert_close(logp, expected_logp.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy.float(), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_entropy_is_not_differentiated_unless_asked():
    hidden = torch.randn(4, 8, requires_grad=True)
    logp, entropy, *_ = token_logprobs(hidden, torch.randn(10, 8), torch.zeros(4, dtype=torch.int64), 1.0)
    assert logp.requires_grad
    assert not entropy.requires_grad


def test_entropies_of_nearly_certain_tokens_are_accurate_and_not_negative():
    # one logit above the rest by `gap`: H is known in closed form, and log Z - E[logit] would lose it in rounding
    gap = torch.tensor([8.0, 12.0, 16.0, 20.0, 30.0])
    weight = torch.zeros(50, 1)
    weight[3] = 1.0
    _, entropy, *_ = token_logprobs(gap[:, None], weight, torch.full((5,), 3), 1.0)
    rest = 49 * torch.exp(-gap.double())
    expected = torch.log1p(rest) + rest / (1 + rest) * gap.double()
    assert (entropy >= 0).all()
    torch.testing.assert_close(entropy, expected.float(), atol=2e-7, rtol=1e-3)


def test_backward_holds_no_logits_of_the_whole_batch():
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    kept = []

    def record(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        logp, *_ = token_logprobs(hidden, weight, torch.zeros(64, dtype=torch.int64), 1.0, chunk_tokens=4)
    logp.sum().backward()
    assert kept
    assert 4 * 1000 not in kept
    assert hidden.grad is not None


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_truncated_tokens_are_renormalised_over_what_was_kept(chunk):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 16, generator=generator).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    target = torch.randint(0, 50, (9,), generator=generator)
    ids = [sorted({int(t), *torch.randint(0, 50, (n,), generator=generator).tolist()}) for n, t in enumerate(target)]
    ids[2], ids[5] = [], []
    kept = Kept(torch.tensor([len(i) for i in ids]), torch.tensor([i for some in ids for i in some]))
    logp, entropy, *_ = token_logprobs(hidden, weight, target, 0.7, chunk_tokens=chunk, kept=kept)
    gradients = torch.autograd.grad(logp.square().sum(), (hidden, weight))

    logits = hidden.double() @ weight.double().T / 0.7
    expected = []
    for n, some in enumerate(ids):
        left = logits[n, some] if some else logits[n]
        expected.append(logits[n, target[n]] - torch.log(torch.exp(left).sum()))
    wanted = torch.stack(expected)
    torch.testing.assert_close(logp.double(), wanted, atol=1e-5, rtol=1e-5)
    assert logp[0].item() == pytest.approx(0, abs=1e-6), "one id left"
    expected_gradients = torch.autograd.grad(wanted.square().sum(), (hidden, weight))
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, token_logprobs(hidden, weight, target, 0.7)[1])


def test_a_pack_carries_the_kept_ids_of_its_trained_tokens():
    rng = np.random.default_rng(0)
    samples = [trajectory(rng, response=4, environment=(1,)), trajectory(rng, response=2), trajectory(rng, response=3)]
    for sample, counts in ((samples[0], [2, 3, 1, 2]), (samples[2], [1, 1, 4])):
        sample.kept_counts = np.array(counts, np.uint32)
        sample.kept_ids = rng.integers(0, VOCABULARY, sum(counts)).astype(np.uint32)
    (row,) = pack(samples, range(3), 100, "cpu")
    order = [int(index) for index in dict.fromkeys(row.sequence.tolist())]
    counts = {0: [2, 1, 2], 1: [0, 0], 2: [1, 1, 4]}
    ids = {0: [*samples[0].kept_ids[:2], *samples[0].kept_ids[5:]], 1: [], 2: [*samples[2].kept_ids]}
    assert row.kept.counts.tolist() == [c for index in order for c in counts[index]]
    assert row.kept.ids.tolist() == [int(i) for index in order for i in ids[index]]
    (plain,) = pack(samples, [1], 100, "cpu")
    assert plain.kept is None


def test_a_pack_carries_no_kept_ids_of_tokens_that_something_else_sampled():
    rng = np.random.default_rng(0)
    sample = trajectory(rng, response=4)
    sample.kept_counts = np.array([2, 3, 1, 2], np.uint32)
    sample.kept_ids = np.arange(8, dtype=np.uint32)
    sample.samplers = np.array([0, 1, 2, 0], np.uint8)
    (row,) = pack([sample], [0], 100, "cpu")
    assert row.kept.counts.tolist() == [2, 0, 0, 2] and row.kept.ids.tolist() == [0, 1, 6, 7]


def test_no_token_gives_no_log_prob():
    logp, entropy, *_ = token_logprobs(torch.zeros(0, 8), torch.zeros(10, 8), torch.zeros(0, dtype=torch.int64), 1.0)
    assert logp.shape == entropy.shape == (0,)


def test_a_packs_log_probs_equal_the_stock_models_logits(tmp_path):
    model = tiny_policy(tmp_path / "model", tied=False)
    samples = [sample for group in batch(groups=2, size=2) for sample in group]
    (row,) = pack(samples, range(4), 1000, "cpu")
    logp, entropy, *_ = pack_logprobs(model, row, temperature=0.7)
    for index, sample in enumerate(samples):
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))[None]
        logits = model(ids, use_cache=False).logits[0].double() / 0.7
        trained = np.flatnonzero(sample.roles == 0)
        for position, value, h in zip(
            trained, logp[row.sequence == index], entropy[row.sequence == index], strict=True
        ):
            distribution = torch.distributions.Categorical(logits=logits[len(sample.prompt_ids) + position - 1])
            expected = distribution.log_prob(torch.tensor(int(sample.token_ids[position])))
            assert value.item() == pytest.approx(expected.item(), abs=1e-5)
            assert h.item() == pytest.approx(distribution.entropy().item(), abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_policy_state_has_the_names_of_a_saved_checkpoint(tmp_path, tied):
    from safetensors.torch import load_file

    model = tiny_policy(tmp_path / "model", tied=tied)
    state, saved = policy_state(model), load_file(tmp_path / "model" / "model.safetensors")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_a_folder_without_a_usable_checkpoint_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(UsageError, match=r"no config\.json"):
        load_policy(tmp_path, "cpu")
    tiny_policy(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    state = load_file(weights)
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy(tmp_path / "model", "cpu")
    weights.write_bytes(b"not safetensors")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_policy(tmp_path / "model", "cpu")


def test_a_device_that_is_not_there_is_refused(tmp_path):
    tiny_policy(tmp_path / "model")
    for device in ("cuda:7", "toaster"):
        with pytest.raises(UsageError, match=device):
            load_policy(tmp_path / "model", device)


def test_the_samples_of_these_tests_are_deterministic():
    rows = [pack([trajectory(np.random.default_rng(1))], [0], 100, "cpu")[0] for _ in range(2)]
    assert torch.equal(rows[0].input_ids, rows[1].input_ids)
    assert int(rows[0].target.max()) < VOCABULARY


def test_bfloat16_compute_is_close_and_leaves_float32_results_and_gradients(tmp_path):
    model = tiny_policy(tmp_path / "model", tied=False)
    samples = [sample for group in batch(groups=2, size=2) for sample in group]
    (row,) = pack(samples, range(4), 1000, "cpu")
    exact, *_ = pack_logprobs(model, row, temperature=1.0)
    rounded, entropy, *_ = pack_logprobs(model, row, temperature=1.0, compute=torch.bfloat16)
    assert rounded.dtype == entropy.dtype == torch.float32
    difference = (rounded - exact).abs().max().item()
    assert 0 < difference < 0.2
    rounded.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_every_token_has_its_own_temperature():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(20, 8, generator=generator)
    target = torch.randint(0, 20, (12,), generator=generator)
    temperatures = torch.tensor([0.5, 1.0, 1.3] * 4)
    mixed = token_logprobs(hidden, weight, target, temperatures, chunk_tokens=5)
    for temperature in (0.5, 1.0, 1.3):
        own = temperatures == temperature
        alone = token_logprobs(hidden[own], weight, target[own], temperature)
        torch.testing.assert_close(mixed.logp[own], alone.logp)
        torch.testing.assert_close(mixed.entropy[own], alone.entropy)


def test_expected_scores_and_nucleus_entropies_equal_loops_over_the_vocabulary():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = 2 * torch.randn(15, 8, generator=generator), torch.randn(30, 8, generator=generator)
    found = token_logprobs(
        hidden, weight, torch.zeros(15, dtype=torch.int64), 0.9, wanted=Wanted(expected_score=True, nucleus=0.8)
    )
    for row, score, nucleus in zip(hidden.double() @ weight.double().T / 0.9, found.expected_score,
                                   found.nucleus_entropy, strict=True):  # fmt: skip
        p = row.softmax(-1).tolist()
        h = -sum(v * math.log(v) for v in p)
        assert score.item() == pytest.approx(sum(v * v * (math.log(v) + h) for v in p), abs=1e-6)
        kept, mass = [], 0.0
        for v in sorted(p, reverse=True):
            if mass >= 0.8:
                break
            kept.append(v)
            mass += v
        assert nucleus.item() == pytest.approx(-sum(v / mass * math.log(v / mass) for v in kept), abs=1e-5)


def test_nucleus_entropies_have_the_gradient_of_finite_differences():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 6, generator=generator)
    weight = torch.randn(9, 6, generator=generator)
    target = torch.zeros(4, dtype=torch.int64)

    def total(point):
        return token_logprobs(point, weight, target, 1.0, wanted=Wanted(nucleus=0.7)).nucleus_entropy.double().sum()

    leaf = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    for row, column in ((0, 0), (1, 3), (3, 5)):
        step = torch.zeros_like(hidden)
        step[row, column] = 1e-2
        numeric = float((total(hidden + step) - total(hidden - step)) / 2e-2)
        assert gradient[row, column].item() == pytest.approx(numeric, abs=2e-3)
    assert gradient.isfinite().all() and (gradient != 0).any()


@pytest.mark.parametrize("tied", [True, False])
def test_attention_entropies_equal_those_of_the_stock_models_probabilities(tmp_path, tied):
    model = tiny_policy(tmp_path / "model", tied=tied)
    stock = type(model).from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    samples = [sample for group in batch(groups=2, size=2) for sample in group]
    (row,) = pack(samples, range(4), 1000, "cpu")
    found = pack_logprobs(model, row, 1.0, Wanted(attention_entropy=True)).attention_entropy
    assert found.shape == row.target.shape and not found.requires_grad
    for index, sample in enumerate(samples):
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))[None]
        p = stock(ids, use_cache=False, output_attentions=True).attentions[1][0].double()
        own = row.sequence == index
        for position, value in zip(np.flatnonzero(sample.roles == 0), found[own], strict=True):
            at = len(sample.prompt_ids) + int(position) - 1
            entropy = torch.special.entr(p[:, at, : at + 1].detach()).sum(-1).mean()
            expected = float(entropy) / math.log(at + 1) if at else 0.0
            assert value.item() == pytest.approx(expected, abs=1e-5)
    assert len(pack_logprobs(model, row, 1.0).attention_entropy) == 0
