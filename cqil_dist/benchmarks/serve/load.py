"""What is asked of a server, and how fast: plain, checked values, and the requests they make.

Sends nothing, and imports no HTTP client: the command line has its defaults from here, and has to
start fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from cqil_dist.errors import CqilError

if TYPE_CHECKING:
    import httpx


class Endpoint(StrEnum):
    """Where prompts go: as they are, or as a user's message through the chat template."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is Endpoint.CHAT else "/v1/completions"


@dataclass(frozen=True)
class Load:
    """What is asked of a server, and how fast.

    Attributes:
        model: None for the first one it lists.
        num_prompts: requests of a run.
        request_rate: requests per second; infinity sends all at once.
        burstiness: shape of the gaps between arrivals (`arrivals`).
        max_concurrency: one run each in every repeat; None for no bound.
        output_len: most tokens of an answer.
        ignore_eos: go on after the end token (vLLM's field and ours).
        usage: ask for token counts with the last event; without them, events are counted.
        seed: of the order of prompts and of the arrivals.
        num_warmups: requests before the first run, counted nowhere.
        unique_prompts: begin every prompt with a number drawn anew each time, so that no server has
            it in a prefix cache from an earlier request.
        timeout_s: most seconds of one answer.

    Raises:
        CqilError: naming the value and the rule.
    """

    endpoint: Endpoint = Endpoint.COMPLETIONS
    model: str | None = None
    num_prompts: int = 48
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: tuple[int | None, ...] = (None,)
    repeats: int = 1
    output_len: int = 64
    ignore_eos: bool = False
    usage: bool = True
    temperature: float = 0.0
    seed: int = 0
    num_warmups: int = 3
    unique_prompts: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "repeats", "output_len"):
            if (value := getattr(self, name)) < 1:
                raise CqilError(f"{name} is {value} but must be 1 or more")
        for bound in self.max_concurrency:
            if bound is not None and bound < 1:
                raise CqilError(f"max_concurrency is {bound} but must be 1 or more")
        for name in ("num_warmups", "temperature"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise CqilError(f"{name} is {value} but must be 0 or more, and finite")
        for name in ("burstiness", "timeout_s"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise CqilError(f"{name} is {value} but must be above 0, and finite")
        if not self.request_rate > 0:
            raise CqilError(f"request_rate is {self.request_rate} but must be above 0")

    def request(self, client: httpx.AsyncClient, model: str, prompt: str) -> httpx.Request:
        """A streaming request, ready to be sent."""
        chat = [{"role": "user", "content": prompt}]
        fields: dict[str, Any] = {
            "model": model,
            "max_tokens": self.output_len,
            "temperature": self.temperature,
            "stream": True,
            **({"messages": chat} if self.endpoint is Endpoint.CHAT else {"prompt": prompt}),
        }
        # Not there if not asked for: some servers refuse fields they do not know.
        if self.usage:
            fields["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return client.build_request("POST", self.endpoint.path, json=fields)
