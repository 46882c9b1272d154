"""Run many requests at the same time with the asyncio client.

Start a service first: cqil serve smollm2-135m --plan "P2 S12 E28 D1" --ranks 2
"""

from __future__ import annotations

import argparse
import asyncio

from cqil_dist import AsyncClient

PROMPTS = ("The capital of France is", "A lighthouse is", "def fibonacci(n):")


async def stream(client: AsyncClient, prompt: str) -> str:
    text = prompt
    async for chunk in client.generate(prompt, max_tokens=24, temperature=0, stream=True):
        text += chunk.text
    return text


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051", help="address of the gRPC port")
    async with AsyncClient(parser.parse_args().address) as client:
        # The requests share steps, so three take less than three times as long as one.
        for text in await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS)):
            print(text)
        reply = await client.chat([{"role": "user", "content": "hi"}], max_tokens=16, seed=1)
        print(reply.text)


if __name__ == "__main__":
    asyncio.run(main())
