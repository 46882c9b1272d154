"""How far a changed model is from the original."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Divergence:
    """How far a changed model is from the original, on some text; means over its tokens.

    Attributes:
        kl: KL(original || changed) of the next token, nats.
        loss: the changed model's cross entropy on the text itself, nats.
    """

    kl: float
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)
