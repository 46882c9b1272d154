"""Which text a plan or an adapter was made with, so that it is not judged by the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cqil_dist.errors import TextError
from cqil_dist.planning.texts import Windows


def made_with(windows: Windows) -> dict[str, Any]:
    """What to write of a text beside what was made with it, under the key "measured"."""
    return {"text": windows.source, "tokens": windows.tokens, "files": sorted(windows.files)}


def refuse_known_text(
    texts: Sequence[Windows], plan: str, adapter_plan: Mapping[str, Any] | None
) -> None:
    """Raises TextError where a plan's file, or an adapter, was made with one of these texts.

    Args:
        plan: as the user gave it.
        adapter_plan: what lies in the adapter.
    """
    known: set[str] = set()
    for record in (_record(plan), adapter_plan):
        if record is not None:
            known.update(record.get("measured", {}).get("files", []))
    for text in texts:
        if known & text.files:
            raise TextError(
                f"the plan or its adapter was made with {text.source}; what it scores there says "
                "nothing of other text: evaluate on a file that it has not seen"
            )


def _record(plan: str) -> Mapping[str, Any] | None:
    if not (file := Path(plan)).is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None
