"""A transformers model that computes its layers in a plan's groups.

Batches of whole sequences, gradients, peft's adapters and `generate` with its cache work as they do
without a plan. The group equations are those of the reference model.
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
    """Load the model in a directory, in evaluation mode.

    Raises:
        UnsupportedModel: its structure is not one whose layers can be grouped.
        CheckpointError: its files are damaged, or lack a tensor.
    """
    from transformers import AutoModelForCausalLM

    ModelConfig.from_directory(path)  # refuses structures that cannot be grouped
    model: PreTrainedModel
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot read the weights in {path}: {error}") from error
    if missing := sorted(found["missing_keys"]):  # transformers has made up random values
        raise CheckpointError(f"the checkpoint in {path} lacks {missing[0]}; fetch the model again")
    return model.to(device).eval()


@contextmanager
def grouped(
    model: PreTrainedModel, groups: Sequence[Group], *, checkpointing: bool = False
) -> Iterator[None]:
    """Make the model compute these groups, in order, within the block.

    Layers that no group names pass their input on unchanged, so that computing can start at a later
    layer, or skip some. A backward pass has to run within the block too.

    Args:
        model: a model of a supported family, with or without an adapter.
        checkpointing: keep only groups' inputs, and compute groups again in the backward pass.

    Raises:
        PlanError: a group names a layer that the model lacks.
    """
    decoder: Any = model.get_decoder()
    layers = decoder.layers
    proxies = [_LayerProxy(layer) for layer in layers]
    for group in groups:
        if group.layers[-1] >= len(layers):
            raise PlanError(
                f"a group names layer {group.layers[-1]} but the model has {len(layers)} layers"
            )
        members = [proxies[layer] for layer in group.layers]
        members[-1].group = _GroupOfLayers(group, members, checkpointing)
    decoder.layers = nn.ModuleList(proxies)
    try:
        yield
    finally:
        decoder.layers = layers


def final_hidden(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Return hidden states [B, T, D] after the final norm, from `input_ids` or `inputs_embeds`."""
    decoder: Any = model.get_decoder()
    hidden_BTD: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
    return hidden_BTD


def next_token_logits(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Return float32 logits [N, V] of hidden states that the final norm has been applied to."""
    head: Any = model.get_output_embeddings()
    logits_NV: Tensor = head(hidden_ND)
    return logits_NV.float()


def hidden_after(model: PreTrainedModel, groups: Sequence[Group], hidden_BTD: Tensor) -> Tensor:
    """Return the last group's output [B, T, D], before the final norm, from the first's input."""
    decoder: Any = model.get_decoder()
    norm, decoder.norm = decoder.norm, nn.Identity()
    try:
        with grouped(model, groups):
            return final_hidden(model, inputs_embeds=hidden_BTD)
    finally:
        decoder.norm = norm


def hidden_states(model: PreTrainedModel, tokens_T: Tensor) -> list[Tensor]:
    """Return every layer's input, in order, and the last layer's output: [1, T, D] each."""
    decoder: Any = model.get_decoder()
    states = [decoder.embed_tokens(tokens_T[None].to(model.device))]
    for layer in range(len(decoder.layers)):
        states.append(hidden_after(model, [Group((layer,))], states[-1]))
    return states


class _LayerProxy(nn.Module):
    """A layer's replacement, which returns its input unless it is the last member of a group.

    Layers differ in the attention mask that they are called with (some have sliding windows), so
    each proxy keeps the arguments of its own call for its layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer
        self.group: _GroupOfLayers | None = None
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states if self.group is None else self.group(hidden_states)


class _GroupOfLayers:
    """The members of one group, computed together; no module, since its members are modules."""

    def __init__(self, group: Group, members: Sequence[_LayerProxy], checkpointing: bool) -> None:
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
            hidden_states=member.layer.input_layernorm(x), **member.arguments
        )
        return output

    def _feed_forward(self, index: int, u: Tensor) -> Tensor:
        layer = self._members[index].layer
        output: Tensor = layer.mlp(layer.post_attention_layernorm(u))
        return output
