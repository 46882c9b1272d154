"""A transformers model that computes its layers in a plan's groups.

What measuring and training plans takes: batches of whole sequences, gradients, peft's adapters,
`generate` with its cache. The group equations are the reference's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cqil_dist.errors import CheckpointError, PlanError
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.reference import group_output
from cqil_dist.plan import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in a directory, for evaluation.

    Raises:
        UnsupportedModel: its structure is not one whose layers can be grouped.
        CheckpointError: its files are damaged, or lack a tensor.
    """
    from transformers import AutoModelForCausalLM

    ModelConfig.from_directory(path)  # refuses what cannot be grouped
    model: PreTrainedModel
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot read the weights in {path}: {error}") from error
    if missing := sorted(found["missing_keys"]):  # transformers makes such up
        raise CheckpointError(f"the checkpoint in {path} lacks {missing[0]}; it is not complete")
    return model.to(device).eval()


@contextmanager
def grouped(
    model: PreTrainedModel, groups: Sequence[Group], *, checkpointing: bool = False
) -> Iterator[None]:
    """Within the block the model computes these groups, in order.

    Layers that no group names pass their input on: computing can begin in the midst of the model,
    or leave layers out. Whatever runs the model's backward pass does so within the block too.

    Args:
        model: of a supported family, with an adapter or without.
        checkpointing: keep nothing but the groups' inputs for the backward pass.

    Raises:
        PlanError: a group names a layer that the model lacks.
    """
    decoder: Any = model.get_decoder()
    layers = decoder.layers
    standing_in = [_Passing(layer) for layer in layers]
    for group in groups:
        if group.layers[-1] >= len(layers):
            raise PlanError(
                f"a group names layer {group.layers[-1]} but the model has {len(layers)} layers"
            )
        members = [standing_in[layer] for layer in group.layers]
        members[-1].group = _GroupOfLayers(group, members, checkpointing)
    decoder.layers = nn.ModuleList(standing_in)
    try:
        yield
    finally:
        decoder.layers = layers


def final_hidden(model: PreTrainedModel, **given: Tensor) -> Tensor:
    """Hidden states [B, T, D] after the final norm; given `input_ids` or `inputs_embeds`."""
    decoder: Any = model.get_decoder()
    hidden_BTD: Tensor = decoder(**given, use_cache=False).last_hidden_state
    return hidden_BTD


def next_token_logits(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Float32 logits [N, V] of what `final_hidden` gave."""
    head: Any = model.get_output_embeddings()
    logits_NV: Tensor = head(hidden_ND)
    return logits_NV.float()


def hidden_after(model: PreTrainedModel, groups: Sequence[Group], hidden_BTD: Tensor) -> Tensor:
    """What these groups make of the first one's input; the final norm is not applied."""
    decoder: Any = model.get_decoder()
    norm, decoder.norm = decoder.norm, nn.Identity()
    try:
        with grouped(model, groups):
            return final_hidden(model, inputs_embeds=hidden_BTD)
    finally:
        decoder.norm = norm


def hidden_states(model: PreTrainedModel, tokens_T: Tensor) -> list[Tensor]:
    """What the model hands to each layer, in order, and what the last makes of it: [1, T, D]."""
    decoder: Any = model.get_decoder()
    states = [decoder.embed_tokens(tokens_T[None].to(model.device))]
    for layer in range(len(decoder.layers)):
        states.append(hidden_after(model, [Group((layer,))], states[-1]))
    return states


class _Passing(nn.Module):
    """Stands in for one layer: passes its input on, unless it is the last member of a group.

    The model hands every layer masks of its own kind: each member remembers what it was handed.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer
        self.group: _GroupOfLayers | None = None
        self.handed: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **handed: Any) -> Tensor:
        self.handed = handed
        return hidden_states if self.group is None else self.group(hidden_states)


class _GroupOfLayers:
    """The members of one group, computed together. Not a module: the members are, already."""

    def __init__(self, group: Group, members: Sequence[_Passing], checkpointing: bool) -> None:
        self._group = group
        self._members = dict(zip(group.layers, members, strict=True))
        self._checkpointing = checkpointing

    def __call__(self, x: Tensor) -> Tensor:
        if self._checkpointing and torch.is_grad_enabled():
            output: Tensor = checkpoint(self._compute, x, use_reentrant=False)
            return output
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        return group_output(x, self._group, self._attention, self._feed_forward)

    def _attention(self, index: int, x: Tensor) -> Tensor:
        member = self._members[index]
        output: Tensor
        output, _ = member.layer.self_attn(
            hidden_states=member.layer.input_layernorm(x), **member.handed
        )
        return output

    def _feed_forward(self, index: int, u: Tensor) -> Tensor:
        layer = self._members[index].layer
        output: Tensor = layer.mlp(layer.post_attention_layernorm(u))
        return output
