"""Our multi-token-prediction head as a model that vLLM finds: its configuration, and the name of its class."""

from transformers import AutoConfig, Qwen3Config

from drafters.mtp.vllm_form import ARCHITECTURE, MODEL_TYPE
from pipeline.engine.vllm.environment import end_with_starter
from pipeline.engine.vllm.install import let_vllm_search

CLASS = "pipeline.engine.vllm.head_model:RollaheadMTP"


class HeadConfig(Qwen3Config):
    """`config.json` of a head as `drafters.mtp.vllm_form` writes it: one layer, most fields those of its target."""

    model_type = MODEL_TYPE


def register() -> None:
    """In a process of vLLM's; again is fine. vLLM calls it as its plugin (`vllm.general_plugins`) when it starts one,
    which is also where that process is tied to ours."""
    from vllm import ModelRegistry

    end_with_starter()
    let_vllm_search()  # a spawned process runs the top of the script that started it, which may import anything
    AutoConfig.register(MODEL_TYPE, HeadConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, CLASS)
