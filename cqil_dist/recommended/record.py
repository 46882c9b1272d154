"""What is written of a plan beside its groups: how it was found, with which text, and for what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cqil_dist.plan import PlanSource
from cqil_dist.progress import Progress
from cqil_dist.recommended.index import recommended

PlanRecord = Mapping[str, Any]
"""A plan's JSON, whole."""


def plan_record(source: PlanSource, model: str) -> PlanRecord | None:
    """Of a plan in any form that `plan_for` takes; None where nothing is written."""
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


def measured_of(record: PlanRecord | None) -> Mapping[str, Any]:
    """What was measured of a plan; empty where nothing is written."""
    measured = (record or {}).get("measured")
    return measured if isinstance(measured, Mapping) else {}


def note_missing_compensation(
    source: PlanSource, model: str, progress: Progress, option: str = "--adapter"
) -> None:
    """Say so where a plan that was chosen for its compensated form is to go without.

    Args:
        option: of the command, that would take the adapter.
    """
    if measured_of(plan_record(source, model)).get("compensation"):
        progress.note(
            "this plan was chosen for its compensated form, and loses far more without: make the "
            f"adapter with 'cqil plan compensate', and give it with {option}"
        )
