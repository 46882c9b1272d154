"""Compensating a plan's error by linear regression, without training or any cost at run time.

A member of a group takes the group's input, and not the output of the members before it. To a first
approximation, the difference between the two is a linear map J of the input it takes, and what its
output then lacks is a linear map of that output. Ridge regression on calibration text fits these
maps, which fold into the projections beside them:

    attention inputs        after the norm, of each member     W' = W (I + J)    q, k and v
    feed-forward inputs     after the norm, of each member     W' = W (I + J)    gate and up
    feed-forward outputs    of all members together            W' = (I + J) W    down

Each map is fitted with those above it in place, one group after the other, so that it also corrects
the error that those before it have left. The directions of each map that explain most are kept, as
a LoRA adapter.

Maps of the model's width generalise. Regression on the activations before the down projections,
which are wider, fits the calibration text better and other text worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cqil_dist.errors import TextError
from cqil_dist.model.adapter import Lora
from cqil_dist.model.checkpoint import layer_tensor
from cqil_dist.plan import Group
from cqil_dist.planning.measure.grouped_model import hidden_after, hidden_states
from cqil_dist.planning.measure.merging import Merged
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A layer's norms, in the order they are computed, and the projections that take each one's output.
_PROJECTIONS_AFTER = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_OUTPUT = "mlp.down_proj"


class Compensation:
    """Fits and applies maps that correct the groups of one model, on one calibration text.

    In memory are a hidden state a token and layer, some ten more in float32 a token and member of
    the group that is being fitted, and, while maps are applied, the weights they change twice.

    Attributes:
        windows: calibration text, of at least ten times as many tokens as the model is wide.
        rank: the rank to which each map is reduced.
        ridge: penalty on a map, relative to its inputs' mean square.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        progress: Progress,
        rank: int = 256,
        ridge: float = 0.3,
    ) -> None:
        self.windows = windows
        self.rank = rank
        self.ridge = ridge
        self._model = model
        self._progress = progress

    def to_json(self) -> dict[str, Any]:
        return {**self.windows.to_json(), "rank": self.rank, "ridge": self.ridge}

    @cached_property
    def _states_WL(self) -> list[list[Tensor]]:
        """Return the original model's layer inputs and last output for each window, [1, T, D] each.

        They are computed when first needed: if every result is known already, nothing is fitted.
        """
        count = len(self.windows.token_ids_WT)
        with (
            torch.no_grad(),
            self._progress.task("Computing text to fit to", count, "windows") as task,
        ):
            states_WL: list[list[Tensor]] = []
            for tokens_T in self.windows.token_ids_WT:
                states_WL.append(hidden_states(self._model, tokens_T))
                task.advance()
        return states_WL

    @contextmanager
    def applied(
        self, groups: Sequence[Group], progress: Progress | None = None
    ) -> Iterator[Merged]:
        """Compensate the model for these groups within the block.

        Args:
            groups: adjacent groups, in order. The first one's input is the original model's, each
                other one's is the output of the group before it.

        Raises:
            TextError: there is too little text for so small a ridge.
        """
        merged = Merged(self._model)
        try:
            if groups:
                self._fit(merged, groups, progress or SilentProgress())
            yield merged
        finally:
            merged.undo()

    @torch.no_grad()
    def _fit(self, merged: Merged, groups: Sequence[Group], progress: Progress) -> None:
        inputs = self._states(groups[0].layers[0])
        with progress.task("Fitting groups", len(groups), "groups") as task:
            for group in groups:
                fit = _Fit(merged, group, inputs, self.ridge, self.rank)
                original = self._original_activations(group)
                for norm in _PROJECTIONS_AFTER:
                    fit.correct_inputs(norm, original)
                inputs = fit.correct_outputs(self._states(group.layers[-1] + 1))
                task.advance()

    def _states(self, layer: int) -> list[Tensor]:
        """Return a layer's original input for each window; after the last layer, its output."""
        return [states_L[layer] for states_L in self._states_WL]

    def _original_activations(self, group: Group) -> _Activations:
        """Return the norms' outputs in the original model; the group is still unchanged."""
        found: _Activations = {}
        for layer in group.layers:
            inputs = self._states(layer)
            found |= _norm_outputs(self._model, Group((layer,)), _PROJECTIONS_AFTER, inputs)
        return found


# The outputs [T, D] of a layer's module, window after window, by layer and module name.
_Activations = dict[tuple[int, str], list[Tensor]]


