"""From a model's name to a running engine, and back to nothing.

The driver's side: resolves the model, validates the plan, places the actors, brings up the mesh,
and takes everything down again, also when something fails half way.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cqil_dist.assignment import assign
from cqil_dist.client import GenerationClient
from cqil_dist.errors import LaunchError
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.store import resolve
from cqil_dist.outputs import Chunk, Completion
from cqil_dist.plan import Plan, PlanSource
from cqil_dist.progress import Progress, SilentProgress
from cqil_dist.rpc.convert import Prompt
from cqil_dist.rpc.v1 import generation_pb2 as pb
from cqil_dist.runtime.coordinator import Coordinator, CoordinatorSpec
from cqil_dist.runtime.layer_actor import LayerActor, MeshSpec, RankSpec
from cqil_dist.runtime.placement import RankResources, connected, placed
from cqil_dist.runtime.rank import CacheShape
from cqil_dist.sampling_params import SamplingParams

_START_TIMEOUT_S = 120.0
_JOIN_DEADLINE_S = 30.0
_CLOSE_TIMEOUT_S = 5.0
# Streams beyond the KV slots wait in the engine's queue; this many may wait.
_QUEUED_STREAMS = 256


@dataclass(frozen=True)
class LaunchConfig:
    """How to run a model.

    Attributes:
        model: built-in name, directory, GGUF file or hub id.
        plan: anything `Plan.parse` reads.
        ranks: how many layer actors; None for as many as the plan's largest group has layers.
        address: of a Ray cluster; None takes RAY_ADDRESS, else starts a local one.
        strategy: placement of the ranks: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        device: "cpu", "cuda", or "auto": CUDA where the cluster has a GPU.
        gpus_per_rank: below 1 lets ranks share a GPU.
        threads_per_rank: compute threads of a rank on a CPU.
        dtype: "float32", "float16", "bfloat16", or "auto": float32 on a CPU, on a GPU the
            checkpoint's own 16-bit dtype or bfloat16.
        slots: requests that run at the same time.
        max_len: most tokens of a prompt and its completion; None for the model's own limit, at
            most 4096.
        prefill_tokens: most prompt tokens a step computes, so that a long prompt does not stall
            the others; None for 64 on a CPU and 512 on a GPU.
        pin: bind each rank to cores of its own; None does so on a local cluster with enough of
            them.
        step_deadline_s: seconds a step may take before a rank counts as lost.
        verbose: show Ray's own logs.
    """

    model: str
    plan: PlanSource = "sequential"
    ranks: int | None = None
    address: str | None = None
    strategy: str = "PACK"
    device: str = "auto"
    gpus_per_rank: float = 1.0
    threads_per_rank: int = 1
    dtype: str = "auto"
    slots: int = 8
    max_len: int | None = None
    prefill_tokens: int | None = None
    pin: bool | None = None
    step_deadline_s: float = 60.0
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("threads_per_rank", "slots", "ranks", "max_len", "prefill_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise LaunchError(f"{name} is {value!r} but must be a whole number, at least 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise LaunchError(f"device {self.device!r} is not 'auto', 'cpu' or 'cuda'")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise LaunchError(
                f"dtype {self.dtype!r} is not 'auto', 'float32', 'float16' or 'bfloat16'"
            )


def launch(
    model: str,
    plan: PlanSource = "sequential",
    ranks: int | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> RunningEngine:
    """Run a model under a plan on Ray actors.

    Args:
        model, plan, ranks, **options: the fields of `LaunchConfig`.
        progress: where long steps report; silent by default.

    Returns:
        The running engine: use it in a `with` block, or close it.

    Raises:
        PlanError, ModelError: the plan or the model cannot be used; nothing was started.
        InsufficientResources: the cluster lacks what was asked for.
        LaunchError: the cluster or an actor failed.
    """
    config = LaunchConfig(model, plan, ranks, **options)
    return RunningEngine(config, progress or SilentProgress())


class RunningEngine:
    """A launched model; made by `launch`."""

    def __init__(self, config: LaunchConfig, progress: Progress) -> None:
        path = resolve(config.model, progress)
        self.config = config
        self.model_config = ModelConfig.from_directory(path)
        self.plan = Plan.parse(config.plan, self.model_config.num_layers)
        world = config.ranks or max(group.size for group in self.plan.groups)
        self.assignment = assign(self.plan, world, self.model_config.vocab_size)
        with ExitStack() as stack, _ray_errors():
            self._bring_up(path, stack, progress)
            self._stack = stack.pop_all()

    def generate(self, prompt: Prompt, **sampling: Any) -> Iterator[Chunk]:
        """Stream a completion.

        Args:
            prompt: text, token ids, or chat messages with "role" and "content".
            **sampling: the fields of `SamplingParams`.

        Raises:
            RequestError: the prompt or a sampling value is wrong.
            CqilError: the engine failed.
        """
        return self.client.stream(prompt, SamplingParams.from_dict(sampling))

    def complete(self, prompt: Prompt, **sampling: Any) -> Completion:
        """The whole completion at once; arguments and errors as for `generate`."""
        return self.client.complete(prompt, SamplingParams.from_dict(sampling))

    def status(self) -> pb.GetStatusResponse:
        """Plan, ranks, and how busy the engine is."""
        return self.client.status()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as the coordinator encodes it."""
        with _ray_errors():
            token_ids: list[int] = ray.get(self._coordinator.encode.remote(text))
        return token_ids

    def exchanges_per_token(self) -> float:
        """Exchanges a step took, counted by the exchanges themselves; 0 before the first step."""
        led: int = sum(stats["rounds_led"] for stats in self.exchange_stats())
        return led / max(1, self.status().steps)

    def exchange_stats(self) -> list[dict[str, Any]]:
        """Counters and latest waits of each rank's exchange (`ExchangeStats.snapshot`)."""
        with _ray_errors():
            stats: list[dict[str, Any]] = ray.get(
                [rank.exchange_stats.remote() for rank in self._ranks], timeout=_START_TIMEOUT_S
            )
        return stats

    def close(self) -> None:
        """Stop every actor, and the local cluster if it is ours. Idempotent."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _bring_up(self, path: Path, stack: ExitStack, progress: Progress) -> None:
        config, world = self.config, self.assignment.world
        with progress.task("Starting Ray"):
            local = stack.enter_context(
                connected(config.address, world * config.threads_per_rank, config.verbose)
            )
            resources = _resources(config, world)
            group = stack.enter_context(placed(resources, world, config.strategy))
        on_gpu = resources.gpus > 0
        with progress.task("Starting actors"):
            self._ranks = self._start_ranks(group, resources, stack)
            self._coordinator = _start(Coordinator, stack, placement_group=group, num_cpus=0)
            places = ray.get([r.place.remote() for r in self._ranks], timeout=_START_TIMEOUT_S)
        slots = config.slots
        max_len = config.max_len or min(self.model_config.max_positions, 4096)
        if max_len > self.model_config.max_positions:
            raise LaunchError(
                f"max_len is {max_len} but the model's positions end at "
                f"{self.model_config.max_positions}"
            )
        prefill_tokens = config.prefill_tokens or (512 if on_gpu else 64)
        dtype = _dtype(config.dtype, on_gpu, self.model_config)
        rank_spec = RankSpec(
            assignment=self.assignment,
            config=self.model_config,
            model_path=path,
            cache_shape=CacheShape(slots, max_len),
            dtype=dtype,
            step_tokens=slots + prefill_tokens,
            threads=config.threads_per_rank,
            step_deadline_s=config.step_deadline_s,
        )
        coordinator_spec = CoordinatorSpec(
            model=config.model,
            assignment=self.assignment,
            config=self.model_config,
            model_path=path,
            dtype=dtype,
            slots=slots,
            max_len=max_len,
            prefill_tokens=prefill_tokens,
            streams=slots + _QUEUED_STREAMS,
            step_deadline_s=config.step_deadline_s,
        )
        loading = [rank.load.remote(rank_spec) for rank in self._ranks]
        loading.append(self._coordinator.load.remote(coordinator_spec))
        self._await_loading(loading, progress)
        with progress.task("Connecting ranks"):
            address, secret = self._connect(places, local, on_gpu)
        stack.callback(_close_quietly, [*self._ranks, self._coordinator])
        self.client = stack.enter_context(GenerationClient(address, secret))

    def _start_ranks(
        self, group: PlacementGroup, resources: RankResources, stack: ExitStack
    ) -> list[Any]:
        device = "cuda" if resources.gpus else "cpu"
        return [
            _start(
                LayerActor,
                stack,
                rank,
                device,
                placement_group=group,
                bundle=rank,
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
            )
            for rank in range(self.assignment.world)
        ]

    def _await_loading(self, loading: list[Any], progress: Progress) -> None:
        total = self.assignment.world * self.plan.depth
        with progress.task("Loading weights", total=total, unit="stages") as task:
            while loading:
                done, loading = ray.wait(loading, timeout=0.2)
                ray.get(done)
                counts = ray.get([rank.stages_loaded.remote() for rank in self._ranks])
                task.update(sum(counts))

    def _connect(
        self, places: Sequence[dict[str, Any]], local: bool, on_gpu: bool
    ) -> tuple[str, bytes]:
        secret, epoch = secrets.token_bytes(32), 0
        nodes = [node for node in ray.nodes() if node["Alive"]]
        host_of = {
            # A single node stays on loopback; several use the addresses by which they know each
            # other, not whatever a node's name or default route would give.
            node["NodeID"]: "127.0.0.1" if len(nodes) == 1 else node["NodeManagerAddress"]
            for node in nodes
        }
        hosts = [host_of[place["node_id"]] for place in places]
        listening = [
            rank.listen.remote(host, secret, epoch)
            for rank, host in zip(self._ranks, hosts, strict=True)
        ]
        addresses = dict(enumerate(ray.get(listening, timeout=_START_TIMEOUT_S)))
        described = ray.get([rank.describe.remote() for rank in self._ranks])
        descriptions = [
            {**description, "address": host}
            for description, host in zip(described, hosts, strict=True)
        ]
        cores, enough = _cores(places, self.config.threads_per_rank)
        pin = (local and not on_gpu) if self.config.pin is None else self.config.pin
        # A rank with cores to itself may poll for as long as a peer's run of layers takes.
        spin_s = (0.02 if pin else 0.0005) if enough else 0.0
        own_gpus = len({(p["node_id"], p["gpu"]) for p in places if p["gpu"]}) == len(places)
        nccl_address = None
        if on_gpu and own_gpus and len(places) > 1:
            nccl_address = ray.get(self._ranks[0].free_address.remote(hosts[0]))
        joining = [
            rank.join.remote(
                MeshSpec(
                    addresses=addresses,
                    secret=secret,
                    epoch=epoch,
                    nccl_address=nccl_address,
                    cores=cores[index] if pin and enough else (),
                    spin_s=spin_s,
                    deadline_s=_JOIN_DEADLINE_S,
                )
            )
            for index, rank in enumerate(self._ranks)
        ]
        host = host_of[ray.get(self._coordinator.node_id.remote())]
        started = self._coordinator.start.remote(
            host, addresses, secret, epoch, _JOIN_DEADLINE_S, descriptions
        )
        ray.get(joining, timeout=_START_TIMEOUT_S)
        return ray.get(started, timeout=_START_TIMEOUT_S), secret


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


def _close_quietly(actors: Sequence[Any]) -> None:
    """Let actors close their sockets before they are killed; those already dead are done."""
    closing = [actor.close.remote() for actor in actors]
    ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)


def _resources(config: LaunchConfig, world: int) -> RankResources:
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    if config.device == "cuda" or (config.device == "auto" and has_gpus):
        return RankResources(cpus=1, gpus=config.gpus_per_rank)
    return RankResources(cpus=config.threads_per_rank, gpus=0)


def _dtype(asked: str, on_gpu: bool, config: ModelConfig) -> str:
    if asked != "auto":
        return asked
    if not on_gpu:
        return "float32"
    half = config.checkpoint_dtype in ("float16", "bfloat16")
    return config.checkpoint_dtype if half else "bfloat16"


def _cores(places: Sequence[dict[str, Any]], threads: int) -> tuple[list[tuple[int, ...]], bool]:
    """Cores of each rank, none shared on a node, and whether every node has enough of them."""
    taken: Counter[str] = Counter()
    cores: list[tuple[int, ...]] = []
    for place in places:
        first = taken[place["node_id"]]
        cores.append(tuple(place["cores"][first : first + threads]))
        taken[place["node_id"]] += threads
    return cores, all(len(own) == threads for own in cores)


@contextmanager
def _ray_errors() -> Iterator[None]:
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
