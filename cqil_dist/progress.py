"""Tells the person who waits for a long step how far it has come.

It knows how to count a step's work and how to show it: bars on a terminal, one line at the start
and one at the end of each step anywhere else, or nothing. It knows nothing of models, files or
ranks: whoever does the work opens a task and counts. Everything goes to standard error, so that a
command's standard output stays its result.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console
    import rich.progress

_GROWTH_INTERVAL_S = 0.2


class Task:
    """A step in progress, which counts the work done. Any thread may count.

    Attributes:
        completed: work done so far, in the step's unit.
        total: work the step has in all; None where nobody knows.
    """

    def __init__(
        self, total: float | None = None, on_change: Callable[[Task], None] | None = None
    ) -> None:
        self.completed = 0.0
        self.total = total
        self._on_change = on_change
        self._lock = threading.Lock()

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more as done."""
        with self._lock:
            self.completed += amount
            self._changed()

    def update(self, completed: float, total: float | None = None) -> None:
        """Set what is done in all; `total`, where given, replaces the step's total."""
        with self._lock:
            self.completed = completed
            if total is not None:
                self.total = total
            self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self)


class Progress(ABC):
    """A place where long steps say how far they have come."""

    @abstractmethod
    def task(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> AbstractContextManager[Task]:
        """Open a step; it ends with the `with` block, and has failed where that raises.

        Steps may overlap, in one thread or in several.

        Args:
            description: what is being done, as "Downloading smollm2-135m".
            total: work in all, in `unit`; None where it is not known (yet).
            unit: "B" for bytes, otherwise a plural noun such as "tensors".
        """

    @abstractmethod
    def note(self, line: str) -> None:
        """Tell something that is not a step, such as why a step is needed at all."""


class SilentProgress(Progress):
    """A progress that counts, and shows nothing."""

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        yield Task(total)

    def note(self, line: str) -> None:
        pass


class ConsoleProgress(Progress):
    """A progress with bars on a terminal, and a line at each step's start and end elsewhere."""

    def __init__(self, console: rich.console.Console | None = None) -> None:
        if console is None:
            from rich.console import Console  # rich takes 50 ms to import

            console = Console(stderr=True)
        self._console = console
        self._lock = threading.Lock()
        self._bars: rich.progress.Progress | None = None
        self._open_bars = 0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        started = time.perf_counter()
        outcome = "failed after "
        with self._shown(description, total, unit) as task:
            try:
                yield task
                outcome = f"{_amount(task.completed, unit)}, " if task.completed else ""
            finally:
                self.note(f"{description}: {outcome}{time.perf_counter() - started:.1f} s")

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _shown(self, description: str, total: float | None, unit: str) -> Iterator[Task]:
        if not self._console.is_terminal:
            self.note(f"{description} ...")
            yield Task(total)
            return
        bars = self._first_bar_opens()
        try:
            shown = bars.add_task(description, total=total, amount="")
            yield Task(
                total,
                lambda task: bars.update(
                    shown,
                    completed=task.completed,
                    total=task.total,
                    amount=_amount(task.completed, unit, task.total),
                ),
            )
        finally:
            bars.remove_task(shown)
            self._last_bar_closes()

    def _first_bar_opens(self) -> rich.progress.Progress:
        # A terminal has room for one live display: steps that overlap share it.
        from rich import progress

        with self._lock:
            if self._bars is None:
                self._bars = progress.Progress(
                    progress.SpinnerColumn(),
                    progress.TextColumn("{task.description}", markup=False),
                    progress.BarColumn(),
                    progress.TextColumn("{task.fields[amount]}", markup=False),
                    progress.TimeElapsedColumn(),
                    console=self._console,
                    transient=True,
                )
                self._bars.start()
            self._open_bars += 1
            return self._bars

    def _last_bar_closes(self) -> None:
        with self._lock:
            self._open_bars -= 1
            if self._open_bars == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


@contextmanager
def following_growth(folder: Path, task: Task) -> Iterator[None]:
    """Count the bytes that appear under `folder` while the block runs, up to the task's total.

    It is for work done by a program or library that writes files but does not tell how far it is.
    """
    before = _bytes_under(folder)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_GROWTH_INTERVAL_S):
            grown = max(0, _bytes_under(folder) - before)
            task.update(grown if task.total is None else min(grown, task.total))

    follower = threading.Thread(target=follow, name="follow-growth", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:  # moved or removed since it was listed
            continue
    return total


def _amount(completed: float, unit: str, total: float | None = None) -> str:
    if unit == "B":
        done = format_bytes(completed)
        return done if total is None else f"{done} of {format_bytes(total)}"
    done = f"{completed:g}" if total is None else f"{completed:g} of {total:g}"
    return f"{done} {unit}".rstrip()


def format_bytes(count: float) -> str:
    """Write a number of bytes with a decimal prefix: 92871040 is "92.9 MB"."""
    power = 0
    while count >= 1000 and power < 4:
        count /= 1000
        power += 1
    return f"{count:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
