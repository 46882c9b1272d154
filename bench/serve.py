"""Latency and throughput of any OpenAI-compatible server under load.

The same as `cqil bench serve`; see cqil_dist/benchmarks/serve for what is measured and how.
"""

from __future__ import annotations

import sys

from cqil_dist.cli.app import app

if __name__ == "__main__":
    app(["bench", "serve", *sys.argv[1:]], prog_name="cqil")
