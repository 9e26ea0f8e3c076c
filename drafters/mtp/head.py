"""The multi-token-prediction head on the decoder's own layers: one block that reads the target's hidden states.

After DeepSeek-V3 (arXiv 2412.19437, section 2.2) and Bebop (arXiv 2606.12370). With h_t the target's final-norm hidden
state at position t and x_{t+1} the known token after it,

    z = W_fc [norm_e(embed(x_{t+1})), norm_h(h_t)],   h'_t = block(z),   q(x_{t+2}) = softmax(head(norm(h'_t))),

embedding and output head being the target's. Further tokens come from the same block: h'_t takes the place of
h_{t+1}, the draft that of x_{t+2}. Details are those of GLM-4.5's head as vLLM runs it, whose block is that of a dense
Qwen3 or Llama: h' goes round before the final norm, and the embedding counts as zero at position 0.

MiMo's checkpoints hold such a head under other names (`model.mtp_layers.0`), with the two inputs of W_fc the other way
round, h_t taken before the target's final norm, and h' going round after its own, as vLLM runs it; its first layer is
read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.models.checkpoint import MTP_LAYERS, files_with, holds, load_tensors, read_tensors
from pipeline.models.config import ModelConfig
from pipeline.models.decoder import Decoder, LayerWeights
from pipeline.models.kv_cache import AttentionPlan, KVCache

if TYPE_CHECKING:
    from drafters.mtp.chain import HeadChain
    from pipeline.models.cpu_layers import CompiledLayers

PREFIX = "mtp."
FILE = "mtp.safetensors"
"""a head's own file, in any folder or beside the model's"""


def head_config(config: ModelConfig) -> ModelConfig:
    """Of the head for a model: one layer like the model's, with full attention."""
    return replace(config, layers=1, windows=())


class MTPHead(LayerWeights):
    """The head of one target, whose embedding and output head it shares."""

    def __init__(self, target: Decoder) -> None:
        config = head_config(target.config)
        super().__init__(config, target.dtype, target.device)
        self._target, hidden = target, config.hidden_size
        self.norm_embedding = self._norm_weight("mtp.pre_fc_norm_embedding.weight", hidden)
        self.norm_hidden = self._norm_weight("mtp.pre_fc_norm_hidden.weight", hidden)
        self.fc = self._linear({"mtp.fc": hidden}, 2 * hidden)
        self.layer = self._layer("mtp.layers.0.")
        self.final_norm = self._norm_weight("mtp.norm.weight", hidden)
        self._compiled_fc = False
        self._chain: HeadChain | None = None
        self._chained: tuple[CompiledLayers, CompiledLayers | None] | None = None
        """the compiled layers of head and target that it was made of"""
        self.normed_goes_round = False
        """MiMo's: further tokens read norm(h') in place of h', the first the target's states before its final norm"""

    def _compile(self) -> None:
        super()._compile()
        self._compiled_fc = False
        if self._compiled is not None:
            from pipeline.models.cpu_products import packed_address

            self._compiled_fc = bool(packed_address(self.fc.weight))

    def takes_compiled(self, rows: int) -> bool:
        return self._compiled is not None and self._target.takes_compiled(rows)

    @torch.no_grad()
    def forward(self, token_ids: Tensor, hidden: Tensor, plan: AttentionPlan, cache: KVCache) -> Tensor:
        """h' [N, H] of N packed rows; their keys and values are cached.

        Args:
            token_ids: int64 [N], the token after each row's position.
            hidden: [N, H], the target's, or the head's own of the row before.
            plan: of the rows' positions.
            cache: of the head, one layer.
        """
        embedded = self._target.embedding[token_ids]
        if not plan.cached.all():
            embedded[plan.positions == 0] = 0
        return self.through(0, self.layer, self._joined(embedded, hidden), plan, cache, self.attention)

    def _joined(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """z [N, H]"""
        if self.takes_compiled(len(hidden)) and self._compiled_fc:
            from pipeline.models.cpu_layers import joined_product

            norms = self.norm_embedding, self.norm_hidden
            return joined_product(embedded, hidden, norms, self.fc, self.config.rms_norm_eps)
        norm = self.attention.norm
        return self.fc(torch.cat([norm(embedded, self.norm_embedding), norm(hidden, self.norm_hidden)], 1))

    def chains(self, rows: int) -> bool:
        """Whether `chain` can read, or draft for, so many rows."""
        fits = self._compiled_fc and self._target.has_compiled_head and not self.normed_goes_round
        return fits and self.takes_compiled(rows)

    def chain(self) -> "HeadChain":
        """Whole drafts, for the weights as they are now."""
        from drafters.mtp.chain import HeadChain

        assert self._compiled is not None
        made_of = self._compiled, self._target.compiled
        if self._chain is None or self._chained != made_of:
            self._chained = made_of
            self._chain = HeadChain(
                self._compiled, embedding=self._target.embedding, norms=(self.norm_embedding, self.norm_hidden),
                fc=self.fc, final_norm=self.final_norm, head=self._target.head, epsilon=self.config.rms_norm_eps,
            )  # fmt: skip
        return self._chain

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, V] of h' [N, H]."""
        return self._target.normed_logits(hidden, self.final_norm)

    def target_input(self, hidden: Tensor) -> Tensor:
        """What the head reads of the target's final-norm hidden states [N, H].

        MiMo's reads those before that norm, of which its own norm takes the scale away: dividing by weights is enough.
        """
        weight = self._target.final_norm
        return torch.where(weight == 0, 0, hidden / weight) if self.normed_goes_round else hidden

    def next_input(self, hidden: Tensor) -> Tensor:
        """What takes the place of the target's hidden states [N, H] for the token after the one of h' [N, H]."""
        return self.attention.norm(hidden, self.final_norm) if self.normed_goes_round else hidden


