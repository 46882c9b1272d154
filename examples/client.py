"""Generate text over gRPC with the Python client.

Start a service first: cqil serve smollm2-135m --plan "P2 S12 E28 D1" --ranks 2
"""

from __future__ import annotations

import argparse

from cqil_dist import Client, QueueFull


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051", help="address of the gRPC port")
    with Client(parser.parse_args().address, timeout_s=60) as client:
        for model in client.models():
            print(f"{model.name}: {len(model.plan['groups'])} groups, context {model.max_len}")

        # Chunks come as they are generated, and go on after the last one if the connection breaks.
        for chunk in client.generate("Once upon a time", max_tokens=32, temperature=0, stream=True):
            print(chunk.text, end="", flush=True)
        print()

        # The answer to a chat comes as a whole.
        try:
            messages = [{"role": "user", "content": "hi"}]
            reply = client.chat(messages, max_tokens=64, temperature=0.7, seed=1)
        except QueueFull:
            print("too busy; try again later")
        else:
            print(f"{reply.text!r} ({reply.finish_reason}, {reply.usage.completion_tokens} tokens)")


if __name__ == "__main__":
    main()
