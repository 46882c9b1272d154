"""The data plane: connections between ranks, and what travels over them."""

from cqil_dist.exchange.base import (
    Exchange,
    ExchangeStats,
)
from cqil_dist.exchange.handshake import COORDINATOR, SECRET_BYTES
from cqil_dist.exchange.link import Link, recv_each
from cqil_dist.exchange.listener import Listener, connect, connect_mesh
from cqil_dist.exchange.tcp import TcpExchange
from cqil_dist.exchange.torch_distributed import TorchDistributedExchange

__all__ = [
    "COORDINATOR",
    "SECRET_BYTES",
    "Exchange",
    "ExchangeStats",
    "Link",
    "Listener",
    "TcpExchange",
    "TorchDistributedExchange",
    "connect",
    "connect_mesh",
    "recv_each",
]
