"""Progress: what a person sees of a long step."""

from __future__ import annotations

import io
import re
import threading
import time
from pathlib import Path

import pytest
from helpers.watching import wait_for
from rich.console import Console

from cqil_dist.progress import (
    ConsoleProgress,
    SilentProgress,
    Task,
    following_growth,
    format_bytes,
)


def lines_progress() -> tuple[ConsoleProgress, io.StringIO]:
    out = io.StringIO()
    return ConsoleProgress(Console(file=out, force_terminal=False)), out


def terminal_progress() -> tuple[ConsoleProgress, io.StringIO]:
    out = io.StringIO()
    return ConsoleProgress(Console(file=out, force_terminal=True, width=100)), out


def test_a_step_is_two_lines_where_there_is_no_terminal() -> None:
    progress, out = lines_progress()
    with progress.task("Downloading x [1/2]", total=2_000_000, unit="B") as task:
        for _ in range(4):
            task.advance(500_000)
    first, last = out.getvalue().splitlines()
    assert first == "Downloading x [1/2] ..."
    assert re.fullmatch(r"Downloading x \[1/2\]: 2\.0 MB, \d+\.\d s", last)


def test_a_long_line_is_not_wrapped() -> None:
    progress, out = lines_progress()
    progress.note("x" * 300)
    assert out.getvalue() == "x" * 300 + "\n"


@pytest.mark.parametrize("make", [lines_progress, terminal_progress])
def test_a_step_that_fails_says_so(make: object) -> None:
    assert callable(make)
    progress, out = make()

    def convert() -> None:
        with progress.task("Converting x", unit="tensors") as task:
            task.update(3, total=10)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        convert()
    assert re.search(r"Converting x: failed after \d+\.\d s", out.getvalue())


def test_a_terminal_has_bars_while_steps_run_and_a_line_for_each_at_the_end() -> None:
    progress, out = terminal_progress()
    with progress.task("Loading rank 0", total=4, unit="tensors") as first:
        with progress.task("Loading rank 1", total=4, unit="tensors") as second:
            first.update(1)
            second.update(3)
            amounts = ("1 of 4 tensors", "3 of 4 tensors")
            wait_for(lambda: all(amount in out.getvalue() for amount in amounts), "both bars")
        first.update(4)
    assert re.search(r"Loading rank 1: 3 tensors, \d+\.\d s", out.getvalue())
    assert re.search(r"Loading rank 0: 4 tensors, \d+\.\d s", out.getvalue())
    with progress.task("Again"):  # the bars can come back
        pass
    assert re.search(r"Again: \d+\.\d s", out.getvalue())


@pytest.mark.parametrize("make", [lines_progress, terminal_progress])
def test_steps_may_be_opened_and_counted_by_any_thread(make: object) -> None:
    assert callable(make)
    progress, out = make()
    with progress.task("All", unit="tensors") as shared:

        def load(rank: int) -> None:
            with progress.task(f"Rank {rank}") as own:
                for _ in range(200):
                    own.advance()
                    shared.advance()

        threads = [threading.Thread(target=load, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "All: 800 tensors" in out.getvalue()
    assert all(f"Rank {rank}: 200, " in out.getvalue() for rank in range(4))


def test_silent_progress_still_counts() -> None:
    with SilentProgress().task("x", total=3) as task:
        task.advance(2)
        assert (task.completed, task.total) == (2, 3)


def test_growth_of_a_folder_is_counted_up_to_the_total(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"x" * 500)
    task = Task(total=1000)
    with following_growth(tmp_path, task):
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "file").write_bytes(b"x" * 700)
        deadline = time.monotonic() + 5
        while task.completed == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert task.completed == 700
        (tmp_path / "copy").write_bytes(b"x" * 700)
        while task.completed == 700 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert task.completed == 1000


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (92_871_040, "92.9 MB"), (2e9, "2.0 GB"), (5e15, "5000.0 TB")],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text
