"""lm-eval's view of a model under a plan: its own Hugging Face class, with the layers grouped.

Importing this module registers it:

    import cqil_dist.planning.evaluation.lm_eval
    lm_eval.simple_evaluate("cqil", model_args={"pretrained": ..., "plan": ...}, tasks=[...])
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from cqil_dist.plan import PlanSource
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.planning.measure.grouped_model import grouped
from cqil_dist.planning.measure.measured_model import MeasuredModel
from cqil_dist.planning.measure.merging import merge
from cqil_dist.progress import ConsoleProgress
from cqil_dist.recommended.record import note_missing_compensation


@register_model("cqil")
class GroupedLM(HFLM):  # type: ignore[misc]
    """A model under a plan, for lm-eval 0.4.13.

    Args:
        pretrained: whatever `--model` may be.
        plan: anything `Plan.parse` reads.
        adapter: directory of the plan's adapter.
        device, dtype, matmul_precision: as in `ComputeConfig`.
        options: of lm-eval's `HFLM`, such as `batch_size`.

    Raises:
        CqilError: the model, the plan or the adapter cannot be used.
    """

    def __init__(
        self,
        pretrained: str,
        plan: PlanSource = "sequential",
        adapter: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        matmul_precision: str = "highest",
        **options: Any,
    ) -> None:
        computing = ComputeConfig(device.removesuffix(":0"), dtype, matmul_precision)
        measured = MeasuredModel.of(pretrained, computing, ConsoleProgress())
        parsed = measured.plan(plan)
        if adapter is None:
            note_missing_compensation(plan, pretrained, measured.progress, "adapter")
        changes = None if adapter is None else measured.adapter(Path(adapter), parsed)
        merge(measured.model, changes)
        # As ours are: bfloat16 has no more than eight bits for a sum of many tokens.
        options.setdefault("softmax_dtype", "float32")
        super().__init__(pretrained=measured.model, tokenizer=measured.tokenizer, **options)
        self._computing = ExitStack()
        self._computing.enter_context(grouped(measured.model, parsed.groups))
