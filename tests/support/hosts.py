"""Several "hosts" on one machine: network namespaces with a name, an address and a /dev/shm of their own on one switch.

    with Hosts(folder, 2) as hosts:
        job = Job(hosts.command("n0", ["mpiexec", "-hosts", "n0,n1", ...]), log, **hosts.environment)

Each host lives as long as the process that holds its namespaces, which ends when its standard input does: nothing is
left behind, even if the tests are killed. `hosts.shell` stands in for ssh. What the hosts share is the disk, as a
cluster's do, and the table of processes.
"""

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.jobs import MARK

SUBNET = "10.77.0"
# with a bridge such as container engines make: up, with the same address on every host, leading nowhere
HOLDER = """
set -e
hostname {name}
mount --bind {folder}/{name}.hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
ip link add docker0 type bridge
ip address add 172.17.0.1/16 dev docker0
ip link set docker0 up
echo ready
exec cat
"""
SHELL = """#!/bin/sh
# called as ssh is: options, host, command; like ssh it passes no environment on
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
exec nsenter --target "$(cat {folder}/$host.pid)" --net --uts --mount -- \\
    env -i HOME="$HOME" PATH=/usr/local/bin:/usr/bin:/bin {mark}="${mark}" sh -c "cd {folder}; $*"
"""


class Hosts:
    """Hosts n0, n1, ... with the addresses 10.77.0.1, 10.77.0.2, ...

    Args:
        folder: for the few files that make them; on the disk that they share.
        count: how many.
        own_name: the address that a host's own name has in its /etc/hosts; None: the one that others reach it by.
    """

    def __init__(self, folder: Path, count: int, own_name: str | None = None) -> None:
        self.folder, self.names, self.own_name = folder, [f"n{i}" for i in range(count)], own_name
        self.shell = folder / "remote_shell"
        self.holders: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shell.write_text(SHELL.format(folder=self.folder, mark=MARK))
        self.shell.chmod(0o755)
        try:
            self._hold("switch")
            self._ip("switch", "link", "add", "switch", "type", "bridge")
            self._ip("switch", "link", "set", "switch", "up")
            for number, name in enumerate(self.names):
                self._hold(name)
                self._connect(name, f"{SUBNET}.{number + 1}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def environment(self) -> dict[str, str]:
        """For a job on them: both MPIs start their daemons by our shell, and use no memory that real hosts lack."""
        return {
            "HYDRA_LAUNCHER": "ssh",
            "HYDRA_LAUNCHER_EXEC": str(self.shell),
            "PRTE_MCA_plm_ssh_agent": str(self.shell),
            "OMPI_MCA_btl_tcp_if_include": "eth0",  # Open MPI alone tries the bridge too, and waits for ever
            "UCX_TLS": "tcp,self",  # UCX knows one host from another by the machine, which they share
            "TMPDIR": "/dev/shm",  # noqa: S108  # private to each host, where /tmp is not
        }

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """The same command as if it were typed on a host."""
        spaces = ["--net", "--uts", "--mount"]
        return ["nsenter", "--target", str(self.holders[name].pid), *spaces, "--wd=.", "--", *command]

    def cut(self, name: str) -> None:
        """Pull the plug of a host."""
        self._ip("switch", "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        self._ip("switch", "link", "set", name, "up")
        # a question for an address, asked for the last time before, would still fail: "no route to host"
        self._ip(name, "neighbour", "flush", "dev", "eth0")

    def received(self, name: str) -> int:
        """Bytes that a host has got over its cable."""
        shown = self._ip(name, "-s", "-j", "link", "show", "eth0")
        return json.loads(shown)[0]["stats64"]["rx"]["bytes"]

    def _hold(self, name: str) -> None:
        lines = ["127.0.0.1 localhost"]
        for number, other in enumerate(self.names):
            address = self.own_name if other == name and self.own_name else f"{SUBNET}.{number + 1}"
            lines.append(f"{address} {other}")
        (self.folder / f"{name}.hosts").write_text("\n".join(lines) + "\n")
        script = HOLDER.format(name=name, folder=self.folder)
        holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--ipc", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.holders[name] = holder
        (self.folder / f"{name}.pid").write_text(str(holder.pid))
        if holder.stdout is None or holder.stdout.readline() != "ready\n":
            raise OSError(f"the namespaces of {name} cannot be made")

    def _connect(self, name: str, address: str) -> None:
        switch = str(self.holders["switch"].pid)
        self._ip(name, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", switch)
        self._ip("switch", "link", "set", name, "master", "switch", "up")
        self._ip(name, "address", "add", f"{address}/24", "dev", "eth0")
        self._ip(name, "link", "set", "eth0", "up")

    def _ip(self, name: str, *arguments: str) -> str:
        command = ["nsenter", "--target", str(self.holders[name].pid), "--net", "ip", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _end(self) -> None:
        for holder in self.holders.values():
            holder.communicate()  # closes its input


@functools.cache
def missing() -> str | None:
    """Return why this machine cannot have hosts, or None."""
    tools = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if tools:
        return f"no {tools[0]}: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = "ip link add b0 type bridge && ip link add v0 type veth peer name v1 && mount -t tmpfs tmpfs /dev/shm"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--ipc", "sh", "-c", probe], capture_output=True, text=True
    )
    return f"no network namespaces: {done.stderr.strip()}" if done.returncode else None
