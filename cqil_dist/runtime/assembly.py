"""Brings the ranks together: out of a pool of actors into the mesh of a new epoch.

Launching and recovering are one procedure. Ranks whose actors are alive and hold their weights
keep them; the others go to whatever actor answers (one that Ray has started again, or a spare) and
load. Then all listen in the next epoch, connect, and serve. If another is lost meanwhile, it
starts over, until the deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from cqil_dist.errors import CqilError, ExchangeError, LaunchError, RankUnavailable
from cqil_dist.exchange.handshake import COORDINATOR
from cqil_dist.exchange.link import Link
from cqil_dist.exchange.listener import connect
from cqil_dist.outputs import RankStatus
from cqil_dist.runtime.layer_actor import ActorState, MeshSpec
from cqil_dist.runtime.spec import EngineSpec

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_RETRY_S = 0.2
_MAX_SURPRISES = 2
# An actor that has answered before and does not within this long is stuck, or its node is cut
# off. One that has not been heard of may be importing torch on a busy machine.
_ANSWER_S = 1.0
_FIRST_ANSWER_S = 60.0
# One whose connection is closed may have lost its peers only, and answers soon.
_GRACE_S = 0.3
_CALL_TIMEOUT_S = 60.0
_LOADING_ANSWER_S = 10.0
_JOIN_DEADLINE_S = 20.0

# A core that sleeps takes tens of microseconds to wake, and runs its first layer a third slower.
# A rank with cores to itself may poll for as long as a peer's run of layers takes; one that
# shares them, only for as long as an exchange.
_SPIN_PINNED_S = 0.02
_SPIN_S = 0.0005


@dataclass(frozen=True)
class AssembledRanks:
    """The ranks of one epoch, connected.

    Attributes:
        links: from the coordinator to rank 0, 1, ...
        actors: their handles.
        phases: seconds each phase took.
    """

    epoch: int
    links: tuple[Link, ...]
    actors: tuple[Any, ...]
    descriptions: tuple[RankStatus, ...]
    phases: dict[str, float]


@dataclass
class _Candidate:
    """An actor of the pool, and what is known of it.

    Attributes:
        state: its latest answer in the present round of asking.
        address: of its node, when it last answered.
        question: the call that has not been answered yet, and when it was asked.
        known: it has answered since its process was last known to have ended.
        gone: Ray does not start it again.
    """

    actor: Any
    state: ActorState | None = None
    address: str = "a node not known yet"
    question: Any = None
    asked: float = 0.0
    known: bool = False
    gone: bool = False


class RankPool:
    """The actors of a launch, spare ones included, as its coordinator sees them.

    Args:
        actors: handles of at least as many `LayerActor`s as there are ranks.
        secret: of the launch.
    """

    def __init__(self, actors: Sequence[Any], spec: EngineSpec, secret: bytes) -> None:
        self._candidates = [_Candidate(actor) for actor in actors]
        self._spec = spec
        self._secret = secret
        self._seats: dict[int, int] = {}
        self._preparing: dict[int, Any] = {}
        self._stopping = threading.Event()
        self.waiting_for = ""

    def assemble(self, ended: frozenset[int] = frozenset()) -> AssembledRanks:
        """Connect all ranks in a new epoch.

        Args:
            ended: ranks known to have closed their connections. Of these, one that does not
                answer is taken to be restarting; any other that does not, to be stuck.

        Raises:
            RankUnavailable: a rank has no actor within the spec's `recovery_timeout_s`, time to
                load apart.
            ModelError: a rank's weights cannot be read.
            LaunchError: the pool has been stopped, or cores cannot be bound as asked.
        """
        deadline = time.monotonic() + self._spec.recovery_timeout_s
        for rank in ended:
            if (seat := self._seats.get(rank)) is not None:
                self._candidates[seat].known = False
        phases: dict[str, float] = {}
        surprises = 0
        while True:
            try:
                with _timed(phases, "seat"):
                    states = self._seat(deadline)
                loaded = phases.get("load", 0.0)
                with _timed(phases, "load"):
                    self._load()
                deadline += phases["load"] - loaded
                with _timed(phases, "connect"):
                    return self._connect(states, phases)
            except (ExchangeError, RayActorError, GetTimeoutError) as error:
                reason: Exception = error
            except CqilError:
                raise
            except Exception as error:  # of one actor, which may have another successor
                surprises += 1
                logger.exception("unexpected")
                reason = error
            if time.monotonic() > deadline or surprises > _MAX_SURPRISES:
                raise RankUnavailable(
                    f"the ranks could not meet: {type(reason).__name__}: {reason}"
                ) from reason
            logger.warning("the ranks meet once more, because: %s", reason)
            self._check_stopping()
            time.sleep(_RETRY_S)

    def stop(self) -> None:
        """End an `assemble` under way, and let no other begin."""
        self._stopping.set()

    def prepare_spares(self) -> None:
        """Have actors without a rank read the weights that they may be asked for.

        Those that are being restarted will do so when they are back.
        """
        for index, candidate in enumerate(self._candidates):
            under_way = self._preparing.get(index)
            if under_way is not None and not ray.wait([under_way], timeout=0)[0]:
                continue
            if index not in self._seats.values() and not candidate.gone:
                self._preparing[index] = candidate.actor.prepare.remote(self._spec)

    # Seating: an actor that answers for every rank.

    def _seat(self, deadline: float) -> dict[int, ActorState]:
        """Choose an actor for every rank; returns their states."""
        started = time.monotonic()
        for candidate in self._candidates:
            candidate.state = None
            if not candidate.gone:
                self._ask(candidate)
        while True:
            self._read_answers()
            answered = {
                index: candidate.state
                for index, candidate in enumerate(self._candidates)
                if candidate.state is not None
            }
            # Those that may still answer are waited for: they hold weights.
            missing = [c for c in self._candidates if c.state is None and not c.gone]
            grace = time.monotonic() < started + _GRACE_S
            if not missing or not (grace or any(c.known for c in missing)):
                seats = seat_ranks(self._spec.assignment.world, answered, self._seats)
                if seats is not None:
                    self._seats = seats
                    self.waiting_for = ""
                    return {rank: answered[seat] for rank, seat in seats.items()}
            self._end_stuck()
            self._wait(deadline, answered)

    def _ask(self, candidate: _Candidate) -> None:
        candidate.question = candidate.actor.state.remote()
        candidate.asked = time.monotonic()

    def _read_answers(self) -> None:
        open_questions = {
            candidate.question: candidate
            for candidate in self._candidates
            if candidate.question is not None
        }
        if not open_questions:
            return
        answers, _ = ray.wait(
            list(open_questions), num_returns=len(open_questions), timeout=_POLL_S
        )
        hosts = host_addresses()
        for answer in answers:
            candidate = open_questions[answer]
            candidate.question = None
            try:
                state: ActorState = ray.get(answer)
            except ActorDiedError as error:
                candidate.known = False
                candidate.gone = not getattr(error, "preempted", False)
                logger.error("an actor is gone for good: %s", error)
                if not candidate.gone:
                    self._ask(candidate)
            except RayActorError:  # its process ended: the next question waits for the next one
                candidate.known = False
                self._ask(candidate)
            else:
                candidate.state = state
                candidate.known = True
                candidate.address = hosts.get(state.node_id, candidate.address)

    def _end_stuck(self) -> None:
        """Have Ray end and restart actors that should have answered by now."""
        now = time.monotonic()
        for candidate in self._candidates:
            patience = _ANSWER_S if candidate.known else _FIRST_ANSWER_S
            if candidate.state is not None or candidate.gone or now - candidate.asked < patience:
                continue
            if not ray.wait([candidate.question], timeout=0)[0]:  # else it has answered just now
                logger.warning("no answer from %s within %g s", candidate.address, patience)
                candidate.known = False
                ray.kill(candidate.actor, no_restart=False)
                self._ask(candidate)

    def _wait(self, deadline: float, answered: Mapping[int, ActorState]) -> None:
        held = frozenset[int]().union(*(state.ranks for state in answered.values()))
        lost = [
            f"rank {rank} (was on {self._candidates[seat].address})"
            for rank, seat in sorted(self._seats.items())
            if seat not in answered
        ] or [f"rank {rank}" for rank in range(self._spec.assignment.world) if rank not in held]
        self.waiting_for = ", ".join(lost)
        self._check_stopping()
        living = sum(not candidate.gone for candidate in self._candidates)
        if time.monotonic() > deadline or living < self._spec.assignment.world:
            raise RankUnavailable(
                f"no actor for {self.waiting_for} within {self._spec.recovery_timeout_s:g} s: "
                f"{len(answered)} of {len(self._candidates)} actors answer and "
                f"{self._spec.assignment.world} are needed; add a node, or launch again with fewer "
                "ranks"
            )
        time.sleep(_POLL_S)

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise LaunchError("the engine is closing")

    # Loading and connecting.

    def _seated(self) -> list[_Candidate]:
        return [self._candidates[self._seats[rank]] for rank in range(len(self._seats))]

    def _load(self) -> None:
        """Every seated actor reads its rank's weights, unless it has them."""
        seated = self._seated()
        loading = [
            candidate.actor.load.remote(self._spec, rank) for rank, candidate in enumerate(seated)
        ]
        questions = [candidate.actor.state.remote() for candidate in seated]
        asked = time.monotonic()
        while waiting := ray.wait(loading, num_returns=len(loading), timeout=_POLL_S)[1]:
            self._check_stopping()
            _raise_first_error(ref for ref in loading if ref not in waiting)
            # Reading takes as long as it takes, as long as those who read are there.
            answers, silent = ray.wait(questions, num_returns=len(questions), timeout=0)
            _raise_first_error(answers)
            if not silent:
                questions = [candidate.actor.state.remote() for candidate in seated]
                asked = time.monotonic()
            elif time.monotonic() - asked > _LOADING_ANSWER_S:
                raise ExchangeError(
                    f"{len(silent)} of {len(seated)} actors do not answer while they load"
                )
        _raise_first_error(loading)

    def _connect(
        self, states: Mapping[int, ActorState], phases: dict[str, float]
    ) -> AssembledRanks:
        spec = self._spec
        seated = self._seated()
        epoch = 1 + max(state.epoch for state in states.values())
        hosts = host_addresses()
        if gone := [rank for rank, state in states.items() if state.node_id not in hosts]:
            raise ExchangeError(f"the nodes of ranks {gone} are gone")
        own_hosts = [hosts[states[rank].node_id] for rank in range(len(seated))]
        listening = [
            candidate.actor.listen.remote(host, self._secret, epoch)
            for candidate, host in zip(seated, own_hosts, strict=True)
        ]
        addresses = dict(enumerate(_results(listening, _CALL_TIMEOUT_S)))
        nccl_address = None
        own_gpus = {(state.node_id, state.gpu) for state in states.values()}
        if spec.on_gpu and 1 < len(seated) == len(own_gpus):
            asked = [seated[0].actor.free_address.remote(own_hosts[0])]
            (nccl_address,) = _results(asked, _CALL_TIMEOUT_S)
        cores = self._cores(states)
        joining = [
            candidate.actor.join.remote(
                spec,
                MeshSpec(
                    rank=rank,
                    addresses=addresses,
                    secret=self._secret,
                    epoch=epoch,
                    nccl_address=nccl_address,
                    cores=cores[rank] if cores is not None and spec.pin != "never" else (),
                    spin_s=_spin_s(cores is not None, spec.pin),
                    deadline_s=_JOIN_DEADLINE_S,
                ),
            )
            for rank, candidate in enumerate(seated)
        ]
        links: list[Link] = []
        try:
            for rank, address in addresses.items():
                sock = connect(address, COORDINATOR, rank, self._secret, epoch, _JOIN_DEADLINE_S)
                links.append(Link(sock, rank, address, spec.max_message_bytes))
            sizes = _results(joining, _CALL_TIMEOUT_S)
        except BaseException:
            for link in links:
                link.close()
            raise
        descriptions = tuple(
            RankStatus(
                rank=rank,
                node_id=states[rank].node_id,
                address=own_hosts[rank],
                pid=states[rank].pid,
                device="cuda" if spec.on_gpu else "cpu",
                **sizes[rank],
            )
            for rank in range(len(seated))
        )
        actors = tuple(candidate.actor for candidate in seated)
        return AssembledRanks(epoch, tuple(links), actors, descriptions, phases)

    def _cores(self, states: Mapping[int, ActorState]) -> list[tuple[int, ...]] | None:
        """Cores of each rank, none shared on a node; None where a node has not enough of them."""
        threads = self._spec.threads
        taken: Counter[str] = Counter()
        cores: list[tuple[int, ...]] = []
        for rank in range(len(states)):
            state = states[rank]
            first = taken[state.node_id]
            cores.append(state.cores[first : first + threads])
            taken[state.node_id] += threads
        if all(len(own) == threads for own in cores):
            return cores
        if self._spec.pin == "always":
            raise LaunchError(
                f"pin asks for {threads} cores a rank, but a node has fewer than its ranks need; "
                "launch fewer ranks or threads, or without pin"
            )
        return None


