"""One page of all that a folder holds: analysis, fronts, evaluations. Nothing outside is needed."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from cqil_dist.plan import Plan

REPORT = "report.html"
_TEMPLATE = "report.html.j2"


# Kinds of records, by what they call themselves.
_KINDS = ("analysis", "front", "evaluation")


def write_report(folder: Path) -> Path:
    """Write `report.html` from the folder's JSON and PNG files; returns its path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cqil_dist.planning", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"interval": _interval, "picture": _picture, "plan": _plan_text}
    page = environment.get_template(_TEMPLATE).render(_records(folder))
    (folder / REPORT).write_text(page, encoding="utf-8")
    return folder / REPORT


def _records(folder: Path) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
    """The records of a folder by kind, each with the file that it is in."""
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = {kind: [] for kind in _KINDS}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not ours
        if isinstance(record, dict) and record.get("record") in found:
            found[record["record"]].append((path, record))
    return found


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def _picture(path: Path) -> str:
    """A PNG as a data URI; nothing where there is none."""
    if not path.is_file():
        return ""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _plan_text(plan: dict[str, Any]) -> str:
    return str(Plan.parse(plan, plan["num_layers"]))
