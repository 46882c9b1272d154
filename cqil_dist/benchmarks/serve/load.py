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
from cqil_dist.settings import check_settings, number, setting, whole

if TYPE_CHECKING:
    import httpx

_AT_ONCE = whole(1)


class Endpoint(StrEnum):
    """The endpoint that takes prompts: as they are, or as messages for the chat template."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        """Return the endpoint's path in the OpenAI API."""
        return "/v1/chat/completions" if self is Endpoint.CHAT else "/v1/completions"


@dataclass(frozen=True)
class Load:
    """The requests that a server is to answer, and how fast they come.

    Attributes:
        max_concurrency: most requests under way at once, one run each in every repeat; None for no
            bound.

    Raises:
        CqilError: naming the field, its value and the rule.
    """

    endpoint: Endpoint = setting(
        Endpoint.COMPLETIONS, "Where prompts go: as they are, or as chat messages."
    )
    model: str | None = setting(
        None, "Model to ask.", unset="the first that the server lists", short="-m"
    )
    num_prompts: int = setting(48, "Number of requests of a run.", whole(1))
    request_rate: float = setting(
        math.inf, "Requests per second; inf sends all at once.", number(infinity=True)
    )
    burstiness: float = setting(
        1.0, "Shape of arrivals: 1 is a Poisson process, less comes in bursts.", number()
    )
    max_concurrency: tuple[int | None, ...] = (None,)
    repeats: int = setting(1, "Number of interleaved repeats.", whole(1))
    output_len: int = setting(64, "Most tokens of an answer.", whole(1))
    ignore_eos: bool = setting(False, "Go on after the end token, if the server can.")
    usage: bool = setting(True, "Ask for token counts; without them, events are counted.")
    temperature: float = setting(
        0.0, "Temperature that tokens are sampled at; 0 is greedy.", number(zero=True)
    )
    seed: int = setting(0, "Seed of the prompts' order and of arrivals.", whole(0))
    num_warmups: int = setting(
        3, "Number of requests before the first run, which are not counted.", whole(0)
    )
    unique_prompts: bool = setting(
        False, "Begin every prompt with a new number, which keeps it out of prefix caches."
    )
    timeout_s: float = setting(600.0, "Most seconds of one answer.", number())

    def __post_init__(self) -> None:
        check_settings(self, CqilError)
        for bound in self.max_concurrency:
            if bound is not None and not _AT_ONCE.admits(bound):
                raise CqilError(f"max_concurrency is {bound} but must be {_AT_ONCE}")

    def request(self, client: httpx.AsyncClient, model: str, prompt: str) -> httpx.Request:
        """Make a streaming request for one prompt."""
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
