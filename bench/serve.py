"""Latency and throughput of any OpenAI-compatible server under load.

The same as `cqil bench serve`; see cqil_dist/benchmarks/serve for what is measured and how.
"""

from __future__ import annotations

import typer

from cqil_dist.cli.bench import serve

if __name__ == "__main__":
    typer.run(serve)
