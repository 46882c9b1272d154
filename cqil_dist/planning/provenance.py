"""Which text a plan or an adapter was made with, so that it is not judged by the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cqil_dist.errors import TextError
from cqil_dist.planning.windows import Windows
from cqil_dist.recommended import recommended


def made_with(windows: Windows, *earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """What to write of a text beside what was made with it, under the key "measured".

    Args:
        earlier: what is written of what it was made from: of a plan, of the plan in an adapter.
    """
    files = windows.files.union(*map(_files, earlier))
    return {"text": windows.source, "tokens": windows.tokens, "files": sorted(files)}


def refuse_known_text(
    texts: Sequence[Windows], plan: str, model: str, adapter_plan: Mapping[str, Any] | None
) -> None:
    """Raises TextError where a plan's file, or an adapter, was made with one of these texts.

    Args:
        plan, model: as the user gave them.
        adapter_plan: what lies in the adapter.
    """
    for text in texts:
        if any(knows(record, text) for record in (record_of(plan, model), adapter_plan)):
            raise TextError(
                f"the plan or its adapter was made with {text.source}; what it scores there says "
                "nothing of other text: evaluate on a file that it has not seen"
            )


def knows(record: Mapping[str, Any] | None, text: Windows) -> bool:
    """Whether what the record describes was made with a file that the text is from."""
    return not _files(record).isdisjoint(text.files)


def record_of(plan: str, model: str) -> Mapping[str, Any] | None:
    """What is written of a plan, given as the user does; None where nothing is."""
    try:
        text = recommended(plan, model) or Path(plan).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError):  # no file: notation, or JSON itself
        return None
    return found if isinstance(found, dict) else None


def _files(record: Mapping[str, Any] | None) -> frozenset[str]:
    measured = record.get("measured") if isinstance(record, Mapping) else None
    return frozenset(measured.get("files", []) if isinstance(measured, Mapping) else [])
