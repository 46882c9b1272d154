"""The page of `cqil serve` in a real browser, served by the real command over the trained model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.browsing import chromium
from helpers.commands import cqil_serve
from helpers.page_tab import ANSWER_MS, Tab, attributes, choices
from helpers.watching import wait_for
from playwright.sync_api import Browser, Locator, Route, ViewportSize

pytestmark = pytest.mark.real_model

CONCURRENT = "smollm2-135m"
ORIGINAL = "smollm2-135m:sequential"
MODELS = {"left": ORIGINAL, "right": CONCURRENT}
GROUPS = {"left": 30, "right": 22}
RANKS = 2
PROMPT = "The capital of France is"
MAX_TOKENS = 48
KIND_OF_WORK = ["attention", "feed forward", "head"]
MARKUP = '<img src=x onerror="window.hurt = true"><b>bold</b> & <script>window.hurt = true</script>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(browser: Browser, smollm2_path: Path) -> Iterator[str]:
    """The URL of a `cqil serve` with both plans, started only if there is a browser."""
    with cqil_serve(
        *(CONCURRENT, "--plan", "P2 S12 E28 D1", "--ranks", str(RANKS), "--compare", "sequential")
    ) as service:
        yield service.http


@pytest.fixture
def tab(browser: Browser, url: str) -> Iterator[Tab]:
    with browser.new_page() as page:
        yield Tab(page, url)
        # The page asks for its status all the time: a test's answer to it may be on its way, and
        # would fail if the page were closed under it.
        page.unroute_all(behavior="wait")


@pytest.fixture(scope="module")
def answered(browser: Browser, url: str) -> Iterator[Tab]:
    """A page on which both sides have answered one prompt; tests leave it as it is."""
    viewport = ViewportSize(width=1280, height=760)
    with browser.new_page(viewport=viewport, device_scale_factor=1) as page:
        tab = Tab(page, url)
        tab.open()
        tab.ask(PROMPT, MAX_TOKENS)
        assert tab.text("#generate") == "Stop"
        tab.wait("done")
        page.wait_for_selector("#service:text('8 of 8 slots free')")
        assert tab.text("#generate") == "Generate"
        yield tab


def status_of(url: str) -> Any:
    return httpx.get(f"{url}/status").json()


def completed(url: str, side: str) -> Any:
    body = {
        "model": MODELS[side],
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]


def choices_of(tab: Tab, side: str) -> list[Any]:
    (response,) = (
        response
        for response in tab.completions
        if (response.request.post_data_json or {})["model"] == MODELS[side]
    )
    return choices(response)


@pytest.mark.parametrize("side", MODELS)
def test_both_sides_show_what_the_api_answers(answered: Tab, url: str, side: str) -> None:
    expected = completed(url, side)
    assert answered.text(f"#{side} .tokens") == expected["text"]
    assert answered.text(f"#{side} .echo") == PROMPT
    assert answered.text(f"#{side} .ending").strip() == expected["finish_reason"]
    shown = attributes(answered.tokens(side), "data-id")
    assert list(map(int, shown)) == expected["token_ids"]


def test_tokens_are_coloured_by_whether_they_agree(answered: Tab) -> None:
    left, right = ([c["token_ids"][0] for c in choices_of(answered, side)] for side in MODELS)
    both = min(len(left), len(right))
    expected = ["agree" if a == b else "differ" for a, b in zip(left, right, strict=False)]
    assert {"agree", "differ"} == set(expected), "this prompt has tokens of both kinds"
    for side, ids in (("left", left), ("right", right)):
        found = attributes(answered.tokens(side), "data-agree")
        assert found == expected + ["none"] * (len(ids) - both)
    assert answered.text("#agreement") == (
        f"{expected.count('agree')} of {both} tokens agree, "
        f"first difference at token {expected.index('differ') + 1}"
    )


def test_what_differs_is_seen_without_colours_too(answered: Tab) -> None:
    def looks(agree: str) -> tuple[str, str]:
        token = answered.page.locator(f"#right .token[data-agree={agree}]").first
        style = token.evaluate_handle("(token) => getComputedStyle(token)")
        return style.evaluate("(style) => style.backgroundColor"), style.evaluate(
            "(style) => style.boxShadow"
        )

    (agree_colour, agree_lines), (differ_colour, differ_lines) = map(looks, ("agree", "differ"))
    assert agree_colour != differ_colour
    assert (agree_lines.count("inset"), differ_lines.count("inset")) == (1, 2), "one is the notch"


@pytest.mark.parametrize("side", MODELS)
def test_steps_are_timed_by_the_ranks_and_not_by_arrival(answered: Tab, side: str) -> None:
    first, *others = choices_of(answered, side)
    assert first["timeline"]["request_tokens"] > 1, "the prompt's step is no decode step"
    durations = sorted(choice["timeline"]["duration_ms"] for choice in others)
    middle = len(durations) // 2
    median = (durations[middle] + durations[~middle]) / 2
    assert float(answered.text(f"#{side} .median")) == pytest.approx(median, abs=0.06)
    latest = others[-1]["timeline"]["duration_ms"]
    assert float(answered.text(f"#{side} .latest")) == pytest.approx(latest, abs=0.06)
    points = answered.page.locator(f"#{side} .spark polyline").get_attribute("points") or ""
    assert len(points.split()) == len(others)
    assert answered.text(f"#{side} .depth") == str(GROUPS[side])


def test_the_end_tells_how_much_faster_a_step_is(answered: Tab) -> None:
    left, right = (float(answered.text(f"#{side} .median")) for side in MODELS)
    match = re.fullmatch(r"concurrent is ([\d.]+)% (\w+) per step", answered.text("#verdict"))
    assert match is not None
    gain = 100 * (1 - right / left)
    told = float(match[1]) * {"faster": 1, "slower": -1}[match[2]]
    assert told == pytest.approx(gain, abs=1)


def percents(rects: Locator, name: str) -> list[float]:
    return [float(value.rstrip("%")) for value in attributes(rects, name)]


@pytest.mark.parametrize("side", MODELS)
def test_the_last_step_is_drawn_to_scale_for_every_rank(answered: Tab, side: str) -> None:
    last = choices_of(answered, side)[-1]["timeline"]
    scale_ms = max(choices_of(answered, each)[-1]["timeline"]["duration_ms"] for each in MODELS)
    rows = answered.page.locator(f"#timeline .row[data-rank][data-side={side}]")
    assert attributes(rows, "data-rank") == [str(rank) for rank in range(RANKS)]
    for rank, row in zip(last["ranks"], rows.all(), strict=True):
        rects = row.locator(".track rect")
        assert attributes(rects, "data-kind") == [s["kind"] for s in rank["spans"]]
        assert attributes(rects, "data-group") == [str(s["group"]) for s in rank["spans"]]
        drawn = zip(*(percents(rects, name) for name in ("x", "width")), strict=True)
        for (x, width), span in zip(drawn, rank["spans"], strict=True):
            length_us = span["end_us"] - span["start_us"]
            assert x == pytest.approx(span["start_us"] / (10 * scale_ms), abs=1e-3)
            assert width == pytest.approx(length_us / (10 * scale_ms), abs=1e-3)
        summary = row.locator(".summary").inner_text()
        computing, waiting = (
            int(us.replace(",", "")) for us in re.findall(r"([\d,]+) µs", summary)
        )
        lengths = {True: 0.0, False: 0.0}
        for span in rank["spans"]:
            lengths[span["kind"] in KIND_OF_WORK] += span["end_us"] - span["start_us"]
        assert (computing, waiting) == pytest.approx((lengths[True], lengths[False]), abs=1)


def test_ranks_are_labelled_with_where_they_run(answered: Tab, url: str) -> None:
    labels = answered.page.locator("#timeline .row[data-side=left] .rank").all_inner_texts()
    for rank, label in zip(status_of(url)["ranks"], labels, strict=True):
        for told in (f"rank {rank['rank']}", rank["address"], rank["device"]):
            assert told in label


def test_plans_are_drawn_with_their_concurrent_layers_and_bypass(answered: Tab) -> None:
    for side, groups in GROUPS.items():
        assert answered.page.locator(f".plan[data-side={side}] .group").count() == groups
    concurrent = answered.page.locator(".plan .group.concurrent")
    assert concurrent.locator(".layer").all_inner_texts() == [str(i) for i in range(12, 28)]
    assert set(concurrent.locator(".bypass").all_inner_texts()) == {"D1"}


def test_pointing_at_a_group_finds_its_spans(answered: Tab) -> None:
    answered.page.hover(".plan[data-side=right] .group[data-group='12']")
    assert answered.text("#tip") == "group 12: layers 12 ∥ 13, bypass 1"
    lit = answered.page.locator("#timeline rect.here")
    assert set(attributes(lit, "data-group")) == {"12"}
    assert set(attributes(lit, "data-side")) == {"right"}
    lit.first.hover()
    assert "layers 12 ∥ 13" in answered.text("#tip")
    assert "µs" in answered.text("#tip")
    answered.page.hover("h1")
    assert not answered.page.locator("#tip").is_visible()


def test_nothing_is_asked_of_anybody_else(answered: Tab) -> None:
    answered.assert_undisturbed()


def test_a_picture_is_kept(answered: Tab, tmp_path: Path) -> None:
    kept = Path(os.environ.get("CQIL_TEST_ARTIFACTS") or tmp_path) / "page.png"
    kept.parent.mkdir(parents=True, exist_ok=True)
    answered.page.screenshot(path=kept, full_page=True)
    assert 20_000 < kept.stat().st_size < 250_000


def test_stop_ends_both_streams_and_frees_their_slots(tab: Tab, url: str) -> None:
    tab.open()
    tab.ask("Once upon a time", 4000)
    for side in MODELS:
        tab.tokens(side).nth(2).wait_for(state="attached", timeout=ANSWER_MS)
    status = status_of(url)
    assert status["free_slots"] == status["slots"] - 2
    tab.page.click("#generate")
    tab.wait("stopped")
    assert tab.text("#generate") == "Generate"
    for side in MODELS:
        assert 3 <= tab.tokens(side).count() < 100
    wait_for(lambda: status_of(url)["free_slots"] == status["slots"], "free slots", 10)
    tab.assert_undisturbed()


def test_markup_in_a_prompt_is_text(tab: Tab) -> None:
    """Pressing Enter asks, as the button does."""
    tab.open()
    tab.page.fill("#max-tokens", "4")
    tab.page.fill("#prompt", MARKUP)
    tab.page.press("#prompt", "Enter")
    tab.wait("done")
    for side in MODELS:
        assert tab.text(f"#{side} .echo") == MARKUP
    assert_no_markup(tab)
    tab.assert_undisturbed()


def test_what_a_model_says_is_text_and_a_broken_stream_tells_why(tab: Tab) -> None:
    """Texts that come late, without a token or with several, stay in order."""
    said: list[dict[str, Any]] = [
        {"text": "", "token_ids": []},  # a part of the prompt
        {"text": MARKUP, "token_ids": [5]},
        {"text": "", "token_ids": [6], "logprobs": {"tokens": ["\ufffd"]}},
        {"text": "é\n", "token_ids": [7, 8], "logprobs": {"tokens": ["\ufffd", "\n"]}},
    ]
    events = [{"choices": [choice]} for choice in said] + [{"error": {"message": "<i>lost</i>"}}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    tab.page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    tab.open()
    tab.ask(PROMPT, 4)
    tab.wait("error")
    for side in MODELS:
        assert tab.text(f"#{side} .tokens") == MARKUP + "é\n"
        assert attributes(tab.tokens(side), "data-id") == ["5", "6", "7", "8"]
        assert tab.text(f"#{side} .notice") == "<i>lost</i>"
    assert tab.text("#agreement") == "4 of 4 tokens agree, no difference"
    assert_no_markup(tab)
    tab.assert_undisturbed()


def assert_no_markup(tab: Tab) -> None:
    assert tab.page.locator("#answers :is(img, b, i, script)").count() == 0
    assert tab.page.evaluate("window.hurt") is None


def test_a_refusal_shows_in_place(tab: Tab) -> None:
    tab.open()
    tab.ask("", 4)
    tab.wait("error")
    for side in MODELS:
        assert "the prompt is empty" in tab.text(f"#{side} .notice")
    tab.ask("The", 1)
    tab.wait("done")
    assert not tab.page.locator("#left .notice").is_visible()


def test_a_key_is_asked_for_where_one_is_needed_and_sent_from_then_on(tab: Tab) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer open sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "give the service's key"}})

    tab.page.route("**/status", guard)
    tab.page.route("**/v1/completions", guard)
    tab.page.goto(tab.url)
    tab.page.fill("#key", "open barley")
    tab.page.press("#key", "Enter")
    tab.page.wait_for_selector('#notice:text("give the service\'s key")')
    assert tab.page.locator("#generate").is_disabled()
    tab.page.fill("#key", "open sesame")
    tab.page.press("#key", "Enter")
    tab.page.wait_for_selector("#generate:enabled")
    assert not tab.page.locator("#key").is_visible()
    tab.ask("The", 1)
    tab.wait("done")


def test_one_plan_alone_says_how_to_get_both(tab: Tab) -> None:
    def without_the_original(route: Route) -> None:
        status = route.fetch().json()
        route.fulfill(json={**status, "models": status["models"][:1]})

    tab.page.route("**/status", without_the_original)
    tab.open()
    assert tab.page.locator(".side").count() == 1
    assert "--compare sequential" in tab.page.inner_text("#hint")
    tab.ask("The", 2)
    tab.page.wait_for_selector(".side[data-state=done]", timeout=ANSWER_MS)
    assert attributes(tab.page.locator(".token"), "data-agree") == ["none", "none"]
    assert not tab.page.locator("#comparison").is_visible()


def test_columns_stack_where_there_is_no_room(tab: Tab) -> None:
    tab.page.set_viewport_size({"width": 400, "height": 800})
    tab.open()
    left, right = (tab.page.locator(f"#{side}").bounding_box() for side in MODELS)
    assert left is not None
    assert right is not None
    assert right["y"] >= left["y"] + left["height"]
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
