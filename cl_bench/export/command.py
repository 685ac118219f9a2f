"""The verb ``export``: merged weights for timm, an adapter for PEFT, and a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from cl_bench.data.views import CentreView
from cl_bench.export.adapter import Adapter, adapter
from cl_bench.export.card import card, licence
from cl_bench.export.folding import Plain, merged, plain
from cl_bench.export.loading import Loaded, load
from cl_bench.results.files import replaced
from cl_bench.run.run import quiet

FOLDER_NAME = "export"
"""Default name of the folder of an export, in that of the cell."""


@dataclass(frozen=True)
class Written:
    """What an export has written.

    Attributes:
        files: Paths, weights first.
        notices: A sentence for each thing that a reader of the files should know.
    """

    files: list[Path]
    notices: list[str]


def export(
    cell: Path, folder: Path | None = None, *, experience: int | None = None, weights: str | None = None
) -> Written:
    """Write the kept model of a cell for timm, with a model card, and for PEFT if it is a LoRA.

    Args:
        cell: Folder of the cell.
        folder: Where to write; ``export`` in the folder of the cell if None.
        experience: Index, from 0, of the experience after which the model was kept; the last if None.
        weights: File of the pre-trained weights, if it is no longer where the config says.

    Raises:
        ValueError: If timm cannot hold the model, or the files of the cell do not belong together. Nothing is
            written then.
        FileNotFoundError: If there is no such kept model, or its pre-trained weights are missing.
        OSError: If a file cannot be written.
    """
    loaded = load(cell, experience, weights=weights)
    folded = plain(loaded.strategy.float())
    with quiet():
        fresh, _ = loaded.configuration.build([], [])
    identity = loaded.strategy.backbone.protocol()
    base = f"timm/{identity['model']}" if identity["weights"] == "pretrained" else identity["model"]
    change = adapter(merged(fresh.backbone), folded.state, base)
    absence = change if isinstance(change, str) else None
    target = cell / FOLDER_NAME if folder is None else folder
    contents: dict[str, bytes] = {
        "model.safetensors": safetensors.torch.save(folded.state, {"format": "pt"}),
        "config.json": _json(_timm_config(loaded, folded)),
        "README.md": card(loaded, folded, absence).encode(),
    }
    if isinstance(change, Adapter):
        contents |= {
            "adapter/adapter_model.safetensors": safetensors.torch.save(change.state, {"format": "pt"}),
            "adapter/adapter_config.json": _json(change.config),
        }
    for name, content in contents.items():
        with replaced(target / name) as file:
            file.write(content)
    notices = [] if absence is None else [f"There is no PEFT adapter: {absence}."]
    if not folded.exact_logits:
        notices.append("The predictions are those of the strategy; the logits have another scale.")
    return Written([target / name for name in contents], notices)


def _timm_config(loaded: Loaded, folded: Plain) -> dict[str, Any]:
    """Return what timm reads from ``config.json``: architecture, class names, size and normalisation."""
    backbone, view = loaded.strategy.backbone, loaded.transform
    size = backbone.image_size
    data = {
        "input_size": [3, size, size],
        "mean": [round(value, 6) for value in backbone.mean.flatten().tolist()],
        "std": [round(value, 6) for value in backbone.std.flatten().tolist()],
        "num_classes": folded.num_classes,
        "classifier": "head",
        "label_names": loaded.class_names,
        "license": licence(backbone).name,
    }
    if isinstance(view, CentreView):
        data |= {"crop_pct": view.size / view.short_side, "interpolation": view.interpolation}
    return {
        "architecture": folded.architecture,
        "num_classes": folded.num_classes,
        "num_features": backbone.feature_dim,
        "model_args": folded.options,
        "pretrained_cfg": data,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
