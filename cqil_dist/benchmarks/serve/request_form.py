"""In which fields a request is asked. Knows the OpenAI API's two endpoints, and sends nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line takes its choices from here, and has to start fast
    import httpx


class Endpoint(StrEnum):
    """Where prompts go: as they are, or as a user's message through the chat template."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is Endpoint.CHAT else "/v1/completions"


@dataclass(frozen=True)
class RequestForm:
    """A request without its prompt.

    Attributes:
        max_tokens: most tokens of an answer.
        ignore_eos: go on after the end token (vLLM's field and ours).
        include_usage: ask for token counts with the last event.
    """

    endpoint: Endpoint
    model: str
    max_tokens: int
    temperature: float
    ignore_eos: bool = False
    include_usage: bool = True

    def body(self, prompt: str) -> bytes:
        """JSON of a streaming request."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
        }
        if self.endpoint is Endpoint.CHAT:
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        # Left out where they say nothing, for a peer that does not know them.
        if self.include_usage:
            fields["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields).encode()

    def request(self, client: httpx.AsyncClient, prompt: str) -> httpx.Request:
        """Ready to be sent."""
        headers = {"Content-Type": "application/json"}
        body = self.body(prompt)
        return client.build_request("POST", self.endpoint.path, content=body, headers=headers)

    def simpler(self) -> Iterator[RequestForm]:
        """This form, then with fewer and fewer of the fields that a peer may not know."""
        for include_usage in sorted({self.include_usage, False}, reverse=True):
            for ignore_eos in sorted({self.ignore_eos, False}, reverse=True):
                yield replace(self, include_usage=include_usage, ignore_eos=ignore_eos)
