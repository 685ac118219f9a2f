"""A run, from its configuration to a finished result file."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path

import torch
from lightning.pytorch import Callback

from cl_bench.artifacts.keeping import clear, keepers, lacking
from cl_bench.errors import refusing, sentence
from cl_bench.loop.checkpoint import Refused
from cl_bench.loop.diagnostics import Diagnostics
from cl_bench.loop.provenance import data_hashes, differing_images, recorded_hashes
from cl_bench.processes.ranks import be_first, failed_first, first_is_woken, is_first
from cl_bench.results.result import FILE_NAME, Result, read
from cl_bench.run.choice import choice
from cl_bench.run.claim import Held, claim
from cl_bench.run.configuration import Configuration
from cl_bench.run.tracking import loggers, record

ERROR_NAME = "error.txt"


class RunFailed(RuntimeError):
    """A run failed; its result file holds the reason, and ``error.txt`` in the same folder the traceback."""


def run(
    configuration: Configuration,
    callbacks: Sequence[Callback] = (),
    wait: Callable[[str], None] | None = None,
) -> Result:
    """Return the result of a cell, and run the cell first if it is not done.

    At most one process runs a cell. Those that wait for it read its result.

    Args:
        configuration: The cell.
        callbacks: Callbacks of this run, such as a progress bar.
        wait: Called with a sentence that names the process that runs the cell, before waiting for it; None
            raises instead.

    Raises:
        ValueError: If configuration, data, backbone or device cannot be used. Nothing has been trained then.
        OSError: If data or weights are missing.
        Held: If another process runs the cell and ``wait`` is None, or took it over while this process was
            stopped.
        RunFailed: If training or evaluation failed; without a message if another process prints it.
    """
    if configuration.is_single:
        be_first()
    with refusing():
        configuration.datamodule.setup("fit")
        if is_first():
            _require_writable(configuration.folder)
    # Only the first of several processes holds the lock.
    lock = claim(_claim_path(configuration), wait) if is_first() else nullcontext(lambda: None)
    with lock as require:
        done = finished(configuration)
        if done is None:
            return _run(configuration, callbacks, require)
        require_same_images(done, configuration, data_hashes(configuration.datamodule))
        return read(done)


def _claim_path(configuration: Configuration) -> Path:
    """Return the lock file of a cell, which is the same for every name of its setting."""
    return configuration.results / configuration.benchmark / ".claims" / configuration.hash


def _run(configuration: Configuration, callbacks: Sequence[Callback], require: Callable[[], None]) -> Result:
    """Run a cell that this process has locked; ``require`` raises Held if it has lost the lock."""
    folder, values = configuration.folder, configuration.namespace
    if is_first():
        (folder / ERROR_NAME).unlink(missing_ok=True)
        (folder / "config.yaml").write_text(configuration.yaml, encoding="utf-8")
    torch.set_num_threads(values.threads)
    checkpoints = configuration.checkpoints
    checkpoints.require = require
    if is_first() and not values.resume:
        checkpoints.clear()
    if is_first() and checkpoints.last is None:
        clear(folder)
    with refusing(RunFailed, Held), loggers(configuration, require) as (opened, resuming):
        watching = [Diagnostics(), *callbacks] if values.diagnostics else callbacks
        strategy, trainer = configuration.build([*resuming, *watching], opened)
        trainer.require_fit(strategy, configuration.datamodule, values.regime)
        trainer.callbacks += keepers(
            values.keep,
            folder,
            strategy,
            configuration.hash,
            logits=values.keep_logits,
            require=require,
        )
        try:
            result = trainer.run(
                strategy,
                configuration.datamodule,
                regime=values.regime,
                config=configuration.cell,
                setting=values.setting,
                chosen=choice(configuration),
                folder=folder,
                checkpoints=checkpoints,
                require=require,
            )
        except (Refused, Held):
            raise
        except Exception as error:
            message = trainer.result.error or sentence(error)
            require()
            raise RunFailed(_reported(error, message, folder)) from error
        record(result, opened, folder)
        return result


def finished(configuration: Configuration) -> Path | None:
    """Return the result file of this cell, under any name of its setting, or None if the cell is not done.

    The name of a folder only says where to look: the content of the file decides whose result it is.

    Raises:
        ValueError: If the cell is done and has not kept what ``--keep`` asks for.
    """
    benchmark = configuration.results / configuration.benchmark
    own = configuration.folder / FILE_NAME
    found = benchmark.glob(f"*/*-{configuration.hash}/{FILE_NAME}")  # searched only if its own is not done
    for path in chain([own] if own.is_file() else [], found):
        try:
            result = read(path)
        except (ValueError, OSError):  # a damaged file: the cell runs again and replaces it
            continue
        if result.status == "done" and _is_of(result, configuration):
            _require_kept(path.parent, result, configuration)
            return path
    return None


def _require_kept(folder: Path, result: Result, configuration: Configuration) -> None:
    """Refuse a finished cell without what ``--keep`` asks for: a second run would replace its result."""
    values = configuration.namespace
    absent = lacking(folder, result, values.keep, logits=values.keep_logits)
    if absent is not None:
        raise ValueError(
            f"The cell {folder} is done and has kept no {absent}, which only a run can keep: choose other "
            "--results, remove the folder to run the cell again, or ask for less."
        )


def _is_of(result: Result, configuration: Configuration) -> bool:
    """Return whether ``result`` is that of this cell, by its config and by what it says of itself."""
    values, data, name = configuration.namespace, configuration.datamodule, configuration.strategy_class.name
    return (
        result.cell == configuration.hash
        and (result.strategy == name or result.strategy.startswith(f"{name} ("))
        and (result.dataset, result.num_experiences) == (data.name, data.stream_length)
        and (result.seed, result.order, result.regime) == (values.seed, data.order_name, values.regime)
    )


def images_now(configuration: Configuration) -> dict[str, str]:
    """Return the hashes of the images that a cell would be run on; none if they are not at hand.

    Raises:
        ValueError: If the data cannot be used.
    """
    try:
        return data_hashes(configuration.datamodule)
    except FileNotFoundError:  # a result is of use where its data are not
        return {}


def require_same_images(path: Path, configuration: Configuration, images: Mapping[str, str]) -> None:
    """Check that a finished result is of ``images``, hashes by name, as far as both are known.

    Raises:
        ValueError: If it is not.
    """
    differing = differing_images(images, recorded_hashes(read(path)))
    if differing is None:
        return
    data = configuration.namespace.data
    place = data.get("root") or configuration.datamodule.name
    own_name = "name this dataset with --name, " if "name" in data else ""
    raise ValueError(
        f"The result {path} is of {differing} than {place} has now: {own_name}choose other "
        "--results, or remove the folder of the result to run its cell again."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and log messages of the libraries, but not errors."""
    lightning = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in lightning]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in lightning:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(lightning, levels, strict=True):
                logger.setLevel(level)


def _reported(error: Exception, message: str, folder: Path) -> str:
    """Write the traceback, and return ``message`` if this process is the one to print it, otherwise nothing.

    The process that failed first writes its traceback. The first process prints the message, unless it cannot
    detect the failure of another.
    """
    before, file = failed_first(sentence(error)), folder / ERROR_NAME
    if before is None or (is_first() and not file.exists()):
        with suppress(OSError):  # on a full disk, the error itself matters more
            file.write_text(traceback.format_exc(), encoding="utf-8")
    return message if is_first() or not (before or first_is_woken()) else ""


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"The results folder {folder} cannot be written ({error.strerror}): "
            "choose another with --results."
        ) from error
