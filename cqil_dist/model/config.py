"""What a model's layers look like, read from its Hugging Face config.

The config travels to every rank as plain numbers, so that ranks need not import transformers.
Only structures this runtime computes exactly are accepted; anything else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqil_dist.costs import ModelShape
from cqil_dist.errors import ModelError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Fields whose presence (with a value other than the neutral one) changes a layer's arithmetic.
_FOREIGN_FIELDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "num_local_experts": ("mixture of experts", (None, 0)),
    "num_experts": ("mixture of experts", (None, 0)),
    "n_routed_experts": ("mixture of experts", (None, 0)),
    "kv_lora_rank": ("latent attention", (None, 0)),
    "attn_logit_softcapping": ("capped attention logits", (None,)),
    "final_logit_softcapping": ("capped output logits", (None,)),
    "query_pre_attn_scalar": ("its own attention scale", (None,)),
    "embedding_multiplier": ("scaled embeddings", (None, 1.0)),
    "residual_multiplier": ("scaled residuals", (None, 1.0)),
    "logits_scaling": ("scaled logits", (None, 1.0)),
    "partial_rotary_factor": ("rotary embedding of a part of each head", (None, 1.0)),
    "no_rope_layers": ("layers without rotary embedding", (None,)),
    "quantization_config": ("quantised weights", (None,)),
    "layer_norm_epsilon": ("LayerNorm in place of RMSNorm", (None,)),
    "layer_norm_eps": ("LayerNorm in place of RMSNorm", (None,)),
    "vision_config": ("images as input", (None,)),
    "encoder_layers": ("an encoder", (None, 0)),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a pre-norm decoder: RMSNorm, rotary attention, gated SiLU feed-forward.

    Attributes:
        windows: per layer, how many latest positions a query attends to; None for all of them.
        inv_freq: rotary inverse frequencies, head_dim / 2 of them.
        rope_scale: factor on the rotary cosines and sines (YaRN's attention factor).
        max_positions: longest sequence (tokens) whose rotary embedding is exact.
        eos_token_ids: tokens that end a generation.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    windows: tuple[int | None, ...]
    inv_freq: tuple[float, ...]
    rope_scale: float
    max_positions: int
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Read `config.json` (and `generation_config.json`) of a Hugging Face directory.

        Raises:
            ModelError: no readable config.
            UnsupportedModel: naming what differs from the structure this runtime computes.
        """
        from transformers import AutoConfig, GenerationConfig

        try:
            hf_config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"cannot read the model's config in {path}: {error}") from error
        eos = hf_config.eos_token_id
        if (path / "generation_config.json").is_file():
            stated = GenerationConfig.from_pretrained(path).eos_token_id
            eos = eos if stated is None else stated
        return cls.from_hf(hf_config, eos)

    @classmethod
    def from_hf(
        cls, hf_config: PreTrainedConfig, eos: int | list[int] | None = None
    ) -> ModelConfig:
        """Translate a transformers config. Raises UnsupportedModel naming what differs."""
        family = hf_config.model_type
        _refuse_foreign(hf_config)
        heads = hf_config.num_attention_heads
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        inv_freq, rope_scale, max_positions = _rotary(hf_config, head_dim)
        attention_bias = bool(getattr(hf_config, "attention_bias", False))
        eos = hf_config.eos_token_id if eos is None else eos
        return cls(
            family=family,
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            num_heads=heads,
            num_kv_heads=hf_config.num_key_value_heads or heads,
            head_dim=head_dim,
            intermediate_size=hf_config.intermediate_size,
            vocab_size=hf_config.vocab_size,
            rms_norm_eps=hf_config.rms_norm_eps,
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(getattr(hf_config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            tied_head=bool(hf_config.tie_word_embeddings),
            windows=_windows(hf_config),
            inv_freq=inv_freq,
            rope_scale=rope_scale,
            max_positions=max_positions,
            eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos or ()),
            checkpoint_dtype=str(hf_config.dtype or "float32").removeprefix("torch."),
        )

    @cached_property
    def shape(self) -> ModelShape:
        """Return the sizes that decide what pieces of layers take."""
        return ModelShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
        )

    @cached_property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """Return [out, in] of each projection of a layer, by its name within the layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden_size),
            "self_attn.k_proj": (kv, self.hidden_size),
            "self_attn.v_proj": (kv, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, q),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }


def _refuse_foreign(hf_config: PreTrainedConfig) -> None:
    differences = [
        f"{meaning} ({field}={getattr(hf_config, field)!r})"
        for field, (meaning, neutral) in _FOREIGN_FIELDS.items()
        if getattr(hf_config, field, None) not in neutral
    ]
    names = ("hidden_act", "hidden_activation", "activation_function")
    activations = {str(getattr(hf_config, name, "silu")) for name in names}
    foreign = sorted(activations - {"silu", "swish", "None"})
    differences += [f"activation {name!r} in place of 'silu'" for name in foreign]
    if hf_config.model_type not in FAMILIES:
        differences.insert(0, f"model_type {hf_config.model_type!r}")
    if differences:
        raise UnsupportedModel(
            f"this model has {'; '.join(differences)}. Supported are the families "
            f"{', '.join(FAMILIES)} and checkpoints of their structure (pre-norm RMSNorm, rotary "
            "grouped-query attention, gated SiLU feed-forward)"
        )


def _windows(hf_config: PreTrainedConfig) -> tuple[int | None, ...]:
    window: int | None = getattr(hf_config, "sliding_window", None)
    layer_types: list[str] | None = getattr(hf_config, "layer_types", None)
    layers: int = hf_config.num_hidden_layers
    if hf_config.model_type == "llama" or window is None:
        return (None,) * layers
    if not layer_types:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _rotary(hf_config: PreTrainedConfig, head_dim: int) -> tuple[tuple[float, ...], float, int]:
    """Compute inverse frequencies, scale and exact length by transformers' own initialisers."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    limit = hf_config.max_position_embeddings
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        inv_freq, scale = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    elif kind in ROPE_INIT_FUNCTIONS:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    else:
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise UnsupportedModel(f"rope_type {kind!r} is unknown; known: {known}")
    if kind == "longrope":
        # Past the trained length these frequencies change with the sequence's own length, which
        # keys already rotated and cached cannot follow.
        limit = parameters.get("original_max_position_embeddings") or limit
    return tuple(inv_freq.tolist()), float(scale), limit
