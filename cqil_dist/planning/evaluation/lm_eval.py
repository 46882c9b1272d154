"""A model class for lm-eval: its own Hugging Face class, with the layers in a plan's groups.

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
        pretrained: a model in any form that the `--model` of the cqil command takes.
        plan: a plan in any form that `Plan.parse` reads, or the name of a recommended one.
        adapter: the directory of the plan's adapter.
        device, dtype, matmul_precision: as in `ComputeConfig`.
        options: further options of lm-eval's `HFLM`, such as `batch_size`.

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
        measured_model = MeasuredModel.of(pretrained, computing, ConsoleProgress())
        model, parsed = measured_model.model, measured_model.plan(plan)
        if adapter is None:
            note_missing_compensation(plan, pretrained, measured_model.progress, "adapter")
        else:
            merge(model, measured_model.adapter(Path(adapter), parsed))
        # As `cqil eval` does: bfloat16 has only eight bits for the sum over many tokens.
        options.setdefault("softmax_dtype", "float32")
        super().__init__(pretrained=model, tokenizer=measured_model.tokenizer, **options)
        self._computing = ExitStack()
        self._computing.enter_context(grouped(model, parsed.groups))
