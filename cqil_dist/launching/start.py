"""From a checked launch config to serving actors, and back to nothing.

Everything that is started registers its end with the caller's exit stack at once, so that a
failure half way, or Ctrl-C, takes down what is there.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from cqil_dist.client import AsyncClient, Client
from cqil_dist.coordinator.actor import Coordinator
from cqil_dist.errors import CqilError, LaunchError
from cqil_dist.exchange.handshake import SECRET_BYTES
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.launching.in_thread import in_thread
from cqil_dist.launching.placement import RankResources, connected, placed, rank_resources
from cqil_dist.launching.resolve import ResolvedLaunch
from cqil_dist.progress import Progress
from cqil_dist.rank.actor import QUESTIONS, LayerActor
from cqil_dist.rank.spec import EngineSpec

ANSWER_TIMEOUT_S = 120.0
"""Seconds a running actor may take to answer."""

_CLOSE_TIMEOUT_S = 5.0
_RESTART_S = 60.0  # of a coordinator's process, before it looks for its ranks
_PROGRESS_S = 0.2


@dataclass(frozen=True)
class LaunchedService:
    """A coordinator that serves, and how to reach it.

    Attributes:
        coordinator: its handle.
        address: "host:port" of its generation service when it was launched.
        key: the launch's, which every call carries.
        patience_s: seconds that requests wait for a coordinator that Ray starts again.
        locate: returns the "host:port" where it serves now; waits until it does.
    """

    coordinator: Any
    address: str
    key: str
    patience_s: float
    locate: Callable[[], str]

    def client(self) -> Client:
        """Connect to the service."""
        return Client(
            self.address, api_key=self.key, patience_s=self.patience_s, locate=self.locate
        )

    def async_client(self) -> AsyncClient:
        """Connect to the service from an event loop."""
        finding: asyncio.Future[str] | None = None

        async def locate() -> str:
            # Waiting takes a thread, which outlives whoever gives up waiting: one is enough.
            nonlocal finding
            if finding is None or finding.done():
                finding = in_thread(self.locate)
            return await asyncio.shield(finding)

        return AsyncClient(
            self.address, api_key=self.key, patience_s=self.patience_s, locate=locate
        )


def bring_up(resolved: ResolvedLaunch, stack: ExitStack, progress: Progress) -> LaunchedService:
    """Start Ray if need be, place the actors, and have the coordinator bring them together.

    Raises:
        LaunchError, InsufficientResources: the cluster or an actor failed.
        ModelError: a rank cannot read its weights.
        RankUnavailable: the ranks could not come together.
    """
    config, model = resolved.config, resolved.model
    world = resolved.assignment.world
    with progress.task("Starting Ray"):
        cpus = resolved.actors * config.threads_per_rank
        local = stack.enter_context(connected(config.address, cpus, config.verbose))
        resources = rank_resources(config, resolved.actors)
        group = stack.enter_context(placed(resources, world, config.spares, config.strategy))
    on_gpu = resources.gpus > 0
    spec = EngineSpec(
        model=config.model,
        names=resolved.names,
        model_path=resolved.path,
        config=model,
        assignments=resolved.assignments,
        adapter=resolved.adapter,
        precision=config.precision_for(model, on_gpu),
        engine=resolved.engine(on_gpu),
        threads=config.threads_per_rank,
        on_gpu=on_gpu,
        pin=_pin(config, local, on_gpu),
    )
    secret = secrets.token_bytes(SECRET_BYTES)
    with progress.task("Starting actors"):
        # A coordinator that is started again finds them by name; handles among its arguments would
        # lie in Ray's object store, where a restart may miss them.
        launch = secrets.token_hex(4)
        names = [f"cqil-{launch}-{index}" for index in range(resolved.actors)]
        actors = _start_layer_actors(names, resources, group, stack)
        coordinator = _start_coordinator(spec, secret, names, stack)
        stack.callback(_close_quietly, coordinator, actors)
        ray.get([actor.state.remote() for actor in actors], timeout=ANSWER_TIMEOUT_S)
    stages = world * sum(assignment.plan.depth for assignment in resolved.assignments)
    address = _started(coordinator, actors, stages, progress)

    def locate() -> str:
        return _locate(coordinator, config.recovery_timeout_s + _RESTART_S)

    return LaunchedService(coordinator, address, secret.hex(), config.recovery_timeout_s, locate)


def _start_layer_actors(
    names: Sequence[str], resources: RankResources, group: PlacementGroup, stack: ExitStack
) -> list[Any]:
    """Start a layer actor on each of the group's bundles."""
    return [
        _start(
            LayerActor,
            stack,
            "cuda:0" if resources.gpus > 0 else "cpu",  # Ray shows an actor its own GPUs only
            name=name,
            where=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            concurrency_groups={QUESTIONS: 2},
        )
        for bundle, name in enumerate(names)
    ]


