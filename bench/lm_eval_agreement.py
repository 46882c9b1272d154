"""Compares `cqil eval`'s scores of a multiple-choice task with lm-eval's, on the same questions.

    python bench/lm_eval_agreement.py sciq.jsonl --model smollm2-135m --limit 200

lm-eval computes the same model with its own Hugging Face class.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

_TASK = """
task: agreement
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def main(
    task: Annotated[Path, typer.Argument(help='{"context", "choices", "gold"} a line.')],
    model: Annotated[str, typer.Option()] = "smollm2-135m",
    limit: Annotated[int, typer.Option(min=2, help="Questions.")] = 200,
) -> None:
    """Print both programs' scores of the first questions of a task."""
    from cqil_dist.planning.evaluation.evaluate import evaluate
    from cqil_dist.planning.evaluation.tasks import read_task
    from cqil_dist.planning.measure.compute_config import ComputeConfig
    from cqil_dist.planning.measure.measured_model import MeasuredModel
    from cqil_dist.progress import ConsoleProgress

    measured_model = MeasuredModel.of(model, ComputeConfig("cpu"), ConsoleProgress())
    sequential = measured_model.plan("sequential")
    evaluation = evaluate(measured_model, sequential, None, [], [read_task(task, limit)], [])
    expected = _lm_eval(task.resolve(), measured_model.path, limit)
    table = Table("measure", "cqil eval", "lm-eval", title=f"{model}, {task.stem}, {limit} items")
    for result in evaluation.results:
        score = result.paired.original.value
        table.add_row(result.measure, f"{score:.4f}", f"{expected[f'{result.measure},none']:.4f}")
    Console().print(table)


def _lm_eval(task: Path, model: Path, limit: int) -> dict[str, float]:
    """lm-eval's scores of the first `limit` questions."""
    with TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
        import lm_eval
        from lm_eval.tasks import TaskManager

        (Path(folder) / "agreement.yaml").write_text(_TASK.format(file=task), encoding="utf-8")
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": "float32", "device": "cpu"},
            tasks=["agreement"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
        )
        scores: dict[str, float] = found["results"]["agreement"]
        return scores


if __name__ == "__main__":
    typer.run(main)
