"""One HTML page of a folder's analyses, searches, evaluations and latencies.

The page holds its pictures and asks for no other file.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cqil_dist.assignment import assign
from cqil_dist.costs import Costs, ModelShape
from cqil_dist.plan import Plan
from cqil_dist.planning.evaluation.intervals import Interval, difference_text
from cqil_dist.records import kind_of

REPORT = "report.html"
_TEMPLATE = "report.html.j2"

# The record kinds that the page shows.
_KINDS = ("analysis", "front", "evaluation", "latency")


def write_report(folder: Path) -> Path:
    """Write `report.html` from a folder's JSON and PNG files, and return its path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cqil_dist.planning", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "interval": _interval,
        "difference": _difference,
        "picture": _picture,
        "plan": _plan_text,
    }
    records, left_out = _records(folder)
    plans = _rows(records)
    measures = _headings(list(dict.fromkeys(key for row in plans for key in row["losses"])))
    page = environment.get_template(_TEMPLATE).render(
        records, plans=plans, measures=measures, left_out=left_out
    )
    (folder / REPORT).write_text(page, encoding="utf-8")
    return folder / REPORT


# Each kind's records, with the files they are from.
_Records = dict[str, list[tuple[Path, dict[str, Any]]]]
# A measure, the text or task it is of, the items taken of that, and the digest of their tokens.
_Measure = tuple[str, str, str, str]


def _records(folder: Path) -> tuple[_Records, list[str]]:
    """Read a folder's records by kind, and the names of files that another version has written."""
    found: _Records = {kind: [] for kind in _KINDS}
    left_out: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # some other program's file
        kind, readable = kind_of(record)
        if kind in found and readable:
            found[kind].append((path, record))
        elif kind in found:
            left_out.append(path.name)
    return found, left_out


def _headings(keys: Sequence[_Measure]) -> dict[_Measure, str]:
    """Return the heading of each measure's column, with the digest where two would look alike."""
    headings = {key: ", ".join(key[:3]) for key in keys}
    often = Counter(headings.values())
    return {
        key: f"{heading} ({key[3][:4]})" if often[heading] > 1 else heading
        for key, heading in headings.items()
    }


def _rows(records: _Records) -> list[dict[str, Any]]:
    """Return the table's rows, one for each evaluation and for each plan that was only timed.

    The deepest plan comes first. A plan takes the same time with an adapter as without one, because
    adapters are merged: an evaluation with an adapter has its plan's latency.
    """
    timed = {
        (found["setting"]["model"], _plan_text(result["plan"])): result
        for _, found in records["latency"]
        for result in found["results"]
        if result["plan"] is not None
    }
    evaluations = [found for _, found in records["evaluation"]]
    rows = [_row(records, found["model"], found["plan"], timed, found) for found in evaluations]
    evaluated = {(found["model"], _plan_text(found["plan"])) for found in evaluations}
    rows += [
        _row(records, model, result["plan"], timed)
        for (model, plan), result in timed.items()
        if (model, plan) not in evaluated
    ]
    return sorted(rows, key=lambda row: -row["depth"])


def _row(
    records: _Records,
    model: str,
    described: dict[str, Any],
    timed: dict[tuple[str, str], dict[str, Any]],
    evaluation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    plan = Plan.parse(described, described["num_layers"])
    costs = {found["model"]: found["cost"] for _, found in records["front"]}
    cost, timing = costs.get(model), timed.get((model, str(plan)))
    exchanges = latency_us = None
    if cost is not None:
        # Layers are taken whole, which take as long whatever the rest of their shape.
        shape = ModelShape(1, 1, 1, 1, 1, cost["vocab_size"])
        assignment = assign(plan, (timing or cost)["ranks"], shape)
        exchanges = assignment.rounds
        times = (cost["layer_us"], cost["head_us"], cost["link_us"])
        latency_us = assignment.latency_us(Costs(shape, *times))
    results = [] if evaluation is None else evaluation["results"]
    return {
        "plan": str(plan),
        "adapter": None if evaluation is None else evaluation["adapter"],
        "depth": plan.depth,
        "exchanges": exchanges,
        "predicted_ms": None if latency_us is None else latency_us / 1000,
        "measured_ms": None if timing is None else timing["itl_p50_ms"],
        "losses": {
            (each["measure"], each["of"], each["items"], each["digest"]): each["difference"]
            for each in results
        },
    }


def _difference(difference: dict[str, float], measure: str) -> str:
    return difference_text(measure, Interval(**difference))


def _interval(interval: dict[str, float]) -> str:
    return str(Interval(**interval))


def _picture(path: Path) -> str:
    """Return a PNG file as a data URI; an empty string where there is no such file."""
    if not path.is_file():
        return ""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _plan_text(plan: dict[str, Any]) -> str:
    return str(Plan.parse(plan, plan["num_layers"]))
