"""The machine and the software that a measurement ran on, for its report."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine(device: str) -> dict[str, Any]:
    """Return hardware, cores, system, date, and the versions of what decides the speed."""
    return {
        "hardware": _hardware(device),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("cqil-dist", "torch", "transformers", "ray")},
    }


def _hardware(device: str) -> str:
    """Return the name of the GPU or CPU that computes."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
