"""How the settings of a method were chosen; a result states it, and no hash includes it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cl_bench.run.configs import Config, load, words
from cl_bench.run.configuration import Configuration, resolve


def choice(configuration: Configuration) -> Config:
    """Return how the settings of a run were chosen, for its provenance.

    They are ``tuned`` if those that a study of this pair varied are as in its best trial, and ``published``
    if those of the method are as in its own config, its recipe and its class, and all that the recipe sets
    for trainer, data and backbone is as there. Otherwise somebody chose them ``by hand``, such as the author
    of the dataset's config.
    """
    study = configuration.tuning
    if study is None:
        return {"settings": "published" if _is_published(configuration) else "by hand"}
    as_tuned = configuration.overridden(words(study.chosen)).cell == configuration.cell
    pair = [one.stem for one in _parts(configuration)[:2]]
    of_pair = pair in ([], [Path(study.strategy).stem, Path(study.dataset).stem])
    return {"settings": "tuned" if as_tuned and of_pair else "by hand", "tuning": asdict(study)}


def _is_published(configuration: Configuration) -> bool:
    if not (parts := _parts(configuration)):
        return False
    strategy, dataset, *recipe = parts
    data = {key: value for key, value in load(dataset).items() if key == "data"}
    try:
        published = resolve([strategy, data, *recipe]).resolved
    except ValueError:  # the method needs what else the dataset's config sets
        return False
    used = configuration.resolved
    return published["model"] == used["model"] and all(_agree(load(one), published, used) for one in recipe)


def _agree(keys: Any, first: Any, second: Any) -> bool:
    """Return whether two configs have the same value at every key of a third."""
    if not all(isinstance(one, dict) for one in (keys, first, second)):
        return bool(first == second)
    return all(_agree(below, first.get(key), second.get(key)) for key, below in keys.items())


def _parts(configuration: Configuration) -> list[Path]:
    """Return the configs of method, dataset and recipe, if it has one; none for the config of a whole run."""
    files = [layer for layer in configuration.layers if isinstance(layer, Path)]
    return files[1:] if len(files) > 2 else []
