"""Watching other threads and processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def wait_for(happened: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def actors(name: str) -> set[int]:
    """Processes of live actors of this class on this machine, by Ray's process titles."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if f"ray::{name}" in " ".join(process.info["cmdline"] or [])
    }
