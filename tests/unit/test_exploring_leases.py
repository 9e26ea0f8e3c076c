"""Leases that are sampled at a temperature of their own, from the objective to the engine and back."""

import msgspec
import numpy as np
import pytest
import torch

from drafters.suffix_automaton import SuffixAutomatonDrafter
from learner.objective import Objective
from learner.prompts import LeaseSource
from learner.validation import Limits, check_trajectory
from pipeline.codec import decode_from_learner, encode
from pipeline.config import load_config
from pipeline.engine.generator import GroupRequest
from pipeline.engine.native.generator import NativeGenerator
from pipeline.messages import BadMessage, Capabilities, Grant, SamplingParams
from pipeline.tasks import load_task
from tests.unit.generation import finish
from tests.unit.learner_samples import trajectory
from tests.unit.tiny_models import reference, reference_logits, save_tiny

LIMITS = Limits(prompt_tokens=100, response_tokens=100, vocab_size=1000)


def source_of(recipe):
    config = load_config(None, [f"objective.recipe={recipe}"])
    objective = Objective.from_config(config.objective)
    task = load_task(config.task, 0)
    return LeaseSource(task, range(10), lambda text: [1, 2], (2,), config, objective.lease_temperature)


def test_every_fourth_lease_of_aepo_explores():
    leases = [source_of("aepo")(number, 0) for number in range(8)]
    assert [bool(lease.temperatures) for lease in leases] == [False, False, False, True] * 2
    assert set(leases[3].temperatures) == {1.2} and len(leases[3].temperatures) == leases[3].group_size
    assert leases[3].sampling_of(0).temperature == 1.2 and leases[0].sampling_of(0).temperature == 1.0
    assert not any(source_of("grpo")(number, 0).temperatures for number in range(8))


def test_temperatures_travel_and_old_peers_leave_them_out():
    lease = source_of("aepo")(3, 0)
    (message,) = encode(Grant(leases=(lease,)))
    assert decode_from_learner([message]).leases == (lease,)
    plain = msgspec.msgpack.decode(message)
    del plain["leases"][0]["temperatures"]
    assert decode_from_learner([msgspec.msgpack.encode(plain)]).leases[0].temperatures == ()
    plain["leases"][0]["temperatures"] = [0.0]
    with pytest.raises(BadMessage):
        decode_from_learner([msgspec.msgpack.encode(plain)])


@pytest.mark.parametrize(
    ("lease", "temperature", "accepted"), [(3, 1.2, True), (3, 0.8, True), (0, 1.0, True), (0, 1.2, False)]
)
def test_a_sample_says_what_it_was_sampled_with(lease, temperature, accepted):
    granted = source_of("aepo")(lease, 0)
    sample = trajectory(np.random.default_rng(0), lease=lease, prompt=2)
    sampling = msgspec.structs.replace(granted.sampling, temperature=temperature)
    sample.header = msgspec.structs.replace(sample.header, sampling=sampling)
    sample.prompt_ids = np.array([1, 2], np.uint32)
    if accepted:
        check_trajectory(sample, "engine-0", granted, LIMITS, Capabilities())
    else:
        with pytest.raises(BadMessage, match="was sampled with"):
            check_trajectory(sample, "engine-0", granted, LIMITS, Capabilities())


def test_the_native_engine_samples_each_at_its_temperature(tmp_path):
    folder = save_tiny(tmp_path / "model")
    temperatures = (0.5, 1.0, 1.7)
    generator = NativeGenerator(folder, drafter=SuffixAutomatonDrafter(), max_sequences=4, stop_token_ids=())
    prompt = [1, 5, 9, 3]
    sampling = SamplingParams(temperature=1.0, max_new_tokens=25)
    generator.add(GroupRequest(0, np.array(prompt), sampling, (7, 7, 7), temperatures))
    model = reference(folder)
    done = finish(generator)
    assert len(done) == 3
    for (_, index), sample in done.items():
        logits = reference_logits(model, prompt + sample.token_ids.tolist())[len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits / temperatures[index], -1)
        expected = logp.gather(1, torch.from_numpy(sample.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=1e-4)
    assert len({tuple(sample.token_ids.tolist()) for sample in done.values()}) == 3
