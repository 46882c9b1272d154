"""The shipped cluster files are what Ray's launcher and KubeRay's resources ask for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.hosts import RAY_SETTINGS
from ray.autoscaler._private.util import fillout_defaults, validate_config
from typer.main import get_command

from cqil_dist.cli.app import app

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
LAUNCHER_FILES = ("local.yaml", "aws.yaml", "gcp.yaml")
KUBERAY_FILES = ("raycluster.yaml", "rayjob.yaml")

# What the resources' definitions (ray.io/v1) require of each part.
GROUP = {"groupName", "maxReplicas", "minReplicas", "template"}


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_s_own_schema_takes_the_file(name: str) -> None:
    validate_config(fillout_defaults(load(name)))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_tokens_are_asked_for_and_brought_to_every_node(name: str) -> None:
    config = load(name)
    assert "~/.ray/auth_token" in config["file_mounts"]
    (settings,) = (c for c in config["setup_commands"] if "ray.env" in c)
    assert "export RAY_AUTH_MODE=token" in settings
    for setting, value in RAY_SETTINGS.items():
        assert f"export {setting}={value}\n" in settings


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_what_is_mounted_is_there_and_enough_to_install(name: str) -> None:
    mounts = load(name)["file_mounts"]
    ours = {source for source in mounts.values() if not source.startswith("~")}
    assert all((REPOSITORY / source).exists() for source in ours)
    assert {"cqil_dist", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= ours


def cluster_spec(name: str) -> Any:
    spec = load(f"kuberay/{name}")["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_s_definitions_have_what_they_require(name: str) -> None:
    resource = load(f"kuberay/{name}")
    assert resource["apiVersion"] == "ray.io/v1"
    assert resource["kind"] == {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}[name]
    assert resource["metadata"]["name"]
    spec = cluster_spec(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert groups[1:]
    assert all(group.keys() >= GROUP for group in groups[1:])
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["name"]
        assert container["image"]
        assert container["resources"].keys() == {"requests", "limits"}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_clusters_ask_for_tokens_and_put_a_rank_on_a_node(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}  # from Ray 2.52
    assert tuple(map(int, spec["rayVersion"].split(".")[:2])) >= (2, 52)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        settings = {entry["name"]: entry["value"] for entry in container["env"]}
        assert settings.items() >= RAY_SETTINGS.items()
    for group in spec["workerGroupSpecs"]:
        affinity = group["template"]["spec"]["affinity"]["podAntiAffinity"]
        (rule,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        labels = group["template"]["metadata"]["labels"]
        assert rule["labelSelector"]["matchLabels"].items() <= labels.items()


def test_a_job_runs_a_command_of_ours() -> None:
    job = load("kuberay/rayjob.yaml")["spec"]
    program, *words = shlex.split(job["entrypoint"])
    assert program == "cqil"
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    parsed = command.make_context(program, words)  # refuses options that there are not
    assert parsed.params["address"] == "auto"
    assert job["shutdownAfterJobFinishes"] is True
