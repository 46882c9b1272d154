"""Waiting for other threads, and finding processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil


def wait_for(happened: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Wait until a condition holds; fails, saying what did not happen, after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def descendants(name: str = "", of: int | None = None) -> list[psutil.Process]:
    """Live descendants of this process (or another), filtered by a part of their command line."""
    found: list[psutil.Process] = []
    for process in psutil.Process(of).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended; so has one that is a zombie
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def actors(name: str) -> set[int]:
    """Process ids of live Ray actors of this class, found by the titles that Ray gives processes.

    Only clusters that this process has started are searched, as the machine may have others.
    """
    return {process.pid for process in descendants(f"ray::{name}")}
