"""Every error that this package raises on purpose.

CqilError
├── PlanError          a plan that is malformed or does not fit the model
├── ModelError         anything about the model's files
│   ├── ModelNotFound      no such name, directory, file or hub id; or no such served model
│   ├── UnsupportedModel   a structure this runtime does not compute
│   └── CheckpointError    a tensor or file that is missing, misshapen or damaged
├── ConfigError        a setting, a device or an output folder that cannot be used
├── TextError          a text or a task for measuring cannot be used
├── RequestError       one request's prompt or sampling values are wrong; others go on
├── ServiceError       a service does not answer a request, through no fault in its values
│   ├── QueueFull           too many requests wait already
│   ├── RequestTimeout      the request's deadline has passed
│   ├── Unauthenticated     the key is missing or wrong
│   └── ServiceUnavailable  nobody answers, or the service is ending
├── LaunchError        the cluster or its actors could not be brought up
│   └── InsufficientResources   asked for more than the cluster has
├── RankUnavailable    the ranks could not be assembled in time; the engine has given up
└── ExchangeError      the data plane between ranks
    ├── ProtocolError      a peer sent something that is not what the plan expects next
    └── PeerLost           a peer closed its socket or missed the deadline

Messages name the operands, the rule that was broken, and the way out.
"""

from __future__ import annotations


class CqilError(Exception):
    """The base class of every error that this package raises on purpose."""


class PlanError(CqilError, ValueError):
    """A plan is malformed, or does not fit the model it is used with."""


class ModelError(CqilError):
    """A model's files are absent, unreadable or of an unsupported kind."""


class ModelNotFound(ModelError):
    """There is no model under this name, path or hub id, or the service has none of that name."""


class UnsupportedModel(ModelError):
    """The model's structure differs from what this runtime computes exactly."""


class CheckpointError(ModelError):
    """A tensor or a file of a checkpoint is missing, misshapen or damaged."""


class ConfigError(CqilError, ValueError):
    """A setting of a measurement or a training, a device, or an output folder cannot be used."""


class TextError(CqilError, ValueError):
    """A text or an evaluation task cannot be used: it is unreadable, too short or malformed."""


class RequestError(CqilError, ValueError):
    """A request cannot be served as asked; other requests are not affected."""


class ServiceError(CqilError):
    """A service does not answer a request, through no fault in the request's values."""


class QueueFull(ServiceError):
    """The queue is full (one may try again later), or a message is larger than any may be."""


class RequestTimeout(ServiceError):
    """The request's deadline has passed."""


class Unauthenticated(ServiceError):
    """The service's API key is missing or wrong."""


class ServiceUnavailable(ServiceError):
    """No service answers, or the one that does is ending."""


class LaunchError(CqilError):
    """The cluster or its actors could not be started, or have died since."""


class InsufficientResources(LaunchError):
    """The cluster has less than what was asked for, or did not free it in time."""


class RankUnavailable(CqilError):
    """The ranks could not be assembled and connected in time: at launch, or after a loss.

    Where no actor was found for a rank, the message names the rank and the node it was on.
    """


class ExchangeError(CqilError):
    """The data plane between ranks has failed."""


class ProtocolError(ExchangeError):
    """A peer sent something other than what the protocol expects next."""


class PeerLost(ExchangeError):
    """A peer closed its connection or missed the deadline.

    Attributes:
        peer: rank of the lost peer (-1 is the coordinator).
        address: "host:port" of the peer as this rank knew it.
        reason: how the loss was noticed.
    """

    def __init__(self, peer: int, address: str, reason: str) -> None:
        super().__init__(peer, address, reason)
        self.peer = peer
        self.address = address
        self.reason = reason

    def __str__(self) -> str:
        name = "the coordinator" if self.peer < 0 else f"rank {self.peer}"
        return f"lost {name} at {self.address}: {self.reason}"
