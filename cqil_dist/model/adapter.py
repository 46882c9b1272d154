"""LoRA adapters (arXiv 2106.09685) in peft's format, read in the parts that a rank needs.

    adapter_config.json         rank r, alpha, target modules
    adapter_model.safetensors   lora_A [r, in] and lora_B [out, r] of each module
    plan.json                   the plan that the adapter was made for

An adapter changes a weight W into W + (alpha / r) B A. This module knows peft's files and nothing
of training or of the ranks of a run; peft itself is needed only where adapters are trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mode
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cqil_dist.errors import CheckpointError, ConfigError, PlanError, UnsupportedModel
from cqil_dist.model.config import ModelConfig
from cqil_dist.plan import Plan
from cqil_dist.records import require_folder, whole_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PLAN = "plan.json"

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# Fields of other features of peft, and their neutral values; each would change what is computed.
_UNSUPPORTED = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layer_replication": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "target_parameters": None,
}

# Values of `init_lora_weights` with which training leaves the base model as it is.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Lora:
    """The change B A of one weight matrix [out, in], as two factors of rank r.

    Attributes:
        a_RI: the factor A, [r, in].
        b_OR: the factor B, [out, r], with the scale alpha / r multiplied in.
    """

    a_RI: Tensor
    b_OR: Tensor

    @property
    def rank(self) -> int:
        """Return the number r of rows of A and of columns of B."""
        return self.a_RI.shape[0]


class Adapter:
    """An adapter in a directory, whose factors are read from its file when they are asked for.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedModel: the adapter is something other than plain LoRA.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = _read_config(path)
        self._file = path / WEIGHTS
        if not self._file.is_file():
            raise CheckpointError(f"no {WEIGHTS} in {path}; is it the directory of an adapter?")
        self._modules = self._locate()

    @property
    def plan(self) -> dict[str, Any] | None:
        """Return plan.json's content, for `Plan.parse`; None without it. Raises CheckpointError."""
        try:
            plan: dict[str, Any] = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.path / PLAN}: {error}") from error
        return plan

    @cached_property
    def digest(self) -> str:
        """Return the hex SHA-256 of the weights file and the config together."""
        content = self._file.read_bytes() + (self.path / CONFIG).read_bytes()
        return hashlib.sha256(content).hexdigest()

    @classmethod
    def made_for(cls, path: Path, config: ModelConfig, plan: Plan) -> Self:
        """Open the adapter in a directory, and check that it fits a model and a plan.

        Raises:
            CheckpointError: a file is missing or damaged, or is for a model of another shape.
            PlanError: the adapter was made for another plan.
            UnsupportedModel: the adapter is something other than plain LoRA.
        """
        adapter = cls(path)
        adapter.check(config)
        adapter.check_plan(plan)
        return adapter

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError if the adapter was made for a model of another shape."""
        shapes = config.projection_shapes
        for module, parts in self._modules.items():
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
            if match is None or int(match[1]) >= config.num_layers or match[2] not in shapes:
                raise CheckpointError(
                    f"the adapter in {self.path} changes {module}, which is no projection of a "
                    f"layer of this model of {config.num_layers} layers"
                )
            out, inner = shapes[match[2]]
            (rank, found_in), (found_out, other_rank) = parts["A"], parts["B"]
            if (found_in, found_out, rank) != (inner, out, other_rank):
                raise CheckpointError(
                    f"the adapter in {self.path} changes {module} by [{found_out}, {other_rank}] x "
                    f"[{rank}, {found_in}] but the model's weight is [{out}, {inner}]"
                )

    def check_plan(self, plan: Plan) -> None:
        """Raise PlanError if the adapter was made for another plan; one without a plan fits all."""
        if (own := self.plan) is not None and (
            made_for := Plan.parse(own, plan.num_layers)
        ) != plan:
            raise PlanError(
                f"the adapter in {self.path} was made for {made_for}, not for {plan}; give "
                f"--plan {self.path / PLAN}"
            )

    def delta(
        self, name: str, rows: range | None = None, columns: range | None = None
    ) -> Tensor | None:
        """Return the change of a tensor [out, in], or of its `rows` or `columns`, in float32.

        It is None where the tensor stays as it is. Raises CheckpointError for a damaged file.
        """
        module = name.removesuffix(".weight")
        if module not in self._modules:
            return None
        lora = self._lora(module, rows, columns)
        return lora.b_OR @ lora.a_RI

    def loras(self) -> dict[str, Lora]:
        """Return the factors of every module that the adapter changes, by name, in float32."""
        return {module: self._lora(module, None, None) for module in self._modules}

    def _lora(self, module: str, rows: range | None, columns: range | None) -> Lora:
        try:
            with safe_open(self._file, framework="pt") as file:
                a_RI, b_OR = (
                    file.get_slice(f"{_PREFIX}{module}.lora_{part}.weight") for part in "AB"
                )
                a = a_RI[:, columns.start : columns.stop] if columns is not None else a_RI[:]
                b = b_OR[rows.start : rows.stop] if rows is not None else b_OR[:]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {module} from {self._file}: {error}") from error
        return Lora(a.float(), self._scale(module, len(a)) * b.float())

    def _scale(self, module: str, rank: int) -> float:
        alpha = _of_pattern(self._config.get("alpha_pattern") or {}, module)
        alpha = self._config.get("lora_alpha", 8) if alpha is None else alpha  # 8: peft's default
        return float(alpha / rank**0.5 if self._config.get("use_rslora") else alpha / rank)

    def _locate(self) -> dict[str, dict[str, tuple[int, int]]]:
        modules: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with safe_open(self._file, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    if (match := _TENSOR.fullmatch(key)) is None:
                        raise UnsupportedModel(
                            f"{self._file} holds {key}, which is not a LoRA factor of a module"
                        )
                    shape = tuple(file.get_slice(key).get_shape())
                    modules.setdefault(match["module"], {})[match["part"]] = shape
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._file} is truncated or damaged: {error}") from error
        if odd := [module for module, parts in modules.items() if set(parts) != {"A", "B"}]:
            raise CheckpointError(f"{self._file} lacks one factor of {odd[0]}")
        return modules


def require_adapter_folder(path: Path) -> None:
    """Make the folder that an adapter is to be written to.

    Raises:
        ConfigError: the folder cannot be written to, or holds a plan.json that is no adapter's and
            would be lost.
    """
    require_folder(path)
    if (path / PLAN).is_file() and not (path / CONFIG).is_file():
        raise ConfigError(
            f"{path / PLAN} is no adapter's, and an adapter there would replace it; write to a "
            "folder of its own"
        )


def write_adapter(
    path: Path, loras: Mapping[str, Lora], base_model: str, plan: Mapping[str, Any]
) -> None:
    """Write an adapter in a form that peft and `Adapter` read.

    Args:
        path: the folder to write to; the weights are written last, and whole.
        loras: the factors by module name, such as "model.layers.3.mlp.down_proj".
        base_model: the name of the model that the adapter is for, for peft.
        plan: the plan that the adapter is for, in the form that `Plan.parse` reads.
    """
    # If writing is interrupted from here on, the adapter lacks its weights and is refused.
    (path / WEIGHTS).unlink(missing_ok=True)
    ranks = {module: lora.rank for module, lora in loras.items()}
    usual = mode(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": usual,
        "lora_alpha": usual,  # scale 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(loras),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    for name, content in ((CONFIG, config), (PLAN, plan)):
        with whole_file(path / name) as file:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {
        f"{_PREFIX}{module}.lora_{part}.weight": factor.contiguous().clone()  # shares no memory
        for module, lora in loras.items()
        for part, factor in (("A", lora.a_RI), ("B", lora.b_OR))
    }
    with whole_file(path / WEIGHTS) as file:
        save_file(tensors, file, metadata={"format": "pt"})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except FileNotFoundError:
        raise CheckpointError(f"no {CONFIG} in {path}; is it the directory of an adapter?") from (
            None
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG} is not an adapter's config: {error!r}") from error
    if kind != "LORA":
        raise UnsupportedModel(f"the adapter in {path} is of type {kind}; only LORA can be merged")
    if (start := config.get("init_lora_weights")) not in _INITIALISATIONS:
        raise UnsupportedModel(
            f"the adapter in {path} has init_lora_weights = {start!r}, which changes the base "
            "model too; convert it to plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    for key, neutral in _UNSUPPORTED.items():
        if (value := config.get(key, neutral)) not in (neutral, None, False, []):
            raise UnsupportedModel(
                f"the adapter in {path} has {key} = {value!r}, which cannot be merged; only plain "
                "LoRA of the layers' projections can"
            )
    return config


def _of_pattern(pattern: Mapping[str, float], module: str) -> float | None:
    """Return the value of the first pattern that matches a module's name by peft's rule."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return None
