"""Per-token latency of transformers, the sequential plan and concurrent plans.

The same as `cqil bench latency`; see cqil_dist/benchmarks/latency.py for what is measured and how.
"""

from __future__ import annotations

import typer

from cqil_dist.cli.bench import latency

if __name__ == "__main__":
    typer.run(latency)
