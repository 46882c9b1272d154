"""How to run a model: what a user may choose, and the values that follow from it.

Plain values, checked before anything is started; imports neither Ray nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cqil_dist.errors import LaunchError
from cqil_dist.plan import PlanSource

if TYPE_CHECKING:
    from cqil_dist.model.config import ModelConfig
    from cqil_dist.model.precision import Precision

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "float16", "bfloat16")

_DEFAULT_MAX_LEN = 4096


@dataclass(frozen=True)
class LaunchConfig:
    """How to run a model.

    Attributes:
        model: built-in name, directory, GGUF file or hub id. On a cluster a directory or file must
            lie at the same path on every node; others are fetched where they are missing.
        plan: anything `Plan.parse` reads, or for the built-in model "fast", "balanced" or
            "careful".
        compare: a second plan to serve over the same ranks, as a model of its own, without the
            adapter; None for none.
        adapter: directory of a LoRA adapter in peft's format, merged into the weights that run
            under `plan`; at the same path on every node.
        served_model_name: what requests call the model; None for `model`.
        ranks: how many layer actors; None for as many as the plan's largest group has layers.
        address: of a Ray cluster that this machine is a node of; None takes RAY_ADDRESS, else
            starts a local one.
        strategy: placement of the ranks: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        device: "cpu", "cuda", or "auto": CUDA where the cluster has GPUs for all ranks.
        gpus_per_rank: below 1 lets ranks share a GPU.
        threads_per_rank: compute threads of a rank on a CPU.
        dtype: "float32", "float16", "bfloat16", or "auto": float32 on a CPU, on a GPU the
            checkpoint's own 16-bit dtype or bfloat16.
        slots: requests that run at the same time.
        max_waiting: most requests that wait for a slot; more are refused.
        max_len: most tokens of a prompt and its completion; None for the model's own limit, at
            most 4096.
        prefill_tokens: most prompt tokens a step computes, so that a long prompt does not stall
            the others; None for 64 on a CPU and 512 on a GPU.
        pin: bind each rank to cores of its own, the lowest of its node; None does so on a local
            cluster with enough of them. Pass False where several launches share a machine.
        spares: standby actors, on nodes of their own under STRICT_SPREAD, which take over a lost
            rank. They read all ranks' weights beforehand as far as memory allows.
        step_deadline_s: seconds a step may take before a rank counts as lost.
        recovery_timeout_s: seconds to wait for a lost rank to be replaced before giving up.
        verbose: show Ray's own logs.

    Raises:
        LaunchError: naming the value and the rule.
    """

    model: str
    plan: PlanSource = "sequential"
    ranks: int | None = None
    compare: PlanSource | None = None
    adapter: str | Path | None = None
    served_model_name: str | None = None
    address: str | None = None
    strategy: str = "PACK"
    device: str = "auto"
    gpus_per_rank: float = 1.0
    threads_per_rank: int = 1
    dtype: str = "auto"
    slots: int = 8
    max_waiting: int = 256
    max_len: int | None = None
    prefill_tokens: int | None = None
    pin: bool | None = None
    spares: int = 0
    step_deadline_s: float = 30.0
    recovery_timeout_s: float = 180.0
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("threads_per_rank", "slots", "ranks", "max_len", "prefill_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise LaunchError(f"{name} is {value!r} but must be a whole number, at least 1")
        if self.max_len == 1:
            raise LaunchError("max_len is 1 but must hold a prompt and a completion, at least 2")
        for name in ("spares", "max_waiting"):
            if not isinstance(value := getattr(self, name), int) or value < 0:
                raise LaunchError(f"{name} is {value!r} but must be a whole number, at least 0")
        for name in ("gpus_per_rank", "step_deadline_s", "recovery_timeout_s"):
            if not (value := getattr(self, name)) > 0:
                raise LaunchError(f"{name} is {value!r} but must be above 0")
        for name, known in (("strategy", STRATEGIES), ("device", DEVICES), ("dtype", DTYPES)):
            if (value := getattr(self, name)) not in known:
                raise LaunchError(f"{name} {value!r} is not one of {', '.join(known)}")

    def max_len_for(self, model: ModelConfig) -> int:
        """Tokens a KV slot has room for. Raises LaunchError past the model's own positions."""
        max_len = self.max_len or min(model.max_positions, _DEFAULT_MAX_LEN)
        if max_len > model.max_positions:
            raise LaunchError(
                f"max_len is {max_len} but the model's positions end at {model.max_positions}"
            )
        return max_len

    def precision_for(self, model: ModelConfig, on_gpu: bool) -> Precision:
        """The numbers in which this model is computed and stored on such a device."""
        from cqil_dist.model.precision import Precision

        if self.dtype != "auto":
            return Precision.of(self.dtype)
        if not on_gpu:
            return Precision.of("float32")  # what CPUs compute fastest
        half = model.checkpoint_dtype in ("float16", "bfloat16")
        return Precision.of(model.checkpoint_dtype if half else "bfloat16")

    def prefill_tokens_for(self, on_gpu: bool) -> int:
        return self.prefill_tokens or (512 if on_gpu else 64)
