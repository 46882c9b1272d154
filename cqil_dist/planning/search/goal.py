"""What a plan that is searched for has to keep to: plain, checked values; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from cqil_dist.errors import PlanError
from cqil_dist.settings import check_settings, number, setting, whole


@dataclass(frozen=True)
class Goal:
    """The one bound that a plan has to keep to; a search looks for the best that does.

    Raises:
        PlanError: naming the bound, its value and the rule; or not exactly one is given.
    """

    depth: int | None = setting(None, "Number of groups of the plan.", whole(1))
    max_kl: float | None = setting(
        None,
        "Most divergence from the original, in nats a token of the calibration text.",
        number(zero=True),
    )
    max_loss: float | None = setting(
        None,
        "Most rise of perplexity on the calibration text, such as 5% or 0.05.",
        number(zero=True),
    )
    max_latency_us: float | None = setting(
        None, "Most microseconds that a token takes by the cost model.", number()
    )

    def __post_init__(self) -> None:
        check_settings(self, PlanError)
        if sum(value is not None for value in vars(self).values()) != 1:
            raise PlanError("give one goal: a depth, a KL divergence, a loss or a latency")

    def check(self, num_layers: int, max_group: int) -> None:
        """Raise PlanError where groups of so many layers cannot reach the depth asked for."""
        fewest = -(-num_layers // max_group)
        if self.depth is not None and not fewest <= self.depth <= num_layers:
            raise PlanError(
                f"depth is {self.depth}, but groups of up to {max_group} of {num_layers} layers "
                f"reach depths {fewest} to {num_layers}; allow larger groups (--max-group)"
            )
