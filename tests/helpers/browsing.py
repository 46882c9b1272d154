"""A real browser, if the machine has one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the machine's own Chromium, since Playwright's would have to be downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if (found := next(filter(None, map(shutil.which, names)), None)) is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
