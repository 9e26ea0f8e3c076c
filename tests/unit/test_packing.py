from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from learner.attention import packed_sdpa, segment_arguments
from learner.packing import first_fit_decreasing, pack
from pipeline.messages import SamplingParams
from tests.unit.learner_samples import batch, tiny_folder, tiny_policy, trajectory, transformers_class


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 50))
def test_bins_hold_every_sequence_once_and_overflow_only_for_a_single_long_one(lengths, capacity):
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[i] for i in members) <= capacity or len(members) == 1


def test_two_sequences_share_a_bin_only_as_first_fit_decreasing_says():
    assert first_fit_decreasing([3, 7, 3, 5], 10) == [[1, 0], [3, 2]]


def test_a_pack_names_the_predictor_and_the_data_of_each_generated_token():
    rng = np.random.default_rng(0)
    samples = [
        trajectory(rng, prompt=3, response=4, environment=(1,), version=5),
        trajectory(rng, prompt=2, response=2, version=6),
    ]
    (row,) = pack(samples, [0, 1], 100, "cpu")
    first, second = (np.concatenate([s.prompt_ids, s.token_ids]).astype(int).tolist() for s in samples)
    assert row.input_ids[0].tolist() == first[:-1] + second[:-1]
    assert row.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert row.cu_seq_lens.tolist() == [0, 6, 9]
    assert row.predictor.tolist() == [2, 4, 5, 7, 8]
    assert row.target.tolist() == [first[3], first[5], first[6], second[2], second[3]]
    assert row.sequence.tolist() == [0, 0, 0, 1, 1]
    assert row.version.tolist() == [5, 5, 5, 6, 6]
    assert row.logp_behaviour.tolist() == pytest.approx([*samples[0].logprobs[[0, 2, 3]], *samples[1].logprobs])


def test_samples_without_a_trained_token_are_left_out_and_an_empty_prompt_loses_its_first_token():
    rng = np.random.default_rng(0)
    samples = [
        trajectory(rng, response=2, environment=(0, 1)),
        trajectory(rng, response=0),
        trajectory(rng, prompt=0, response=3),
    ]
    (row,) = pack(samples, [0, 1, 2], 100, "cpu")
    assert row.sequence.tolist() == [2, 2]
    assert row.predictor.tolist() == [0, 1]
    assert row.target.tolist() == samples[2].token_ids[1:].tolist()


def test_packs_obey_the_token_limit():
    samples = [sample for group in batch() for sample in group]
    rows = pack(samples, range(len(samples)), 40, "cpu")
    assert len(rows) > 2
    assert all(row.input_ids.numel() <= 40 for row in rows)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_row_equals_each_sequence_alone_in_the_stock_model(tmp_path, tied):
    folder = tiny_folder(tmp_path / "model", tied=tied)
    packed = tiny_policy(tmp_path / "model", tied=tied)
    stock = transformers_class(tied).from_pretrained(folder, attn_implementation="eager").eval()
    samples = [sample for group in batch(groups=1, size=3) for sample in group]
    (row,) = pack(samples, [0, 1, 2], 1000, "cpu")
    projection = torch.randn(row.input_ids.shape[1], 32, generator=torch.Generator().manual_seed(0))

    hidden = packed.base_model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        use_cache=False,
        **segment_arguments(row.cu_seq_lens),
    ).last_hidden_state[0]
    (hidden * projection).sum().backward()

    bounds = row.cu_seq_lens.tolist()
    alone = [stock.base_model(row.input_ids[:, a:b], use_cache=False).last_hidden_state[0] for a, b in pairwise(bounds)]
    (torch.cat(alone) * projection).sum().backward()
    torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-5, rtol=1e-5)
    for (name, ours), (_, theirs) in zip(packed.named_parameters(), stock.named_parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_sliding_window_ends_at_the_sequence_and_at_the_window():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 11, 4, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 7, 11], dtype=torch.int32)
    output, _ = packed_sdpa(
        torch.nn.Identity(), query, key, value, None, scaling=0.5, cu_seq_lens_q=bounds, sliding_window=3
    )
    for start, end in ((0, 7), (7, 11)):
        for position in range(start, end):
            seen = slice(max(start, position - 2), position + 1)
            for head in range(4):
                scores = key[0, head // 2, seen] @ query[0, head, position] * 0.5
                expected = scores.softmax(0) @ value[0, head // 2, seen]
                torch.testing.assert_close(output[0, position, head], expected, atol=1e-5, rtol=1e-5)


def test_padded_and_cached_calls_equal_the_stock_attention(tmp_path):
    ours = tiny_policy(tmp_path / "model")
    stock = transformers_class(True).from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    outputs = [model.generate(ids, attention_mask=mask, output_logits=True, **options) for model in (ours, stock)]
    for position in range(6):
        expected = outputs[1].logits[position]
        torch.testing.assert_close(outputs[0].logits[position], expected, atol=1e-4, rtol=1e-4)


def test_turns_count_runs_of_environment_tokens_between_generated_ones():
    rng = np.random.default_rng(0)
    sample = trajectory(rng, response=9, environment=(0, 3, 4, 7))
    (row,) = pack([sample], [0], 100, "cpu")
    assert row.turn.tolist() == [0, 0, 1, 1, 2]  # positions 1, 2, 5, 6, 8


def test_a_pack_says_what_each_token_was_sampled_with():
    rng = np.random.default_rng(0)
    hot, plain = trajectory(rng, response=2), trajectory(rng, response=3)
    hot.header = structs.replace(hot.header, sampling=SamplingParams(temperature=1.2))
    plain.entropies = np.array([0.1, 0.2, 0.3], np.float32)
    (row,) = pack([hot, plain], [0, 1], 100, "cpu")
    assert row.temperature[row.sequence == 0].tolist() == pytest.approx([1.2, 1.2])
    assert row.temperature[row.sequence == 1].tolist() == [1.0] * 3
    assert row.entropy_engine[row.sequence == 1].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert row.entropy_engine[row.sequence == 0].isnan().all()
