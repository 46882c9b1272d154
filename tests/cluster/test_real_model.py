"""smollm2-135m with its trained weights: the reference agrees with transformers, ranks with it."""

from __future__ import annotations

from pathlib import Path

import pytest

import cqil_dist as cqil
from cqil_dist.checks.verify import PREFILL_TOKENS, verify_ranks, verify_reference

pytestmark = pytest.mark.real_model


def test_the_reference_is_transformers(smollm2_path: Path) -> None:
    check = verify_reference(smollm2_path)
    assert check.passed, check


@pytest.mark.parametrize(
    ("plan", "ranks"),
    [
        ("P2 S12 E28 D0", 2),
        ("P2 S12 E28 Dfull", 2),
        ("P3 S10 E28 D0", 3),
        ("P4 S12 E28 D1", 2),
    ],
)
def test_ranks_are_the_reference(cluster: None, smollm2_path: Path, plan: str, ranks: int) -> None:
    with cqil.launch(
        str(smollm2_path), plan, ranks, slots=4, max_len=256, prefill_tokens=PREFILL_TOKENS
    ) as engine:
        checks = list(verify_ranks(engine, smollm2_path))
    assert len(checks) == 2
    assert all(check.passed for check in checks), checks


def test_the_demo_plan_keeps_the_answer(cluster: None, smollm2_path: Path) -> None:
    with cqil.launch("smollm2-135m", "balanced", ranks=2, max_len=128) as engine:
        completion = engine.complete("The capital of France is", max_tokens=8, temperature=0)
    assert "Paris" in completion.text


def test_a_rank_needs_little_more_than_its_weights_and_cache(
    cluster: None, smollm2_path: Path
) -> None:
    """Beside them, 300 MB are enough for Python, torch, Ray's worker, activations and loading."""
    with cqil.launch("smollm2-135m", "P2 S12 E28 D0", ranks=2, slots=1, max_len=512) as engine:
        engine.complete("word " * 400, max_tokens=2)
        for rank in engine.status().ranks:
            status = Path(f"/proc/{rank.pid}/status").read_text(encoding="utf-8")
            peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            peak_bytes = 1024 * int(peak.split()[1])
            assert peak_bytes < rank.weight_bytes + rank.kv_bytes + 300_000_000
