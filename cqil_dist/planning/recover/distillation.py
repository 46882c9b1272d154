"""Distillation of a model under a plan: trains a LoRA adapter, the model being its own teacher.

Teacher and student are one model in one process: the teacher computes the layers one by one with
the adapter off, the student computes the plan's groups with it on. The loss is the KL divergence of
the next token. Every step depends on its number and the seed alone, so that an interrupted run
resumes as if it had not been interrupted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cqil_dist.model.adapter import Adapter, Lora, write_adapter
from cqil_dist.plan import Plan
from cqil_dist.planning.measure.grouped_model import final_hidden, grouped
from cqil_dist.planning.measure.held_out import HeldOut, micro_batches
from cqil_dist.planning.measure.kl_loss import kl_loss
from cqil_dist.planning.measure.merging import merge
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.planning.recover.training_config import TrainingConfig
from cqil_dist.planning.recover.training_state import TrainingLog, TrainingState
from cqil_dist.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def distill(
    model: PreTrainedModel,
    plan: Plan,
    train: Windows,
    held_out: Windows,
    config: TrainingConfig,
    output: Path,
    progress: Progress,
    *,
    teacher: str,
    made: Mapping[str, Any],
    start: Adapter | None = None,
    on_evaluation: Callable[[TrainingLog], None] = lambda log: None,
) -> TrainingLog:
    """Train an adapter for a plan, and write it to `output` in peft's format, with the plan.

    The model's weights are left as they were.

    Args:
        held_out: text that is not trained on, but evaluated on at times.
        output: the adapter's folder, which also holds the state of an unfinished run.
        teacher: identifies the model's weights and arithmetic; a run with others is not resumed.
        made: the adapter's provenance, which is written with the plan under "measured".
        start: an adapter to begin with; its changes become part of the new one.
        on_evaluation: called after each evaluation on the held-out windows.

    Returns:
        The losses of all steps, those before an interruption included.

    Raises:
        ConfigError: `output` holds a run of another model, plan, text or config.
    """
    identity = _identity(teacher, plan, train, held_out, config, start)
    state = TrainingState(output, identity)
    student = _Student(model, config, start)
    try:
        log = _train(student, plan, train, held_out, config, state, progress, on_evaluation)
        described = {**plan.to_json(), "measured": made}
        write_adapter(output, student.loras(), str(model.name_or_path), described)
    finally:
        student.undo()
    return log


def _train(
    student: _Student,
    plan: Plan,
    train: Windows,
    held_out: Windows,
    config: TrainingConfig,
    state: TrainingState,
    progress: Progress,
    on_evaluation: Callable[[TrainingLog], None],
) -> TrainingLog:
    peft_model = student.peft_model
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    log = state.resume(peft_model, optimizer)

    unseen = HeldOut(peft_model, held_out, student.teacher_hidden)

    def evaluate() -> None:
        log.held_out[len(log.losses)] = unseen.kl(plan.groups, student.hidden)
        on_evaluation(log)

    with progress.task("Distilling", config.steps, "steps") as task:
        task.update(len(log.losses))
        if not log.losses:
            evaluate()
        for step in range(len(log.losses), config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            indices = _indices(len(train.token_ids_WT), config, step)
            tokens_BT = train.token_ids_WT[indices]
            log.losses.append(_add_gradients(student, plan, tokens_BT, config))
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            task.advance()
            done = step + 1
            if done % config.eval_steps == 0 or done == config.steps:
                evaluate()
            if done % config.save_steps == 0 or done == config.steps:
                state.save(peft_model, optimizer, log)
    return log


class _Student:
    """A model with an adapter in training, which is its own teacher when the adapter is off.

    The changes of an adapter to begin with are added to the frozen weights, so that the one in
    training stays small whatever their rank, and are taken away while the teacher computes.

    Attributes:
        peft_model: the model with the adapter in training.
    """

    def __init__(
        self, model: PreTrainedModel, config: TrainingConfig, start: Adapter | None
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self._start = merge(model, start)
        lora_config = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=list(PROJECTIONS),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft reads an attribute that transformers has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            torch.manual_seed(config.seed)
            self.peft_model: PeftModel = get_peft_model(model, lora_config)
        for module in self.peft_model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False  # autocast would cast float32 back again

    def undo(self) -> None:
        """Restore the model's weights, and remove the adapter from it."""
        self.peft_model.unload()
        self._start.undo()

    def hidden(self, tokens_CT: Tensor) -> Tensor:
        """Return the student's final hidden states [C, T, D].

        The adapter's weights are float32, but its products are in the model's dtype: on two cores
        with AMX, a step takes a quarter less time than with float32 products.
        """
        device, dtype = self.peft_model.device.type, self.peft_model.dtype
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return final_hidden(self.peft_model, input_ids=tokens_CT)

    @torch.no_grad()
    def teacher_hidden(self, tokens_CT: Tensor) -> Tensor:
        """Return the teacher's final hidden states [C, T, D]."""
        with self._start.removed(), self.peft_model.disable_adapter():
            return self.hidden(tokens_CT)

    def loras(self) -> dict[str, Lora]:
        """Return everything that the student adds to the teacher's weights, by module."""
        loras = dict(self._start.loras)
        for name, module in self.peft_model.get_base_model().named_modules():
            if not hasattr(module, "lora_A"):
                continue
            a_RI, b_OR = (
                part["default"].weight.detach().float().cpu()
                for part in (module.lora_A, module.lora_B)
            )
            b_OR = module.scaling["default"] * b_OR
            if (start := self._start.loras.get(name)) is not None:
                a_RI = torch.cat([start.a_RI, a_RI])
                b_OR = torch.cat([start.b_OR, b_OR], dim=1)
            loras[name] = Lora(a_RI, b_OR)
        return loras


def _add_gradients(
    student: _Student, plan: Plan, tokens_BT: Tensor, config: TrainingConfig
) -> float:
    """Add a batch's gradients to the adapter's, and return the batch's loss."""
    total = 0.0
    for tokens_CT in micro_batches(tokens_BT.to(student.peft_model.device)):
        teacher_CTD = student.teacher_hidden(tokens_CT)
        with grouped(student.peft_model, plan.groups, checkpointing=config.gradient_checkpointing):
            student_CTD = student.hidden(tokens_CT)
            loss = kl_loss(student.peft_model, teacher_CTD, student_CTD)
            loss = len(tokens_CT) / len(tokens_BT) * loss
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _indices(count: int, config: TrainingConfig, step: int) -> list[int]:
    """Return a step's windows by index: each epoch has every window once, in its own order."""
    numbers = range(step * config.batch_size, (step + 1) * config.batch_size)
    orders = {
        epoch: torch.randperm(
            count, generator=torch.Generator().manual_seed(config.seed + 1_000_003 * epoch)
        )
        for epoch in {number // count for number in numbers}
    }
    return [int(orders[number // count][number % count]) for number in numbers]


def _identity(
    teacher: str,
    plan: Plan,
    train: Windows,
    held_out: Windows,
    config: TrainingConfig,
    start: Adapter | None,
) -> dict[str, Any]:
    """Return all that determines the trained weights and the log, except the programs' versions."""
    deciding = asdict(config)
    for name in ("save_steps", "gradient_checkpointing"):
        del deciding[name]
    return {
        "model": teacher,
        "plan": plan.to_json(),
        "text": train.digest,
        "held-out text": held_out.digest,
        "adapter to begin with": None if start is None else start.digest,
        **deciding,
    }
