"""Which text a plan or an adapter was made with, so that it is not judged by the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cqil_dist.errors import TextError
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.recommended.record import PlanRecord, measured_of, plan_record


def made_with(windows: Windows, *earlier: PlanRecord | None) -> dict[str, Any]:
    """What to write of a text beside what was made with it, under the key "measured".

    Args:
        earlier: what is written of what it was made from: of a plan, of the plan in an adapter.
            Its files are not forgotten, nor the compensation that the plan was chosen for.
    """
    files = windows.files.union(*map(_files, earlier))
    chosen = [found for each in earlier if (found := measured_of(each).get("compensation"))]
    return {
        **windows.to_json(),
        "files": sorted(files),
        "compensation": chosen[-1] if chosen else None,
    }


def refuse_known_text(
    texts: Sequence[Windows], plan: str, model: str, adapter_plan: PlanRecord | None
) -> None:
    """Raises TextError where a plan's file, or an adapter, was made with one of these texts.

    Args:
        plan, model: as the user gave them.
        adapter_plan: what lies in the adapter.
    """
    for text in texts:
        if any(knows(record, text) for record in (plan_record(plan, model), adapter_plan)):
            raise TextError(
                f"the plan or its adapter was made with {text.source}; what it scores there says "
                "nothing of other text: evaluate on a file that it has not seen"
            )


def knows(record: PlanRecord | None, text: Windows) -> bool:
    """Whether what the record describes was made with a file that the text is from."""
    return not _files(record).isdisjoint(text.files)


def _files(record: PlanRecord | None) -> frozenset[str]:
    files = measured_of(record).get("files")
    return frozenset(map(str, files if isinstance(files, list) else []))