def seat_ranks(
    world: int, states: Mapping[int, ActorState], previous: Mapping[int, int]
) -> dict[int, int] | None:
    """Which actor is which rank; None where there are fewer actors than ranks.

    A rank goes to an actor that holds its weights: the one that had it before, else the one that
    holds the fewest others. What is left over goes first to the actors that had those ranks.

    Args:
        states: of the actors that answer, by index.
        previous: index of the actor that was each rank, where there was one.
    """
    if len(states) < world:
        return None
    seats: dict[int, int] = {}

    def seat(rank: int, candidates: list[int]) -> None:
        free = [index for index in candidates if index not in seats.values()]
        if rank not in seats and free:
            seats[rank] = min(
                free, key=lambda i: (i != previous.get(rank), len(states[i].ranks), i)
            )

    for rank in range(world):
        seat(rank, [index for index, state in states.items() if rank in state.ranks])
    for rank in range(world):
        seat(rank, [previous[rank]] if previous.get(rank) in states else [])
    for rank in range(world):
        seat(rank, list(states))
    return seats


def host_addresses() -> dict[str, str]:
    """By id of each live node, the address to reach it by.

    A single node stays on loopback; several use the addresses by which they know each other, not
    whatever a node's name or default route would give.
    """
    nodes = ray.nodes()
    if len(nodes) == 1:
        return {nodes[0]["NodeID"]: "127.0.0.1"}
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        phases[name] = phases.get(name, 0.0) + time.monotonic() - started


def _spin_s(own_cores: bool, pin: str) -> float:
    if not own_cores:
        return 0.0
    return _SPIN_S if pin == "never" else _SPIN_PINNED_S


def _results(calls: list[Any], timeout_s: float) -> list[Any]:
    """What the calls return, raising the first error as soon as it comes, as it was raised."""
    deadline = time.monotonic() + timeout_s
    waiting = calls
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise GetTimeoutError(f"{len(waiting)} actors did not answer within {timeout_s:g} s")
        _raise_first_error(done)
    results: list[Any] = ray.get(calls)
    return results


def _raise_first_error(done: Iterable[Any]) -> None:
    try:
        ray.get(list(done))
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise
