"""The `cqil` command in processes of its own, each with a Ray cluster of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def start_cqil(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from cqil_dist.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "", "COLUMNS": "200", **environment},
    )


def cqil(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    process = start_cqil(*arguments)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
