"""Steps of a draft head: Muon for its matrices and AdamW for its vectors, or AdamW for both.

Muon (Jordan et al., 2024) takes a step of equal size in all directions of a matrix. A head that begins as a copy of the
last layer needs a fraction of the steps for the same acceptance (docs/drafting.md).
"""

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from pipeline.config.types import DrafterSection

_WEIGHT_DECAY = 0.01
"""of matrices under AdamW; under Muon there is none"""
_MOMENTS: dict[type[Optimizer], tuple[str, ...]] = {
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum_buffer",),
}


class HeadOptimizer:
    """Holds the moments of a head's parameters."""

    def __init__(self, module: nn.Module, section: DrafterSection) -> None:
        """
        Args:
            module: the head.
            section: which optimizer, and learning rates.
        """
        self._parameters = dict(module.named_parameters())
        matrices = [p for p in self._parameters.values() if p.dim() == 2]
        vectors = [p for p in self._parameters.values() if p.dim() != 2]
        self._rest: Optimizer = AdamW(
            [{"params": vectors, "weight_decay": 0.0}], lr=section.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self._of_matrices: Optimizer = self._rest
        if section.optimizer == "muon":
            # scaled by the ratio of outputs to inputs, as its authors do: one rate does for models of all widths
            self._of_matrices = Muon(matrices, lr=section.matrix_learning_rate, weight_decay=0.0)
        else:
            self._rest.add_param_group({"params": matrices, "weight_decay": _WEIGHT_DECAY})
        self._optimizers = {id(part): part for part in (self._of_matrices, self._rest)}.values()
        self._rates = [group["lr"] for part in self._optimizers for group in part.param_groups]

    def step(self, factor: float) -> None:
        """One step by the gradients, which go; learning rates are `factor` times the section's."""
        groups = [group for part in self._optimizers for group in part.param_groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = factor * rate
        for part in self._optimizers:
            part.step()
            part.zero_grad()

    def moments(self) -> dict[str, Tensor]:
        """By their own name and the parameter's, "exp_avg.fc.weight"; not copied. Empty before the first step."""
        return {
            f"{key}.{name}": value
            for name, p in self._parameters.items()
            for key, value in self._of(p).state.get(p, {}).items()
            if isinstance(value, Tensor)
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what `moments` holds after a step."""
        return {
            f"{key}.{name}": () if key == "step" else tuple(p.shape)
            for name, p in self._parameters.items()
            for key in _MOMENTS[type(self._of(p))]
        }

    def load(self, moments: dict[str, Tensor]) -> None:
        """As `moments` gives them, copied to where the parameters are; other names are not read."""
        for entry, value in moments.items():
            key, _, name = entry.partition(".")
            if name in self._parameters:
                p = self._parameters[name]
                self._of(p).state[p][key] = value.to(p.device, copy=True)

    def _of(self, parameter: Tensor) -> Optimizer:
        return self._of_matrices if parameter.dim() == 2 else self._rest
