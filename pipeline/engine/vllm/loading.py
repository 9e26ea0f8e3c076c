"""vLLM's loading of checkpoints that hold a multi-token-prediction head beside the model, as ours do.

vLLM's dense models refuse tensors that they do not know. This load format is vLLM's own, less the head's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from drafters.mtp.head import PREFIX
from pipeline.models.config import FAMILIES


def without_head(
    tensors: Iterable[tuple[str, Tensor]], model: Any, head: dict[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Of a publication's tensors those that vLLM's class of the model knows; those of a draft head go to `head`."""
    # Classes of other families take the names for themselves, or for their heads.
    headless = type(model).__name__ in FAMILIES
    for name, tensor in tensors:
        of_head = name.startswith(PREFIX)
        if of_head and head is not None:
            head[name] = tensor
        if not (of_head and headless):
            yield name, tensor


@register_model_loader("rollahead")
class CheckpointLoader(DefaultModelLoader):
    """At the start and for every update, of models and drafters."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(self, model_config: ModelConfig, model: Any) -> Iterator[tuple[str, Tensor]]:
        yield from without_head(super().get_all_weights(model_config, model), model)
