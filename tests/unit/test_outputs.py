"""What a request gives back survives JSON, and its latency figures are the usual ones."""

import json

import pytest

from cqil_dist.outputs import Chunk, Completion, Timings, TokenLogprob, Usage
from cqil_dist.timeline import RankTimeline, Span, SpanKind, StepTimeline

COMPLETION = Completion(
    text="Hi",
    token_ids=(5, 6),
    finish_reason="stop",
    usage=Usage(prompt_tokens=3, completion_tokens=2),
    timings=Timings(ttft_ms=12.5, itl_ms=(20.0,)),
    logprobs=(
        TokenLogprob(5, "H", -0.5, top=(TokenLogprob(5, "H", -0.5), TokenLogprob(9, "J", -1.5))),
        TokenLogprob(6, "i", -0.1),
    ),
    seed=7,
    stop_reason="\nUser:",
    prompt_logprobs=(TokenLogprob(3, "O", None), TokenLogprob(4, "h", -2.0)),
    prompt_text="Oh",
)
SPANS = (Span(SpanKind.ATTENTION, 0, 10.0, 30.5), Span(SpanKind.OUTPUT_EXCHANGE, 0, 30.5, 90.0))
TIMELINE = StepTimeline(4, 3, 1, 12.0, 0.5, (RankTimeline(1, SPANS),))


def test_a_last_chunk_survives_json_unchanged() -> None:
    chunk = Chunk("i", (6,), COMPLETION.logprobs, "stop", "\nUser:", COMPLETION, TIMELINE)
    wire = chunk.to_dict()
    assert json.loads(json.dumps(wire)) == wire
    assert wire["result"]["usage"]["total_tokens"] == 5
    assert wire["result"]["logprobs"][0]["top"][1] == {
        "token_id": 9,
        "token": "J",
        "logprob": -1.5,
        "top": [],
    }
    assert (wire["finish_reason"], wire["stop_reason"]) == ("stop", "\nUser:")
    assert [entry["logprob"] for entry in wire["result"]["prompt_logprobs"]] == [None, -2.0]
    assert wire["result"]["prompt_text"] == "Oh"
    (rank,) = wire["timeline"]["ranks"]
    assert [span["kind"] for span in rank["spans"]] == ["attention", "output exchange"]


def test_a_middle_chunk_has_no_result_and_no_logprobs() -> None:
    wire = Chunk("H", (5,)).to_dict()
    assert wire["finish_reason"] is wire["result"] is wire["logprobs"] is None
    assert wire["timeline"] is None


def test_percentiles_and_rate() -> None:
    timings = Timings(ttft_ms=100.0, itl_ms=(40.0, 10.0, 30.0, 20.0, 50.0))
    assert timings.itl_p50_ms == 30.0
    assert timings.itl_p90_ms == pytest.approx(46.0)
    assert timings.itl_percentile(100) == 50.0
    # The first token's wait is prefill, not decode.
    assert timings.decode_tokens_per_second == pytest.approx(1000 / 30)
    assert timings.total_ms == 250.0


def test_a_single_token_has_no_latency_between_tokens() -> None:
    wire = Timings(ttft_ms=100.0).to_dict()
    assert wire["itl_p50_ms"] is wire["decode_tokens_per_second"] is None
    assert wire["total_ms"] == 100.0
