"""Plans that were found by measurement, by the model's name: fast, balanced and careful.

Beside each plan its file says what it cost on text that it was not chosen on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from cqil_dist.errors import PlanError
from cqil_dist.plan import Plan, PlanSource
from cqil_dist.progress import Progress

# The bound to search with for another model: about what the built-in model's plans cost there.
_LOSSES = {"fast": "60%", "balanced": "35%", "careful": "15%"}
NAMES = tuple(_LOSSES)


def plan_for(source: PlanSource, model: str, num_layers: int) -> Plan:
    """A plan in any form that `Plan.parse` reads, or by the name of a recommended one.

    Args:
        model: what `--model` was given.

    Raises:
        PlanError: as `Plan.parse`; or there is no plan of that name for this model, with the
            command that finds one.
    """
    if not isinstance(source, str) or (name := source.strip().lower()) not in NAMES:
        return Plan.parse(source, num_layers)
    if (text := recommended(name, model)) is None:
        raise PlanError(
            f"no plan {name!r} comes with {model}; find one with 'cqil plan search --model {model} "
            f"--max-loss {_LOSSES[name]} -o {name}.json' and run it with '--plan {name}.json'"
        )
    return Plan.parse(text, num_layers)


def plan_record(source: PlanSource, model: str) -> Mapping[str, Any] | None:
    """All that is written of a plan, in any form that `plan_for` takes; None where nothing is."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | Path):
        return None
    text = str(source).strip()
    try:
        if not text.startswith("{"):
            text = recommended(text, model) or Path(text).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError):  # notation
        return None
    return found if isinstance(found, dict) else None


def note_missing_compensation(source: PlanSource, model: str, progress: Progress) -> None:
    """Say so where a plan that was chosen for a compensated model is to go without."""
    measured = (plan_record(source, model) or {}).get("measured")
    if isinstance(measured, Mapping) and measured.get("compensation"):
        progress.note(
            "this plan was chosen for its compensated form, and loses far more without: make the "
            "adapter with 'cqil plan compensate', and give it with --adapter"
        )


def recommended(name: str, model: str) -> str | None:
    """What is written of the plan of that name; None where none comes with the model."""
    file = resources.files(__package__) / model / f"{name.strip().lower()}.json"
    if "/" in model or "/" in name or not file.is_file():
        return None
    return file.read_text(encoding="utf-8")
