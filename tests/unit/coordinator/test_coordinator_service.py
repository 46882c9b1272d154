"""A call that ends while its request is being submitted; gRPC's own side is played by the test."""

from __future__ import annotations

from typing import Any

from helpers.observed_engine import ObservedModel, serving
from helpers.served import model_infos
from helpers.tiny_models import TinyModelFactory

from cqil_dist.coordinator.service import EngineServicer
from cqil_dist.rpc.convert import request_to_wire


class EndedCall:
    """A context whose call was cancelled before a callback could be registered."""

    def add_callback(self, callback: Any) -> bool:
        return False

    def send_initial_metadata(self, metadata: Any) -> None:
        """Nobody is there to get it."""


def test_a_call_that_ended_while_it_was_submitted_frees_its_slot(
    tiny_model: TinyModelFactory,
) -> None:
    model = tiny_model()
    steps = ObservedModel(model, model.plan("sequential"), 1)
    unasked: Any = None
    with serving(model, steps, slots=1) as engine:
        servicer = EngineServicer(engine, model_infos(engine, ["tiny"]), status=unasked)
        request = request_to_wire("x", max_tokens=50, temperature=0, ignore_eos=True)
        context: Any = EndedCall()
        responses = list(servicer.Generate(request, context))
        assert responses[-1].completion.finish_reason == "abort"
        assert len(responses[-1].completion.token_ids) < 50
        assert engine.status().running_requests == 0
