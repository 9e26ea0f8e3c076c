"""What an engine is made of, checked before anything is loaded, and built."""

from collections.abc import Callable
from pathlib import Path

from pipeline.config import Config, resolve_threads
from pipeline.engine.generator import Generator
from pipeline.telemetry import Log
from pipeline.transport.keys import load_engine_keys
from pipeline.transport.options import check_address


def check_connection(config: Config, connect: str | None) -> None:
    """Refuse what is no address, and keys that cannot be used, before anything is loaded."""
    transport = config.transport
    check_address(connect or transport.address, "--connect" if connect else "transport.address")
    if transport.keys:
        load_engine_keys(Path(transport.keys), transport.engine_key)


def check_pieces(config: Config) -> None:
    """Refuse a device, a drafter, a cache compression, a small model or prompts of its calibration that do not exist or
    do not fit the policy, and those that do not go together."""
    from drafters.base import check_policy
    from drafters.registry import build
    from pipeline.engine.native.calibration import check_calibration
    from pipeline.engine.native.compression import KVCompression
    from pipeline.engine.native.small_model import check_switching
    from pipeline.models.config import ModelConfig

    drafter = build(config.engine.drafter)
    if config.engine.generator == "vllm":
        from pipeline.engine.vllm.install import require_vllm
        from pipeline.engine.vllm.proposer import check_needs

        require_vllm()
        check_needs(drafter)
    else:
        from pipeline.models.checkpoint import compute_device

        compute_device(config.engine.device, "engine.device")
    path = config.model.path
    check_policy(drafter, Path(path) if path else None, brings_head=config.drafter.co_train)
    compression = KVCompression.from_config(config.engine.kv_compression)
    if compression is not None and path:
        longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
        compression.check(ModelConfig.from_folder(path), longest)
    check_switching(config, drafter)
    check_calibration(config)


def build_generator(config: Config, folder: Path, log: Log, goes_on: Callable[[], bool] = lambda: True) -> Generator:
    """The generator of the configuration, on the model in `folder`.

    Raises:
        Stopped: it generates before its first lease, to calibrate, and `goes_on`, asked before each step, said no.
    """
    if config.engine.generator == "vllm":
        from pipeline.engine.vllm.configured import vllm_generator

        return vllm_generator(config, folder, log)
    import torch

    from drafters.registry import build
    from pipeline.engine.native.calibration import calibrate_for_run
    from pipeline.engine.native.compression import KVCompression
    from pipeline.engine.native.generator import NativeGenerator
    from pipeline.engine.native.switching import SwitchingRule
    from pipeline.models.precision import choose

    torch.set_num_threads(resolve_threads(config.engine.threads, config))
    switching = config.engine.switching
    generator = NativeGenerator(
        folder,
        drafter=build(config.engine.drafter),
        drafter_seconds=config.engine.drafter_seconds,
        max_sequences=config.engine.max_sequences,
        max_draft_tokens=config.engine.max_draft_tokens,
        stagger=config.engine.stagger,
        max_length=config.sampling.max_prompt_tokens + config.sampling.max_new_tokens,
        dtype=config.engine.dtype,
        device=config.engine.device,
        verification=config.engine.verification,
        kv_bytes=config.engine.kv_bytes,
        kv_compression=KVCompression.from_config(config.engine.kv_compression),
        prefill_tokens=config.engine.prefill_tokens,
        recompute_on_update=config.engine.update_kv == "recompute",
        small_model=switching.small_model or None,
        switching=SwitchingRule.from_config(switching),
        on_event=log,
    )
    if config.engine.dtype == "auto":
        log(f"engine.dtype = auto: {choose(generator.decoder.config, generator.decoder.device)}")
    if switching.small_model and switching.policy_share:
        calibrate_for_run(generator, config, folder, log, goes_on)
    return generator
