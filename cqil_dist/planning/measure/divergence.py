"""The distance of a changed model from the original model."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Divergence:
    """How far a changed model is from the original model, averaged over the tokens of a text.

    Attributes:
        kl: KL(original || changed) of the next token's distribution, in nats.
        loss: the changed model's cross entropy on the text, in nats.
    """

    kl: float
    loss: float

    @property
    def perplexity(self) -> float:
        """The changed model's perplexity on the text."""
        return math.exp(self.loss)
