"""The page of `cqil serve` in a browser's tab."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Locator, Page, Request, Response

ANSWER_MS = 120_000


@dataclass
class Tab:
    """A tab that records its requests, and its errors and console messages."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    completions: list[Response] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("response", self._note_response)

    def _note_response(self, response: Response) -> None:
        if response.url.endswith("/v1/completions"):
            self.completions.append(response)

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector("#generate:enabled")

    def ask(self, prompt: str, max_tokens: int) -> None:
        self.page.fill("#prompt", prompt)
        self.page.fill("#max-tokens", str(max_tokens))
        self.page.click("#generate")

    def wait(self, state: str) -> None:
        """Wait until both sides are in this state."""
        for side in ("left", "right"):
            self.page.wait_for_selector(f"#{side}[data-state={state}]", timeout=ANSWER_MS)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).text_content() or ""

    def tokens(self, side: str) -> Locator:
        return self.page.locator(f"#{side} .tokens .token")

    def assert_undisturbed(self) -> None:
        """Check that there was no error, and no request but for the page's own files and API."""
        assert self.complaints == []
        assert {request.url for request in self.requests} == {
            self.url + path
            for path in (
                *("/", "/page.css", "/page.js", "/drawing.js"),
                *("/status", "/v1/completions"),
            )
        }


def attributes(located: Locator, name: str) -> list[str]:
    found: list[str] = located.evaluate_all(
        "(elements, name) => elements.map((element) => element.getAttribute(name))", name
    )
    return found


def choices(response: Response) -> list[Any]:
    """The choices of a completed stream's events, in order."""
    events = [block.removeprefix("data: ") for block in response.text().split("\n\n") if block]
    assert events.pop() == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events]
