"""Cells on a real cluster of two nodes on loopback, one of which dies during a grid."""

import contextlib
import io
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cl_bench.__main__ import main
from cl_bench.grid.cells import Cell
from cl_bench.grid.ray import RayEngine
from cl_bench.grid.work import Job
from cl_bench.loop.continuation import resumption
from cl_bench.results.result import FILE_NAME, Result, read
from cl_bench.results.tuning import read as read_record

# The second cell on the node whose raylet the file `doomed` names hangs in its second experience.
STRATEGY = """
import os
import time
from pathlib import Path

from strategies.linear_probe import LinearProbe

HERE = Path(__file__).parent


class Recorded(LinearProbe):
    name = "recorded"

    def before_training(self, data):
        super().before_training(data)
        node = os.environ.get("RAY_RAYLET_PID", "none")
        if self.experience.is_first:
            with (HERE / "begun").open("a") as begun:
                begun.write(f"{node} {self.trainer.datamodule.seed}\\n")
            return
        doomed, lines = HERE / "doomed", (HERE / "begun").read_text().splitlines()
        if doomed.read_text() == node and sum(line.startswith(f"{node} ") for line in lines) > 1:
            (HERE / "hangs").touch()
            time.sleep(3600)
"""

GRID = """
strategies: [{folder}/recorded.yaml]
datasets: [toy]
seeds: [1, 2, 3, 4, 5]
common: {{trainer.accelerator: cpu}}
"""

TUNED = """
strategies: [{folder}/recorded.yaml]
datasets: [toy]
common: {{trainer.accelerator: cpu}}
tune: {{trials: 6, experiences: first:2, space: {folder}/space.yaml}}
"""

NODE: dict[str, Any] = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": 80 * 2**20}

TIMES = ("seconds", "provenance", "peak_memory_bytes")


@dataclass
class Nodes:
    """A cluster of one node, and of a second one once that is used; each has one CPU."""

    cluster: Cluster
    killed: bool = False

    @cached_property
    def second(self) -> Any:
        return self.cluster.add_node(**NODE)

    @property
    def second_raylet(self) -> int:
        pid: int = self.second.all_processes["raylet"][0].process.pid
        return pid

    def kill_second(self) -> None:
        """Kill all processes of the second node, as a power cut does."""
        self.killed = True
        for pid in [self.second_raylet, *descendants(self.second_raylet)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listed.splitlines()[1:])}
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Cluster()
    try:
        cluster.add_node(**NODE, include_dashboard=False)
        yield Nodes(cluster)
    finally:
        cluster.shutdown()


def grid(*words: object) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["grid", *map(str, words)])
    return status, output.getvalue()


def results(folder: Path) -> dict[int, Result]:
    return {result.seed: result for path in folder.rglob(FILE_NAME) if (result := read(path))}


