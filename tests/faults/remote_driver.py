"""The driver that `RemoteEngine` runs on another host; it imports nothing but the package.

Messages are JSON lines on standard input: first the launch's options, then requests for a stream or
for the status. Answers are JSON lines on standard output, each with the number of its message.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import cqil_dist
from cqil_dist.errors import CqilError

_Message = dict[str, Any]


def main() -> None:
    """Launch an engine, then answer messages until standard input ends."""
    printing = threading.Lock()

    def answer(message: _Message, engine: cqil_dist.RunningEngine) -> None:
        try:
            for value in perform(engine, **message):
                tell(message, value)
        except CqilError as error:
            tell(message, {"error": str(error)})

    def perform(
        engine: cqil_dist.RunningEngine, do: str, arguments: _Message, **_: Any
    ) -> Iterator[_Message]:
        if do == "status":
            yield asdict(engine.status())
        else:
            for chunk in engine.generate(**arguments):
                yield {"time": time.monotonic(), **chunk.to_dict()}

    def tell(message: _Message, value: _Message) -> None:
        with printing:
            print(json.dumps({"number": message["number"], "answer": value}), flush=True)

    messages: Iterator[_Message] = (json.loads(line) for line in sys.stdin)
    first = next(messages)
    try:
        engine = cqil_dist.launch(**first["arguments"])
    except CqilError as error:
        tell(first, {"error": f"{type(error).__name__}: {error}"})
        return
    with engine:
        tell(first, {})
        for message in messages:
            threading.Thread(target=answer, args=(message, engine), daemon=True).start()


if __name__ == "__main__":
    main()
