"""Two hosts: network namespaces joined by a virtual cable, one torchrun in each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from tests.support.torchrun import World, torchrun

LONGEST = 300
TIMEOUT = 4


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces and their cable; names and addresses are of this process, so that several tests can run."""

    def __init__(self) -> None:
        key = os.getpid() % 65536
        self.names = [f"kaisa-{key}-{host}" for host in (0, 1)]
        self.cables = [f"kv{key}x{host}" for host in (0, 1)]
        self.addresses = [f"10.{200 + key // 6554}.{key % 250}.{host + 1}" for host in (0, 1)]

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """Pulls the cable out of the second host."""
        ip("-n", self.names[1], "link", "set", self.cables[1], "down")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self.cables[0]], check=False, capture_output=True)

    def start(self, host: int, folder: Path, plan: dict[str, object]) -> AbstractContextManager[World]:
        """Starts the torchrun of one host, which waits for that of the other."""
        options = [
            *("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "kaisa"),
            *("--rdzv-endpoint", f"{self.addresses[0]}:29517", "--local-addr", self.addresses[host]),
            *("--rdzv-conf", f"is_host={1 - host},join_timeout=40"),
        ]
        # No name server answers in a namespace; do not wait for it.
        environment = [f"GLOO_SOCKET_IFNAME={self.cables[host]}", "RES_OPTIONS=timeout:1 attempts:1"]
        inside = ["ip", "netns", "exec", self.names[host], "env", *environment]
        return torchrun(folder, {"timeout": TIMEOUT, **plan}, 1, options, inside)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("the command ip is missing: install iproute2")
    made = Hosts()
    try:
        made.connect()
    except subprocess.CalledProcessError as error:
        made.close()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield made
    made.close()


def parameters(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"result_{rank}.pt", weights_only=True)["parameters"]


def test_two_hosts_give_what_two_ranks_of_one_host_give(tmp_path: Path, hosts: Hosts) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    with hosts.start(0, both, {}) as first, hosts.start(1, both, {}) as second:
        assert (first.wait(LONGEST), second.wait(LONGEST)) == (0, 0), first.log
    with torchrun(one, {"timeout": TIMEOUT}) as world:
        assert world.wait(LONGEST) == 0, world.log
    for rank in (0, 1):
        for name, expected in parameters(one, rank).items():
            assert torch.equal(parameters(both, rank)[name], expected)


def test_a_host_that_is_cut_off_is_named(tmp_path: Path, hosts: Hosts) -> None:
    plan = {"fault": "cut_off", "slow": 0.2, "until": 1000, "saves": False}
    with hosts.start(0, tmp_path, plan) as first, hosts.start(1, tmp_path, plan) as second:
        first.wait_for("started_0")
        first.wait_for("started_1")
        hosts.cut()
        first.wait_for("error_0", 4 * TIMEOUT)
        assert "rank 1 is dead or unreachable" in first.error(0)
        second.wait_for("error_1", 4 * TIMEOUT)
        assert "the store that the ranks met at does not answer" in first.error(1)