def timeless(value: Any) -> Any:
    """Return a result without the values that differ between any two runs."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list | tuple) else value


def test_a_cell_on_a_cluster_gives_the_result_of_its_own_command(nodes: Nodes, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("{strategies: [ncm], datasets: [toy], common: {trainer.accelerator: cpu}}")
    status, output = grid(
        path, "--engine", "ray", "--address", nodes.cluster.address, "--results", tmp_path / "ray"
    )
    assert (status, "1 of 1 cells done" in output) == (0, True), output
    words = ["run", "ncm", "toy", "--trainer.accelerator=cpu", f"--results={tmp_path / 'local'}"]
    assert main(words) == 0
    (on_ray,), (local,) = (results(tmp_path / name).values() for name in ("ray", "local"))
    assert timeless(asdict(on_ray)) == timeless(asdict(local))


def kill_mid_way(nodes: Nodes, folder: Path) -> tuple[str, list[list[str]]]:
    """Write the strategy of the grids, and kill the second node when its second cell hangs.

    Return the node, and a list that will hold the cells that had begun by then.
    """
    (folder / "recorded_strategy.py").write_text(STRATEGY)
    (folder / "recorded.yaml").write_text("model: {class_path: recorded_strategy.Recorded}")
    (folder / "doomed").write_text(doomed := str(nodes.second_raylet))
    killed: list[list[str]] = []

    def kill() -> None:
        while not (folder / "hangs").exists():
            time.sleep(0.1)
        killed.append((folder / "begun").read_text().splitlines())
        nodes.kill_second()

    threading.Thread(target=kill, daemon=True).start()
    return doomed, killed


@pytest.mark.soak
def test_the_cell_on_a_node_that_dies_resumes_from_its_checkpoint(nodes: Nodes, tmp_path: Path) -> None:
    path, begun = tmp_path / "grid.yaml", tmp_path / "begun"
    path.write_text(GRID.format(folder=tmp_path))
    doomed, killed = kill_mid_way(nodes, tmp_path)
    status, output = grid(
        path, "--engine", "ray", "--address", nodes.cluster.address, "--results", tmp_path / "ray"
    )
    assert status == 0, output
    assert "5 of 5 cells done" in output
    (at_death,) = killed
    assert len({line.split()[0] for line in at_death}) == 2  # both nodes had run cells

    begun_cells = Counter(line.split()[1] for line in begun.read_text().splitlines())
    assert begun_cells == Counter("12345")  # none started twice

    status, output = grid(path, "--results", tmp_path / "local", "--workers", "1")
    assert status == 0, output
    on_ray, local = results(tmp_path / "ray"), results(tmp_path / "local")
    assert on_ray.keys() == local.keys() == set(range(1, 6))
    in_flight = int([line for line in at_death if line.startswith(f"{doomed} ")][-1].split()[1])
    resumed = {seed: result.provenance["resumed"] for seed, result in on_ray.items() if resumption(result)}
    assert {seed: [entry["from"] for entry in entries] for seed, entries in resumed.items()} == {
        in_flight: ["experience 2, expanded"]
    }
    for seed, result in local.items():
        assert timeless(asdict(on_ray[seed])) == timeless(asdict(result))
    assert len({tuple(result.rows[-1].correct) for result in local.values() if result.rows[-1]}) > 1


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "No Ray cluster answers at 127.0.0.1:1 ("),
        ("nonsense", "The address of a Ray cluster cannot be 'nonsense': write HOST:PORT, or auto."),
    ],
)
def test_an_address_without_a_cluster_is_refused_in_one_sentence(address: str, sentence: str) -> None:
    engine = RayEngine(address, workers=None, gpus_per_cell=None)
    with pytest.raises(ValueError, match=re.escape(sentence)), engine:
        pass


def test_a_gpu_that_no_machine_has_is_refused_at_once(nodes: Nodes, tmp_path: Path) -> None:
    job = Job(Cell("ncm", "toy", ()), tmp_path, threads=1)
    with (
        RayEngine(nodes.cluster.address, workers=None, gpus_per_cell=0.5) as engine,
        pytest.raises(
            ValueError, match=r"No machine of the Ray cluster has the CPUs \(1\) and GPUs \(0\.5\)"
        ),
    ):
        engine.run([job], lambda job: None, lambda job, outcome: None)


@pytest.mark.soak
def test_a_study_on_two_nodes_one_of_which_dies_has_the_trials_of_one(nodes: Nodes, tmp_path: Path) -> None:
    if nodes.killed:
        nodes.cluster.remove_node(nodes.second, allow_graceful=False)
        nodes.second = nodes.cluster.add_node(**NODE)
    path = tmp_path / "grid.yaml"
    path.write_text(TUNED.format(folder=tmp_path))
    (tmp_path / "space.yaml").write_text("head_lr: {low: 1.0e-4, high: 1.0, log: true}")
    _, killed = kill_mid_way(nodes, tmp_path)
    status, output = grid(
        path, "--engine", "ray", "--address", nodes.cluster.address, "--results", tmp_path / "ray"
    )
    assert status == 0, output
    assert len(killed) == 1
    status, output = grid(path, "--results", tmp_path / "local", "--workers", "1")
    assert status == 0, output
    on_ray, local = (
        read_record(tmp_path / name / "tuning" / "recorded-toy.json") for name in ("ray", "local")
    )
    assert vars(on_ray) | {"spent": None} == vars(local) | {"spent": None}
    assert len(local.scores) == 6
