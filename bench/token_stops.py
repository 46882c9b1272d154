"""Count the functions that one decoded token passes through on its way through the runtime.

    python bench/token_stops.py [--json after.json] [--compare before.json]

A stop is a distinct function of the package `cqil_dist` that is entered for every decoded token.
Stops are counted in the client's process, in the coordinator's and in that of one rank (the one
with the most), while the runtime serves one request as a user launches it, on Ray.

Every Python process of the launch notes each entry of a function whose code lies in the package's
folder, with the time. A module `sitecustomize` on PYTHONPATH, which Python imports as it starts,
sees to that in Ray's workers. The client notes when tokens arrive, so that all processes are
looked at between the same two tokens, in the midst of a request. A function counts if it was
entered as many times as tokens came (but two: processes do not handle a token at the same moment),
and in more than half of the intervals between tokens. Loops in the background go round more rarely
than tokens come, and thus do not count, however much they do at a time; where tokens take so long
that this may not hold, nothing is counted.

A generator or coroutine is entered whenever it goes on. Lambdas and nested functions count;
comprehensions, bodies of classes and modules, and generated code (protobuf's, and the methods of
dataclasses) do not. Before Python 3.12, threads that Python did not start are not seen: Ray runs
some methods of actors on such threads, but tokens take other ways.

Needs Linux. Uses only the package's public interface and the names of the two actor classes, so
that trees whose modules are laid out differently can be compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import TypeAlias

Entry: TypeAlias = tuple[int, str, str]  # time, by a clock that all processes share; file; name
Stop: TypeAlias = tuple[str, str, float]  # file, qualified name, entries per token

_PROCESSES = {"client": 1, "coordinator": 1, "rank": 2}
# Ray names a worker's process after the class of its actor.
_ROLES = {"ray::Coordinator": "coordinator", "ray::LayerActor": "rank"}
_COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
_PROMPT = "Once upon a time"  # goes on in words: a special token has no text to go on with
_TOKENS = 64
_SLACK_TOKENS = 2
_SLOWEST_MS = 250  # half of what the fastest loop in the background waits
_POLL_S = 0.1
_ANSWER_S = 60.0


class Recorder:
    """Notes every entry of the package's functions in this process, until it is asked for them.

    Args:
        package: the package's folder.
        folder: where a file `asked` will appear, and the answer is then written.
        role: what to answer as, unless Ray has given the process a title.
    """

    def __init__(self, package: str, folder: str, role: str) -> None:
        self._package = package + os.sep
        self._folder = Path(folder)
        self._role = role
        # Appending is atomic, so threads need no lock. What an entry means is found out later.
        self._entries: list[tuple[int, CodeType]] = []

    def start(self) -> None:
        """Watch this thread and those that start from now on, and answer when asked."""
        if sys.version_info >= (3, 12):
            tool, events = sys.monitoring.PROFILER_ID, sys.monitoring.events
            sys.monitoring.use_tool_id(tool, "token_stops")
            for event in (events.PY_START, events.PY_RESUME):
                sys.monitoring.register_callback(tool, event, lambda code, _: self._note(code))
            sys.monitoring.set_events(tool, events.PY_START | events.PY_RESUME)
        else:
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)
        threading.Thread(target=self._answer, name="token-stops", daemon=True).start()

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self._note(frame.f_code)

    def _note(self, code: CodeType) -> None:
        if code.co_filename.startswith(self._package):
            self._entries.append((time.monotonic_ns(), code))

    def _answer(self) -> None:
        while not (self._folder / "asked").exists():
            time.sleep(_POLL_S)
        title = Path("/proc/self/cmdline").read_text("utf-8", "replace")
        role = next((_ROLES[each] for each in _ROLES if title.startswith(each)), self._role)
        entries: list[Entry] = [
            (at, code.co_filename.removeprefix(self._package), code.co_qualname)
            for at, code in self._entries[:]
            if _is_written(code)
        ]
        unfinished = self._folder / f"{role}-{os.getpid()}.unfinished"
        unfinished.write_text(json.dumps(entries), "utf-8")
        unfinished.rename(unfinished.with_suffix(".json"))


def _is_written(code: CodeType) -> bool:
    """Whether it is a function that somebody wrote."""
    # Bodies of classes and modules keep their names in dictionaries: they are not optimized.
    is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
    is_generated = "_pb2" in Path(code.co_filename).name
    return is_function and not is_generated and code.co_name not in _COMPREHENSIONS


def record_in_worker(package: str, folder: str) -> None:
    """What `sitecustomize` does in other processes: record, then run the one that it hides."""
    Recorder(package, folder, "other").start()
    hidden = PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != folder])
    if hidden is not None and hidden.loader is not None:
        hidden.loader.exec_module(importlib.util.module_from_spec(hidden))


@contextmanager
def recording() -> Iterator[Path]:
    """Record in this process and in those it starts; yields the folder where they answer."""
    package = importlib.util.find_spec("cqil_dist")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("cqil_dist is neither installed nor on PYTHONPATH")
    with tempfile.TemporaryDirectory(prefix="token-stops-") as folder:
        where = (package.submodule_search_locations[0], folder)
        shutil.copy(__file__, Path(folder, "token_stops.py"))
        hook = f"import token_stops\n\ntoken_stops.record_in_worker(*{where!r})\n"
        Path(folder, "sitecustomize.py").write_text(hook, "utf-8")
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, inherited)))
        Recorder(*where, "client").start()
        yield Path(folder)


def serve_request(options: argparse.Namespace, folder: Path) -> tuple[list[int], list[Path]]:
    """Launch the runtime and have it serve a request.

    Returns:
        When the request was made and then when the client had each token; and the answers.
    """
    import cqil_dist as cqil  # not above: workers import this file as they start

    os.environ.pop("RAY_ADDRESS", None)  # workers of a cluster that runs already do not record
    sampling = {"temperature": options.temperature, "seed": 1, "ignore_eos": True}
    with cqil.launch(options.model, options.plan, ranks=_PROCESSES["rank"]) as engine:
        for _ in engine.generate(_PROMPT, max_tokens=8, **sampling):
            pass  # warms up
        moments = [time.monotonic_ns()]
        for chunk in engine.generate(_PROMPT, max_tokens=_TOKENS, **sampling):
            moments += [time.monotonic_ns()] * len(chunk.token_ids)
        return moments, _collect(folder)


def _collect(folder: Path) -> list[Path]:
    (folder / "asked").touch()
    deadline = time.monotonic() + _ANSWER_S
    while True:
        answers = {role: [*folder.glob(f"{role}-*.json")] for role in _PROCESSES}
        counts = {role: len(found) for role, found in answers.items()}
        if counts == _PROCESSES:
            return [path for found in answers.values() for path in found]
        if time.monotonic() > deadline:
            raise SystemExit(f"processes that answered: {counts}; expected: {_PROCESSES}")
        time.sleep(_POLL_S)


def stops_of(entries: Sequence[Entry], moments: Sequence[int]) -> list[Stop]:
    """One process's stops, in the order in which the request first came to them.

    Args:
        moments: when the request was made, then when each token came.
    """
    edge = len(moments) // 8  # requests begin and end with work that is not a token's
    tokens = moments[edge:-edge]
    intervals: dict[tuple[str, str], list[int]] = {}
    for at, file, name in entries:
        if at >= moments[0]:
            entered = intervals.setdefault((file, name), [])
            if tokens[0] < at <= tokens[-1]:
                entered.append(bisect_left(tokens, at))
    count = len(tokens) - 1
    return [
        (*function, round(len(entered) / count, 2))
        for function, entered in intervals.items()
        if len(entered) >= count - _SLACK_TOKENS and len(set(entered)) > count / 2
    ]


def totals_of(roles: dict[str, list[Stop]]) -> dict[str, int]:
    """Stops of each role and of all, how many functions these are, and in how many files."""
    functions = {(file, name) for stops in roles.values() for file, name, _ in stops}
    totals = {role: len(stops) for role, stops in roles.items()}
    totals["in all"] = sum(totals.values())
    totals["distinct functions"] = len(functions)
    totals["distinct files"] = len({file for file, _ in functions})
    return totals


def show(
    roles: dict[str, list[Stop]], totals: dict[str, int], before: dict[str, int] | None
) -> None:
    """Print the stops, and how many there are, beside those of another tree if given."""
    for role, stops in roles.items():
        print(f"{role}\n  {'module':34}{'function':46}entries/token")
        for file, name, entries in stops:
            print(f"  {file:34}{name:46}{entries:13.2f}")
    for total, count in totals.items():
        compared = f"  {count / before[total]:.2f} of {before[total]}" if before else ""
        print(f"{total:20}{count:4}{compared}")


def main() -> None:
    """Measure, show, and write what was found."""
    parser = argparse.ArgumentParser(description="Count the functions that a token passes through.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--plan", default="P2 S12 E28 D1", help="for two ranks")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--json", type=Path, help="a file to write the stops to")
    parser.add_argument("--compare", type=Path, help="such a file, of another tree")
    options = parser.parse_args()
    before = json.loads(options.compare.read_bytes())["totals"] if options.compare else None
    roles: dict[str, list[Stop]] = {}
    with recording() as folder:
        moments, answers = serve_request(options, folder)
        for path in answers:
            role, stops = path.name.split("-")[0], stops_of(json.loads(path.read_bytes()), moments)
            roles[role] = max(roles.get(role, []), stops, key=len)
    token_ms = median(after - at for at, after in pairwise(moments)) / 1e6
    if token_ms > _SLOWEST_MS:
        raise SystemExit(f"a token took {token_ms:.0f} ms: try when the machine is less busy")
    totals = totals_of(roles)
    show(roles, totals, before)
    if options.json:
        settings = {name: getattr(options, name) for name in ("model", "plan", "temperature")}
        settings |= {"python": sys.version.split()[0], "token_ms": round(token_ms)}
        record = {"settings": settings, "totals": totals, "stops": roles}
        options.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
