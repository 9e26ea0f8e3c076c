"""The embedded model: trained from nothing, the same every time, cached whole or not at all."""

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from learner import warm_start
from learner.answers import IGNORED, AnswerSampler, training_batch
from learner.embedded import EOS_ID, Architecture, build_model, build_tokenizer
from learner.warm_start import RECORD, Recipe, WarmStartProgress, WarmStartRecord, ensure_embedded_model
from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.models.tokenizer import Tokenizer
from pipeline.tasks.arithmetic import ArithmeticTask, worked_answer

TINY = Recipe(
    digits=1,
    operands=2,
    seed=3,
    target_reward=1.0,
    competent_reward=1.1,
    time_limit=60.0,
    architecture=Architecture(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate_size=64),
    batch_size=8,
    warmup_steps=5,
    probe_prompts=16,
    probe_every=5,
    probe_below_loss=1e4,
    max_steps=12,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rollahead" / "embedded"


def ensure_model(recipe: Recipe, on_progress: warm_start.OnProgress) -> Path:
    return warm_start.ensure_model(recipe, on_progress, threads=1)


def ignore(progress: WarmStartProgress) -> None:
    pass


def record_of(folder: Path) -> WarmStartRecord:
    return msgspec.json.decode((folder / RECORD).read_bytes(), type=WarmStartRecord)


def changed(recipe: Recipe, **values: object) -> Recipe:
    return msgspec.structs.replace(recipe, **values)


def test_same_recipe_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for name, recipe in [("a", TINY), ("b", TINY), ("c", changed(TINY, seed=4))]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        torch.rand(3)
        weights.append((ensure_model(recipe, ignore) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_random_state_and_threads_are_left_as_they_were() -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    ensure_model(TINY, ignore)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_result_is_a_hugging_face_checkpoint() -> None:
    folder = ensure_model(TINY, ignore)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert GenerationConfig.from_pretrained(folder).eos_token_id == EOS_ID == tokenizer.eos_token_id
    example = ArithmeticTask(3, 3, seed=0).train[0]
    text = example.prompt + worked_answer(example)
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


def test_rollouts_get_the_prompts_that_training_saw() -> None:
    folder = ensure_model(TINY, ignore)
    example = ArithmeticTask(3, 3, seed=0).train[0]
    ids_BT, targets_BT = training_batch([example], build_tokenizer())
    trained_prompt = ids_BT[0, : len(example.prompt)].tolist()
    rollout = Tokenizer(folder)
    assert rollout.encode(example.prompt) == trained_prompt
    assert targets_BT[0, len(trained_prompt) - 1] != IGNORED
    assert rollout.eos_token_ids == (EOS_ID,)


def test_default_model_is_within_its_size() -> None:
    assert 2_000_000 < sum(parameter.numel() for parameter in build_model(Architecture()).parameters()) < 6_000_000


def test_second_call_takes_the_cached_model() -> None:
    folder = ensure_model(TINY, ignore)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    seen: list[WarmStartProgress] = []
    assert ensure_model(TINY, seen.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [(progress.fraction, progress.step) for progress in seen] == [(1.0, 12)]


def test_recipe_follows_the_configuration() -> None:
    config = Config()
    config.task.digits, config.task.operands, config.run.seed = 1, 4, 9
    config.model.warm_start_seconds, config.model.warm_start_reward = 20.0, 0.4
    recipe = Recipe.from_config(config)
    assert recipe == Recipe(digits=1, operands=4, seed=9, target_reward=0.4, time_limit=20.0)
    for name in ("digits", "operands", "seed", "target_reward", "time_limit", "learning_rate", "batch_size"):
        assert changed(recipe, **{name: 7}).digest() != recipe.digest()


def test_configured_model_lies_in_the_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "from_config", staticmethod(lambda config: TINY))
    config = Config()
    config.learner.threads = 1
    assert ensure_embedded_model(config, ignore) == cache / TINY.digest()


def test_progress_moves_forward_and_ends_at_one() -> None:
    seen: list[WarmStartProgress] = []
    ensure_model(TINY, seen.append)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] < 1.0 == fractions[-1]
    assert [progress.step for progress in seen] == [*range(1, 13), 12]


def test_time_limit_keeps_what_there_is_and_says_so() -> None:
    seen: list[WarmStartProgress] = []
    folder = ensure_model(changed(TINY, time_limit=0.01, max_steps=10_000), seen.append)
    record = record_of(folder)
    assert not record.reached
    assert record.steps < 10_000
    assert "far from model.warm_start_reward = 1, after" in seen[-1].message
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_training_reaches_its_target() -> None:
    architecture = Architecture(hidden_size=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate_size=128)
    recipe = changed(
        TINY, architecture=architecture, competent_reward=0.3, target_reward=0.15, batch_size=16, learning_rate=4e-3,
        slip_learning_rate=1e-3, max_steps=2000, probe_prompts=128, probe_every=20, probe_below_loss=5.0,
    )  # fmt: skip
    record = record_of(ensure_model(recipe, ignore))
    rewards = [reward for *_, reward in record.curve]
    competent = next(index for index, reward in enumerate(rewards) if reward >= 0.3)
    assert all(reward > 0.15 for reward in rewards[competent:-1]) and rewards[-1] == record.reward <= 0.15
    assert record.reached == (record.reward >= 0.075)


def test_abandoned_training_leaves_nothing(cache: Path) -> None:
    def abandon(progress: WarmStartProgress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_model(TINY, abandon)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert record_of(ensure_model(TINY, ignore)).steps == 12


def test_two_at_once_train_once() -> None:
    waiting, steps = threading.Event(), []

    def first(progress: WarmStartProgress) -> None:
        steps.append(progress.step)
        if progress.step == 1:
            second.start()
            assert waiting.wait(30)

    def other(progress: WarmStartProgress) -> None:
        seen.append(progress)
        waiting.set()

    seen: list[WarmStartProgress] = []
    second = threading.Thread(target=ensure_model, args=(TINY, other))
    ensure_model(TINY, first)
    second.join(30)
    assert steps == [*range(1, 13), 12]
    assert "waiting" in seen[0].message
    assert {progress.step for progress in seen} == {0, 12}


def test_cache_that_cannot_be_written_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        ensure_model(TINY, ignore)


def test_only_answers_have_targets() -> None:
    tokenizer = build_tokenizer()
    examples = ArithmeticTask(3, 3, seed=0).train[:6]
    ids_BT, targets_BT = training_batch(examples, tokenizer)
    for example, ids, targets in zip(examples, ids_BT.tolist(), targets_BT.tolist(), strict=True):
        text = example.prompt + worked_answer(example)
        assert tokenizer.decode([token for token in ids if token]) == text
        wanted = [token for token in targets if token != IGNORED]
        assert tokenizer.decode(wanted[:-1]) == worked_answer(example)
        assert wanted[-1] == EOS_ID
        first = targets.index(wanted[0])
        assert ids[first + 1 : first + len(wanted)] == wanted[:-1]


def test_padded_cached_sampling_follows_the_model() -> None:
    torch.manual_seed(0)
    model = build_model(TINY.architecture).eval()
    with torch.no_grad():
        # So peaked that sampling is the argmax, which a full forward pass of each prompt alone gives another way.
        model.model.norm.weight *= 1e4
    prompts = [[5, 9, 40], [7, 8, 20, 33, 60, 12, 9], [50]]
    answers = AnswerSampler(model, bfloat16=False).sample(prompts, 12, torch.Generator().manual_seed(1))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == EOS_ID:
                break
            ids.append(token)
        assert answer == ids[len(prompt) :]
