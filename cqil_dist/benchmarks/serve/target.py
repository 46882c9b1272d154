"""The server that is measured: how to reach it, and which models it lists.

Knows connections, TLS and keys; nothing of the requests to its models.
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
# uvicorn and llama.cpp close connections that are idle for 5 s. They are closed here first, or a
# request might be sent on one that the server is closing.
_IDLE_S = 2.0


@dataclass(frozen=True)
class Target:
    """A server's address, TLS settings and API key.

    Attributes:
        base_url: the address, with or without the /v1 of the OpenAI API.
        api_key: the key that is sent as a bearer token, if any.
        insecure: whether to accept any certificate.
        ca_cert: PEM file of the authority to trust in place of the public ones.

    Raises:
        CqilError: the address is not an http or https URL.
    """

    base_url: str
    api_key: str | None = None
    insecure: bool = False
    ca_cert: Path | None = None

    def __post_init__(self) -> None:
        with suppress(ValueError):  # an unclosed bracket, or a port that is no number
            parts = urlsplit(self.base_url)
            if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
                return
        raise CqilError(
            f"base_url is {self.base_url!r} but must be http://HOST:PORT or https://HOST:PORT"
        )

    @property
    def root(self) -> str:
        """Return the URL to which the paths of the OpenAI API, /v1/..., are appended."""
        parts = urlsplit(self.base_url)
        path = parts.path.rstrip("/").removesuffix("/v1")
        return parts._replace(path=path, query="", fragment="").geturl()

    @property
    def shown(self) -> str:
        """Return the root as it may be shown, without a user name and password."""
        parts = urlsplit(self.root)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def client(self) -> httpx.AsyncClient:
        """Make an HTTP client for the server. Raises CqilError if `ca_cert` cannot be read."""
        headers = {"Accept": "text/event-stream, application/json", "Accept-Encoding": "identity"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return httpx.AsyncClient(
            base_url=self.root,
            headers=headers,
            verify=self._verify(),
            timeout=None,  # each request has a limit as a whole
            limits=httpx.Limits(keepalive_expiry=_IDLE_S),  # any number of connections
            trust_env=False,  # a proxy of the environment would be measured too
        )

    def _verify(self) -> ssl.SSLContext | bool:
        if self.insecure or self.ca_cert is None:
            return not self.insecure
        try:
            return ssl.create_default_context(cafile=self.ca_cert)
        except OSError as error:  # ssl.SSLError is one
            raise CqilError(f"cannot read certificates from {self.ca_cert}: {error}") from error

    def require_access(self, status: int | None) -> None:
        """Raise Unauthenticated if this is the HTTP status of a missing or wrong key."""
        if status in (401, 403):
            told = "asks for a key" if self.api_key is None else "does not accept the key"
            raise Unauthenticated(
                f"{self.shown} {told} (HTTP {status}): give its key with --api-key or CQIL_API_KEY"
            )


@dataclass(frozen=True)
class Listing:
    """The answer of /v1/models.

    Attributes:
        models: the models' ids; empty if the server has no such endpoint.
        owner: the first model's owner, which tells servers apart ("vllm", "llamacpp", "cqil_dist").
        server: the Server header.
    """

    models: tuple[str, ...] = ()
    owner: str | None = None
    server: str | None = None


async def list_models(client: httpx.AsyncClient, target: Target) -> Listing:
    """Ask a server for its models.

    Raises:
        ServiceUnavailable: the server cannot be reached.
        Unauthenticated: the key is missing or wrong.
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
    target.require_access(answer.status_code)
    server = answer.headers.get("server")
    try:
        entries = answer.json()["data"]
        models = tuple(str(entry["id"]) for entry in entries)
        return Listing(models, entries[0].get("owned_by"), server)
    except (ValueError, LookupError, TypeError):
        return Listing(server=server)
