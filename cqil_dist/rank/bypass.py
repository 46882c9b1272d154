"""The bypass: the attention outputs of its group that a feed-forward sees, added to its input.

Which outputs those are is decided by `cqil_dist.plan.Bypass` and numbered by
`cqil_dist.assignment.Stage.feed_forward_sees`; here they are tensors, wherever they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_seen(x_ND: Tensor, gathered_BND: Tensor | None, sees: Sequence[Sequence[int]]) -> Tensor:
    """Compute u = x + sum of what is seen, for each of M feed-forward inputs: [M, N, D].

    Args:
        x_ND: the stage's input.
        gathered_BND: the attention outputs that reached this rank, its own and others'; None where
            there are none.
        sees: for each feed-forward input, which of them it sees, in the order of their sum.
    """
    u: list[Tensor] = []
    for seen in sees:
        u_ND = x_ND
        for index in seen:
            assert gathered_BND is not None, "what is seen was gathered"
            u_ND = u_ND + gathered_BND[index]
        u.append(u_ND)
    return u[0].unsqueeze(0) if len(u) == 1 else torch.stack(u)
