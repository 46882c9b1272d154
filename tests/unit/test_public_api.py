"""The package's face: its names, what importing it costs, and which way imports point."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import cqil_dist
from cqil_dist import errors


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in memory after importing these modules in a fresh interpreter."""
    program = (
        f"import json, sys, {', '.join(modules)}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def modules_of(package: str) -> list[str]:
    found = importlib.import_module(package)
    return [
        package,
        *(f"{package}.{module.name}" for module in pkgutil.iter_modules(found.__path__)),
    ]


@pytest.mark.parametrize("name", cqil_dist.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value: Any = getattr(cqil_dist, name)
    assert value.__name__ == name
    assert name in dir(cqil_dist)


def test_names_are_public_once_and_other_names_are_refused() -> None:
    assert len(set(cqil_dist.__all__)) == len(cqil_dist.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cqil_dist.no_such_name  # type: ignore[attr-defined,unused-ignore]


def test_every_error_of_the_package_is_public() -> None:
    assert {error.__name__ for error in own_errors()} <= set(cqil_dist.__all__)


def test_importing_the_package_costs_nothing() -> None:
    assert not loaded_by("cqil_dist") & {"torch", "ray", "transformers", "numpy", "grpc"}


@pytest.mark.parametrize(
    "module",
    [
        "plan",
        "assignment",
        "errors",
        "sampling_params",
        "inputs",
        "outputs",
        "status",
        "timeline",
        "recommended",
        "settings",
        "engine.config",
        "launching.config",
        "serving.serve_config",
        "benchmarks.serve.load",
        "planning.recover.training_config",
        "rank.mesh_spec",
        "coordinator.lifecycle",
        "coordinator.rank_matching",
        "coordinator.failure_reactions",
        "coordinator.core_binding",
        "planning.search.goal",
    ],
)
def test_plain_values_need_neither_torch_nor_a_cluster(module: str) -> None:
    assert not loaded_by(f"cqil_dist.{module}") & {"torch", "ray", "transformers"}


def test_a_client_needs_neither_torch_nor_a_cluster() -> None:
    assert not loaded_by("cqil_dist.client") & {"torch", "ray", "transformers"}


@pytest.mark.parametrize("package", ["cqil_dist.model", "cqil_dist.exchange"])
def test_layers_below_the_actors_know_no_ray(package: str) -> None:
    modules = modules_of(package)
    assert len(modules) > 5
    assert "ray" not in loaded_by(*modules)


def test_the_rank_program_and_the_engine_know_no_ray() -> None:
    rank = ("cqil_dist.rank.program", "cqil_dist.rank.protocol")
    assert "ray" not in loaded_by(*rank, *modules_of("cqil_dist.engine"))


def test_ranks_need_no_transformers() -> None:
    """It takes seconds to import, and a rank gets the config as plain numbers."""
    assert "transformers" not in loaded_by("cqil_dist.rank.program", "cqil_dist.exchange")


def own_errors(error: type[Exception] = errors.CqilError) -> Iterator[type[Exception]]:
    """The package's exceptions, without those that tests derive from them."""
    if error.__module__.startswith("cqil_dist"):
        yield error
    for subclass in error.__subclasses__():
        yield from own_errors(subclass)


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, str | None] = {"CqilError": None}
    ancestors = ["CqilError"]
    for line in errors.__doc__.splitlines():
        if match := re.match(r"(?P<indent>(?:│   |    )*)[├└]── (?P<name>\w+)  ", line):
            depth = len(match["indent"]) // 4 + 1
            ancestors[depth:] = [match["name"]]
            drawn[match["name"]] = ancestors[depth - 1]
    actual = {error.__name__: error.__bases__[0].__name__ for error in own_errors()}
    assert drawn == {**actual, "CqilError": None}


def test_a_lost_peer_is_named_with_its_address() -> None:
    lost = errors.PeerLost(2, "10.0.0.3:4711", "it closed the connection")
    assert str(lost) == "lost rank 2 at 10.0.0.3:4711: it closed the connection"
    assert "the coordinator" in str(errors.PeerLost(-1, "10.0.0.1:1", "no answer"))
