"""Checks that the distributed runtime is exact: equal to the reference, and that to transformers.

Greedy tokens are compared by teacher forcing: the reference computes each whole sequence once,
and every generated token must be its most likely next token. That is the same as generating with
the reference token by token, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cqil_dist.errors import LaunchError
from cqil_dist.model.adapter import Adapter
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.outputs import Completion
from cqil_dist.plan import Plan
from cqil_dist.store.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from cqil_dist.launching.running_engine import RunningEngine

# With this many prompt tokens a step, the longest of the prompts is computed in chunks.
PREFILL_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "A city by the sea has a harbour, a market and a tall white lighthouse. " * 6 + "Every morning",
)
MAX_TOKENS = 24
# Sums in another order differ in the last bits; the model amplifies that to about 1e-4 in float32.
LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """A comparison and its outcome."""

    name: str
    passed: bool
    detail: str


def verify_exactness(
    engine: RunningEngine, path: Path, adapter: Path | None = None
) -> Iterator[Check]:
    """Compare a running float32 engine with the reference, and the reference with transformers.

    Args:
        path: the directory of the engine's model.
        adapter: the directory of the engine's adapter, if it has one.

    Raises:
        LaunchError: the engine's `max_len` is too small for the test's tokens.
    """
    yield verify_reference(path)
    yield from verify_ranks(engine, path, adapter)


def verify_reference(path: Path) -> Check:
    """Compare the reference's logits under the sequential plan with transformers'."""
    from transformers import AutoModelForCausalLM

    config = ModelConfig.from_directory(path)
    original = ReferenceModel(config, Checkpoint(path), Plan.sequential(config.num_layers))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    difference = 0.0
    same_choice = True
    for token_ids in _prompts(path, config.max_positions):
        with torch.inference_mode():
            expected = model(torch.tensor([token_ids])).logits[0]
        logits = original.logits(token_ids)
        difference = max(difference, float((logits - expected).abs().max()))
        same_choice &= bool((logits.argmax(-1) == expected.argmax(-1)).all())
    return Check(
        "reference, sequential plan == transformers",
        same_choice and difference <= LOGIT_TOLERANCE,
        f"logits differ by {difference:.1e} at most (allowed {LOGIT_TOLERANCE:g}), "
        f"{'same' if same_choice else 'OTHER'} greedy choices",
    )


def verify_ranks(engine: RunningEngine, path: Path, adapter: Path | None = None) -> Iterator[Check]:
    """Compare a running float32 engine with the reference under its plan, and with its adapter."""
    checkpoint = Checkpoint(path, None if adapter is None else Adapter(adapter))
    reference = ReferenceModel(ModelConfig.from_directory(path), checkpoint, engine.plan)
    prompts = _prompts(path, engine.status().max_len)
    alone = [_complete(engine, prompt_ids) for prompt_ids in prompts]
    yield _against_reference("one request at a time", engine, reference, alone)
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(partial(_complete, engine), prompts))
    yield _against_reference("requests sharing steps", engine, reference, together)


def _prompts(path: Path, max_len: int) -> list[list[int]]:
    if (room := max_len - MAX_TOKENS) < 1:
        raise LaunchError(f"max_len is {max_len} but verifying takes more than {MAX_TOKENS} tokens")
    tokenizer = load_tokenizer(path)
    return [tokenizer(prompt)["input_ids"][:room] for prompt in PROMPTS]


def _complete(engine: RunningEngine, prompt_ids: list[int]) -> tuple[list[int], Completion]:
    completion = engine.complete(
        prompt_ids, max_tokens=MAX_TOKENS, temperature=0, logprobs=0, ignore_eos=True
    )
    return prompt_ids, completion


def _against_reference(
    name: str,
    engine: RunningEngine,
    reference: ReferenceModel,
    answers: Sequence[tuple[list[int], Completion]],
) -> Check:
    wrong: list[str] = []
    difference = 0.0
    for prompt_ids, completion in answers:
        sequence = [*prompt_ids, *completion.token_ids]
        logprobs = reference.logits(sequence)[len(prompt_ids) - 1 : -1].log_softmax(-1)
        for index, token_id in enumerate(completion.token_ids):
            if (expected := int(logprobs[index].argmax())) != token_id:
                wrong.append(f"token {index} is {token_id}, expected {expected}")
        assert completion.logprobs is not None, "the request asks for them"
        given = torch.tensor([entry.logprob for entry in completion.logprobs])
        chosen = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        difference = max(difference, float((given - chosen).abs().max()))
    tokens = sum(len(completion.token_ids) for _, completion in answers)
    detail = f"{tokens} greedy tokens, log probabilities differ by {difference:.1e} at most"
    return Check(
        f"{engine.assignment.world} ranks == reference, {name}",
        not wrong and difference <= LOGIT_TOLERANCE,
        "; ".join([detail, *wrong[:3]]),
    )
