"""The `cqil` command in processes of its own, each with a Ray cluster of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil
from helpers.watching import descendants, wait_for


def start_cqil(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from cqil_dist.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "", "COLUMNS": "200", **environment},
    )


def cqil(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    process = start_cqil(*arguments)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@dataclass
class Serving:
    """A running `cqil serve`."""

    process: subprocess.Popen[str]
    grpc: str = ""
    http: str = ""
    errors: list[str] = field(default_factory=list)

    def read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)
            if match := re.match(r"gRPC (\S+); HTTP (\S+)$", line):
                self.grpc, self.http = match.groups()

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The processes that it has started, filtered by a part of their command line."""
        return descendants(name, self.process.pid)


@contextmanager
def cqil_serve(*arguments: str, **environment: str) -> Iterator[Serving]:
    """Start `cqil serve` on free ports, and kill it with all its processes at the end."""
    process = start_cqil("serve", *arguments, "--grpc-port", "0", "--http-port", "0", **environment)
    serving = Serving(process)
    reading = threading.Thread(target=serving.read_errors, daemon=True)
    reading.start()
    try:
        wait_for(lambda: bool(serving.http) or process.poll() is not None, "it serves", 180)
        assert serving.http, "".join(serving.errors)
        yield serving
    finally:
        if process.poll() is None:
            for each in serving.processes():
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.kill()
        reading.join(10)
