"""How a measurement of a peer looks on a terminal. Knows the report's JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

_NAMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2el": "E2E",
    "queueing": "queueing",
}
_KINDS_OF_FAILURE = 5
_BUSY = 0.5


def print_report(report: dict[str, Any], console: Console) -> None:
    """Throughput, latencies, failures, and what to keep in mind of them."""
    _print(console, _heading(report["setting"]))
    results = report["results"]
    console.print(_throughput_table(results))
    if any(result["completed"] for result in results):
        console.print(_latency_table(results, report["setting"]["percentiles"]))
    for line in (*_failures(results), *_notes(report)):
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
    table = Table(title="Throughput, per second", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in (
        "at once",
        "completed",
        "failed",
        "seconds",
        "requests",
        "output tokens",
        "repeats",
        "all tokens",
    ):
        table.add_column(column, justify="right")
    for result in results:
        repeats = [each["output_throughput"] for each in result["repeats"]]
        known = [value for value in repeats if value is not None]
        table.add_row(
            _concurrency(result),
            str(result["completed"]),
            str(result["failed"]),
            f"{result['duration']:.1f}",
            _number(result["request_throughput"]),
            _number(result["output_throughput"]),
            f"{min(known):.1f}-{max(known):.1f}" if known else "",
            _number(result["total_token_throughput"]),
        )
    return table


def _latency_table(results: list[dict[str, Any]], percentiles: list[float]) -> Table:
    median = [] if 50 in percentiles else ["median"]
    kinds = ["mean", "std", *median, *(f"p{percent:g}" for percent in percentiles)]
    table = Table(title="Latency, ms", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("at once", "", *kinds):
        table.add_column(column, justify="right")
    for result in results:
        first = _concurrency(result)
        for name, shown in _NAMES.items():
            if f"mean_{name}_ms" in result:
                figures = (_number(result[f"{kind}_{name}_ms"]) for kind in kinds)
                table.add_row(first, shown, *figures)
                first = ""
        table.add_section()
    return table


def _failures(results: list[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        for failure, count in list(result["failures"].items())[:_KINDS_OF_FAILURE]:
            yield f"{count} of {_concurrency(result)} at once failed: {failure}"


def _notes(report: dict[str, Any]) -> Iterator[str]:
    setting, client = report["setting"], report["client_attention"]
    if setting["ignore_eos_refused"]:
        yield "The peer refuses ignore_eos: answers end where the model ends them."
    if any(result["output_tokens_from"] not in ("usage", None) for result in report["results"]):
        yield (
            "The peer gives no usage: output tokens are events with text, of which each may hold "
            "several tokens."
        )
    if any((result["output_tokens_per_event"] or 0) > 1.2 for result in report["results"]):
        yield "An event brings more than one token on average: ITL is between events, not tokens."
    if client is not None:
        yield (
            f"This client was busy {client['busy_share']:.0%} of the time at most, for "
            f"{client['p99_ms']:.1f} ms in a row (p99; {client['longest_ms']:.1f} ms at worst): "
            "moments it noted may be that late."
        )
        if client["busy_share"] > _BUSY:
            yield "It may be what was measured: give it a core or a machine of its own."
    if report["interrupted"]:
        yield "Interrupted: these are the requests that had ended."


def _concurrency(result: dict[str, Any]) -> str:
    return "any" if result["max_concurrency"] is None else str(result["max_concurrency"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
