"""What a plan's JSON records beside its groups: measurements, and the text it was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cqil_dist.plan import PlanSource
from cqil_dist.progress import Progress
from cqil_dist.recommended.index import recommended

PlanRecord = Mapping[str, Any]
"""A plan's whole JSON object."""


def plan_record(source: PlanSource, model: str) -> PlanRecord | None:
    """Return the JSON of a plan as `plan_for` takes it; None if the plan is in no JSON."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | Path):
        return None
    text = str(source).strip()
    try:
        if not text.startswith("{"):
            text = recommended(text, model) or Path(text).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError):  # in the paper's notation
        return None
    return found if isinstance(found, dict) else None


def measured_of(record: PlanRecord | None) -> Mapping[str, Any]:
    """Return the measurements in a plan's JSON; empty if there are none."""
    measured = (record or {}).get("measured")
    return measured if isinstance(measured, Mapping) else {}


def note_missing_compensation(
    source: PlanSource, model: str, progress: Progress, option: str = "--adapter"
) -> None:
    """Warn the user if a plan that was chosen for its compensated form has no adapter.

    Args:
        option: the option by which the user can give the adapter.
    """
    if measured_of(plan_record(source, model)).get("compensation"):
        progress.note(
            "this plan was chosen for its compensated form, and loses far more without: make the "
            f"adapter with 'cqil plan compensate', and give it with {option}"
        )