def head_files(folder: Path | str) -> list[Path]:
    """The files that hold a head in a folder: its own, or a checkpoint's; none where there is no head.

    Raises:
        UsageError: no such folder, or a file that cannot be read.
    """
    own = Path(folder) / FILE
    return [own] if own.exists() else files_with(Path(folder), PREFIX) or files_with(Path(folder), MTP_LAYERS)


def head_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """A head's tensors under our names."""
    return _from_mimo(read_tensors(files, MTP_LAYERS)) if is_mimos(files) else read_tensors(files, PREFIX)


def is_mimos(files: Sequence[Path]) -> bool:
    """Whether the head is one of MiMo's, which feeds itself norm(h')."""
    return not holds(files, PREFIX) and holds(files, MTP_LAYERS)


def _from_mimo(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first of MiMo's heads under our names."""
    renamed = {
        "token_layernorm.": "pre_fc_norm_embedding.",
        "hidden_layernorm.": "pre_fc_norm_hidden.",
        "input_proj.": "fc.",
        "final_layernorm.": "norm.",
    }
    first, found = MTP_LAYERS + "0.", {}
    for name, tensor in tensors.items():
        if name.startswith(first):
            own = name.removeprefix(first)
            old = next((old for old in renamed if own.startswith(old)), "")
            found[PREFIX + (renamed[old] + own.removeprefix(old) if old else "layers.0." + own)] = tensor
    fc = found.get("mtp.fc.weight")
    if fc is not None:
        found["mtp.fc.weight"] = torch.cat(fc.chunk(2, dim=1)[::-1], 1)
    return found


def load_head(head: MTPHead, folder: Path | str) -> None:
    """The head's weights from a folder.

    Raises:
        UsageError: there is no head, or one of another shape; nothing has changed then.
    """
    files = head_files(folder)
    if not files:
        raise UsageError(f"{folder} holds no multi-token-prediction head; train one with rollahead train-drafter")
    try:
        if is_mimos(files):
            _load(head, head_tensors(files), folder)
        else:
            load_tensors(head, files, PREFIX)
    except UsageError as error:
        raise UsageError(f"the multi-token-prediction head does not fit the model: {error}") from None
    head.normed_goes_round = is_mimos(files)


def load_published(head: MTPHead, tensors: Mapping[str, Tensor]) -> None:
    """The head's weights from tensors that came with a publication, in memory.

    Raises:
        UsageError: they are of another shape; nothing has changed then.
    """
    _load(head, {n: t for n, t in tensors.items() if n.startswith(PREFIX)}, "the publication")
    head.normed_goes_round = False


def _load(head: MTPHead, tensors: dict[str, Tensor], folder: Path | str) -> None:
    shapes = head.shapes
    for name in sorted(shapes.keys() | tensors.keys()):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != shapes.get(name):
            raise UsageError(f"{folder}: {name} has shape {shape} where {shapes.get(name)} is needed")
    head.load(tensors.__getitem__)
