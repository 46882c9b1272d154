"""LoRAs added to a model's own weights, and taken away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cqil_dist.model.adapter import Adapter, Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Merged:
    """Changes that were added to a model's weights. The weights before are kept.

    Attributes:
        model: whose weights they are.
        loras: what was added, by module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.loras: dict[str, Lora] = {}
        self._before: dict[nn.Parameter, Tensor] = {}

    def weight(self, module: str) -> nn.Parameter:
        """As it is now, [O, I]."""
        weight: nn.Parameter = self.model.get_parameter(f"{module}.weight")
        return weight

    def add(self, module: str, lora: Lora) -> None:
        """Add a change, one to each module."""
        weight = self.weight(module)
        self.loras[module] = lora
        self._before.setdefault(weight, weight.data)
        change_OI = lora.b_OR.to(weight.device) @ lora.a_RI.to(weight.device)
        weight.data = (weight.data.float() + change_OI).to(weight.dtype)

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Within the block the model has the weights that it had before."""
        now = {weight: weight.data for weight in self._before}
        self.undo()
        try:
            yield
        finally:
            _put(now)

    def undo(self) -> None:
        """Give the model back the weights that it had before."""
        _put(self._before)


def merge(model: PreTrainedModel, adapter: Adapter | None) -> Merged:
    """Add an adapter's changes to a model's weights, all of them or, in an error, none."""
    merged = Merged(model)
    try:
        for module, lora in ({} if adapter is None else adapter.loras()).items():
            merged.add(module, lora)
    except BaseException:
        merged.undo()
        raise
    return merged


def _put(weights: dict[nn.Parameter, Tensor]) -> None:
    for weight, data in weights.items():
        weight.data = data
