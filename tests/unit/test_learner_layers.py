"""The learner's own layers and products against torch's and against formulas written out."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from learner import attention, cpu_attention, lean, linear
from learner.logprobs import Wanted, pack_logprobs, token_logprobs
from learner.packing import pack
from learner.policy import checkpoint_activations
from tests.unit.learner_samples import batch, tiny_folder, tiny_policy, transformers_class


@pytest.fixture(params=[True, False])
def onednn(request, monkeypatch):
    """With oneDNN's products and with torch's, whatever pays on this machine."""
    for module in (linear, attention):
        monkeypatch.setattr(module, "onednn_pays", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_has_torchs_values_and_gradients(bias, onednn):
    torch.manual_seed(0)
    stock = nn.Linear(24, 40, bias=bias)
    ours = copy.deepcopy(stock)
    linear.use_fast_products(ours)
    assert type(ours) is (linear.Linear if onednn else nn.Linear)
    ours.__class__ = linear.Linear
    x = torch.randn(2, 5, 24, requires_grad=True)
    found, expected = (
        torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters())) for layer in (ours, stock)
    )
    torch.testing.assert_close(ours(x), stock(x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_linear_layer_under_autocast_multiplies_in_bfloat16():
    layer = nn.Linear(8, 8)
    layer.__class__ = linear.Linear
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_transposed_views(transposed, onednn):
    a, b = torch.randn(7, 5), torch.randn(9, 5)
    views = (a.t().contiguous().t(), b.t().contiguous().t()) if transposed else (a, b)
    torch.testing.assert_close(linear.times_transposed(*views), (a.double() @ b.double().t()).float())


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("window", [None, 50, 200])
def test_block_attention_has_the_values_and_gradients_of_float64_attention(length, window, onednn):
    generator = torch.Generator().manual_seed(length)
    q, k, v, weight = (torch.randn(n, length, 8, generator=generator) for n in (4, 2, 2, 4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    found = cpu_attention.BlockAttention.apply(*leaves, 0.3, window)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    mask = (distance >= 0) & (distance < (window or length))
    scores = 0.3 * wide[0] @ wide[1].repeat_interleave(2, 0).transpose(1, 2)
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ wide[2].repeat_interleave(2, 0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((found * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight.double()).sum(), wide)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_long_and_short_sequences_of_a_row_attend_to_themselves_alone(onednn):
    lengths = (cpu_attention.LONG + 9, 20, cpu_attention.LONG)
    q, k, v = (torch.randn(1, n, sum(lengths), 8) for n in (4, 2, 2))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    found, _ = attention.packed_sdpa(nn.Module(), q, k, v, None, cu_seq_lens_q=bounds)
    for start, end in itertools.pairwise(bounds):
        parts = [tensor[:, :, start:end] for tensor in (q, k, v)]
        expected = scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(found[:, start:end], expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_gradients_of_log_probs_and_entropies_pass_gradcheck_in_float64(entropy_gradient):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 9, (6,), generator=generator)

    def both(hidden, weight, bias):
        wanted = Wanted(entropy_gradient=entropy_gradient)
        values = token_logprobs(hidden, weight, target, 0.7, bias, wanted=wanted, chunk_tokens=4)
        return (values.logp, values.entropy) if entropy_gradient else values.logp

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_tokens_without_a_gradient_are_left_out_of_the_backward_pass(monkeypatch):
    from learner import logprobs

    rows = []
    original = logprobs._logit_gradient
    monkeypatch.setattr(
        logprobs, "_logit_gradient", lambda logits, *a: (rows.append(len(logits)), original(logits, *a))[1]
    )
    hidden = torch.randn(10, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    coefficient = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, -1.0])
    (coefficient * token_logprobs(hidden, weight, torch.ones(10, dtype=torch.int64), 1.0).logp).sum().backward()
    assert rows == [3]
    expected = torch.autograd.grad((coefficient * (hidden @ weight.t()).log_softmax(-1)[:, 1]).sum(), (hidden, weight))
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


@pytest.mark.parametrize("tied", [True, False])
def test_layers_that_keep_less_give_the_stock_models_log_probs_and_gradients(tmp_path, tied):
    folder = tiny_folder(tmp_path, tied=tied)
    stock = transformers_class(tied).from_pretrained(folder, attn_implementation="packed_sdpa").eval()
    ours = tiny_policy(folder, tied=tied)
    assert isinstance(ours.model.norm, lean.RMSNorm) and isinstance(ours.model.layers[0].mlp, lean.GatedMLP)
    (row,) = pack([sample for group in batch(groups=2) for sample in group], range(8), 1000, "cpu")
    values = [pack_logprobs(model, row, 1.0).logp for model in (ours, stock)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    for value in values:
        value.sum().backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_module_that_computes_something_else_stays_as_it_is():
    class Shifted(nn.Module):
        """Gemma's norm multiplies by 1 + weight."""

        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return (1 + self.weight) * torch.nn.functional.rms_norm(x, (8,), eps=1e-6)

    model = nn.Sequential(Shifted())
    assert lean.keep_less(model) == 0
    assert type(model[0]) is Shifted


def _kept(model, row):
    """Elements that the backward pass keeps of a forward pass, parameters left out."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def record(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        logp = pack_logprobs(model, row, 1.0).logp
    return logp, sum(kept.values())


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(tmp_path):
    plain, frugal = (tiny_policy(tmp_path / str(i)) for i in range(2))
    checkpoint_activations(frugal)
    (row,) = pack([sample for group in batch(groups=2) for sample in group], range(8), 1000, "cpu")
    kept = []
    for model in (plain, frugal):
        logp, elements = _kept(model, row)
        logp.sum().backward()
        kept.append(elements)
    assert kept[1] < 0.5 * kept[0]
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_embedding_and_head_accumulate_in_place_and_equal_autograds(tmp_path, tied):
    """Two micro-batches, one token id repeated and one that the embedding never trains."""
    model = tiny_policy(tmp_path / "model", tied=tied)
    stock = transformers_class(tied).from_pretrained(tmp_path / "model", dtype=torch.float32)
    for each in (model, stock):
        each.get_input_embeddings().padding_idx = 3
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    held = []
    for seed in (0, 1):
        ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(seed))
        ids[0, :6] = torch.tensor([3, 5, 5, 5, 3, 5])
        hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[0]
        token_logprobs(hidden, head, ids[0, 1:], 1.0, accumulate=True).logp.square().sum().backward()
        logits = stock(input_ids=ids[:, :-1]).logits[0]
        logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].square().sum().backward()
        held.append((embedding.grad, head.grad))
    assert all(a is b for a, b in zip(*held, strict=True))
    names = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, names[name].grad, rtol=1e-4, atol=1e-4, msg=name)
