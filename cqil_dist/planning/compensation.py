"""What groups get wrong, taken back by linear regression: no training, no cost at run time.

What a member misses of those before it, their feed-forward outputs above all, it would have
answered, to a first approximation, by a linear map J of it. On calibration text, ridge regression
finds for each group the maps of its members' feed-forward outputs that bring the group's output
closest to the original's; they fold into the down projections: W' = (I + J) W. Group after group,
so that each takes back as well what those before it have left. Of each group's change the
directions that explain most are kept: a LoRA adapter.

Maps of outputs (width x width) generalise; changes of the projections themselves, which have as
many inputs as there are activations, fit the same text better and other text worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cqil_dist.errors import PlanError, TextError
from cqil_dist.model.adapter import Lora
from cqil_dist.model.checkpoint import layer_tensor
from cqil_dist.plan import Group, Plan
from cqil_dist.planning.grouped_model import hidden_after
from cqil_dist.planning.texts import Windows
from cqil_dist.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTION = "mlp.down_proj"


@torch.inference_mode()
def compensate(
    model: PreTrainedModel,
    plan: Plan,
    windows: Windows,
    progress: Progress,
    *,
    rank: int = 256,
    ridge: float = 0.3,
) -> dict[str, Lora]:
    """Changes of down projections, by module, for every group from the first with several layers.

    Args:
        windows: calibration text; ten times as many tokens as the model is wide, or more.
        rank: of each group's change.
        ridge: penalty on the change, as a part of the outputs' mean square.

    Raises:
        PlanError: every layer of the plan stands alone.
        TextError: there is too little text for so small a ridge.
    """
    if plan.depth == plan.num_layers:
        raise PlanError(f"plan {plan} has no group of several layers: there is nothing to fit")
    decoder: Any = model.get_decoder()
    taught = [decoder.embed_tokens(t[None].to(model.device)) for t in windows.token_ids_WT]
    said = taught
    changes: dict[str, Lora] = {}
    begun = False
    with progress.task("Fitting groups", plan.depth, "groups") as task:
        for group in plan.groups:
            begun = begun or group.size > 1
            alone = [Group((layer,)) for layer in group.layers]
            inputs, taught = said, [hidden_after(model, alone, x) for x in taught]
            if begun:
                fitted = _Fitted.of(model, group, inputs, taught, ridge, rank)
                changes |= fitted.changes(decoder)
                said = fitted.outputs
            else:
                said = taught
            task.advance()
    return changes


@dataclass(frozen=True)
class _Fitted:
    """A group and the maps of its members' feed-forward outputs.

    Attributes:
        mixed_RK: what is taken of those outputs, [rank, members * D].
        b_DR: and where it goes.
        outputs: of the group with the maps, by window.
    """

    group: Group
    mixed_RK: Tensor
    b_DR: Tensor
    outputs: list[Tensor]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        group: Group,
        inputs: Sequence[Tensor],
        taught: Sequence[Tensor],
        ridge: float,
        rank: int,
    ) -> _Fitted:
        """Fit the maps that bring the group's outputs closest to what is taught."""
        outputs: list[Tensor] = []
        parts: list[Tensor] = []
        with _feed_forward_outputs(model, group) as noted:
            for x in inputs:
                outputs.append(hidden_after(model, [group], x))
                parts.append(torch.cat([noted[layer] for layer in group.layers], dim=-1))
        normal = _Normal.empty(parts[0].shape[-1], outputs[0].shape[-1], outputs[0].device)
        for part, output, target in zip(parts, outputs, taught, strict=True):
            # What comes next normalises its input: a few tokens that are a thousand times larger
            # than all others would decide everything.
            scale_T1 = target[0].float().pow(2).mean(-1, keepdim=True).rsqrt()
            normal.add(scale_T1 * part[0], scale_T1 * (target - output)[0].float())
        b_DR, mixed_RK = normal.solve(ridge, rank)
        changed = [
            output + (part @ mixed_RK.T @ b_DR.T).to(output.dtype)
            for output, part in zip(outputs, parts, strict=True)
        ]
        return cls(group, mixed_RK, b_DR, changed)

    def changes(self, decoder: Any) -> dict[str, Lora]:
        """The maps, folded into the down projections."""
        parts = self.mixed_RK.chunk(self.group.size, dim=1)
        b_DR = self.b_DR.cpu()
        return {
            layer_tensor(layer, PROJECTION): Lora(
                (mixed_RD @ decoder.layers[layer].mlp.down_proj.weight.float()).cpu(), b_DR
            )
            for layer, mixed_RD in zip(self.group.layers, parts, strict=True)
        }


@contextmanager
def _feed_forward_outputs(model: PreTrainedModel, group: Group) -> Iterator[dict[int, Tensor]]:
    """The latest outputs of each member's down projection, without its bias, in float32."""
    decoder: Any = model.get_decoder()
    noted: dict[int, Tensor] = {}

    def note(layer: int, projection: nn.Linear, output: Tensor) -> None:
        output = output if projection.bias is None else output - projection.bias
        noted[layer] = output.float()

    hooks = [
        decoder.layers[layer].mlp.down_proj.register_forward_hook(
            lambda module, args, output, layer=layer: note(layer, module, output)
        )
        for layer in group.layers
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Normal:
    """Normal equations of a regression of outputs [D] on inputs [K], summed up over tokens."""

    gram_KK: Tensor
    cross_KD: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> _Normal:
        return cls(
            torch.zeros(inputs, inputs, dtype=torch.float64, device=device),
            torch.zeros(inputs, outputs, dtype=torch.float64, device=device),
        )

    def add(self, inputs_NK: Tensor, residual_ND: Tensor) -> None:
        self.gram_KK += inputs_NK.T @ inputs_NK
        self.cross_KD += inputs_NK.T @ residual_ND

    def solve(self, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
        """Factors [D, rank] and [rank, K] of the change that takes most of the residual away."""
        damped_KK = self.gram_KK.clone()
        damped_KK.diagonal().add_(ridge * self.gram_KK.diagonal().mean())
        factor_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if failed:
            raise TextError(
                f"the text does not determine maps of {len(damped_KK)} numbers at ridge {ridge}; "
                "give more text, or a larger ridge"
            )
        change_KD = torch.cholesky_solve(self.cross_KD, factor_KK)
        # Of what the full change explains, the directions of the output that have most of it.
        explained_DD = change_KD.T @ self.gram_KK @ change_KD
        directions_DR = torch.linalg.eigh(explained_DD).eigenvectors[:, -rank:]
        return directions_DR.float(), (change_KD @ directions_DR).T.float().contiguous()
