"""The options of gRPC connections, for servers and clients alike."""

from __future__ import annotations

KEEPALIVE = (
    # A service whose node has vanished closes nothing: ask whether it is still there.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),  # what a server puts up with
)
RECONNECTING = (
    # A service that comes back is found as soon as it is asked for.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# The cluster's own addresses, which no proxy leads to.
DIRECT = (("grpc.enable_http_proxy", 0),)


OTHER_CALLS = 32
"""The calls a coordinator takes beside its requests: questions, and requests to be refused."""

# Initial metadata of a call whose request has been let in: where it breaks, somebody was there.
LET_IN = ("cqil-let-in", "1")


def receiving_up_to(max_bytes: int) -> tuple[tuple[str, int], ...]:
    """Make the option that bounds the size of a received message."""
    return (("grpc.max_receive_message_length", max_bytes),)


# gRPC's default of 4 MiB is little for a long completion with 20 alternatives a token.
LONG_ANSWERS = receiving_up_to(64 << 20)
