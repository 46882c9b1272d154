"""One actor of a pool: asks it, takes in what it or Ray says of it, and replaces its process.

What follows for the actor's state is coordinator/lifecycle.py's decision.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from cqil_dist.coordinator.lifecycle import Event, Lifecycle, Unfit, after, is_stuck
from cqil_dist.coordinator.node_addresses import host_addresses
from cqil_dist.coordinator.rank_matching import MemberView
from cqil_dist.errors import ModelError
from cqil_dist.rank.mesh_spec import ActorState

logger = logging.getLogger(__name__)

_POLL_S = 0.05


@dataclass(frozen=True)
class Question:
    """A call of `LayerActor.state` that has not been answered yet, and when it was made."""

    call: Any
    asked: float


@dataclass
class PoolMember:
    """An actor of a pool, and what is known of it.

    Attributes:
        actor: its handle.
        lifecycle: the state of its process.
        answer: what it said of itself when it was asked last, or that question while it is open.
        address: its node's, when it last answered.
        preparing: its latest call to read the weights of all ranks, as a spare.
    """

    actor: Any
    lifecycle: Lifecycle | Unfit = Lifecycle.STARTING
    answer: ActorState | Question | None = None
    address: str = "a node not known yet"
    preparing: Any = None
    _process: tuple[str, int] | None = None
    _ended: tuple[str, int] | None = None

    @property
    def state(self) -> ActorState | None:
        """The answer to the latest question; None while that is open."""
        return self.answer if isinstance(self.answer, ActorState) else None

    def view(self) -> MemberView:
        """Return the view of it that ranks are matched by."""
        held = None if self.state is None else self.state.ranks
        return MemberView(self.lifecycle, held, self.address)

    def note(self, event: Event | Unfit) -> None:
        """Change its lifecycle as an event demands."""
        self.lifecycle = after(self.lifecycle, event)

    def ask(self) -> None:
        """Ask for its state; `read_answers` takes the answer in."""
        self.answer = Question(self.actor.state.remote(), time.monotonic())

    def replace(self, reason: str) -> None:
        """Have Ray end its process and start another."""
        logger.warning("the process at %s is ended, for another: %s", self.address, reason)
        self.note(Event.ENDED)
        self._ended = self._process
        ray.kill(self.actor, no_restart=False)

    def replace_silent(self) -> None:
        """Replace its process and ask the next one, unless it answers after all."""
        if isinstance(self.answer, Question) and not ray.wait([self.answer.call], timeout=0)[0]:
            self.replace(f"no answer within {time.monotonic() - self.answer.asked:.1f} s")
            self.ask()

    def mark_unfit(self, error: ModelError) -> None:
        """Let its process, which cannot read the model, become no rank."""
        logger.error("%s cannot read the model and gets no rank: %s", self.address, error)
        self.note(Unfit(error))

    def read_answer(self, call: Any, addresses: Mapping[str, str]) -> None:
        """Take in the answer to its question, which has come.

        Args:
            call: the question's call.
            addresses: of nodes, by their ids.
        """
        self.answer = None
        try:
            state: ActorState = ray.get(call)
        except RayError as error:
            if _is_final(error):
                logger.error("an actor has ended, and Ray does not start it again: %s", error)
                self.note(Event.GIVEN_UP)
            else:
                self.note(Event.ENDED)
                self.ask()  # the question waits for the next process
        else:
            self._take_in(state, addresses)

    def _take_in(self, state: ActorState, addresses: Mapping[str, str]) -> None:
        process = (state.node_id, state.pid)
        if process == self._ended:  # not quite yet
            self.ask()
            return
        self.note(Event.ANSWERED if process == self._process else Event.ANSWERED_ANEW)
        self._process = process
        self.answer = state
        self.address = addresses.get(state.node_id, self.address)


def read_answers(members: Iterable[PoolMember]) -> None:
    """Take in the answers that have come, or come within a moment."""
    asked = {m.answer.call: m for m in members if isinstance(m.answer, Question)}
    if not asked:
        return
    answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_POLL_S)
    addresses = host_addresses()
    for call in answers:
        asked[call].read_answer(call, addresses)


def replace_stuck(members: Iterable[PoolMember], answer_s: float) -> None:
    """Replace the processes that should have answered by now.

    Args:
        answer_s: seconds that a process which has answered before may take.
    """
    now = time.monotonic()
    for member in members:
        asked = member.answer.asked if isinstance(member.answer, Question) else now
        if is_stuck(member.lifecycle, now - asked, answer_s):
            member.replace_silent()


def _is_final(error: RayError) -> bool:
    """Return whether Ray does not start the actor again."""
    if isinstance(error, ActorDiedError):
        return not getattr(error, "preempted", False)  # its node was taken away
    return not isinstance(error, RayActorError)  # it could not be started
