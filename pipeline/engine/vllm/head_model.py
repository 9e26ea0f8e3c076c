"""The multi-token-prediction head on vLLM's layers: the equations of `drafters.mtp.head`, behind its method "mtp".

vLLM's proposer feeds what `forward` returns to the next draft, asks `compute_logits` for its distribution, and gives
the model the target's embedding and output layer after loading (`model.embed_tokens`, `lm_head`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, get_draft_quant_config, maybe_prefix

from drafters.mtp.head import PREFIX


@support_torch_compile
class Head(nn.Module):
    """Submodules have the checkpoint's names without the prefix `mtp.`."""

    embed_tokens: nn.Module
    """the target's, from the proposer"""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, quantized = (
            vllm_config.speculative_config.draft_model_config.hf_config,
            get_draft_quant_config(vllm_config),
        )
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = RMSNorm(width, epsilon), RMSNorm(width, epsilon)
        self.fc = ReplicatedLinear(
            2 * width, width, bias=False, params_dtype=vllm_config.model_config.dtype, quant_config=quantized,
            prefix=maybe_prefix(prefix, "fc"), return_bias=False,
        )  # fmt: skip
        # vLLM finds a layer's keys and values by its number, and the target has those below.
        number = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        layer = Qwen3DecoderLayer(
            config, cache_config=vllm_config.cache_config, quant_config=quantized,
            prefix=maybe_prefix(prefix, f"layers.{number}"),
        )  # fmt: skip
        if not config.qk_norm:
            layer.self_attn.q_norm, layer.self_attn.k_norm = nn.Identity(), nn.Identity()
        self.layers = nn.ModuleList([layer])
        self.norm = RMSNorm(width, epsilon)
        self._normed_goes_round = config.normed_goes_round

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """What goes round, [N, H], of N rows: h', or norm(h').

        Args:
            input_ids: [N], the token after each row's position.
            positions: [N].
            hidden_states: [N, H], the target's, or what the head returned for the row before.
        """
        embedded = torch.where(positions[:, None] == 0, 0, self.embed_tokens(input_ids))
        joined = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden_states)], -1)
        x, residual = self.layers[0](positions, self.fc(joined), None)
        x = x + residual
        return self.norm(x) if self._normed_goes_round else x


class RollaheadMTP(nn.Module):
    """vLLM's interface to it."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={PREFIX: "model."},
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )
    lm_head: nn.Module
    """the target's, from the proposer"""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        self.model = Head(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        assert inputs_embeds is None, "text only"
        rows: Tensor = self.model(input_ids, positions, hidden_states)
        return rows

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """float [N, V] of what `forward` returned."""
        normed = hidden_states if self.config.normed_goes_round else self.model.norm(hidden_states)
        logits: Tensor | None = self.logits_processor(self.lm_head, normed)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Of a head's tensors by our names."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded
