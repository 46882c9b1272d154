"""From a checked launch config to connected actors, and back to nothing.

Everything that is started registers its end with the caller's exit stack at once, so that a
failure half way, or Ctrl-C, takes down what is there.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cqil_dist.assignment import Assignment
from cqil_dist.client import GenerationClient
from cqil_dist.errors import LaunchError
from cqil_dist.launch_config import LaunchConfig
from cqil_dist.model.config import ModelConfig
from cqil_dist.progress import Progress
from cqil_dist.runtime.layer_actor import LayerActor, MeshSpec
from cqil_dist.runtime.placement import RankResources, connected, placed
from cqil_dist.runtime.spec import EngineSpec
from cqil_dist.serving.coordinator import Coordinator

ANSWER_TIMEOUT_S = 120.0
"""Seconds an actor may take to answer; starting one imports torch."""

_JOIN_DEADLINE_S = 30.0
_CLOSE_TIMEOUT_S = 5.0

# A core that sleeps takes tens of microseconds to wake, and runs its first layer a third slower.
# A rank with cores to itself may poll for as long as a peer's run of layers takes; one that
# shares them, only for as long as an exchange.
_SPIN_PINNED_S = 0.02
_SPIN_S = 0.0005


def bring_up(
    config: LaunchConfig,
    model: ModelConfig,
    assignment: Assignment,
    model_path: Path,
    stack: ExitStack,
    progress: Progress,
) -> tuple[list[Any], GenerationClient]:
    """Start Ray if need be, place and load the actors, and connect them.

    Returns:
        The layer actors' handles by rank, and a connection to the coordinator.

    Raises:
        LaunchError, InsufficientResources: the cluster or an actor failed.
        CheckpointError: a rank cannot read its weights.
    """
    world = assignment.world
    max_len = config.max_len_for(model)
    with progress.task("Starting Ray"):
        local = stack.enter_context(
            connected(config.address, world * config.threads_per_rank, config.verbose)
        )
        resources = _resources(config, world)
        group = stack.enter_context(placed(resources, world, config.strategy))
    on_gpu = resources.gpus > 0
    with progress.task("Starting actors"):
        ranks = [_start_rank(rank, group, resources, stack) for rank in range(world)]
        coordinator = _start(Coordinator, stack, placement_group=group, num_cpus=0)
        places = ray.get([rank.place.remote() for rank in ranks], timeout=ANSWER_TIMEOUT_S)
    spec = EngineSpec(
        model=config.model,
        model_path=model_path,
        config=model,
        assignment=assignment,
        dtype=config.dtype_for(model, on_gpu),
        slots=config.slots,
        max_len=max_len,
        prefill_tokens=config.prefill_tokens_for(on_gpu),
        threads=config.threads_per_rank,
        step_deadline_s=config.step_deadline_s,
    )
    _load(ranks, coordinator, spec, progress)
    with progress.task("Connecting ranks"):
        pin = (local and not on_gpu) if config.pin is None else config.pin
        cores = _cores(places, config.threads_per_rank)
        if config.pin and cores is None:
            raise LaunchError(
                f"pin asks for {config.threads_per_rank} cores a rank, but a node has fewer than "
                "its ranks need; launch fewer ranks or threads, or without pin"
            )
        stack.callback(_close_quietly, [*ranks, coordinator])
        address, secret = _connect(ranks, coordinator, places, cores, pin, on_gpu)
    return ranks, stack.enter_context(GenerationClient(address, secret))


def _start_rank(
    rank: int, group: PlacementGroup, resources: RankResources, stack: ExitStack
) -> Any:
    return _start(
        LayerActor,
        stack,
        rank,
        "cuda:0" if resources.gpus else "cpu",  # Ray shows a rank its own GPUs only
        placement_group=group,
        bundle=rank,
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )


def _start(
    kind: type,
    stack: ExitStack,
    *arguments: Any,
    placement_group: PlacementGroup,
    bundle: int = 0,
    **resources: Any,
) -> Any:
    """Start an actor that is killed when the stack unwinds."""
    actor: Any = (
        ray.remote(kind)
        .options(
            max_concurrency=4,  # a long load or join must not keep questions waiting
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=bundle
            ),
            **resources,
        )
        .remote(*arguments)
    )
    stack.callback(ray.kill, actor)
    return actor


def _load(ranks: Sequence[Any], coordinator: Any, spec: EngineSpec, progress: Progress) -> None:
    total = len(ranks) * spec.assignment.plan.depth
    loading = [actor.load.remote(spec) for actor in (*ranks, coordinator)]
    with progress.task("Loading weights", total=total, unit="stages") as task:
        while loading:
            done, loading = ray.wait(loading, timeout=0.2)
            ray.get(done)
            task.update(sum(ray.get([rank.stages_loaded.remote() for rank in ranks])))


def _connect(
    ranks: Sequence[Any],
    coordinator: Any,
    places: Sequence[dict[str, Any]],
    cores: list[tuple[int, ...]] | None,
    pin: bool,
    on_gpu: bool,
) -> tuple[str, bytes]:
    """Bring up the mesh and the service; returns the service's address and the launch's secret."""
    secret, epoch = secrets.token_bytes(32), 0
    host_of = _hosts()
    hosts = [host_of[place["node_id"]] for place in places]
    listening = [
        rank.listen.remote(host, secret, epoch) for rank, host in zip(ranks, hosts, strict=True)
    ]
    addresses = dict(enumerate(ray.get(listening, timeout=ANSWER_TIMEOUT_S)))
    described = ray.get([rank.describe.remote() for rank in ranks], timeout=ANSWER_TIMEOUT_S)
    descriptions = [
        {**description, "address": host} for description, host in zip(described, hosts, strict=True)
    ]
    spin_s = 0.0
    if cores is not None:
        spin_s = _SPIN_PINNED_S if pin else _SPIN_S
    nccl_address = None
    own_gpus = {(place["node_id"], place["gpu"]) for place in places}
    if on_gpu and 1 < len(places) == len(own_gpus):
        nccl_address = ray.get(ranks[0].free_address.remote(hosts[0]), timeout=ANSWER_TIMEOUT_S)
    joining = [
        rank.join.remote(
            MeshSpec(
                addresses=addresses,
                secret=secret,
                epoch=epoch,
                nccl_address=nccl_address,
                cores=cores[index] if pin and cores is not None else (),
                spin_s=spin_s,
                deadline_s=_JOIN_DEADLINE_S,
            )
        )
        for index, rank in enumerate(ranks)
    ]
    host = host_of[ray.get(coordinator.node_id.remote(), timeout=ANSWER_TIMEOUT_S)]
    started = coordinator.start.remote(
        host, addresses, secret, epoch, _JOIN_DEADLINE_S, descriptions
    )
    ray.get(joining, timeout=ANSWER_TIMEOUT_S)
    return ray.get(started, timeout=ANSWER_TIMEOUT_S), secret


def _hosts() -> dict[str, str]:
    """By node id, the address to reach it by.

    A single node stays on loopback; several use the addresses by which they know each other, not
    whatever a node's name or default route would give.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return {nodes[0]["NodeID"]: "127.0.0.1"}
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}