def _start_coordinator(
    spec: EngineSpec, secret: bytes, names: Sequence[str], stack: ExitStack
) -> Any:
    """Start the coordinator beside the driver: when this node is lost, so is the launch."""
    # Soft affinity would pass over a node without CPUs to give, as heads often are.
    here = ray.get_runtime_context().get_node_id()
    where = NodeAffinitySchedulingStrategy(here, soft=False)
    return _start(Coordinator, stack, spec, secret, names, where=where, num_cpus=0)


def _pin(config: LaunchConfig, local: bool, on_gpu: bool) -> str:
    if config.pin is None:
        return "if_possible" if local and not on_gpu else "never"
    return "always" if config.pin else "never"


def _start(
    kind: type,
    stack: ExitStack,
    *arguments: Any,
    where: Any,
    num_cpus: int,
    num_gpus: float = 0,
    name: str | None = None,
    concurrency_groups: dict[str, int] | None = None,
) -> Any:
    """Start an actor that Ray restarts when it dies, until the stack unwinds."""
    remote: Any = ray.remote  # its types know no actor's options
    actor = remote(
        name=name,
        max_restarts=-1,
        max_concurrency=8,
        concurrency_groups=concurrency_groups,
        scheduling_strategy=where,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )(kind).remote(*arguments)
    stack.callback(ray.kill, actor)
    return actor


def _started(coordinator: Any, actors: Sequence[Any], total: int, progress: Progress) -> str:
    """Have the coordinator bring the ranks together; return the service's address."""
    starting = coordinator.start.remote()
    with progress.task("Loading weights", total=total, unit="stages") as task:
        while not ray.wait([starting], timeout=_PROGRESS_S)[0]:
            counts = [actor.stages_loaded.remote() for actor in actors]
            answered, _ = ray.wait(counts, num_returns=len(counts), timeout=_PROGRESS_S)
            if len(answered) == len(counts):  # an actor that fails is the coordinator's affair
                with suppress(RayActorError):
                    task.update(min(total, sum(ray.get(answered))))
        address: str = ray.get(starting)
        task.update(total)
    return address


def _locate(coordinator: Any, timeout_s: float) -> str:
    """Wait until the coordinator serves, and return where.

    Raises:
        LaunchError: Ray does not start it again, or not in time.
    """
    deadline = time.monotonic() + timeout_s
    with ray_errors():
        while True:
            try:
                address: str = ray.get(
                    coordinator.start.remote(), timeout=max(0.0, deadline - time.monotonic())
                )
                return address
            except ActorUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PROGRESS_S)


def _close_quietly(coordinator: Any, actors: Sequence[Any]) -> None:
    """Have actors close their sockets before they are killed; ignore those already dead.

    The coordinator comes first: it would take ranks that leave for lost.
    """
    for closing in ([coordinator], actors):
        calls = [actor.close.remote() for actor in closing]
        ray.wait(calls, num_returns=len(calls), timeout=_CLOSE_TIMEOUT_S)


@contextmanager
def ray_errors() -> Iterator[None]:
    """Raise Ray's errors as ours, and ours, raised inside an actor, as they were."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, CqilError):
            raise error.cause from None
        raise LaunchError(f"an actor failed: {error}") from error
    except RayActorError as error:
        raise LaunchError(f"an actor died: {error}") from error
    except GetTimeoutError as error:
        raise LaunchError(f"an actor did not answer in time: {error}") from error
