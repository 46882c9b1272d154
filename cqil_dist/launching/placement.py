"""Ray's side of a launch: the cluster, the resources, and actors on a placement group."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cqil_dist.errors import InsufficientResources, LaunchError
from cqil_dist.launching.config import LaunchConfig

# An error about missing resources comes within 30 s of the launch; starting Ray has its share.
_PLACEMENT_TIMEOUT_S = 20.0
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RankResources:
    """The CPUs and GPUs that one rank asks of its node."""

    cpus: int
    gpus: float

    def bundle(self) -> dict[str, float]:
        """Return them as a bundle of a Ray placement group."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def rank_resources(config: LaunchConfig, actors: int) -> RankResources:
    """Choose what one of `actors` ranks and spares asks for, on the cluster Ray is connected to."""
    enough_gpus = ray.cluster_resources().get("GPU", 0) >= actors * config.gpus_per_rank
    if config.device == "cuda" or (config.device == "auto" and enough_gpus):
        return RankResources(cpus=1, gpus=config.gpus_per_rank)
    return RankResources(cpus=config.threads_per_rank, gpus=0)


@contextmanager
def connected(address: str | None, local_cpus: int, verbose: bool) -> Iterator[bool]:
    """Connect to a Ray cluster, or start a local one; undo what was done at the end.

    Args:
        address: the cluster head's; None takes RAY_ADDRESS, else starts a local cluster.
        local_cpus: CPUs that a local cluster claims to have, at least.

    Yields:
        Whether the cluster is a local one of our own.

    Raises:
        LaunchError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    if address.startswith("ray://"):
        raise LaunchError(
            f"address {address} is a Ray client's, but launching talks to the ranks directly: run "
            "on a node of the cluster and give the head's host:port, or 'auto'"
        )
    if not local:
        _check_reachable(address)
    logging_options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    try:
        if local:
            ray.init(
                "local",
                num_cpus=max(os.cpu_count() or 1, local_cpus),
                include_dashboard=False,
                # Ray starts workers at niceness 15, below whatever else the machine does; a rank
                # that has to wait for its core keeps all the others waiting.
                # One that is stuck does not end when asked to, and is killed after this long.
                _system_config={"worker_niceness": 0, "kill_worker_timeout_milliseconds": 500},
                **logging_options,
            )
        else:
            ray.init(address, **logging_options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        what = "start a local Ray cluster" if local else f"reach the Ray cluster at {address}"
        raise LaunchError(
            f"cannot {what}: {error}. For a cluster with token authentication, set "
            "RAY_AUTH_MODE=token and have its token in ~/.ray/auth_token before starting"
        ) from error
    try:
        yield local
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise LaunchError at once if nobody listens; Ray would try for more than a minute."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto", which Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise LaunchError(
            f"nobody answers at the Ray cluster's address {address}: {error}; is the head running "
            "(ray status), and is this its host:port?"
        ) from error


def room_for(bundle: Mapping[str, float]) -> dict[str, int]:
    """Count the actors with this bundle that each live node holds if it does nothing else.

    Returns:
        The counts, by Ray's id of the node.
    """
    return {
        node["NodeID"]: int(
            min(node["Resources"].get(name, 0) / amount for name, amount in bundle.items())
        )
        for node in ray.nodes()
        if node["Alive"]
    }


def fits(actors: int, strategy: str, room: Collection[int]) -> bool:
    """Return whether nodes with this room can ever hold the actors, placed by this strategy."""
    if strategy == "STRICT_SPREAD":
        return sum(count > 0 for count in room) >= actors
    if strategy == "STRICT_PACK":
        return max(room, default=0) >= actors
    return sum(room) >= actors


@contextmanager
def placed(
    resources: RankResources, ranks: int, spares: int, strategy: str
) -> Iterator[PlacementGroup]:
    """Reserve room for ranks and spares, and give it back at the end.

    Raises:
        InsufficientResources: saying what was asked and what the cluster has.
    """
    bundle = resources.bundle()
    actors = ranks + spares
    shortage = partial(_shortage, bundle, ranks, spares, strategy)
    if not fits(actors, strategy, room_for(bundle).values()):
        raise InsufficientResources(shortage())
    group = placement_group([bundle] * actors, strategy=strategy)
    try:
        if not group.wait(_PLACEMENT_TIMEOUT_S):
            raise InsufficientResources(shortage())
        yield group
    finally:
        remove_placement_group(group)


def _shortage(bundle: dict[str, float], ranks: int, spares: int, strategy: str) -> str:
    each = _amounts(bundle)
    actors = f"{ranks} ranks and {spares} spares" if spares else f"{ranks} ranks"
    nodes = "; ".join(
        f"{node['NodeManagerAddress']} has {_amounts(node['Resources'])}"
        for node in ray.nodes()
        if node["Alive"]
    )
    return (
        f"asked for {actors} of {each} each, strategy {strategy}, but the cluster has "
        f"{_amounts(ray.cluster_resources())} ({_amounts(ray.available_resources())} free; "
        f"{nodes}). {_ways_out(bundle)}"
    )


def _ways_out(bundle: dict[str, float]) -> str:
    if "GPU" in bundle:
        return "Ask for fewer ranks, let them share GPUs (gpus_per_rank=0.5), or use device='cpu'"
    return "Ask for fewer ranks or threads, another strategy, or add nodes"


def _amounts(resources: dict[str, float]) -> str:
    named = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if name in resources]
    return ", ".join(named) or "no CPU or GPU"
