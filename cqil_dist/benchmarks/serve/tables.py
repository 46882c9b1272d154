"""Tables of a server's measurement on a terminal, made from the report's JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E", "queueing": "queueing"}
_STATISTICS = ("mean", "std", "p50", "p90", "p99")
_KINDS_OF_FAILURE = 5
_BUSY = 0.5


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print throughput, latencies, failures, and notes on how to read them."""
    _print(console, _heading(report["setting"]))
    results = report["results"]
    console.print(_throughput_table(results))
    if any(result["completed"] for result in results):
        console.print(_latency_table(results))
    for line in (*_failures(results), *notes(report)):
        _print(console, line)


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _heading(setting: dict[str, Any]) -> str:
    rate = setting["request_rate"]
    paced = "due at once" if rate == "inf" else f"at {rate:g} a second"
    return (
        f"{setting['model']} at {setting['base_url']} ({setting['endpoint']}), "
        f"{setting['num_prompts']} requests {paced}, at most {setting['output_len']} output "
        f"tokens{', end token ignored' if setting['ignore_eos'] else ''}, "
        f"repeats: {setting['repeats']}"
    )


def _throughput_table(results: list[dict[str, Any]]) -> Table:
    counts = ("completed", "failed", "seconds")
    rates = ("requests", "output tokens", "repeats", "all tokens")
    table = _table("Throughput, per second", "at once", *counts, *rates)
    for result in results:
        repeats = [each["output_throughput"] for each in result["repeats"]]
        table.add_row(
            _concurrency(result),
            str(result["completed"]),
            str(result["failed"]),
            f"{result['duration']:.1f}",
            _number(result["request_throughput"]),
            _number(result["output_throughput"]),
            f"{min(repeats):.1f}-{max(repeats):.1f}",
            _number(result["total_token_throughput"]),
        )
    return table


def _latency_table(results: list[dict[str, Any]]) -> Table:
    table = _table("Latency, ms", "at once", "", *_STATISTICS)
    for result in results:
        first = _concurrency(result)
        for name, shown in _LATENCIES.items():
            if f"mean_{name}_ms" in result:
                figures = (_number(result[f"{kind}_{name}_ms"]) for kind in _STATISTICS)
                table.add_row(first, shown, *figures)
                first = ""
        table.add_section()
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _failures(results: list[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        for failure, count in list(result["failures"].items())[:_KINDS_OF_FAILURE]:
            yield f"{count} of {_concurrency(result)} at once failed: {failure}"


def notes(report: dict[str, Any]) -> Iterator[str]:
    """Yield remarks on how to read the figures."""
    if any(result["output_tokens_from"] in ("events", "mixed") for result in report["results"]):
        yield "Without usage, output tokens are events with text, of which each may hold several."
    if any((result["output_tokens_per_event"] or 0) > 1.2 for result in report["results"]):
        yield "An event brings more than one token on average: ITL is between events, not tokens."
    share = report["client_cpu_share"]
    yield f"Client CPU share: {share:.0%} of a core at most."
    if share > _BUSY:
        yield "The client may be what was measured: give it a core or a machine of its own."
    if report["interrupted"]:
        yield "Interrupted: these are the requests that had ended."


def _concurrency(result: dict[str, Any]) -> str:
    return "any" if result["max_concurrency"] is None else str(result["max_concurrency"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
