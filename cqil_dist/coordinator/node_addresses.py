"""The addresses by which the nodes of a cluster reach each other."""

from __future__ import annotations

import ray


def host_addresses() -> dict[str, str]:
    """Return the address to reach each live node by, by Ray's id of the node.

    A single node stays on loopback; several use the addresses by which they know each other, not
    whatever a node's name or default route would give.
    """
    nodes = ray.nodes()
    if len(nodes) == 1:
        return {nodes[0]["NodeID"]: "127.0.0.1"}
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}
