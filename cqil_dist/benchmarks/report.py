"""Shows a latency report: tables on the terminal, and a plot in a file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def print_tables(report: dict[str, Any]) -> None:
    """Print the setting, the latencies, and how they compare with the serial paths."""
    setting = report["setting"]
    console = Console()
    console.print(
        f"{setting['model']}, {setting['dtype']}, {setting['hardware']} "
        f"({setting['cores']} cores), {setting['threads_per_rank']} thread a rank, "
        f"{setting['prompt_tokens']} prompt + "
        f"{setting['output_tokens']} output tokens, {setting['repeats']} interleaved repeats"
    )
    console.print(_latency_table(report["results"]))
    console.print(_serial_path_table(report["results"]))
    if report["layer_times_ms"]:
        times = report["layer_times_ms"]
        console.print(
            f"one layer: {times['layer_alone']:.3f} ms alone, {times['layer_together']:.3f} ms "
            f"while all ranks compute; head: {times['head_together']:.2f} ms shared, "
            f"{times['head_whole_alone']:.2f} ms whole on one core"
        )


def _latency_table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Latency, ms", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("configuration", no_wrap=True)
    for column in ("ranks", "TTFT", "ITL p50", "p90", "repeats", "speed-up", "vs seq"):
        table.add_column(column, justify="right")
    transformers, sequential = (result["itl_p50_ms"] for result in results[:2])
    for result in results:
        median, repeats = result["itl_p50_ms"], result["repeat_medians_ms"]
        table.add_row(
            result["name"],
            str(result["ranks"]),
            f"{statistics.median(result['ttft_ms']):.1f}",
            f"{median:.2f}",
            f"{result['itl_p90_ms']:.2f}",
            f"{min(repeats):.1f}-{max(repeats):.1f}",
            f"{transformers / median:.2f}x",
            f"{median / sequential - 1:+.1%}",
        )
    return table


def _serial_path_table(results: Sequence[dict[str, Any]]) -> Table:
    """Compare per-token latency with the serial path's time; show where exchanges spend theirs."""
    table = Table(title="Serial path", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("configuration", no_wrap=True)
    for column in ("depth", "exchanges", "path, ms", "over it", "transfer, us", "skew, us"):
        table.add_column(column, justify="right")
    for result in results[1:]:
        predicted, exchange = result["predicted_ms"], result["exchange_us"]
        table.add_row(
            result["name"],
            str(result["depth"]),
            f"{result['exchanges_per_token']:g}",
            f"{predicted:.2f}" if predicted else "",
            f"{result['itl_p50_ms'] / predicted - 1:+.1%}" if predicted else "",
            f"{exchange['transfer']:.0f}" if exchange else "",
            f"{exchange['skew']:.0f}" if exchange else "",
        )
    return table


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Plot each configuration's median per-token latency as a bar, with its repeats' spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    medians = [result["itl_p50_ms"] for result in results]
    repeats = [(*result["repeat_medians_ms"], result["itl_p50_ms"]) for result in results]
    spread = [
        [median - min(each) for median, each in zip(medians, repeats, strict=True)],
        [max(each) - median for median, each in zip(medians, repeats, strict=True)],
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(results) + 1.6))
    names = [f"{result['name']} ({result['ranks']})" for result in results]
    bars = axes.barh(names, medians, xerr=spread, color="#4c72b0", capsize=3)
    axes.bar_label(bars, labels=[f"{median:.1f}" for median in medians], padding=6)
    predicted = [result["predicted_ms"] for result in results]
    for index, value in enumerate(predicted):
        if value:
            axes.plot([value, value], [index - 0.4, index + 0.4], color="#c44e52", lw=2)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per token (median; red: layers and head of the serial path)")
    setting = report["setting"]
    axes.set_title(f"{setting['model']}, {setting['dtype']}, {setting['hardware']}")
    axes.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