def _cores(places: Sequence[dict[str, Any]], threads: int) -> list[tuple[int, ...]] | None:
    """Cores of each rank, none shared on a node; None where a node has not enough of them."""
    taken: Counter[str] = Counter()
    cores: list[tuple[int, ...]] = []
    for place in places:
        first = taken[place["node_id"]]
        cores.append(tuple(place["cores"][first : first + threads]))
        taken[place["node_id"]] += threads
    return cores if all(len(own) == threads for own in cores) else None


def _resources(config: LaunchConfig, world: int) -> RankResources:
    enough_gpus = ray.cluster_resources().get("GPU", 0) >= world * config.gpus_per_rank
    if config.device == "cuda" or (config.device == "auto" and enough_gpus):
        return RankResources(cpus=1, gpus=config.gpus_per_rank)
    return RankResources(cpus=config.threads_per_rank, gpus=0)


def _close_quietly(actors: Sequence[Any]) -> None:
    """Let actors close their sockets before they are killed; those already dead are done."""
    closing = [actor.close.remote() for actor in actors]
    ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)


@contextmanager
def ray_errors() -> Iterator[None]:
    """Errors of Ray's as ours; ours, raised inside an actor, as they were."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            raise cause from None
        raise LaunchError(f"an actor failed: {error}") from error
    except RayActorError as error:
        raise LaunchError(f"an actor died: {error}") from error
    except GetTimeoutError as error:
        raise LaunchError(f"an actor did not answer in time: {error}") from error
