"""Generation through real actors, sockets and gRPC gives what transformers and the reference do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from helpers.adapters import random_adapter
from helpers.tiny_models import TinyModel, TinyModelFactory, random_tokens, tiny_config
from helpers.watching import wait_for
from safetensors.torch import load_file

import cqil_dist as cqil
from cqil_dist.client import Client
from cqil_dist.model.adapter import Adapter
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.reference import ReferenceModel

PROMPT = random_tokens(23, seed=1)
PLAN = "P3 S1 E6 D1"  # the last group is short


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def engine(cluster: None, model: TinyModel) -> Iterator[cqil.RunningEngine]:
    """An engine with fewer ranks than its groups have layers, which computes prompts in chunks."""
    with cqil.launch(
        str(model.path), PLAN, ranks=2, slots=3, max_len=96, prefill_tokens=8
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def greedy(model: TinyModel) -> Callable[[list[int], int], list[int]]:
    """The greedy continuation that the reference computes under PLAN."""
    reference = ReferenceModel(model.config, model.checkpoint, model.plan(PLAN))
    return reference.greedy


def wait_for_free_slots(engine: cqil.RunningEngine, slots: int) -> None:
    wait_for(lambda: engine.status().free_slots == slots, "slots are freed", timeout_s=10)


def test_tokens_are_the_references(
    engine: cqil.RunningEngine, greedy: Callable[[list[int], int], list[int]]
) -> None:
    completion = engine.complete(PROMPT, max_tokens=20, temperature=0)
    assert list(completion.token_ids) == greedy(PROMPT, 20)
    assert completion.usage.prompt_tokens == len(PROMPT)
    assert len(completion.timings.itl_ms) == len(completion.token_ids) - 1


def test_sequential_plan_is_transformers(cluster: None, model: TinyModel) -> None:
    import torch

    with cqil.launch(str(model.path), "sequential", ranks=2, max_len=64) as engine:
        completion = engine.complete(PROMPT, max_tokens=16, temperature=0)
    expected = model.original.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)
    assert list(completion.token_ids) == expected[0, len(PROMPT) :].tolist()


def test_layers_split_over_ranks_give_the_references_tokens_and_so_does_a_second_plan(
    cluster: None, model: TinyModel
) -> None:
    """The second plan computes the first one's split layers as members of groups."""
    with cqil.launch(
        str(model.path),
        "sequential",
        ranks=2,
        ungrouped="shard",
        compare=PLAN,
        served_model_name="m",
        max_len=64,
    ) as engine:
        for name, plan in (("m", "sequential"), ("m:compare", PLAN)):
            reference = ReferenceModel(model.config, model.checkpoint, model.plan(plan))
            completion = engine.complete(PROMPT, model=name, max_tokens=16, temperature=0)
            assert list(completion.token_ids) == reference.greedy(PROMPT, 16)
        assert engine.assignment.rounds == 2 * model.config.num_layers


def test_an_adapter_runs_on_every_rank_and_the_other_plan_without(
    cluster: None, model: TinyModel, tmp_path: Path
) -> None:
    adapter = random_adapter(tmp_path / "adapter", model, plan=PLAN)
    adapted = Checkpoint(model.path, Adapter(adapter))
    expected = ReferenceModel(model.config, adapted, model.plan(PLAN)).greedy(PROMPT, 16)
    original = ReferenceModel(model.config, model.checkpoint, model.plan("sequential"))
    with cqil.launch(
        str(model.path),
        PLAN,
        ranks=2,
        adapter=adapter,
        compare="sequential",
        served_model_name="m",
        max_len=64,
    ) as engine:
        for name, tokens in (("m", expected), ("m:sequential", original.greedy(PROMPT, 16))):
            completion = engine.complete(PROMPT, model=name, max_tokens=16, temperature=0)
            assert list(completion.token_ids) == tokens
        resident = sum(rank.weight_bytes for rank in engine.status().ranks)
    assert resident > 1.5 * layer_bytes(model), "both weights are there"


def layer_bytes(model: TinyModel) -> int:
    """The bytes of all layers' tensors but the norms, whose gains are folded into what follows."""
    weights = load_file(model.path / "model.safetensors")
    return sum(w.nbytes for name, w in weights.items() if ".layers." in name and "norm" not in name)


