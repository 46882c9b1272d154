"""Every error this package raises on purpose.

CqilError
├── PlanError          a plan that is malformed or does not fit the model
├── ModelError         anything about the model's files
│   ├── ModelNotFound      no such name, directory, file or hub id; or not served
│   ├── UnsupportedModel   a structure this runtime does not compute
│   └── CheckpointError    a tensor or file that is missing, misshapen or damaged
├── ConfigError        a setting, a device or an output folder that cannot be used
├── TextError          text or a task to measure with that cannot be used
├── RequestError       one request's prompt or sampling values are wrong; others go on
├── ServiceError       a service that was asked does not answer the request
│   ├── QueueFull           too many requests wait already
│   ├── RequestTimeout      the request's deadline has passed
│   ├── Unauthenticated     the key is missing or wrong
│   └── ServiceUnavailable  nobody answers, or the service is ending
├── LaunchError        the cluster or its actors could not be brought up
│   └── InsufficientResources   asked for more than the cluster has
├── RankUnavailable    ranks could not come together in time; the engine has given up
└── ExchangeError      the data plane between ranks
    ├── ProtocolError      a peer sent something that is not what the plan expects next
    └── PeerLost           a peer closed its socket or missed the deadline

Messages name the operands, the rule that was broken, and the way out.
"""

from __future__ import annotations


class CqilError(Exception):
    """Base of every error this package raises on purpose."""


class PlanError(CqilError, ValueError):
    """A plan is malformed, or does not fit the model it is used with."""


class ModelError(CqilError):
    """The model's files are absent, unreadable or of an unknown kind."""


class ModelNotFound(ModelError):
    """No model under this name, path or hub id; or none that a service has under it."""


class UnsupportedModel(ModelError):
    """The model's structure differs from what this runtime computes exactly."""


class CheckpointError(ModelError):
    """A tensor or a file of the checkpoint is missing, misshapen or damaged."""


class ConfigError(CqilError, ValueError):
    """How to measure or train, where to compute or where to write to cannot be as asked."""


class TextError(CqilError, ValueError):
    """Text, or an evaluation task, cannot be used: unreadable, too short, or of another form."""


class RequestError(CqilError, ValueError):
    """A request cannot be served as asked; no other request is touched."""


class ServiceError(CqilError):
    """A service that was asked does not answer the request, through no fault in its values."""


class QueueFull(ServiceError):
    """As many requests wait as may, and later there is room; or one is larger than any may be."""


class RequestTimeout(ServiceError):
    """The request's deadline has passed."""


class Unauthenticated(ServiceError):
    """The service's key is missing, or another."""


class ServiceUnavailable(ServiceError):
    """Nobody answers, or the service is ending."""


class LaunchError(CqilError):
    """The cluster or its actors could not be brought up (or died since)."""


class InsufficientResources(LaunchError):
    """The cluster does not have, or does not free in time, what was asked for."""


class RankUnavailable(CqilError):
    """Ranks could not come together in time: at launch, or because a lost one was not replaced.

    The message names the rank and, where it is known, its node.
    """


class ExchangeError(CqilError):
    """The data plane between ranks failed."""


class ProtocolError(ExchangeError):
    """A peer sent something other than what the protocol allows next."""


class PeerLost(ExchangeError):
    """A peer closed its connection or missed the deadline.

    Attributes:
        peer: rank of the lost peer (-1 is the coordinator).
        address: "host:port" of the peer as this rank knew it.
    """

    def __init__(self, peer: int, address: str, reason: str) -> None:
        super().__init__(peer, address, reason)
        self.peer = peer
        self.address = address
        self.reason = reason

    def __str__(self) -> str:
        name = "the coordinator" if self.peer < 0 else f"rank {self.peer}"
        return f"lost {name} at {self.address}: {self.reason}"
