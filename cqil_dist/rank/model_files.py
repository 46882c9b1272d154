"""The model's files on this node: one copy a node, fetched where that is possible."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ray

from cqil_dist.errors import ModelNotFound
from cqil_dist.model.adapter import Adapter
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.rank.spec import EngineSpec

_FETCH_S = 3600
_RESOLVE = """
import sys
from cqil_dist.errors import CqilError
from cqil_dist.store.store import resolve
from cqil_dist.progress import SilentProgress
try:
    print(resolve(sys.argv[1], SilentProgress()))
except CqilError as error:
    sys.exit(str(error))
"""


def model_directory(name: str, path: Path) -> Path:
    """Find the directory of a model on this node; fetch the model if it is not there.

    Args:
        name: the name the model was launched by.
        path: its directory on the node that launched it.

    Raises:
        ModelNotFound: it is not there and cannot be fetched; the message names the node.
    """
    if path.is_dir():
        return path
    # In a process of its own: converting takes libraries and memory that a rank has no use for.
    # Ranks of one node share one copy: the first to come makes it, the others wait at its lock.
    node = ray.util.get_node_ip_address()
    try:
        found = subprocess.run(
            [sys.executable, "-c", _RESOLVE, name],
            capture_output=True,
            text=True,
            check=False,
            timeout=_FETCH_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(f"node {node} did not fetch {name} within {_FETCH_S} s") from error
    if found.returncode != 0:
        raise ModelNotFound(
            f"node {node} has no directory {path}, and could not fetch "
            f"{name}: {found.stderr.strip()[-500:]}; fetch or copy the model there"
        )
    return Path(found.stdout.strip().splitlines()[-1])


def checkpoints_of(spec: EngineSpec, path: Path) -> list[Checkpoint]:
    """Open the checkpoint that each plan of an engine is read from, one for each plan.

    Args:
        path: the model's directory on this node.

    Raises:
        ModelNotFound: the adapter is not on this node.
        CheckpointError: a file is missing or damaged; the message names it.
    """
    original = Checkpoint(path)
    if spec.adapter is None:
        return [original] * len(spec.assignments)
    if not spec.adapter.is_dir():
        node = ray.util.get_node_ip_address()
        raise ModelNotFound(f"node {node} has no directory {spec.adapter}; copy the adapter there")
    return [Checkpoint(path, Adapter(spec.adapter)), *[original] * (len(spec.assignments) - 1)]
