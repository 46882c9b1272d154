"""Several hosts on one machine: namespaces with their own network, processes and home directory.

Each host is a process tree of its own (unshare(1)) on a bridge, with its own address, root's home,
/tmp/ray and /dev/shm, so that Ray nodes, sshd and `ray stop` on one host do not affect another. The
rest of the file system is shared: the package and its environment are at the same path everywhere.
Hosts end with their processes, so that nothing is left even if this one is killed. Needs root on
Linux.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from cqil_dist.errors import LaunchError

HEAD_PORT = 6379
_TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount")
_OPERATOR = 254  # the bridge's own address, where `ray up` is run
_OBJECT_STORE_BYTES = 100_000_000
# As in cluster/: a lost node is noticed within seconds, a stuck process is killed at once, and
# ranks have no lower priority than the machine's other processes.
RAY_SETTINGS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_kill_worker_timeout_milliseconds": "500",
    "RAY_worker_niceness": "0",
}

# Process 1 of a host. Ray's sessions and shared memory are private to the host, and so is root's
# home directory, which sshd and Ray look up in the password file. No name server is asked: Ray
# looks up clouds' metadata servers when it starts, and would wait 10 s for an answer.
_INIT = """
set -e
home=$1
mount -t tmpfs -o size=1g tmpfs /dev/shm
mkdir -p /tmp/ray "$home/.ray_sessions"
mount --bind "$home/.ray_sessions" /tmp/ray
sed "s|^\\(root:[^:]*:[^:]*:[^:]*:[^:]*\\):[^:]*:|\\1:$home:|" /etc/passwd > "$home/.passwd"
mount --bind "$home/.passwd" /etc/passwd
echo "nameserver 127.0.0.1" > "$home/.resolv"
mount --bind "$home/.resolv" /etc/resolv.conf
hostname "$2"
echo ready
while :; do sleep 3600 & wait; done
"""


def why_not() -> str | None:
    """The reason why hosts cannot be made on this machine; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are network namespaces: they need root on Linux"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"hosts need {', '.join(missing)} (Debian: util-linux, iproute2)"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, check=False
    )
    return None if probe.returncode == 0 else f"no namespaces here: {probe.stderr.decode().strip()}"


