"""The actors that may become ranks: who answers, who is stuck, who is gone for good."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from cqil_dist.coordinator.node_addresses import host_addresses
from cqil_dist.errors import ModelError
from cqil_dist.rank.mesh_spec import ActorState

logger = logging.getLogger(__name__)

_POLL_S = 0.05
# One that has not been heard of may be importing torch on a busy machine.
_FIRST_ANSWER_S = 60.0


@dataclass
class Candidate:
    """An actor of a pool, and what is known of it.

    Attributes:
        state: its latest answer in the present round of asking.
        address: of its node, when it last answered.
        question: the call that has not been answered yet, and when it was asked.
        known: it has answered since its process was last known to have ended.
        gone: Ray does not start it again.
        unfit: why its process cannot read the model; the next one may.
        preparing: as a spare, its latest call to read all weights.
        ready: as a spare, it has them.
    """

    actor: Any
    state: ActorState | None = None
    address: str = "a node not known yet"
    question: Any = None
    asked: float = 0.0
    known: bool = False
    gone: bool = False
    unfit: ModelError | None = None
    preparing: Any = None
    ready: bool = False
    _process: tuple[str, int] | None = None
    _ended: tuple[str, int] | None = None

    @property
    def able(self) -> bool:
        """It may get a rank, now or when it has started again."""
        return not self.gone and self.unfit is None

    def ask(self) -> None:
        """For its state; `read_answers` takes the answer in."""
        self.state = None
        self.question = self.actor.state.remote()
        self.asked = time.monotonic()

    def restart(self, waited_s: float) -> None:
        """Have Ray end it and start it again, and ask the next one; unless it answers after all."""
        if ray.wait([self.question], timeout=0)[0]:
            return
        self.renew(f"no answer within {waited_s:.1f} s")
        self.ask()

    def renew(self, reason: str) -> None:
        """Have Ray end its process and start another."""
        logger.warning("the process at %s is ended, for another: %s", self.address, reason)
        self.known = False
        self._ended = self._process
        ray.kill(self.actor, no_restart=False)

    def note_unfit(self, error: ModelError) -> None:
        """It cannot read the model, and is no candidate until it has started again."""
        self.unfit = error
        logger.error("%s cannot read the model and gets no rank: %s", self.address, error)

    def read_answer(self, addresses: Mapping[str, str]) -> None:
        """Take in the answer to its question, which has come.

        Args:
            addresses: of nodes, by their ids.
        """
        answer, self.question = self.question, None
        try:
            state: ActorState = ray.get(answer)
        except ActorDiedError as error:
            self.known = False
            self.gone = not getattr(error, "preempted", False)
            logger.error("an actor is gone for good: %s", error)
            if not self.gone:
                self.ask()
        except RayActorError:  # its process ended: the next question waits for the next one
            self.known = False
            self.unfit = None
            self.ask()
        except RayError as error:
            self.gone = True
            logger.error("an actor cannot be started: %s", error)
        else:
            process = (state.node_id, state.pid)
            if process == self._ended:  # not quite yet
                self.ask()
                return
            if process != self._process:
                self._process, self.unfit = process, None
            self.state = state
            self.known = True
            self.address = addresses.get(state.node_id, self.address)


def read_answers(candidates: Sequence[Candidate]) -> None:
    """Take in the answers that have come, or come within a moment."""
    asked = {c.question: c for c in candidates if c.question is not None}
    if not asked:
        return
    answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_POLL_S)
    addresses = host_addresses()
    for answer in answers:
        asked[answer].read_answer(addresses)


def end_stuck(candidates: Sequence[Candidate], answer_s: float) -> None:
    """Restart those that should have answered by now.

    Args:
        answer_s: seconds for one that has answered before.
    """
    now = time.monotonic()
    for candidate in candidates:
        patience = answer_s if candidate.known else _FIRST_ANSWER_S
        if candidate.state is None and not candidate.gone and now - candidate.asked > patience:
            candidate.restart(patience)
