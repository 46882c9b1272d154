"""The address that is measured: how it is reached, and which models it says it has.

Knows connections, TLS and keys; not what is asked of the models.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from cqil_dist.benchmarks.serve.recording import reason
from cqil_dist.errors import CqilError, ServiceError, ServiceUnavailable, Unauthenticated

_LISTING_TIMEOUT_S = 30.0
# uvicorn and llama.cpp hang up on connections that idle for 5 s: give them up first, or a request
# might be sent into the hanging up.
_IDLE_S = 2.0


@dataclass(frozen=True)
class Peer:
    """An address, and what it takes to be let in.

    Attributes:
        base_url: with or without the /v1 of the OpenAI API.
        api_key: sent as a bearer token.
        insecure: take any certificate.
        ca_cert: PEM file of whom to believe, in place of the public authorities.

    Raises:
        CqilError: it is no http address.
    """

    base_url: str
    api_key: str | None = None
    insecure: bool = False
    ca_cert: Path | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CqilError(
                f"{self.base_url} is no address of an HTTP server: give it as http://HOST:PORT or "
                "https://HOST:PORT"
            )

    @property
    def root(self) -> str:
        """The address that the paths of the OpenAI API, /v1/..., follow."""
        parts = urlsplit(self.base_url)
        path = parts.path.rstrip("/").removesuffix("/v1")
        return parts._replace(path=path, query="", fragment="").geturl()

    @property
    def shown(self) -> str:
        """The root without a password or token that the address may carry."""
        parts = urlsplit(self.root)
        return parts._replace(
            netloc=parts.netloc.rpartition("@")[2], query="", fragment=""
        ).geturl()

    def client(self) -> httpx.AsyncClient:
        """With as many connections as it takes, and straight to the address.

        Raises:
            CqilError: `ca_cert` cannot be read.
        """
        headers = {"Accept": "text/event-stream, application/json", "Accept-Encoding": "identity"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return httpx.AsyncClient(
            base_url=self.root,
            headers=headers,
            verify=self._verify(),
            timeout=None,  # each request has a limit as a whole
            limits=httpx.Limits(keepalive_expiry=_IDLE_S),
            trust_env=False,  # a proxy of the environment would be measured too
        )

    def _verify(self) -> ssl.SSLContext | bool:
        if self.insecure or self.ca_cert is None:
            return not self.insecure
        try:
            return ssl.create_default_context(cafile=self.ca_cert)
        except OSError as error:  # ssl.SSLError is one
            raise CqilError(f"cannot read certificates from {self.ca_cert}: {error}") from error


@dataclass(frozen=True)
class Listing:
    """What /v1/models said.

    Attributes:
        models: ids; empty where the peer has no such endpoint.
        owner: of the first one, which tells servers apart ("vllm", "llamacpp", "cqil_dist").
        server: the Server header.
    """

    models: tuple[str, ...] = ()
    owner: str | None = None
    server: str | None = None


async def list_models(client: httpx.AsyncClient, peer: Peer) -> Listing:
    """Ask for the models.

    Raises:
        ServiceUnavailable: nobody answers at the address.
        Unauthenticated: the key is missing, or another.
    """
    try:
        answer = await client.get("/v1/models", timeout=_LISTING_TIMEOUT_S)
    except (httpx.HTTPError, OSError) as error:
        raise ServiceUnavailable(_nobody(peer, reason(error))) from error
    refuse_strangers(peer, answer.status_code)
    try:
        entries: list[dict[str, Any]] = answer.json()["data"] if answer.is_success else []
        models = tuple(str(entry["id"]) for entry in entries)
    except (ValueError, LookupError, TypeError):
        return Listing(server=answer.headers.get("server"))
    owner = entries[0].get("owned_by") if entries else None
    return Listing(models, owner, answer.headers.get("server"))


def choose_model(asked: str | None, listing: Listing, peer: Peer) -> str:
    """The model asked for, else the first one listed. Raises ServiceError where there is neither.

    A model that is not listed is not refused here: some servers answer to names they do not list.
    """
    if asked is not None:
        return asked
    if not listing.models:
        raise ServiceError(
            f"{peer.shown}/v1/models lists no models: name one with --model, and look whether this "
            "is the address of an OpenAI-compatible server"
        )
    return listing.models[0]


def refuse_strangers(peer: Peer, status: int | None) -> None:
    """Raises Unauthenticated if this is the HTTP status of a key that does not fit."""
    if status in (401, 403):
        told = "asks for a key" if peer.api_key is None else "does not accept the key"
        raise Unauthenticated(
            f"{peer.shown} {told} (HTTP {status}): give its key with --api-key or CQIL_API_KEY"
        )


def _nobody(peer: Peer, why: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in why:
        return (
            f"{peer.shown} has a certificate that is not believed ({why}): name its authority with "
            "--ca-cert, or take it as it is with --insecure"
        )
    return (
        f"nobody answers at {peer.shown} ({why}): start a server there, or give its address with "
        "--base-url"
    )