class Host:
    """One host of a `Network`.

    Attributes:
        name: its host name.
        address: its IPv4 address.
        home: root's home directory on it.
    """

    def __init__(self, network: Network, index: int) -> None:
        self.name = f"host{index}"
        self.address = network.address_of(index)
        self.home = network.folder / self.name
        self.home.mkdir()
        self._network = network
        self._port = f"port{index}"
        self._init, self._pid = _unshared(
            ["--pid", "--ipc", "--uts"], ["bash", "-c", _INIT, "init", str(self.home), self.name]
        )
        assert self._init.stdout is not None
        if self._init.stdout.readline() != "ready\n":
            raise LaunchError(f"{self.name} did not start: {self._init.communicate()[1]}")
        network.plug_in(self._port, self._pid, self.address)

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` on the host, with the environment's commands on PATH."""
        environment = {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "PYTHONUNBUFFERED": "1",
        }
        settings = [f"{name}={value}" for name, value in environment.items()]
        return ["nsenter", "-t", str(self._pid), "-a", "--", "env", *settings, *words]

    def run(self, *words: str, timeout_s: float = 120, check: bool = True) -> str:
        """Run a command on the host to its end, and return its output.

        Raises:
            LaunchError: the command failed; the message has what it printed.
        """
        done = subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=self.home,
        )
        if check and done.returncode != 0:
            output = (done.stdout + done.stderr)[-3000:]
            raise LaunchError(f"{self.name}: {' '.join(words)} gave {done.returncode}: {output}")
        return done.stdout

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command on the host, which ends with the host."""
        return subprocess.Popen(self.command(*words), text=True, cwd=self.home, **options)

    def start_ray(self, head: Host | None = None, *, cpus: int) -> None:
        """Start a Ray node on the host: the head of a cluster, or a member of `head`'s."""
        role = ["--head", f"--port={HEAD_PORT}", "--include-dashboard=false"]
        if head is not None:
            role = [f"--address={head.address}:{HEAD_PORT}"]
        settings = [f"{name}={value}" for name, value in RAY_SETTINGS.items()]
        node = [f"--node-ip-address={self.address}", f"--num-cpus={cpus}"]
        node += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        self.run("env", *settings, "ray", "start", *role, *node)

    def processes(self, pattern: str) -> list[int]:
        """Process ids, as the host numbers them, of processes whose command line matches."""
        return [int(pid) for pid in self.run("pgrep", "-f", pattern, check=False).split()]

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one of the host's processes, if that still exists."""
        self.run("kill", f"-{number.value}", str(pid), check=False)

    def kill_ray(self) -> None:
        """Kill the host's Ray node and everything that runs in it."""
        self.run("pkill", "-KILL", "-f", "ray", check=False)

    def cut(self) -> None:
        """Disconnect the host: nothing goes in or out, and no connection is closed."""
        self._network.switch("ip", "link", "set", self._port, "down")

    def restore(self) -> None:
        """Connect the host again."""
        self._network.switch("ip", "link", "set", self._port, "up")

    def power_off(self) -> None:
        """End everything that runs on the host; calling this again has no effect."""
        self._init.kill()
        self._init.wait()


class Network:
    """Hosts on one bridge; use it in a `with` block.

    Args:
        count: how many hosts to make; their addresses are 10.77.0.1 and on.

    Attributes:
        hosts: the hosts, in order of address.
        folder: the directory of their homes, which is removed at the end.
        switch_pid: a process in the bridge's network namespace, whose address is 10.77.0.254.
    """

    def __init__(self, count: int) -> None:
        if (reason := why_not()) is not None:
            raise LaunchError(reason)
        self.hosts: list[Host] = []
        self._switch, self.switch_pid = _unshared([], ["bash", "-c", "echo; sleep infinity"])
        self.folder = Path(tempfile.mkdtemp(prefix="cqil_hosts_"))
        try:
            assert self._switch.stdout is not None
            self._switch.stdout.readline()
            self.switch("ip", "link", "set", "lo", "up")
            self.switch("ip", "link", "add", "bridge", "type", "bridge")
            self.switch("ip", "addr", "add", f"{self.address_of(_OPERATOR)}/24", "dev", "bridge")
            self.switch("ip", "link", "set", "bridge", "up")
            token = secrets.token_hex(32)
            for index in range(1, count + 1):
                host = Host(self, index)
                self.hosts.append(host)
                (host.home / ".ray").mkdir()
                (host.home / ".ray" / "auth_token").write_text(token, encoding="ascii")
        except BaseException:
            self.close()
            raise

    def address_of(self, index: int) -> str:
        return f"10.77.0.{index}"

    def switch(self, *words: str) -> str:
        """Run a command in the bridge's network namespace, and return its output."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.switch_pid), "--net", "--", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LaunchError(f"{' '.join(words)} gave {done.returncode}: {done.stderr}")
        return done.stdout

    def host_at(self, address: str) -> Host:
        (host,) = (host for host in self.hosts if host.address == address)
        return host

    def start_ray(self) -> None:
        """Start a Ray node on each host that has none.

        The first host is the cluster's head, with no room for ranks; the others have room for one.
        """
        head, *others = self.hosts
        idle = [host for host in self.hosts if not host.processes("raylet/raylet")]
        if head in idle:
            head.start_ray(cpus=0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: host.start_ray(head, cpus=1), set(idle) & set(others)))

    def plug_in(self, port: str, pid: int, address: str) -> None:
        """Connect a host's namespace to the bridge."""
        self.switch(
            "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid)
        )
        self.switch("ip", "link", "set", port, "master", "bridge", "up")
        for words in (
            ["addr", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
            # It leads nowhere, but programs find their own address by it.
            ["route", "add", "default", "via", self.address_of(_OPERATOR)],
        ):
            subprocess.run(["nsenter", "-t", str(pid), "--net", "--", "ip", *words], check=True)

    def close(self) -> None:
        """End all hosts and remove their homes; calling this again has no effect."""
        for host in self.hosts:
            host.power_off()
        self._switch.kill()
        self._switch.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unshared(namespaces: Sequence[str], words: Sequence[str]) -> tuple[subprocess.Popen[str], int]:
    """Run a command in new namespaces, which end with the process, as it ends with this one.

    Returns:
        The process, and the process id by which the namespaces can be entered.
    """
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", *namespaces),
            *("--fork", "--kill-child"),
            *(["--mount-proc"] if "--pid" in namespaces else []),
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 10
    while process.poll() is None:
        if pids := children.read_text(encoding="ascii").split():
            return process, int(pids[0])
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    process.kill()
    raise LaunchError(f"unshare failed: {process.communicate()[1]}")
