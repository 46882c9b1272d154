"""Clients of a generation service: `Client`, and `AsyncClient` for asyncio.

They need grpcio and protobuf, and nothing else that is not Python's own.
"""

from __future__ import annotations

from cqil_dist.client.aio import AsyncClient
from cqil_dist.client.sync import Client

__all__ = ["AsyncClient", "Client"]
