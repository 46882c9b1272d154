"""Checks whether a launch would work on a cluster: every node, every link, and what to fix.

The checks run in one small actor a node, which takes no CPUs and is ended afterwards.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cqil_dist.checks.node_probe import LinkSpeed, NodeFacts, NodeProbe
from cqil_dist.coordinator.node_addresses import host_addresses
from cqil_dist.errors import CqilError
from cqil_dist.exchange.handshake import SECRET_BYTES
from cqil_dist.launching.placement import RankResources, fits, rank_resources, room_for
from cqil_dist.launching.resolve import ResolvedLaunch
from cqil_dist.model.footprint import footprint
from cqil_dist.progress import Progress
from cqil_dist.store.builtin import BUILTIN_MODELS

Verdict = Literal["ok", "warning", "failure"]

# The memory of a rank beside its weights and cache: Python, torch, Ray's worker, activations.
_PROCESS_BYTES = 300_000_000
_ANSWER_S = 90.0
# Above this a link gets a warning: the exchanges of a group cost one or two round trips.
_SLOW_ROUND_TRIP_US = 1000.0


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        where: a node's address, "a -> b" for a link, or "cluster".
        check: what was checked, such as "memory".
        detail: what was found and, unless the verdict is "ok", how to fix it.
    """

    where: str
    check: str
    verdict: Verdict
    detail: str


def diagnose(wanted: ResolvedLaunch | None, progress: Progress) -> Iterator[Finding]:
    """Check the cluster that Ray is connected to, finding by finding.

    Args:
        wanted: the launch to check for; None checks the cluster alone.
    """
    nodes = host_addresses()
    on_gpu = False
    room: dict[str, int] = {}
    if wanted is not None:
        resources = rank_resources(wanted.config, wanted.actors)
        on_gpu = resources.gpus > 0
        by_id = room_for(resources.bundle())
        yield _resources(wanted, resources, by_id.values())
        if wanted.compared_note:
            yield Finding("cluster", "compare", "ok", wanted.compared_note)
        room = {host: by_id.get(node_id, 0) for node_id, host in nodes.items()}
    with progress.task("Starting probes", total=len(nodes), unit="nodes") as task:
        probes: dict[str, Any] = {}
        facts: dict[str, NodeFacts] = {}
        secret = secrets.token_bytes(SECRET_BYTES)
        try:
            for node_id, host in nodes.items():
                where = NodeAffinitySchedulingStrategy(node_id, soft=False)
                probes[host] = (
                    ray.remote(NodeProbe)
                    .options(num_cpus=0, max_concurrency=4, scheduling_strategy=where)
                    .remote(host, secret)
                )
            path = None if wanted is None else wanted.path
            asked = {host: probe.facts.remote(path) for host, probe in probes.items()}
            for host, answer in asked.items():
                try:
                    facts[host] = ray.get(answer, timeout=_ANSWER_S)
                except RayError as error:
                    reason = str(error).strip().splitlines()[-1]
                    yield Finding(
                        host,
                        "package",
                        "failure",
                        f"cannot run there: {reason}; install this package on the node, in the "
                        "same environment as on the others",
                    )
                task.advance()
            own = _own_host(nodes)
            for host, found in facts.items():
                here, for_ranks = facts.get(own, found), room.get(host, 0)
                yield from _node_findings(host, found, here, on_gpu and for_ranks > 0)
                if wanted is not None and (for_ranks or host == own):
                    yield _model(host, found, wanted)
                if wanted is not None and for_ranks:
                    yield _memory(host, found, wanted, on_gpu, for_ranks)
            yield from _link_findings({host: probes[host] for host in facts}, progress)
        finally:
            for probe in probes.values():
                ray.kill(probe)


def _own_host(nodes: Mapping[str, str]) -> str:
    return nodes[ray.get_runtime_context().get_node_id()]


def _resources(wanted: ResolvedLaunch, resources: RankResources, room: Collection[int]) -> Finding:
    strategy, actors = wanted.config.strategy, wanted.actors
    each = ", ".join(f"{amount:g} {name}" for name, amount in resources.bundle().items())
    detail = f"{actors} actors of {each} ({strategy}); the nodes have room for {sorted(room)}"
    if fits(actors, strategy, room):
        return Finding("cluster", "resources", "ok", detail)
    detail += "; add nodes, ask for fewer ranks, or choose another strategy"
    return Finding("cluster", "resources", "failure", detail)


