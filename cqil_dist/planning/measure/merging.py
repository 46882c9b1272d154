"""LoRA changes that are added to a model's weights, and undone again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cqil_dist.model.adapter import Adapter, Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Merged:
    """A model with changes added to its weights; the weights before are kept.

    Attributes:
        model: the model.
        loras: the change that was added to each module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.loras: dict[str, Lora] = {}
        self._before: dict[nn.Parameter, Tensor] = {}

    def weight(self, module: str) -> nn.Parameter:
        """Return the current weight [O, I] of a module."""
        weight: nn.Parameter = self.model.get_parameter(f"{module}.weight")
        return weight

    def add(self, module: str, lora: Lora) -> None:
        """Add a change to a module's weight; a module can have one change."""
        weight = self.weight(module)
        self.loras[module] = lora
        self._before.setdefault(weight, weight.data)
        change_OI = lora.b_OR.to(weight.device) @ lora.a_RI.to(weight.device)
        weight.data = (weight.data.float() + change_OI).to(weight.dtype)

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Give the model the weights it had before, within the block."""
        now = {weight: weight.data for weight in self._before}
        self.undo()
        try:
            yield
        finally:
            _put(now)

    def undo(self) -> None:
        """Give the model the weights it had before, for good."""
        _put(self._before)


def merge(model: PreTrainedModel, adapter: Adapter | None) -> Merged:
    """Add an adapter's changes to a model's weights; if one fails, none is added."""
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
