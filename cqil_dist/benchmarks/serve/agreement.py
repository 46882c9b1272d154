"""Finds the fields in which a peer takes requests, by asking once before anything is measured.

Peers refuse fields they do not know: `ignore_eos`, or `stream_options`. What they refuse is left
out, and the report says so. A mistake in what was asked (the model, the endpoint) shows here too,
as an error in place of a run in which every request fails.
"""

from __future__ import annotations

import httpx

from cqil_dist.benchmarks.serve.answer import Answer, read
from cqil_dist.benchmarks.serve.peer import Listing, Peer, refuse_strangers
from cqil_dist.benchmarks.serve.recording import record
from cqil_dist.benchmarks.serve.request_form import RequestForm
from cqil_dist.errors import ModelNotFound, RequestError, ServiceError, ServiceUnavailable

_PROMPT = "The sea is"
_INVALID = (400, 422)
_ABSENT = (404, 405)


async def agree(
    client: httpx.AsyncClient, peer: Peer, listing: Listing, form: RequestForm, timeout_s: float
) -> RequestForm:
    """The form, without the fields that the peer refuses.

    A peer that is busy or fails is taken to know them all: the measurement counts its failures.

    Raises:
        Unauthenticated: the key is missing, or another.
        ModelNotFound: the model is neither known nor listed.
        RequestError: the request is refused even without these fields.
        ServiceError: the endpoint is not there, or nothing came back at all.
    """
    refused: Answer | None = None
    for candidate in form.simpler():
        answer = read(await record(client, candidate.request(client, _PROMPT), timeout_s))
        refuse_strangers(peer, answer.status)
        if answer.status is None:
            raise ServiceUnavailable(f"{peer.shown} gave no answer: {answer.failure}")
        if answer.status in _ABSENT:
            raise _absent(peer, listing, form, answer)
        if answer.status not in _INVALID:
            return candidate
        refused = refused or answer
    assert refused is not None, "a form is one of its own candidates"
    raise RequestError(
        f"{peer.shown}{form.endpoint.path} refuses the request: {refused.failure}{_known(listing)}"
    )


def _absent(
    peer: Peer, listing: Listing, form: RequestForm, answer: Answer
) -> ModelNotFound | ServiceError:
    told = f"{peer.shown}{form.endpoint.path} answers {answer.failure}"
    if listing.models and form.model not in listing.models:
        return ModelNotFound(f"{told}; {form.model!r} is not listed there{_known(listing)}")
    return ServiceError(f"{told}: try another --endpoint or --model{_known(listing)}")


def _known(listing: Listing) -> str:
    return f"; its models (--model): {', '.join(listing.models)}" if listing.models else ""
