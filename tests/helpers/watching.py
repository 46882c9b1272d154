"""Watching other threads and processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil


def wait_for(happened: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def descendants(name: str = "", of: int | None = None) -> list[psutil.Process]:
    """Live processes that this one (or another) has started, by a part of their command line."""
    found: list[psutil.Process] = []
    for process in psutil.Process(of).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended; so has one that is a zombie
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def actors(name: str) -> set[int]:
    """Processes of live actors of this class in Ray clusters of ours, by Ray's process titles.

    Others on this machine are none of our tests' affair.
    """
    return {process.pid for process in descendants(f"ray::{name}")}
