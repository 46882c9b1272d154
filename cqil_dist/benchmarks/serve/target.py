"""The address that is measured: how it is reached, and which models it says it has.

Knows connections, TLS and keys; not what is asked of the models.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from cqil_dist.benchmarks.serve.stream import reason
from cqil_dist.errors import CqilError, ServiceUnavailable, Unauthenticated

_LISTING_TIMEOUT_S = 30.0
# uvicorn and llama.cpp hang up on connections that idle for 5 s: give them up first, or a request
# might be sent into the hanging up.
_IDLE_S = 2.0


@dataclass(frozen=True)
class Target:
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
        with suppress(ValueError):  # of brackets without an end, or a port that is none
            parts = urlsplit(self.base_url)
            if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
                return
        raise CqilError(
            f"base_url is {self.base_url!r} but must be http://HOST:PORT or https://HOST:PORT"
        )

    @property
    def root(self) -> str:
        """The address that the paths of the OpenAI API, /v1/..., follow."""
        parts = urlsplit(self.base_url)
        path = parts.path.rstrip("/").removesuffix("/v1")
        return parts._replace(path=path, query="", fragment="").geturl()

    @property
    def shown(self) -> str:
        """The root without a password that the address may carry."""
        parts = urlsplit(self.root)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def client(self) -> httpx.AsyncClient:
        """Straight to the address. Raises CqilError if `ca_cert` cannot be read."""
        headers = {"Accept": "text/event-stream, application/json", "Accept-Encoding": "identity"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return httpx.AsyncClient(
            base_url=self.root,
            headers=headers,
            verify=self._verify(),
            timeout=None,  # each request has a limit as a whole
            limits=httpx.Limits(keepalive_expiry=_IDLE_S),  # as many connections as it takes
            trust_env=False,  # a proxy of the environment would be measured too
        )

    def _verify(self) -> ssl.SSLContext | bool:
        if self.insecure or self.ca_cert is None:
            return not self.insecure
        try:
            return ssl.create_default_context(cafile=self.ca_cert)
        except OSError as error:  # ssl.SSLError is one
            raise CqilError(f"cannot read certificates from {self.ca_cert}: {error}") from error

    def refuse_strangers(self, status: int | None) -> None:
        """Raises Unauthenticated if this is the HTTP status of a key that does not fit."""
        if status in (401, 403):
            told = "asks for a key" if self.api_key is None else "does not accept the key"
            raise Unauthenticated(
                f"{self.shown} {told} (HTTP {status}): give its key with --api-key or CQIL_API_KEY"
            )


@dataclass(frozen=True)
class Listing:
    """What /v1/models said.

    Attributes:
        models: ids; empty where the server has no such endpoint.
        owner: of the first one, which tells servers apart ("vllm", "llamacpp", "cqil_dist").
        server: the Server header.
    """

    models: tuple[str, ...] = ()
    owner: str | None = None
    server: str | None = None


async def list_models(client: httpx.AsyncClient, target: Target) -> Listing:
    """Ask for the models.

    Raises:
        ServiceUnavailable: nobody answers at the address.
        Unauthenticated: the key is missing, or another.
    """
    try:
        answer = await client.get("/v1/models", timeout=_LISTING_TIMEOUT_S)
    except (httpx.HTTPError, OSError) as error:
        way_out = "start a server there, or give its address with --base-url"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            way_out = "name its authority with --ca-cert, or take it as it is with --insecure"
        raise ServiceUnavailable(
            f"cannot reach {target.shown} ({reason(error)}): {way_out}"
        ) from error
    target.refuse_strangers(answer.status_code)
    server = answer.headers.get("server")
    try:
        entries = answer.json()["data"]
        models = tuple(str(entry["id"]) for entry in entries)
        return Listing(models, entries[0].get("owned_by"), server)
    except (ValueError, LookupError, TypeError):
        return Listing(server=server)