@dataclass(frozen=True)
class _Fit:
    """Fits the maps of one group, and applies each at once.

    Attributes:
        merged: the model, with the maps of the groups before.
        group_inputs: the group's input for each window, [1, T, D].
    """

    merged: Merged
    group: Group
    group_inputs: Sequence[Tensor]
    ridge: float
    rank: int

    def correct_inputs(self, norm: str, original: _Activations) -> None:
        """Bring every member's activations after a norm closer to those in the original model."""
        outputs = _norm_outputs(self.merged.model, self.group, [norm], self.group_inputs)
        for layer in self.group.layers:
            pairs = zip(outputs[layer, norm], original[layer, norm], strict=True)
            samples = ((x_TD, original_TD - x_TD) for x_TD, original_TD in pairs)
            b_DR, a_RD = _reduced_rank_ridge(samples, self.ridge, self.rank)
            for name in _PROJECTIONS_AFTER[norm]:
                module = layer_tensor(layer, name)
                weight_OD = self.merged.weight(module).float()
                self.merged.add(module, Lora(a_RD, weight_OD @ b_DR))

    def correct_outputs(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Bring the group's outputs closer to the targets, and return what they are then."""
        model = self.merged.model
        with _recording(model, self.group, [_OUTPUT]) as recorded:
            outputs = [hidden_after(model, [self.group], x) for x in self.group_inputs]
        members = [recorded[layer, _OUTPUT] for layer in self.group.layers]
        parts = [torch.cat(each, -1) for each in zip(*members, strict=True)]
        samples = (
            _relative(part_TK, output[0].float(), target[0].float())
            for part_TK, output, target in zip(parts, outputs, targets, strict=True)
        )
        b_DR, a_RK = _reduced_rank_ridge(samples, self.ridge, self.rank)
        for layer, a_RD in zip(self.group.layers, a_RK.chunk(self.group.size, dim=1), strict=True):
            module = layer_tensor(layer, _OUTPUT)
            weight_DI = self.merged.weight(module).float()
            self.merged.add(module, Lora(a_RD @ weight_DI, b_DR))
        return [
            output + (part_TK @ a_RK.T @ b_DR.T).to(output.dtype)
            for output, part_TK in zip(outputs, parts, strict=True)
        ]


@contextmanager
def _recording(
    model: PreTrainedModel, group: Group, names: Iterable[str]
) -> Iterator[_Activations]:
    """Record the outputs of these modules of the members, in float32, within the block.

    Biases are left out, since a linear map of the weights does not change them.
    """
    decoder: Any = model.get_decoder()
    recorded: _Activations = {}
    hooks = []

    def record(key: tuple[int, str], module: Any, output: Tensor) -> None:
        if getattr(module, "bias", None) is not None:
            output = output - module.bias
        recorded.setdefault(key, []).append(output[0].float())

    for key in product(group.layers, names):
        part = decoder.layers[key[0]].get_submodule(key[1])
        hooks.append(
            part.register_forward_hook(
                lambda module, args, output, key=key: record(key, module, output)
            )
        )
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _norm_outputs(
    model: PreTrainedModel, group: Group, norms: Iterable[str], inputs: Sequence[Tensor]
) -> _Activations:
    """Return the outputs of the members' norms for these inputs of the group.

    The feed-forward parts, which are most of the work and come after both norms, are left out.
    """
    decoder: Any = model.get_decoder()
    layers = [decoder.layers[layer] for layer in group.layers]
    left_out = [layer.mlp for layer in layers]
    for layer in layers:
        layer.mlp = nn.Identity()
    try:
        with _recording(model, group, norms) as recorded:
            for x in inputs:
                hidden_after(model, [group], x)
    finally:
        for layer, mlp in zip(layers, left_out, strict=True):
            layer.mlp = mlp
    return recorded


def _relative(inputs_TK: Tensor, output_TD: Tensor, target_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each token's inputs and residual by the RMS of its target or output, the larger.

    The next layer normalises its input, so a token's size does not matter there. In the regression,
    the few tokens that are a thousand times larger than all others would outweigh everything. So
    would the few that a group makes a hundred times larger than they are in the original model, of
    which there were some in 64k tokens of text.
    """
    squares = (each.pow(2).mean(-1, keepdim=True) for each in (output_TD, target_TD))
    scale_T1 = torch.maximum(*squares).rsqrt()
    return scale_T1 * inputs_TK, scale_T1 * (target_TD - output_TD)


def _reduced_rank_ridge(
    samples: Iterable[tuple[Tensor, Tensor]], ridge: float, rank: int
) -> tuple[Tensor, Tensor]:
    """Find factors [D, R] and [R, K] of the map from inputs to residuals by ridge regression.

    Args:
        samples: batches of inputs [N, K] and residuals [N, D], float32.
        ridge: penalty, relative to the inputs' mean square.
        rank: the largest rank R of the map.
    """
    parts = ((x_NK.T @ x_NK, x_NK.T @ residual_ND) for x_NK, residual_ND in samples)
    gram_KK, cross_KD = next(parts)
    for gram, cross in parts:
        gram_KK += gram
        cross_KD += cross
    damped_KK = gram_KK.clone()
    damped_KK.diagonal().add_(ridge * gram_KK.diagonal().mean())
    factor_KK, failed = torch.linalg.cholesky_ex(damped_KK)
    if failed:
        raise TextError(
            f"the text does not determine maps of {len(damped_KK)} numbers at ridge {ridge}; "
            "give more text, or a larger ridge"
        )
    change_KD = torch.cholesky_solve(cross_KD, factor_KK)
    # The output directions that hold most of what the full map explains.
    explained_DD = change_KD.T @ gram_KK @ change_KD
    directions_DR = torch.linalg.eigh(explained_DD).eigenvectors[:, -rank:]
    return directions_DR.float(), (change_KD @ directions_DR).T.float().contiguous()
