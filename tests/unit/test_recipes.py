"""Recipes: read, overridden key by key, refused by name, and trained."""

import math
import tomllib

import numpy as np
import pytest
import torch
from msgspec import structs

from learner.composition import check_composition, check_engine_gives, idle_gate, uncorrected_sampler
from learner.logprobs import pack_logprobs
from learner.objective import Objective
from learner.packing import pack
from learner.tokens import Needs
from learner.trainer import Trainer
from pipeline.cli import main
from pipeline.config import load_config, render
from pipeline.config.load import convert
from pipeline.config.recipes import load_recipe, recipe_names
from pipeline.errors import UsageError
from tests.unit.learner_samples import batch, tiny_folder, tiny_policy

ACTS = {
    "adaptive-entropy": ["objective.regularisers.adaptive-entropy.target=9"],
    "clip-b": ["objective.gates.clip-b.mu=0.5"],
    "clip-v": ["objective.gates.clip-v.mu=0.5"],
    "entropic": ["objective.modulators.entropic.target=3"],
    "entropy-schedule": [
        "objective.modulators.entropic.target.start=3.2",
        "objective.modulators.entropic.target.end=3",
    ],
    "kl-cov-7b": ["objective.gates.kl-cov.fraction=0.05"],
}
"""Values with which a piece that rarely acts, or on large batches only, acts on this one."""

RECONSTRUCTED = ["attention-entropy", "d3s", "earl", "entropy-schedule", "spine"]
ASKED = {
    "empg": ["objective.modulators.empg.ends=[3]"],
    **{name: ["objective.reconstructed=true"] for name in RECONSTRUCTED},
}
"""What a recipe leaves to the user."""


def objective_of(name, *overrides):
    config = load_config(None, [f"objective.recipe={name}", *ASKED.get(name, []), *overrides])
    return Objective.from_config(config.objective), config


def samples_of(policy, seed, explore):
    """Groups whose log-probs are the policy's own, but for drift: none in the first sample of each group, small in the
    second, larger in the others, with one token far off in the very last."""
    rng = np.random.default_rng(seed)
    groups = batch(seed=seed)
    samples = [sample for group in groups for sample in group]
    for index, sample in enumerate(samples):
        sample.roles[:] = 0
        (row,) = pack([sample], [0], 1024, "cpu")
        with torch.no_grad():
            logp, entropy, *_ = pack_logprobs(policy, row, 1.0)
        drift = rng.normal(0, (0.0, 0.004, 0.2, 0.6)[index % 4], len(logp))
        sample.logprobs = np.minimum(logp.numpy() + drift, -1e-3).astype(np.float32)
        sample.entropies = entropy.numpy()
        if index % 4 == 2 and explore:
            sampling = structs.replace(sample.header.sampling, temperature=1.2)
            sample.header = structs.replace(sample.header, sampling=sampling)
        sample.versions = np.full(len(logp), index % 3, np.uint32)
    samples[-1].logprobs[0] = -1e-3
    return groups


def trained(folder, name, steps=2):
    """Weights and metrics after some batches."""
    settings = ["learner.micro_batch_tokens=1024", "sampling.max_new_tokens=16", "learner.minibatches=4"]
    objective, config = objective_of(name, *settings, *ACTS.get(name, []))
    check_composition(objective, config)
    config.learner.learning_rate = 2e-2
    policy = tiny_policy(folder)
    reference = tiny_policy(folder) if Needs.REFERENCE in objective.needs else None
    trainer = Trainer(policy, objective, config.learner, 1.0, reference=reference, max_response_tokens=16)
    rows = [trainer.train(samples_of(policy, step, explore=name == "aepo"), publication=2) for step in range(steps)]
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), rows


