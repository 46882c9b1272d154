"""Use the openai package, unchanged, with a service.

Start one first: cqil serve smollm2-135m --plan "P2 S12 E28 D1" --ranks 2
Needs: pip install openai
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    key = os.environ.get("CQIL_API_KEY", "no key")  # the package needs one in any case
    client = OpenAI(base_url=parser.parse_args().base_url, api_key=key)
    model = client.models.list().data[0].id

    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name three rivers."}],
        max_tokens=32,
        temperature=0,
    )
    print(answer.choices[0].message.content)

    events = client.completions.create(
        model=model,
        prompt="Once upon a time",
        max_tokens=32,
        temperature=0.8,
        seed=1,
        stream=True,
        # Fields beyond OpenAI's have vLLM's names.
        extra_body={"min_p": 0.05, "repetition_penalty": 1.1},
    )
    for event in events:
        print(event.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
