"""engine=ray, for real: a cluster of two nodes on this machine, whose workers and nodes are killed in the middle.

Run by `make cluster-test`. The nodes are Ray's own processes, joined over the loopback interface.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from tests.cluster.conftest import Place

CHECKPOINTS = ("engine=ray", "output.checkpoint_every=20")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def address(cluster: Cluster) -> str:
    return f"engine.address={cluster.address}"


def test_two_nodes_capture_what_one_process_does(place: Place, address: str):
    command = place.start("run", "engine=ray", address)
    assert command.wait() == 0, command.text
    assert len(place.workers("run")) == 2
    manifest = place.must_be_whole("run")
    assert {part.number for part in manifest.parts} == {0, 1}  # both had a share


def test_killed_workers_cost_no_row(place: Place, address: str):
    """Both of them, so that the run ends only if others take their places, however quick it is."""
    command = place.start("run", *CHECKPOINTS, address)
    command.until(lambda: len(place.workers("run")) == 2 and place.committed("run") >= 20)
    for worker in place.workers("run"):
        os.kill(worker, signal.SIGKILL)
    assert command.wait() == 0, command.text
    assert place.log("run").count("a worker was lost") == 2
    assert len(place.workers("run")) > 2
    place.must_be_whole("run")


def test_a_lost_node_costs_no_row(place: Place, cluster: Cluster, address: str):
    command = place.start("run", *CHECKPOINTS, address)
    command.until(lambda: len(place.workers("run")) == 2 and place.committed("run") >= 20)
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    assert command.wait() == 0, command.text
    assert "a worker was lost" in place.log("run")
    place.must_be_whole("run")


def test_a_cluster_of_this_machine_alone(place: Place):
    command = place.start("run", "engine=ray", "engine.workers=2", "engine.cpus_per_worker=1")
    assert command.wait() == 0, command.text
    place.must_be_whole("run")


def test_ctrl_c_keeps_what_workers_hold(place: Place):
    """As a terminal sends it: to the whole process group."""
    command = place.start("run", "engine=ray", "engine.workers=2", "engine.cpus_per_worker=1", CHECKPOINTS[1])
    command.until(lambda: place.committed("run") >= 20)
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.wait() == 130, command.text
    assert command.text.rstrip().endswith("interrupted") and "runs resume" in command.text
    assert place.committed("run") < place.whole.counts["examples"]
    resume = place.resume("run")
    assert resume.wait() == 0, resume.text
    place.must_be_whole("run")


def test_a_killed_driver_is_gone_on_with(place: Place, address: str):
    command = place.start("run", *CHECKPOINTS, address)
    command.until(lambda: place.committed("run") >= 20)
    command.kill()
    unasked = place.resume("run")
    assert unasked.wait() == 1 and "--engine-address" in unasked.text
    resume = place.resume("run", "--engine-address", address.partition("=")[2])
    assert resume.wait() == 0, resume.text
    place.must_be_whole("run")


@pytest.mark.parametrize(
    ("address", "told"), [("auto", "no Ray cluster could be joined"), ("127.0.0.1:1", "nothing answers there")]
)
def test_no_cluster_is_one_line(place: Place, address: str, told: str):
    command = place.start("run", "engine=ray", f"engine.address={address}")
    assert command.wait() == 1
    lines = command.text.splitlines()
    assert len(lines) == 1 and f"engine.address={address}: {told}" in lines[0]


def test_more_than_the_cluster_has_is_one_line(place: Place, address: str):
    command = place.start("run", "engine=ray", address, "engine.gpus_per_worker=3")
    assert command.wait() == 1
    assert command.text.splitlines()[-1].startswith("no node of the cluster has 1 CPUs and 3 GPUs for a worker")