@pytest.mark.slow
def test_every_recipe_trains_and_differs_from_the_others(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    before = torch.cat([p.detach().flatten() for p in tiny_policy(folder).parameters()])
    weights = {}
    for name in recipe_names():
        weights[name], rows = trained(folder, name)
        for row in rows:
            assert all(value is None or math.isfinite(value) for value in row.values()), name
            assert row["skipped_steps"] == 0 and row["grad_norm"] > 0, name
        assert not torch.equal(weights[name], before), name
    same = {}
    for name, vector in weights.items():
        same.setdefault(vector.numpy().tobytes(), []).append(name)
    assert sorted(names for names in same.values() if len(names) > 1) == []


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_builds_says_where_it_is_from_and_survives_a_round_trip(name):
    objective, config = objective_of(name)
    check_composition(objective, config)
    assert load_recipe(name).keys() <= {"paper", "objective", "learner"}
    assert set(load_recipe(name)["paper"]) == {"source", "setting"}
    assert convert(tomllib.loads(render(config))) == config
    for given, piece in zip(config.objective.gates, objective.gates, strict=True):
        assert piece.name == given["name"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_reconstructed_recipe_is_for_those_who_ask_for_it(name, capsys):
    assert "reconstructed" not in load_recipe(name)["objective"]
    asked = [text for more in ASKED.get(name, []) if "reconstructed" not in more for text in ("--set", more)]
    refused = main(["run", "--dry-run", "--set", f"objective.recipe={name}", *asked])
    assert (refused == 2) == (name in RECONSTRUCTED)
    if refused:
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--set objective.reconstructed=true" in error
        assert (
            main(["run", "--dry-run", "--set", f"objective.recipe={name}", "--set", "objective.reconstructed=true"])
            == 0
        )


def test_recipes_hold_the_papers_values():
    erc, config = objective_of("dapo-erc")
    assert (erc.gates[0].options.low, erc.gates[0].options.high) == (0.95, 1.05)
    assert (erc.surrogate.options.clip_low, erc.surrogate.options.clip_high) == (0.2, 0.28)
    assert config.learner.dynamic_sampling
    assert objective_of("ce-gppo-7b")[0].surrogate.options.beta_low == 0.75
    assert objective_of("ce-gppo-1.5b")[0].surrogate.options.beta_low == 0.5
    sparse, _ = objective_of("sparse-rl")
    assert [piece.name for piece in sparse.corrections] == ["veto", "icepop", "batch-normalisation"]
    assert sparse.corrections[1].options.high == 1.5
    gspo, config = objective_of("gspo")
    assert gspo.surrogate.options.clip_high == 4e-4 and config.learner.minibatches == 4


def test_a_recipe_has_no_piece_that_it_does_not_name():
    objective, _ = objective_of("dapo")
    assert objective.gates == objective.corrections == ()


def test_no_recipe_is_the_default_objective():
    config = load_config(None, [])
    assert config.objective.gates == [{"name": "erc"}] and config.objective.corrections == [{"name": "tis"}]
    assert not config.learner.dynamic_sampling


def test_keys_override_a_recipe_one_by_one():
    objective, config = objective_of(
        "dapo-erc",
        "objective.gates.erc.low=0.9",
        "objective.surrogate.clip_high=0.4",
        "learner.dynamic_sampling=false",
    )
    assert (objective.gates[0].options.low, objective.gates[0].options.high) == (0.9, 1.05)
    assert (objective.surrogate.options.clip_low, objective.surrogate.options.clip_high) == (0.2, 0.4)
    assert objective.surrogate.options.dual_clip == 10.0
    assert not config.learner.dynamic_sampling
    replaced, _ = objective_of("dapo-erc", "objective.surrogate=cispo", "objective.gates=[]")
    assert replaced.surrogate.name == "cispo" and replaced.gates == ()
    assert replaced.surrogate.options.cap == 5.0


def test_the_default_objective_is_changed_the_same_way():
    config = load_config(None, ["objective.corrections.tis.cap=5", "objective.gates=clip-cov"])
    assert config.objective.corrections == [{"name": "tis", "cap": 5}]
    assert config.objective.gates == [{"name": "clip-cov"}]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.recipe=dapo-ercc"], "dapo-erc"),
        (["objective.recipe=dapo", "objective.gates.erc.low=0.9"], "the recipe dapo has no such piece there"),
        (["objective.gates.ecr.low=0.9"], "it has erc"),
    ],
)
def test_what_a_recipe_does_not_have_is_refused(overrides, said):
    with pytest.raises(UsageError, match=said):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['objective.corrections=["tis", "icepop"]'], "more than once (tis, icepop)"),
        (["objective.proximal=behaviour"], "tis would count the importance weight twice"),
        (["objective.surrogate=topr"], "topr weighs by pi / mu itself"),
        (["objective.surrogate=m2po"], "m2po weighs by pi / mu itself"),
        (["objective.proximal=interpolate"], "erc needs entropies of the policy at the start of the batch"),
        (
            [
                "objective.proximal=interpolate",
                "objective.gates=[]",
                'objective.corrections=["tis", "batch-normalisation"]',
            ],
            "batch-normalisation looks at the whole batch",
        ),
        (
            ["objective.recipe=areal-interpolated", "engine.kv_compression.policy=r-kv"],
            "engine.kv_compression.policy = r-kv samples from something else",
        ),
        (["objective.surrogate=gspo"], "objective.aggregation = sequence-mean"),
        (["objective.modulators=entrocraft"], "needs rewards below zero"),
        (["objective.surrogate=topr", "objective.corrections=[]", "objective.advantage=reward"], "rewards below zero"),
        (["objective.gates=spine"], "objective.reconstructed = true"),
        (["objective.modulators=d3s"], "objective.reconstructed = true"),
        (['objective.modulators=[{name="entropic", target={start=0.4, end=0.2}}]'], "objective.reconstructed = true"),
        (['objective.gates=["erc", "erc"]'], "erc twice with the same options"),
        (['objective.corrections=["batch-normalisation", "tis"]'], "put batch-normalisation last"),
        (['objective.shaping=[{name="overlong", limit=10, buffer=20}]'], "buffer = 20 must not be above limit = 10"),
        (['objective.shaping=[{name="overlong", buffer=200000}]'], "overlong.buffer = 200000 is above the limit"),
        (['objective.modulators=[{name="entrocraft", lower=0.9}]', "objective.shaping=signed"], "lower = 0.9 is above"),
        (['objective.corrections=[{name="veto", low=1.5}]'], "veto: low = 1.5 must be below 1"),
        (['objective.corrections=[{name="veto", high=0.5}]'], "high = 0.5 above it or 0"),
        (['objective.gates=[{name="clip-cov", low=6}]'], "low = 6.0 must be below high = 5.0"),
        (["objective.surrogate.clip_low=1.5"], "ppo-clip.clip_low = 1.5 is not valid"),
        (["objective.regularisers=[{name='entropy-bonus', coefficient=inf}]"], "set a finite number"),
        (["objective.recipe=empg"], "set objective.modulators.empg.ends"),
        (["objective.regularisers=[{name='kl', estimator='k1'}]"], "no gradient in expectation"),
        (["objective.gates=[{name='erc', low=1.5}]"], "must hold 1"),
    ],
)  # fmt: skip
def test_impossible_compositions_are_refused_in_one_sentence(overrides, said, capsys):
    arguments = [text for override in overrides for text in ("--set", override)]
    assert main(["run", "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


ENTROPY_OF_THE_ENGINE = (
    'engine.generator="vllm"', "objective.recipe=grpo-erc", "objective.proximal=behaviour", "objective.corrections=[]",
)  # fmt: skip


@pytest.mark.parametrize("command", ["run", "learner", "engine"])
def test_an_input_that_the_configured_engine_does_not_give_is_refused_at_start(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.engine.vllm.install.installed_version", lambda: "0.32.0")
    path = tmp_path / "c.toml"
    path.write_text(f'run.out = "{tmp_path / "run"}"\n')
    arguments = [text for override in ENTROPY_OF_THE_ENGINE for text in ("--set", override)]
    assert main([command, str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "erc needs entropies of pi_old" in error and '"recompute"' in error
    assert not (tmp_path / "run").exists()


def test_a_piece_that_reads_the_engines_entropies_is_refused_with_any_pi_old(monkeypatch):
    monkeypatch.setattr("learner.gates.high_entropy.HighEntropyTokens.needs", Needs.ENGINE_ENTROPY)
    overrides = ["objective.gates=['high-entropy']", "objective.corrections=[]"]
    config = load_config(None, ['engine.generator="vllm"', *overrides])
    with pytest.raises(UsageError, match=r"high-entropy needs the entropy that the engine sampled .* records none"):
        check_engine_gives(config)
    check_engine_gives(load_config(None, overrides))


def test_what_the_learner_computes_itself_needs_no_engine_that_gives_it():
    for overrides in (["objective.recipe=grpo-erc"], ["objective.recipe=bypass"], ["objective.gates=mine:gate"]):
        check_engine_gives(load_config(None, ['engine.generator="vllm"', *overrides]))
    with pytest.raises(UsageError, match="erc needs entropies"):
        check_composition(
            Objective.from_config(load_config(None, [*ENTROPY_OF_THE_ENGINE]).objective),
            load_config(None, [*ENTROPY_OF_THE_ENGINE]),
        )


def test_signed_rewards_and_a_reward_of_ones_own_make_entrocraft_possible():
    for overrides in (["objective.shaping=signed"], ["task.reward=mine:reward"]):
        config = load_config(None, ["objective.modulators=entrocraft", *overrides])
        check_composition(Objective.from_config(config.objective), config)


def test_erc_on_the_engines_log_probs_asks_engines_for_entropies():
    objective, config = objective_of("grpo-erc", "objective.proximal=behaviour", "objective.corrections=[]")
    check_composition(objective, config)
    assert objective.needs_entropy_from_engine
    assert not objective_of("grpo-erc")[0].needs_entropy_from_engine
    assert not objective_of("bypass")[0].needs_entropy_from_engine


SAMPLERS = {
    "engine.kv_compression.policy = r-kv": ["engine.kv_compression.policy=r-kv"],
    "engine.switching.small_model = small": ["engine.switching.small_model=small"],
}
NEED_OLD_ENTROPY = [
    ["objective.gates=erc"],
    ["objective.modulators=entropic"],
    ['objective.modulators=[{name="empg", ends=[3]}]'],
    ["objective.modulators=d3s", "objective.reconstructed=true"],
    ["objective.modulators=entrocraft", "objective.shaping=signed"],
    ["objective.regularisers=adaptive-entropy"],
]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("pieces", NEED_OLD_ENTROPY, ids=lambda pieces: pieces[0])
def test_entropies_of_another_sampler_are_not_taken_for_pi_olds(sampler, pieces):
    bare = ["objective.gates=[]", "objective.corrections=[]"]
    config = load_config(None, [*bare, "objective.proximal=behaviour", *SAMPLERS[sampler], *pieces])
    with pytest.raises(UsageError, match=f'those of {sampler} would .* objective.proximal = "recompute"'):
        check_composition(Objective.from_config(config.objective), config)
    with pytest.raises(UsageError, match=f"those of {sampler} would"):
        check_engine_gives(config)
    for changed in ("objective.proximal=recompute", *(f"{key}={value}" for key, value in _without(sampler))):
        overrides = [*bare, "objective.proximal=behaviour", *SAMPLERS[sampler], *pieces, changed]
        config = load_config(None, overrides)
        check_composition(Objective.from_config(config.objective), config)


def _without(sampler):
    return [("engine.kv_compression.policy", "none") if "kv" in sampler else ("engine.switching.small_model", '""')]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_that_nothing_corrects_is_warned_of(sampler):
    for pieces, warned in (
        (["objective.corrections=[]"], True),
        (["objective.corrections=tis"], False),
        (["objective.recipe=bypass"], False),
    ):
        config = load_config(None, [*SAMPLERS[sampler], *pieces])
        warning = uncorrected_sampler(Objective.from_config(config.objective), config)
        assert bool(warning) is warned
        if warning:
            assert sampler in warning and warning.startswith("WARNING")
            example = warning.rpartition(" ")[2]
            better = load_config(None, [*SAMPLERS[sampler], f"objective.recipe={example}"])
            assert uncorrected_sampler(Objective.from_config(better.objective), better) is None


def test_erc_that_sees_no_change_is_warned_of():
    for overrides, warned in (
        (["learner.minibatches=1"], True),
        (["learner.minibatches=2"], False),
        (["learner.minibatches=1", "objective.gates=[]"], False),
        (["learner.minibatches=1", "objective.proximal=behaviour", "objective.corrections=[]"], False),
    ):
        config = load_config(None, overrides)
        assert (idle_gate(Objective.from_config(config.objective), config) is not None) is warned
    # two rejections with other options are a conjunction, not a mistake
    both = 'objective.corrections=["rejection", {name="rejection", level="token", high=0.5}]'
    config = load_config(None, [both])
    check_composition(Objective.from_config(config.objective), config)
