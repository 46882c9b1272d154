"""The same program on CUDA: one rank, two ranks that share a GPU, and NCCL.

In 16-bit arithmetic near ties may fall either way, so logits are compared with the float32
reference within what rounding explains; in float32 tokens must be equal.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import TinyModel, TinyModelFactory, random_tokens

import cqil_dist as cqil
from cqil_dist.assignment import assign
from cqil_dist.exchange import TorchDistributedExchange
from cqil_dist.launching.placement import connected
from cqil_dist.model.head import Embedding
from cqil_dist.model.precision import Precision
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.model.step import Segment
from cqil_dist.rank.program import CacheShape, RankProgram

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PLAN = "P2 S0 E6 D1"
PROMPT = random_tokens(21, seed=5)
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@pytest.fixture(scope="module")
def model(tiny_model: TinyModelFactory) -> TinyModel:
    return tiny_model()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_rank_with_an_nccl_world_of_one(model: TinyModel, dtype: str) -> None:
    plan = model.plan(PLAN)
    device = torch.device("cuda:0")
    torch_dtype = getattr(torch, dtype)
    program = RankProgram(
        0,
        [assign(plan, 1, model.config.shape)],
        model.config,
        [model.checkpoint],
        CacheShape(2, 64),
        Precision.of(dtype),
        device,
    )
    width = model.config.hidden_size
    exchange = TorchDistributedExchange(
        0, 1, "nccl", "127.0.0.1:29511", width, torch_dtype, device, 30.0
    )
    try:
        embedding = Embedding(model.config, model.checkpoint, torch_dtype)
        rows = [program.step([Segment(1, 0, 15, 1)], embedding(PROMPT[:15]), exchange)]
        for position in range(15, len(PROMPT)):
            segment = Segment(1, position, 1, 1)
            rows.append(
                program.step([segment], embedding(PROMPT[position : position + 1]), exchange)
            )
    finally:
        exchange.close()
    expected = model.reference_logits(plan, PROMPT)[14:]
    difference = (torch.cat(rows).cpu() - expected).abs().max() / expected.abs().max()
    assert float(difference) < TOLERANCE[dtype]


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.0), (2, 0.5)])
def test_launch_on_a_gpu(model: TinyModel, ranks: int, share: float) -> None:
    reference = ReferenceModel(model.config, model.checkpoint, model.plan(PLAN))
    options: dict[str, Any] = {"device": "cuda", "gpus_per_rank": share, "dtype": "float32"}
    with (
        connected(None, local_cpus=4, verbose=False),
        cqil.launch(str(model.path), PLAN, ranks, max_len=64, **options) as engine,
    ):
        completion = engine.complete(PROMPT, max_tokens=12, temperature=0)
        assert all(rank.device.startswith("cuda") for rank in engine.status().ranks)
    assert list(completion.token_ids) == reference.greedy(PROMPT, 12)
