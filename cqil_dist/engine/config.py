"""The numbers that bound an engine: how a user may choose them, and what follows from them.

A launch is one of the engine's options among others (`launching.config.LaunchConfig` adds them);
the engine, its scheduler and its ranks get the same numbers with nothing left open.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from cqil_dist.errors import LaunchError
from cqil_dist.settings import check_settings, number, setting, whole

_DEFAULT_MAX_LEN = 4096
_PREFILL_TOKENS_CPU = 64
_PREFILL_TOKENS_GPU = 512


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a user may choose of an engine; None leaves a number to the model or the device.

    Raises:
        LaunchError: naming the option, its value and the rule.
    """

    slots: int = setting(8, "Number of requests that run at the same time.", whole(1))
    max_waiting: int = setting(
        256, "Number of requests that may wait for a slot; more are refused.", whole(0)
    )
    max_len: int | None = setting(
        None,
        "Most tokens that a prompt and its completion may have together.",
        whole(2),
        unset=f"the model's own limit, at most {_DEFAULT_MAX_LEN}",
    )
    prefill_tokens: int | None = setting(
        None,
        "Most prompt tokens that a step computes, so that a long prompt does not stall the others.",
        whole(1),
        unset=f"{_PREFILL_TOKENS_CPU} on a CPU, {_PREFILL_TOKENS_GPU} on a GPU",
    )
    step_deadline_s: float = setting(
        30.0, "Seconds that a step may take before a rank counts as lost.", number()
    )
    recovery_timeout_s: float = setting(
        180.0, "Seconds to wait for a lost rank to be replaced before giving up.", number()
    )

    def __post_init__(self) -> None:
        check_settings(self, LaunchError)

    def max_len_for(self, max_positions: int) -> int:
        """The tokens that a KV slot has room for, of a model with so many positions.

        Raises:
            LaunchError: more are asked for than the model has positions.
        """
        if self.max_len is not None and self.max_len > max_positions:
            raise LaunchError(
                f"max_len is {self.max_len} but the model's positions end at {max_positions}"
            )
        return self.max_len or min(max_positions, _DEFAULT_MAX_LEN)

    def resolved(self, max_positions: int, on_gpu: bool) -> EngineConfig:
        """The same numbers with nothing left open.

        Args:
            max_positions: positions that the model has.
            on_gpu: whether the ranks compute on GPUs.

        Raises:
            LaunchError: max_len is more than the model's positions.
        """
        chosen = {field.name: getattr(self, field.name) for field in fields(EngineConfig)}
        chosen["max_len"] = self.max_len_for(max_positions)
        chosen["prefill_tokens"] = self.prefill_tokens or (
            _PREFILL_TOKENS_GPU if on_gpu else _PREFILL_TOKENS_CPU
        )
        return EngineConfig(**chosen)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(EngineOptions):
    """The numbers of one engine, the same for its coordinator and all its ranks."""

    max_len: int = field()
    prefill_tokens: int = field()

    @property
    def cache_tokens(self) -> int:
        """Tokens that all KV slots together have room for."""
        return self.slots * self.max_len

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step: every slot decodes, and prompts are computed beside them."""
        return self.slots + self.prefill_tokens

    @property
    def max_requests(self) -> int:
        """Most requests that run or wait at the same time."""
        return self.slots + self.max_waiting
