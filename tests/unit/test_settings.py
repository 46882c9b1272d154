"""Settings hold a config to what its fields say of themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from cqil_dist.engine.config import EngineConfig, EngineOptions
from cqil_dist.errors import ConfigError, LaunchError
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.serving.serve_config import ServeConfig
from cqil_dist.settings import check_settings, number, one_of, setting, settings_of, whole


@dataclass(frozen=True)
class Config:
    count: int = setting(1, "Number of things.", whole(1))
    port: int = setting(0, "A port.", whole(0, 65535))
    share: float = setting(0.0, "A share.", number(zero=True))
    rate: float = setting(math.inf, "A rate.", number(infinity=True))
    limit: int | None = setting(None, "A limit.", whole(2))
    kind: str = setting("a", "A kind.", one_of("a", "b"))
    free: str = setting("", "Anything.")

    def __post_init__(self) -> None:
        check_settings(self, ConfigError)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("count", 0, "a whole number, at least 1"),
        ("count", 1.0, "a whole number, at least 1"),
        ("count", True, "a whole number, at least 1"),
        ("count", "1", "a whole number, at least 1"),
        ("count", None, "a whole number, at least 1"),
        ("port", 65536, "a whole number, from 0 to 65535"),
        ("share", -0.1, "a finite number, at least 0"),
        ("share", math.inf, "a finite number, at least 0"),
        ("share", math.nan, "a finite number, at least 0"),
        ("share", "much", "a finite number, at least 0"),
        ("rate", 0, "a number, above 0"),
        ("limit", 1, "a whole number, at least 2"),
        ("kind", "c", "one of a, b"),
        ("kind", ["a"], "one of a, b"),
    ],
)
def test_a_value_that_breaks_its_rule_is_named_with_the_rule(
    name: str, value: Any, rule: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        Config(**{name: value})
    assert str(refused.value) == f"{name} is {value!r} but must be {rule}"


def test_values_at_their_limits_are_taken() -> None:
    config = Config(count=1, port=65535, share=0, rate=math.inf, limit=2, kind="b", free="x")
    assert (config.port, config.share, config.limit) == (65535, 0, 2)
    assert Config(limit=None).limit is None  # the default, whatever the rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots is 0 but must be a whole number, at least 1"),
        ({"max_len": 1}, "max_len is 1 but must be a whole number, at least 2"),
        ({"step_deadline_s": math.inf}, "step_deadline_s is inf but must be a finite number"),
        ({"strategy": "WIDE"}, "strategy is 'WIDE' but must be one of PACK, SPREAD, STRICT_PACK"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        LaunchConfig("a-model", **options)


def test_what_is_left_open_follows_from_model_and_device() -> None:
    on_cpu = LaunchConfig("a-model", slots=3, max_waiting=5).resolved(8192, on_gpu=False)
    assert (on_cpu.max_len, on_cpu.prefill_tokens) == (4096, 64)
    assert (on_cpu.step_tokens, on_cpu.cache_tokens, on_cpu.max_requests) == (67, 3 * 4096, 8)
    on_gpu = EngineOptions().resolved(512, on_gpu=True)
    assert (on_gpu.max_len, on_gpu.prefill_tokens) == (512, 512)
    chosen = EngineOptions(max_len=100, prefill_tokens=7, recovery_timeout_s=4)
    assert chosen.resolved(512, on_gpu=True) == EngineConfig(
        max_len=100, prefill_tokens=7, recovery_timeout_s=4
    )
    with pytest.raises(LaunchError, match="max_len is 513 but the model's positions end at 512"):
        EngineOptions(max_len=513).resolved(512, on_gpu=False)


def test_a_secret_is_not_shown() -> None:
    assert "hush" not in repr(ServeConfig(api_key="hush"))


def test_settings_come_in_the_order_of_the_constructor() -> None:
    assert list(settings_of(LaunchConfig))[:3] == ["model", "plan", "ranks"]
