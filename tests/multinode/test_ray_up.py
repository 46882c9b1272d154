"""`ray up cluster/local.yaml` and `ray down` on three hosts with sshd, run as users run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.hosts import Host, Network
from faults.remote import RemoteEngine
from helpers.nodes import host_of
from helpers.watching import wait_for

from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.plan import Plan

REPOSITORY = Path(__file__).parents[2]
PLAN = "P2 S12 E28 D1"
PROMPT = [504, 3575, 282, 4649, 314]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        not (SSHD and shutil.which("ssh") and shutil.which("rsync")),
        reason="needs openssh-server, openssh-client and rsync",
    ),
]


class Operator:
    """The machine that runs `ray up`, on the hosts' network and with a home of its own."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.home = network.folder / "operator"
        (self.home / ".ssh").mkdir(parents=True)
        (self.home / ".ray").mkdir()
        shutil.copy(network.hosts[0].home / ".ray" / "auth_token", self.home / ".ray")
        self.key = self.home / ".ssh" / "key"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True
        )
        self.config = self.home / "local.yaml"
        self.config.write_text(yaml.safe_dump(self._rendered()), encoding="utf-8")

    def _rendered(self) -> dict[str, Any]:
        """The shipped configuration, with the lines marked EDIT changed for these hosts."""
        shipped = (REPOSITORY / "cluster" / "local.yaml").read_text(encoding="utf-8")
        config: dict[str, Any] = yaml.safe_load(shipped)
        head, *workers = self.network.hosts
        config["provider"] |= {
            "head_ip": head.address,
            "worker_ips": [host.address for host in workers],
        }
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.key)}
        assert config["min_workers"] == config["max_workers"] == len(workers)
        return config

    def ray(self, *words: str) -> str:
        done = subprocess.run(
            ["nsenter", "-t", str(self.network.switch_pid), "--net", "--", "ray", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HOME": str(self.home),
                "RAY_TMPDIR": str(self.home),
                "RAY_AUTH_MODE": "token",
            },
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


def start_sshd(host: Host, operator: Operator) -> None:
    """Start sshd with the operator's key and the home directory of a machine with the package.

    What `make install` and `cqil model fetch` would install is there, so they have nothing to do.
    """
    (host.home / ".ssh").mkdir()
    shutil.copy(f"{operator.key}.pub", host.home / ".ssh" / "authorized_keys")
    (host.home / ".bashrc").touch()
    (host.home / "cqil_dist").mkdir()
    (host.home / "cqil_dist" / ".venv").symlink_to(Path(sys.prefix))
    key = host.home / "sshd_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    host.run("mkdir", "-p", "/run/sshd")
    options = [
        f"HostKey={key}",
        f"ListenAddress={host.address}",
        "StrictModes=no",
        "UsePAM=no",
        "PermitRootLogin=yes",
        "PidFile=none",
        "AuthorizedKeysFile=.ssh/authorized_keys",
    ]
    assert SSHD is not None
    host.popen(SSHD, "-D", "-f", "/dev/null", *(f"-o{option}" for option in options))


@pytest.fixture(scope="module")
def operator(smollm2_path: Path) -> Iterator[Operator]:
    with Network(3) as network:
        operator = Operator(network)
        for host in network.hosts:
            start_sshd(host, operator)
            cached = host.home / ".cache" / "cqil_dist" / "models" / smollm2_path.name
            shutil.copytree(smollm2_path, cached, copy_function=link_or_copy)
        yield operator


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def test_ray_up_generate_lose_a_node_ray_down(operator: Operator, smollm2_path: Path) -> None:
    hosts = operator.network.hosts
    head = hosts[0]
    operator.ray("up", "--yes", "--no-config-cache", str(operator.config))
    wait_for(lambda: len(live_nodes(head)) == 3, "the workers join", timeout_s=180)

    config = ModelConfig.from_directory(smollm2_path)
    plan = Plan.parse(PLAN, config.num_layers)
    reference = ReferenceModel(config, Checkpoint(smollm2_path), plan)
    with RemoteEngine(
        head,
        model="smollm2-135m",
        plan=PLAN,
        ranks=2,
        strategy="STRICT_SPREAD",
        address="auto",
        max_len=256,
        step_deadline_s=10,
    ) as engine:
        ranks = engine.status()["ranks"]
        assert len({rank["address"] for rank in ranks}) == 2
        stream = engine.stream(PROMPT, max_tokens=60, temperature=0, ignore_eos=True).read(10)
        lost = next(rank for rank in ranks if rank["address"] != head.address)
        host_of(operator.network, lost).kill_ray()
        stream.read()
        logits = reference.logits([*PROMPT, *stream.token_ids])[len(PROMPT) - 1 : -1]
        assert logits.argmax(-1).tolist() == stream.token_ids
        status = engine.status()
        assert status["recoveries"] == 1
        now = {rank["address"] for rank in status["ranks"]}
        assert lost["address"] not in now
        assert len(now) == 2

    operator.ray("down", "--yes", str(operator.config))
    wait_for(
        lambda: not any(host.processes("raylet|gcs_server|ray::") for host in hosts), "Ray ends"
    )


def live_nodes(head: Host) -> list[str]:
    code = (
        "import json, ray; ray.init('auto', log_to_driver=False, logging_level='ERROR'); "
        "print(json.dumps([n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']]))"
    )
    output = head.run("python", "-c", code, check=False).splitlines()
    nodes: list[str] = json.loads(output[-1]) if output else []
    return nodes
