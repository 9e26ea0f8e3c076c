"""Greedy drafts of a head in vLLM, engine and worker in one process.

    python -m tests.vllm.mtp_drafts MODEL HEAD [NEWER [broadcast]]

Prints [[[tokens, drafts] of each prompt], the same after an update to the checkpoint NEWER if given,
which has a head of its own; from its files, or by broadcast].
"""

import os
import sys
import tempfile
from pathlib import Path

import msgspec

PROMPTS, DEPTH, TOKENS = [[4, 7, 4, 7, 4, 1], [5, 3], [8, 1, 9, 6]], 3, 40


def main(model: Path, head: Path, newer: Path | None = None, how: str = "files") -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from pipeline.engine.vllm.arguments import WORKER, speculation
    from pipeline.engine.vllm.install import let_vllm_search

    let_vllm_search()
    drafter = {"name": "mtp", "path": str(head), "max_tokens": DEPTH, "greedy": True}
    with tempfile.TemporaryDirectory() as scratch:
        engine = LLM(
            str(model), enforce_eager=True, dtype="float32", max_model_len=128, max_num_seqs=2,
            skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 26, worker_extension_cls=WORKER,
            distributed_executor_backend="uni", load_format="rollahead",
            **speculation(drafter, {}, 8, model, Path(scratch)),
        )  # fmt: skip
        found = []
        drafts: list[list[int]] = []
        engine.collective_rpc(lambda worker: _record(worker.model_runner.drafter, drafts))
        for folder in (None, newer) if newer else (None,):
            if folder is not None:
                if how == "files":
                    said = engine.collective_rpc("rollahead_load_weights", args=(str(folder), 1))
                else:
                    said = broadcast(engine, folder, Path(scratch) / "weights")
                assert said == [""], said
                engine.reset_prefix_cache()
            params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
            answers = []
            for prompt in PROMPTS:
                drafts.clear()
                (made,) = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
                answers.append([list(made.outputs[0].token_ids), list(drafts)])
            found.append(answers)
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")


def broadcast(engine, folder: Path, root: Path) -> list[str]:
    """Publish a checkpoint and its head together, and have the engine's one worker receive both."""
    import queue

    from safetensors.torch import load_file

    from drafters.mtp.head import FILE
    from pipeline.messages import WeightsGroup, WeightsJoin, WeightsManifest, WeightsWanted
    from tests.unit.weight_routes import Learner

    answers: queue.Queue = queue.Queue()
    learner = Learner(root, folder, 4096)
    learner.answer = answers.put
    learner.start()
    learner.publisher.publish(load_file(folder / "model.safetensors") | load_file(folder / FILE), 0)
    ((name, device),) = engine.collective_rpc("rollahead_receiver")
    learner.ask(WeightsJoin(devices=(device,)))
    group = answers.get(timeout=10)
    assert isinstance(group, WeightsGroup)
    joined = engine.collective_rpc("rollahead_join_group", args=(msgspec.msgpack.encode(group), {name: 1}))
    assert joined == [""], joined
    learner.ask(WeightsWanted(group=group.group, version=0))
    manifest = answers.get(timeout=10)
    assert isinstance(manifest, WeightsManifest)
    said = engine.collective_rpc("rollahead_receive_weights", args=(msgspec.msgpack.encode(manifest),))
    engine.collective_rpc("rollahead_leave_group")
    learner.stop()
    return said


def _record(proposer, drafts: list[list[int]]) -> None:
    propose = proposer.propose

    def recorded(*arguments, **named):
        tokens = propose(*arguments, **named)
        drafts.extend(tokens.tolist())
        return tokens

    proposer.propose = recorded


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
