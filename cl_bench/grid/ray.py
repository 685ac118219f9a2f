"""The engine on Ray: cells on every machine of a running cluster."""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cl_bench.errors import sentence
from cl_bench.grid.engine import Engine, Value
from cl_bench.grid.work import Job, Outcome, in_new_process

_ATTEMPTS_AFTER_A_LOSS = 3
_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_PASSED_ON = ("WANDB_", "HF_")  # variables of the grid's environment that cells use


class RayEngine(Engine):
    """Cells on a Ray cluster. If a machine fails, its cells run again on another.

    Args:
        address: HOST:PORT of the cluster; None is RAY_ADDRESS, or the cluster that this machine is part of.
        workers: Cells at a time; None lets Ray decide.
        gpus_per_cell: GPUs of a cell; None means one if the cluster has any.
    """

    def __init__(self, address: str | None, workers: int | None, gpus_per_cell: float | None) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS") or "auto"
        self._workers = workers
        self._gpus = gpus_per_cell

    def __enter__(self) -> Self:
        """Connect to the cluster.

        Raises:
            ValueError: If no cluster runs at the address.
        """
        _require_listener(self._address)
        before = signal.getsignal(signal.SIGTERM)  # Ray replaces it
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"No Ray cluster answers at {self._address} ({sentence(error)}): start one with "
                "ray start --head, or give --address HOST:PORT."
            ) from error
        finally:
            signal.signal(signal.SIGTERM, before)
        return self

    def close(self) -> None:
        """Disconnect; Ray terminates the workers of this grid, and each terminates its cell."""
        ray.shutdown()

    def call(self, function: Callable[[], Value]) -> list[Value]:
        """Return what ``function`` returns on each machine of the cluster.

        A machine that was lost seconds ago is still listed, and is left out.
        """
        remote: Any = ray.remote(num_cpus=0)(_called)
        pinned = (NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in _nodes())
        references = [remote.options(scheduling_strategy=where).remote(function) for where in pinned]
        values: list[Value] = []
        for reference in references:
            try:
                values.append(ray.get(reference))
            except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
                if reference == references[-1] and not values:
                    raise
        return values

    def run(
        self,
        jobs: Sequence[Job],
        started: Callable[[Job], None],
        ended: Callable[[Job, Outcome], None],
    ) -> None:
        """Run ``jobs`` on any machine with room for them.

        Raises:
            ValueError: If no machine of the cluster has room for one of them.
        """
        gpus = self._gpus_of_a_cell()
        for job in jobs:
            _require_room(job.threads, gpus)
        environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        remote: Any = ray.remote(max_retries=_ATTEMPTS_AFTER_A_LOSS)(_run)
        waiting, running = list(jobs), dict[Any, Job]()
        logs = {job: _written(job) for job in jobs}
        while waiting or running:
            while waiting and len(running) < (self._workers or len(jobs)):
                job = waiting.pop(0)
                placed = remote.options(num_cpus=job.threads, num_gpus=gpus)
                running[placed.remote(job, Path.cwd(), environment)] = job
            done, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
            for job in [job for job in running.values() if job in logs and _written(job) != logs[job]]:
                del logs[job]
                started(job)
            for reference in done:
                ended(running.pop(reference), _outcome(reference))

    def _gpus_of_a_cell(self) -> float:
        if self._gpus is not None:
            return self._gpus
        return 1.0 if any(node["Resources"].get("GPU") for node in _nodes()) else 0.0


def _run(job: Job, folder: Path, environment: Mapping[str, str]) -> Outcome:
    """Run ``job`` on this machine as if the grid had been started here, in ``folder``."""
    try:
        os.chdir(folder)
    except OSError as error:
        return Outcome(
            f"{platform.node()} cannot enter {folder} ({error.strerror}): start the grid in a folder that "
            "every machine has."
        )
    os.environ.update(environment)
    return in_new_process(job)


def _called(function: Callable[[], Value]) -> Value:
    return function()


def _require_listener(address: str) -> None:
    """Check in seconds that a server listens at the address; Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"The address of a Ray cluster cannot be {address!r}: write HOST:PORT, or auto.")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"No Ray cluster answers at {address} ({sentence(error)}): start one with ray start --head, or "
            "give --address HOST:PORT."
        ) from error


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _require_room(cpus: int, gpus: float) -> None:
    """Refuse cells for which Ray would wait forever."""
    for node in _nodes():
        resources = node["Resources"]
        if resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= gpus:
            return
    raise ValueError(
        f"No machine of the Ray cluster has the CPUs ({cpus}) and GPUs ({gpus:g}) of a cell: add one with "
        "ray start --address, or choose fewer --threads or --gpus-per-cell."
    )


def _written(job: Job) -> int | None:
    """Return when the log of a job was last written, in nanoseconds; None if it does not exist."""
    try:
        return job.log.stat().st_mtime_ns
    except OSError:
        return None


def _outcome(reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Outcome(f"Ray could not run the cell: {sentence(error)}")
    return outcome
