"""How the settings of a method were chosen; a result states it, and no hash includes it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cl_bench.run.configs import Config, load, words
from cl_bench.run.configuration import Configuration, resolve


def choice(configuration: Configuration) -> Config:
    """Return how the settings of a run were chosen, for its provenance.

    They are ``tuned`` if those that a study varied are as in its best trial, and ``published`` if those of
    the method are as in its own config, its recipe and its class. Otherwise somebody chose them ``by hand``,
    such as the author of the dataset's config.
    """
    study = configuration.tuning
    if study is None:
        return {"settings": "published" if _is_published(configuration) else "by hand"}
    as_tuned = configuration.overridden(words(study.chosen)).cell == configuration.cell
    return {"settings": "tuned" if as_tuned else "by hand", "tuning": asdict(study)}


def _is_published(configuration: Configuration) -> bool:
    files = [layer for layer in configuration.layers if isinstance(layer, Path)]
    if len(files) < 3:  # the config of a whole run, whose parts have no names of their own
        return False
    _, strategy, dataset, *recipe = files
    data = {key: value for key, value in load(dataset).items() if key == "data"}
    try:
        model = resolve([strategy, data, *recipe]).resolved["model"]
    except ValueError:  # the method needs what else the dataset's config sets
        return False
    return bool(model == configuration.resolved["model"])
