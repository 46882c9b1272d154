"""The text that a plan or an adapter was made with, so that neither is evaluated on that text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cqil_dist.errors import TextError
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.recommended.record import PlanRecord, measured_of, plan_record


def made_with(windows: Windows, *sources: PlanRecord | None) -> dict[str, Any]:
    """Return the provenance of a plan or an adapter, which its JSON holds under "measured".

    Args:
        windows: the text that the plan was chosen on, or that the adapter was fitted to.
        sources: the JSON of what an adapter was made from: its plan, and the plan inside the
            adapter that training began with. Their text files are listed too, and the compensation
            that the plan was chosen for is kept.
    """
    files = windows.checksums.union(*map(_files, sources))
    chosen_for = [found for each in sources if (found := measured_of(each).get("compensation"))]
    return {
        **windows.to_json(),
        "files": sorted(files),
        "compensation": chosen_for[-1] if chosen_for else None,
    }


def refuse_seen_text(
    texts: Sequence[Windows], plan: str, model: str, adapter_plan: PlanRecord | None
) -> None:
    """Check that neither a plan nor its adapter was made with any of these texts.

    Args:
        plan, model: as the user gave them.
        adapter_plan: the JSON of the plan inside the adapter; None without an adapter.

    Raises:
        TextError: one of them was, so that a score on that text would say nothing of other text.
    """
    for text in texts:
        if any(has_seen(record, text) for record in (plan_record(plan, model), adapter_plan)):
            raise TextError(
                f"the plan or its adapter was made with {text.source}; what it scores there says "
                "nothing of other text: evaluate on a file that it has not seen"
            )


def has_seen(record: PlanRecord | None, text: Windows) -> bool:
    """Return whether the record's plan or adapter was made with a file that the text is from."""
    return not _files(record).isdisjoint(text.checksums)


def _files(record: PlanRecord | None) -> frozenset[str]:
    files = measured_of(record).get("files")
    return frozenset(map(str, files if isinstance(files, list) else []))