def _node_findings(host: str, facts: NodeFacts, here: NodeFacts, on_gpu: bool) -> Iterator[Finding]:
    other = {
        name: f"{name} {found} (here {here.versions[name]})"
        for name, found in facts.versions.items()
        if found != here.versions[name]
    }
    yield Finding(
        host,
        "versions",
        "failure" if other else "ok",
        f"{', '.join(other.values())}; install the same versions on every node"
        if other
        else ", ".join(f"{name} {found}" for name, found in facts.versions.items()),
    )
    if facts.niceness > 0:
        yield Finding(
            host,
            "niceness",
            "warning",
            f"Ray's workers run at {facts.niceness}, behind other processes; start Ray there with "
            "RAY_worker_niceness=0",
        )
    if facts.gpus:
        verdict: Verdict = "ok" if facts.nccl else "warning"
        yield Finding(host, "GPU", verdict, f"{', '.join(facts.gpus)}; NCCL {facts.nccl}")
    elif on_gpu:
        yield Finding(
            host, "GPU", "failure", "torch sees none; install its CUDA build and NVIDIA's driver"
        )


def _model(host: str, facts: NodeFacts, wanted: ResolvedLaunch) -> Finding:
    name = wanted.config.model
    if facts.has_model:
        return Finding(host, "model", "ok", str(wanted.path))
    if name in BUILTIN_MODELS or not Path(name).exists():
        detail = f"{name} is not there: the launch will fetch it; `cqil model fetch {name}` there"
        return Finding(host, "model", "warning", detail)
    return Finding(host, "model", "failure", f"no directory {wanted.path}: copy the model there")


def _memory(
    host: str, facts: NodeFacts, wanted: ResolvedLaunch, on_gpu: bool, room: int
) -> Finding:
    config, model, assignments = wanted.config, wanted.model, wanted.assignments
    world = assignments[0].world
    engine = wanted.engine(on_gpu)
    precision = config.precision_for(model, on_gpu)
    free = (facts.gpu_free_bytes or 0) if on_gpu else facts.free_bytes
    sizes = sorted(
        footprint(assignments, rank, model, precision, adapted=wanted.adapter is not None).total(
            engine.cache_tokens
        )
        for rank in range(world)
    )
    together = 1 if "SPREAD" in config.strategy else min(room, world)
    needed = sum(_PROCESS_BYTES + size for size in sizes[-together:])
    detail = (
        f"{free / 1e9:.1f} GB free; {together} ranks may come here and take {needed / 1e9:.1f} GB "
        f"({precision.weights}, {engine.slots} slots of {engine.max_len} tokens)"
    )
    if free >= needed:
        return Finding(host, "memory", "ok", detail)
    return Finding(
        host, "memory", "failure", f"{detail}; use more ranks, fewer slots or a shorter max_len"
    )


def _link_findings(probes: Mapping[str, Any], progress: Progress) -> Iterator[Finding]:
    hosts = list(probes)
    pairs = [(a, b) for a in range(len(hosts)) for b in range(len(hosts)) if a != b]
    with progress.task("Measuring links", total=len(pairs), unit="links") as task:
        for own, peer in pairs:  # one after another: all links share the nodes' network
            where = f"{hosts[own]} -> {hosts[peer]}"
            try:
                yield _link_finding(where, _speed(probes, hosts, own, peer))
            except (CqilError, RayError) as error:
                reason = getattr(error, "cause", None) or error
                yield Finding(
                    where,
                    "link",
                    "failure",
                    f"{str(reason).strip().splitlines()[-1]}; ranks listen on free ports of their "
                    "node's cluster address: open all ports between the nodes",
                )
            task.advance()


def _speed(probes: Mapping[str, Any], hosts: Sequence[str], own: int, peer: int) -> LinkSpeed:
    near, far = probes[hosts[own]], probes[hosts[peer]]
    address = ray.get(far.listen.remote(), timeout=_ANSWER_S)
    echoing = far.echo.remote(own)
    speed: LinkSpeed = ray.get(near.measure.remote(own, peer, address), timeout=_ANSWER_S)
    ray.get(echoing, timeout=_ANSWER_S)
    return speed


def _link_finding(where: str, speed: LinkSpeed) -> Finding:
    detail = f"round trip {speed.round_trip_us:.0f} us, {speed.megabytes_per_s:.0f} MB/s"
    if speed.round_trip_us > _SLOW_ROUND_TRIP_US:
        return Finding(where, "link", "warning", f"{detail}: every group of layers waits for it")
    return Finding(where, "link", "ok", detail)
