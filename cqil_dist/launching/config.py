"""How to run a model: what a user may choose, checked before anything is started.

Plain values; imports neither Ray nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cqil_dist.assignment import UNGROUPED
from cqil_dist.engine.config import EngineOptions
from cqil_dist.plan import PlanSource
from cqil_dist.settings import number, one_of, required, setting, whole

if TYPE_CHECKING:
    from cqil_dist.model.config import ModelConfig
    from cqil_dist.model.precision import Precision


@dataclass(frozen=True)
class LaunchConfig(EngineOptions):
    """The settings by which a model is run; docs/serving.md has a table of the fields.

    Raises:
        LaunchError: naming the field, its value and the rule.
    """

    model: str = field(
        metadata=required(
            "Built-in name, local directory, GGUF file or hub id (org/name) of the model.",
            short="-m",
        )
    )
    plan: PlanSource = setting(
        "sequential",
        "Layers that run together: 'sequential', 'P2 S12 E28 D1' (D: 0, 1, ..., full, parallel), "
        "JSON, a JSON file, or for the built-in model fast, balanced or careful.",
        short="-p",
    )
    ranks: int | None = setting(
        None,
        "Number of layer actors.",
        whole(1),
        unset="as many as the largest group has layers",
        short="-r",
    )
    compare: PlanSource | None = setting(
        None,
        "A second plan to serve over the same ranks, as a model of its own and without the "
        "adapter.",
    )
    adapter: Path | str | None = setting(
        None,
        "Directory of a LoRA adapter made for the plan, in peft's format; on a cluster it lies at "
        "the same path on every node.",
    )
    served_model_name: str | None = setting(
        None, "Name by which requests call the model.", unset="the one it is launched by"
    )
    address: str | None = setting(
        None,
        "Address of a Ray cluster that this machine is a node of.",
        unset="RAY_ADDRESS, else a local cluster is started",
    )
    strategy: str = setting(
        "PACK",
        "How Ray places the ranks on the cluster's nodes.",
        one_of("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
    )
    device: str = setting(
        "auto",
        "Device that the ranks compute on; auto takes CUDA where the cluster has GPUs for all.",
        one_of("auto", "cpu", "cuda"),
    )
    gpus_per_rank: float = setting(
        1.0, "Number of GPUs of each rank; below 1, ranks share a GPU.", number()
    )
    threads_per_rank: int = setting(1, "Compute threads of each rank on a CPU.", whole(1))
    dtype: str = setting(
        "auto",
        "Type of weights and activations; auto is float32 on a CPU and, on a GPU, the "
        "checkpoint's own 16-bit type or bfloat16.",
        one_of("auto", "float32", "float16", "bfloat16"),
    )
    pin: bool | None = setting(
        None,
        "Bind each rank to cores of its own, the lowest of its node; turn it off where several "
        "launches share a machine.",
        unset="on a local cluster with enough cores",
    )
    spares: int = setting(
        0,
        "Number of standby actors, on nodes of their own under STRICT_SPREAD, that take over lost "
        "ranks and read all ranks' weights beforehand as far as memory allows.",
        whole(0),
    )
    ungrouped: str = setting(
        "own",
        "What becomes of layers outside the plan's groups: own gives each to one rank; shard "
        "splits each over all ranks (tensor parallelism), for two exchanges a layer.",
        one_of(*UNGROUPED),
    )
    verbose: bool = setting(False, "Show Ray's own logs.", short="-v")

    def precision_for(self, model: ModelConfig, on_gpu: bool) -> Precision:
        """Return the numbers in which this model is computed and stored on such a device."""
        from cqil_dist.model.precision import Precision

        if self.dtype != "auto":
            return Precision.of(self.dtype)
        if not on_gpu:
            return Precision.of("float32")  # what CPUs compute fastest
        half = model.checkpoint_dtype in ("float16", "bfloat16")
        return Precision.of(model.checkpoint_dtype if half else "bfloat16")
