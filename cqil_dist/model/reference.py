"""The group equations in one process, written to be read: the oracle of the distributed runtime.

No cache, no folding, no fusing: every layer is computed as transformers names and orders it, and
groups are combined exactly as CQIL (arXiv 2404.06709) defines them. Slow on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cqil_dist.model.checkpoint import EMBEDDING, FINAL_NORM, HEAD, Checkpoint, layer_tensor
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.precision import Precision
from cqil_dist.model.rope import RotaryTable, rotate
from cqil_dist.plan import Group, Plan


def group_output(
    x: Tensor,
    group: Group,
    attention: Callable[[int, Tensor], Tensor],
    feed_forward: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Compute the output of one concurrent group for its input x.

        a_j = A_j(x)
        u_j = x + sum of a_k over the members k that j sees
        y   = x + sum over j of ( a_j + F_j(u_j) )

    Attention enters y once, whatever the bypass; the bypass only changes what the feed-forward
    parts see. A group of one layer that sees itself is the original layer.
    """
    attended = [attention(layer, x) for layer in group.layers]
    y = x
    for member, layer in enumerate(group.layers):
        u = x
        for seen in group.visible(member):
            u = u + attended[seen]
        y = y + attended[member] + feed_forward(layer, u)
    return y


class ReferenceModel:
    """A model under a plan, computed over whole sequences in one process.

    Args:
        precision: the numbers to compute with, float32 unless told otherwise. Matrices are those
            that the weight format stands for.

    Raises:
        CheckpointError: a tensor is missing, misshapen or unreadable.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        plan: Plan,
        precision: Precision | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        self._weights = _read_all(config, checkpoint, precision or Precision.of("float32"))

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Compute float32 next-token logits [T, V] after each of T tokens."""
        tokens = torch.tensor(token_ids)
        x = self._weights[EMBEDDING][tokens]
        for group in self.plan.groups:
            x = group_output(x, group, self._attention, self._feed_forward)
        head = self._weights[EMBEDDING if self.config.tied_head else HEAD]
        return F.linear(self._norm(x, FINAL_NORM), head).float()

    def greedy(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Continue with the most likely token each time; end after an end-of-sequence token."""
        tokens = list(prompt_ids)
        for _ in range(max_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
            if tokens[-1] in self.config.eos_token_ids:
                break
        return tokens[len(prompt_ids) :]

    def _attention(self, layer: int, x_TD: Tensor) -> Tensor:
        config = self.config
        tokens = x_TD.shape[0]
        normed = self._norm(x_TD, layer_tensor(layer, "input_layernorm.weight"))

        def heads(name: str) -> Tensor:
            projected = self._linear(normed, layer_tensor(layer, f"self_attn.{name}"))
            return projected.view(tokens, -1, config.head_dim)

        q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")
        if config.qk_norm:
            q = self._norm(q, layer_tensor(layer, "self_attn.q_norm.weight"))
            k = self._norm(k, layer_tensor(layer, "self_attn.k_norm.weight"))
        rotary = RotaryTable(config, tokens, x_TD.dtype, x_TD.device)
        cos, sin = rotary.at(torch.arange(tokens))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.repeat_interleave(config.shape.queries_per_kv, dim=1)
        v = v.repeat_interleave(config.shape.queries_per_kv, dim=1)
        scores = torch.einsum("qhe,khe->hqk", q, k) * config.head_dim**-0.5
        position = torch.arange(tokens)
        visible = position[None, :] <= position[:, None]
        if (window := config.windows[layer]) is not None:
            visible &= position[None, :] > position[:, None] - window
        scores = scores.masked_fill(~visible, float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        attended = torch.einsum("hqk,khe->qhe", weights, v).reshape(tokens, -1)
        return self._linear(attended, layer_tensor(layer, "self_attn.o_proj"))

    def _feed_forward(self, layer: int, u_TD: Tensor) -> Tensor:
        normed = self._norm(u_TD, layer_tensor(layer, "post_attention_layernorm.weight"))
        gate = self._linear(normed, layer_tensor(layer, "mlp.gate_proj"))
        up = self._linear(normed, layer_tensor(layer, "mlp.up_proj"))
        return self._linear(F.silu(gate) * up, layer_tensor(layer, "mlp.down_proj"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        x32 = x.float()
        scaled = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self._weights[name] * scaled.to(x.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))


def _read_all(
    config: ModelConfig, checkpoint: Checkpoint, precision: Precision
) -> dict[str, Tensor]:
    shapes = _tensor_shapes(config)
    with checkpoint.open() as reader:
        read = {name: reader.read(name, shape) for name, shape in shapes.items()}
    for name, tensor in read.items():
        if tensor.dim() == 2 and name != EMBEDDING:
            outputs, inputs = tensor.shape
            matrix = precision.weight_format.empty(outputs, inputs, tensor.device)
            matrix.write(tensor)
            read[name] = matrix.dequantised()
    return {name: tensor.to(precision.compute_dtype) for name, tensor in read.items()}


def _tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    biases = {"self_attn.o_proj": config.o_bias}
    biases |= dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), config.qkv_bias
    )
    biases |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), config.mlp_bias)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        for part, width in norms.items():
            shapes[layer_tensor(layer, f"{part}.weight")] = (width,)
        for part, (out, inner) in config.projection_shapes.items():
            shapes[layer_tensor(layer, f"{part}.weight")] = (out, inner)
            if biases[part]:
                shapes[layer_tensor(layer, f"{part}.bias")] = (out,)
    return shapes
