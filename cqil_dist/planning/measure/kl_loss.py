"""KL divergence of the next token from hidden states, without holding all logits at once.

The gradient with respect to the logits is the difference of the two distributions, so it can be
computed together with the loss, a few positions at a time. Liger-Kernel (arXiv 2410.10989) fuses
the head with its loss in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cqil_dist.planning.measure.grouped_model import next_token_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions for which both distributions over the vocabulary are held at once.
_ROWS_AT_ONCE = 128


def kl_loss(model: PreTrainedModel, teacher_CTD: Tensor, student_CTD: Tensor) -> Tensor:
    """Return KL(teacher || student) of the next token, in nats, averaged over positions.

    The scalar has a gradient with respect to the student's hidden states.

    Args:
        model: the model whose head gives both distributions; the head gets no gradient.
        teacher_CTD: the teacher's final hidden states, [C, T, D].
        student_CTD: the student's final hidden states, [C, T, D].
    """
    loss: Tensor = _KLLoss.apply(student_CTD, teacher_CTD, model)  # type: ignore[no-untyped-call]
    return loss


class _KLLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_CTD: Tensor, teacher_CTD: Tensor, model: Any) -> Tensor:
        differentiable = ctx.needs_input_grad[0]
        teacher_ND, student_ND = teacher_CTD.flatten(0, -2), student_CTD.flatten(0, -2)
        total = 0.0
        gradient_ND = torch.empty_like(student_ND) if differentiable else None
        for first in range(0, len(student_ND), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            leaf_RD = student_ND[rows].detach().requires_grad_(differentiable)
            with torch.enable_grad():
                logits_RV = next_token_logits(model, leaf_RD)
            teacher_RV = next_token_logits(model, teacher_ND[rows]).log_softmax(-1)
            student_RV = logits_RV.detach().log_softmax(-1)
            target_RV = teacher_RV.exp()
            total += float((target_RV * teacher_RV.sub_(student_RV)).sum())
            if gradient_ND is not None:
                change_RV = student_RV.exp_().sub_(target_RV).div_(len(student_ND))
                (gradient_ND[rows],) = torch.autograd.grad(logits_RV, leaf_RD, change_RV)
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND.view_as(student_CTD))
        return student_CTD.new_tensor(total / len(student_ND), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_CTD,) = ctx.saved_tensors
        return gradients[0].to(gradient_CTD.dtype) * gradient_CTD, None, None
