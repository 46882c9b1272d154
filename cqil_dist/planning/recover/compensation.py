"""What groups get wrong, taken back by linear regression: no training, no cost at run time.

A member of a group reads what the group was given, not what the members before it made of that. To
a first approximation the difference is a linear map J of what it does read; so is, of its output,
what a member misses in the end. Ridge regression on calibration text finds these maps, and they
fold into the projections beside them:

    attention inputs        after the norm, of each member     W' = W (I + J)    q, k and v
    feed-forward inputs     after the norm, of each member     W' = W (I + J)    gate and up
    feed-forward outputs    of all members together            W' = (I + J) W    down

Each is fitted with those above it in place, group after group, so that it takes back as well what
those before have left. Of each map the directions that explain most are kept: a LoRA adapter.

Maps of what has the model's width generalise; changes of the down projections themselves, which
have as many inputs as there are activations, fit the same text better and other text worse.
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

# The norms of a layer in the order they are computed, and the projections that read each.
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_OUTPUT = "mlp.down_proj"


class Compensation:
    """Fits maps to the groups of one model, on one text, as often as asked.

    Holds a hidden state a token and layer, in float32 some ten more a token and member of the group
    that is being fitted, and while maps are in place the weights they change twice.

    Attributes:
        windows: calibration text; ten times as many tokens as the model is wide, or more.
        rank: of each map.
        ridge: penalty on a map, as a part of its inputs' mean square.
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
        """By window, what the original hands to each layer, and what the last makes of it.

        Computed when first needed: where everything was measured before, nothing is fitted.
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
        """Within the block the model is compensated for these groups.

        Args:
            groups: adjacent ones, in order: the first takes what the original hands it, the others
                what those before make of it.

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
                original = self._read_in_original(group)
                for norm in _READERS:
                    fit.correct_inputs(norm, original)
                inputs = fit.correct_outputs(self._states(group.layers[-1] + 1))
                task.advance()

    def _states(self, layer: int) -> list[Tensor]:
        """What the original hands to a layer, by window; one above the last is the model's."""
        return [states_L[layer] for states_L in self._states_WL]

    def _read_in_original(self, group: Group) -> _Recorded:
        """What its members read there; the group's own layers are unchanged yet."""
        read: _Recorded = {}
        for layer in group.layers:
            read |= _read(self._model, Group((layer,)), _READERS, self._states(layer))
        return read


_Recorded = dict[tuple[int, str], list[Tensor]]


@dataclass(frozen=True)
class _Fit:
    """The maps of one group, found and put in place.

    Attributes:
        group_inputs: by window, [1, T, D].
    """

    merged: Merged
    group: Group
    group_inputs: Sequence[Tensor]
    ridge: float
    rank: int

    def correct_inputs(self, norm: str, original: _Recorded) -> None:
        """Bring what each member reads after a norm nearer what it reads in the original."""
        read = _read(self.merged.model, self.group, [norm], self.group_inputs)
        for layer in self.group.layers:
            pairs = zip(read[layer, norm], original[layer, norm], strict=True)
            samples = ((read_TD, original_TD - read_TD) for read_TD, original_TD in pairs)
            b_DR, a_RD = _reduced_rank_ridge(samples, self.ridge, self.rank)
            for name in _READERS[norm]:
                module = layer_tensor(layer, name)
                weight_OD = self.merged.weight(module).float()
                self.merged.add(module, Lora(a_RD, weight_OD @ b_DR))

    def correct_outputs(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Bring the group's outputs nearer the original's; returns what they are now."""
        model = self.merged.model
        with _recorded(model, self.group, [_OUTPUT]) as recorded:
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
        changed = (part_TK @ a_RK.T @ b_DR.T for part_TK in parts)
        return [
            output + change_TD.to(output.dtype)
            for output, change_TD in zip(outputs, changed, strict=True)
        ]


@contextmanager
def _recorded(model: PreTrainedModel, group: Group, names: Iterable[str]) -> Iterator[_Recorded]:
    """What these parts of the members give, [T, D] in float32, window after window.

    Without their biases: a linear map of the weights leaves those alone.
    """
    decoder: Any = model.get_decoder()
    recorded: _Recorded = {}
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


def _read(
    model: PreTrainedModel, group: Group, norms: Iterable[str], inputs: Sequence[Tensor]
) -> _Recorded:
    """What the members read after these norms, where the group is given these inputs.

    The feed-forward parts, most of the work, come after both norms and are left out.
    """
    decoder: Any = model.get_decoder()
    layers = [decoder.layers[layer] for layer in group.layers]
    left_out = [layer.mlp for layer in layers]
    for layer in layers:
        layer.mlp = nn.Identity()
    try:
        with _recorded(model, group, norms) as read:
            for x in inputs:
                hidden_after(model, [group], x)
    finally:
        for layer, mlp in zip(layers, left_out, strict=True):
            layer.mlp = mlp
    return read


def _relative(inputs_TK: Tensor, output_TD: Tensor, target_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and residual of tokens, in parts of the token's target or output, the larger.

    What comes next normalises its input: a few tokens that are a thousand times larger than all
    others would decide everything. So would a few that a group makes a hundred times larger than
    they are in the original, of which 64k tokens of text held some.
    """
    squares = (each.pow(2).mean(-1, keepdim=True) for each in (output_TD, target_TD))
    scale_T1 = torch.maximum(*squares).rsqrt()
    return scale_T1 * inputs_TK, scale_T1 * (target_TD - output_TD)


def _reduced_rank_ridge(
    samples: Iterable[tuple[Tensor, Tensor]], ridge: float, rank: int
) -> tuple[Tensor, Tensor]:
    """Factors [D, rank] and [rank, K] of a map of inputs that takes most of a residual away.

    Args:
        samples: inputs [N, K] and residuals [N, D], float32, part after part.
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
    # Of what the full change explains, the directions of the output that have most of it.
    explained_DD = change_KD.T @ gram_KK @ change_KD
    directions_DR = torch.linalg.eigh(explained_DD).eigenvectors[:, -rank:]
    return directions_DR.float(), (change_KD @ directions_DR).T.float().contiguous()