def test_an_adapter_of_another_model_is_refused(
    model: TinyModel, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    wider = tiny_model(tiny_config(intermediate_size=43))
    adapter = random_adapter(tmp_path, wider, plan=PLAN)
    with pytest.raises(cqil.CheckpointError, match=r"but the model's weight is \[48, 41\]"):
        cqil.launch(str(model.path), PLAN, 2, adapter=adapter)


def test_stream_is_the_completion_in_parts(engine: cqil.RunningEngine) -> None:
    chunks = list(engine.generate("The capital of", max_tokens=12, temperature=0, logprobs=2))
    result = chunks[-1].result
    assert result is not None
    assert all(chunk.result is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(id for chunk in chunks for id in chunk.token_ids) == result.token_ids
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    for entry in result.logprobs:
        first, second = (alternative.logprob for alternative in entry.top)
        assert first is not None
        assert second is not None
        assert entry.logprob == first >= second


def test_requests_share_steps_and_keep_their_answers(
    engine: cqil.RunningEngine, greedy: Callable[[list[int], int], list[int]]
) -> None:
    prompts = [random_tokens(count, seed=count) for count in (3, 40, 11, 1, 27)]
    before = engine.status().steps
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(
            pool.map(lambda p: engine.complete(p, max_tokens=12, temperature=0), prompts)
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == greedy(prompt, 12)
    alone = sum(len(answer.token_ids) for answer in answers)
    assert engine.status().steps - before < alone, "requests took turns instead of sharing steps"
    wait_for_free_slots(engine, 3)


def test_seed_makes_sampling_repeatable(engine: cqil.RunningEngine) -> None:
    settings = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.95, "ignore_eos": True}
    first = engine.complete(PROMPT, seed=7, **settings)
    assert engine.complete(PROMPT, seed=7, **settings).token_ids == first.token_ids
    drawn = engine.complete(PROMPT, **settings)
    assert engine.complete(PROMPT, seed=drawn.seed, **settings).token_ids == drawn.token_ids
    others = {engine.complete(PROMPT, seed=seed, **settings).token_ids for seed in range(4)}
    assert len(others) > 1


def test_cancelling_a_stream_frees_its_slot(engine: cqil.RunningEngine) -> None:
    streams = [engine.generate(PROMPT, max_tokens=60, ignore_eos=True) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    wait_for_free_slots(engine, 3)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "empty"),
        ([1] * 96, {}, "96 tokens"),
        ([1, 307], {}, "307"),
        ("x", {"temperature": -1}, "temperature is -1"),
        ("x", {"top_p": 0}, "top_p is 0"),
        ("x", {"max_tokens": -1}, "max_tokens is -1"),
        ("x", {"colour": 1}, "colour"),
    ],
)
def test_a_bad_request_says_why_and_harms_no_other(
    engine: cqil.RunningEngine,
    greedy: Callable[[list[int], int], list[int]],
    prompt: Any,
    settings: dict[str, Any],
    message: str,
) -> None:
    other = engine.generate(PROMPT, max_tokens=8, temperature=0)
    first = next(iter(other))
    with pytest.raises(cqil.RequestError, match=message):
        engine.complete(prompt, **settings)
    rest = [id for chunk in other for id in chunk.token_ids]
    assert [*first.token_ids, *rest] == greedy(PROMPT, 8)


def test_values_are_also_checked_by_the_coordinator(engine: cqil.RunningEngine) -> None:
    """Clients in other languages may send any values."""
    from cqil_dist.rpc.v1 import generation_pb2 as pb

    connection: Any = engine.client._connections[-1]
    request = pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(top_p=7))
    with pytest.raises(grpc.RpcError) as raised:
        list(connection.call("Generate", request, timeout_s=None))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "top_p is 7" in raised.value.details()


def test_calls_without_the_secret_are_refused(engine: cqil.RunningEngine) -> None:
    with (
        Client(engine.client.address, api_key="00" * 32) as stranger,
        pytest.raises(cqil.Unauthenticated, match="lacks the launch's secret"),
    ):
        stranger.status()


def test_chat_uses_the_models_template(engine: cqil.RunningEngine, model: TinyModel) -> None:
    messages = [{"role": "user", "content": "hello"}]
    expected = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    completion = engine.complete(messages, max_tokens=8, temperature=0)
    assert completion.usage.prompt_tokens == len(expected)
    assert completion.token_ids == engine.complete(expected, max_tokens=8, temperature=0).token_ids


def test_status_and_counters_tell_what_runs(engine: cqil.RunningEngine) -> None:
    engine.complete(PROMPT, max_tokens=4)
    status = engine.status()
    assert [rank.rank for rank in status.ranks] == [0, 1]
    assert len({rank.pid for rank in status.ranks}) == 2
    assert all(rank.weight_bytes > 0 and rank.kv_bytes > 0 for rank in status.ranks)
    assert engine.exchanges_per_token() == engine.assignment.rounds


def test_ranks_hold_the_bytes_they_say(engine: cqil.RunningEngine, model: TinyModel) -> None:
    head_bytes = 4 * model.config.vocab_size * model.config.hidden_size
    expected = layer_bytes(model) + head_bytes
    assert sum(rank.weight_bytes for rank in engine.status().ranks) == expected
