"""An engine launched on another host, and used from here: JSON lines over a process's pipes.

`python -m cqil_dist.benchmarks.remote` is the far end: it launches what it is told, streams what
it is asked for, and reports. `RemoteEngine` is the near end.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Self

from cqil_dist.benchmarks.hosts import Host
from cqil_dist.errors import CqilError

_Event = dict[str, Any]


class RemoteStream:
    """A completion as it comes in.

    Attributes:
        token_ids, text: what has come so far.
        times: when each token came (`time.monotonic`).
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.times: list[float] = []
        self.result: dict[str, Any] | None = None
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()

    def put(self, event: _Event) -> None:
        self._events.put(event)

    def read(self, tokens: int | None = None, timeout_s: float = 180) -> Self:
        """Wait until this many tokens have come, or until its end.

        Raises:
            CqilError: it ended with an error, or nothing came within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while self.result is None and (tokens is None or len(self.token_ids) < tokens):
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise CqilError(
                    f"the stream gave {len(self.token_ids)} tokens and hung for {timeout_s:g} s"
                ) from None
            if "error" in event:
                raise CqilError(event["error"])
            self.token_ids += event["token_ids"]
            self.times += [event["time"]] * len(event["token_ids"])
            self.text += event["text"]
            self.result = event["result"]
        return self


class RemoteEngine:
    """Launches a model from a host; use it in a `with` block.

    Args:
        host: where the driver runs.
        options: of `cqil_dist.launch`.

    Raises:
        CqilError: the launch failed; with the message it failed with.
    """

    def __init__(self, host: Host, **options: Any) -> None:
        self._process = host.popen(
            sys.executable,
            "-m",
            "cqil_dist.benchmarks.remote",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._streams: dict[int, RemoteStream] = {}
        self._answers: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._sending = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._ask({"launch": options}, timeout_s=300)
        except BaseException:
            self.close()
            raise

    def stream(self, prompt: Any, **sampling: Any) -> RemoteStream:
        """Begin a completion."""
        stream = RemoteStream()
        with self._sending:
            number = len(self._streams)
            self._streams[number] = stream
            self._send({"stream": number, "prompt": prompt, "sampling": sampling})
        return stream

    def status(self) -> dict[str, Any]:
        """The engine's `Status` as a dict."""
        status: dict[str, Any] = self._ask({"status": True}, timeout_s=60)["status"]
        return status

    def close(self) -> None:
        """End the launch and the driver. Idempotent."""
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _ask(self, question: _Event, timeout_s: float) -> _Event:
        with self._sending:
            self._send(question)
            try:
                answer = self._answers.get(timeout=timeout_s)
            except queue.Empty:
                raise CqilError(f"no answer to {question} within {timeout_s:g} s") from None
        if "error" in answer:
            raise CqilError(answer["error"])
        return answer

    def _send(self, message: _Event) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):
                continue  # Ray prints what it likes
            event = json.loads(line)
            stream = self._streams.get(event.get("stream", -1))
            (self._answers if stream is None else stream).put(event)
        gone = {"error": "the driver ended"}
        self._answers.put(gone)
        for stream in self._streams.values():
            stream.put(gone)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve() -> None:
    """The far end."""
    import cqil_dist

    printing = threading.Lock()

    def tell(event: _Event) -> None:
        with printing:
            print(json.dumps(event), flush=True)

    def stream(engine: cqil_dist.RunningEngine, message: _Event) -> None:
        try:
            for chunk in engine.generate(message["prompt"], **message["sampling"]):
                event = {"time": time.monotonic(), **chunk.to_dict()}
                tell({"stream": message["stream"], **event})
        except CqilError as error:
            tell({"stream": message["stream"], "error": str(error)})

    messages: Iterator[_Event] = (json.loads(line) for line in sys.stdin)
    try:
        engine = cqil_dist.launch(**next(messages)["launch"])
    except CqilError as error:
        tell({"error": f"{type(error).__name__}: {error}"})
        return
    with engine:
        tell({"launched": True})
        for message in messages:
            if "stream" in message:
                threading.Thread(target=stream, args=(engine, message), daemon=True).start()
            else:
                try:
                    tell({"status": asdict(engine.status())})
                except CqilError as error:
                    tell({"error": str(error)})


if __name__ == "__main__":
    _serve()
