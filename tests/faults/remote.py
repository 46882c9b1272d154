"""An engine launched on another host and used from here, over the pipes of a driver process.

`remote_driver.py` runs on the other host, and describes the messages.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from faults.hosts import Host

from cqil_dist.errors import CqilError

_Message = dict[str, Any]
_DRIVER = Path(__file__).with_name("remote_driver.py")


class _Answers:
    """The answers to one message."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Message] = queue.SimpleQueue()

    def put(self, answer: _Message) -> None:
        self._queue.put(answer)

    def next(self, timeout_s: float) -> _Message:
        """The next answer. Raises CqilError if it is an error, or does not come in time."""
        try:
            answer = self._queue.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            raise CqilError(f"no answer within {timeout_s:.1f} s") from None
        if "error" in answer:
            raise CqilError(answer["error"])
        return answer


class RemoteStream:
    """A completion in progress.

    Attributes:
        token_ids, text: the completion so far.
        times: when each token came (`time.monotonic`).
        result: the whole completion as JSON, once it has ended.
    """

    def __init__(self, answers: _Answers) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.times: list[float] = []
        self.result: dict[str, Any] | None = None
        self._answers = answers

    def read(self, tokens: int | None = None, timeout_s: float = 180) -> Self:
        """Wait until this many tokens have come, or until the stream ends.

        Raises:
            CqilError: the stream ended with an error, or took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while self.result is None and (tokens is None or len(self.token_ids) < tokens):
            chunk = self._answers.next(deadline - time.monotonic())
            self.token_ids += chunk["token_ids"]
            self.times += [chunk["time"]] * len(chunk["token_ids"])
            self.text += chunk["text"]
            self.result = chunk["result"]
        return self


class RemoteEngine:
    """An engine that a driver on a host launches; use it in a `with` block.

    Args:
        host: where the driver runs.
        options: of `cqil_dist.launch`.

    Raises:
        CqilError: the launch failed, with that message.
    """

    def __init__(self, host: Host, **options: Any) -> None:
        self._process = host.popen(
            sys.executable,
            str(_DRIVER),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._sent: list[_Answers] = []
        self._sending = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._send("launch", **options).next(timeout_s=300)
        except BaseException:
            self.close()
            raise

    def stream(self, prompt: Any, **sampling: Any) -> RemoteStream:
        """Start a completion."""
        return RemoteStream(self._send("stream", prompt=prompt, **sampling))

    def status(self) -> dict[str, Any]:
        """The engine's `Status` as a dict."""
        return self._send("status").next(timeout_s=60)

    def close(self) -> None:
        """End the engine and the driver; calling this again has no effect."""
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _send(self, what: str, **arguments: Any) -> _Answers:
        answers = _Answers()
        message = {"do": what, "arguments": arguments}
        assert self._process.stdin is not None
        with self._sending:
            line = json.dumps({"number": len(self._sent), **message})
            self._sent.append(answers)
            try:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            except OSError as error:
                raise CqilError("the driver has ended") from error
        return answers

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # Ray prints what it likes
                message = json.loads(line)
                self._sent[message["number"]].put(message["answer"])
        for answers in self._sent:
            answers.put({"error": "the driver ended"})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
