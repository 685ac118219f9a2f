"""The model card of an exported model: what it is, how to use it, its numbers, and whose weights it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from timm.models import get_pretrained_cfg

from cl_bench.export.folding import Plain
from cl_bench.export.loading import Loaded
from cl_bench.network.backbones import Backbone
from cl_bench.results.escapes import in_markdown
from cl_bench.results.metrics import DEFINITIONS


class Licence(NamedTuple):
    """The licence of pre-trained weights.

    Attributes:
        name: Its identifier, as model hubs write it; ``other`` if it is not known.
        sentence: What is known about it.
    """

    name: str
    sentence: str


def licence(backbone: Backbone) -> Licence:
    """Return the licence of the pre-trained weights of ``backbone``."""
    if backbone.model == "embedded" and backbone.weights == "pretrained":
        return Licence("mit", "The pre-trained weights are those of cl-bench, under the MIT licence.")
    if backbone.weights == "random":
        return Licence("mit", "The weights started at random from a seed of cl-bench, under the MIT licence.")
    if backbone.weights == "file":
        return Licence(
            "other",
            f"The pre-trained weights are a file with the sha256 `{backbone.weights_sha256}`, whose licence "
            "cl-bench does not know: name it here before you publish the model.",
        )
    cfg = get_pretrained_cfg(backbone.model)
    name = cfg.license if cfg is not None else None
    page = f"https://huggingface.co/timm/{backbone.model}"
    if name is None:
        return Licence("other", f"timm names no licence for these pre-trained weights: see {page}.")
    return Licence(name.lower(), f"timm names the licence {name} for the pre-trained weights: see {page}.")


def card(loaded: Loaded, plain: Plain, absence: str | None) -> str:
    """Return the model card as Markdown.

    Args:
        loaded: The strategy, with its result.
        plain: What is exported of it.
        absence: Why there is no PEFT adapter, in words; None if there is one.
    """
    result, backbone = loaded.result, loaded.strategy.backbone
    granted = licence(backbone)
    options = "".join(f", {name}={value!r}" for name, value in plain.options.items())
    parts = [
        f"---\nlibrary_name: timm\nlicense: {granted.name}\n"
        "tags: [image-classification, timm, continual-learning, cl-bench]\n---",
        f"# {in_markdown(result.strategy)} on {in_markdown(result.benchmark)}",
        f"A vision transformer that has learnt {plain.num_classes} classes in "
        f"{loaded.experience + 1} of {result.num_experiences} experiences, exported by cl-bench.",
        "## Use",
        "```python\nimport timm\n\n"
        f'model = timm.create_model("{plain.architecture}", num_classes={plain.num_classes}, '
        f'checkpoint_path="model.safetensors"{options})\n```',
        'Or `timm.create_model("local-dir:FOLDER", pretrained=True)`. `config.json` holds the class names, '
        "and mean and deviation by which images in [0, 1] are normalised.",
        _table(
            [
                ("before the normalisation", in_markdown(_one_line(str(loaded.transform)))),
                ("logits", _logits(plain)),
                ("precision", _precision(loaded)),
                ("PEFT", _peft(absence)),
            ]
        ),
        "## Origin",
        _table(
            [
                ("strategy", f"{in_markdown(result.strategy)}, regime {result.regime}"),
                ("cell", f"`{result.cell}`, seed {result.seed}, class order {in_markdown(result.order)}"),
                ("commit", f"`{result.provenance.get('commit') or 'not recorded'}`"),
                ("dataset", f"{in_markdown(result.dataset)}, {len(result.class_names)} classes"),
                ("kept of old training data", result.training_data or "not recorded"),
            ]
        ),
        "## Protocol",
        f"Numbers are comparable with others of the protocol `{result.protocol.fingerprint}`:",
        _table(_protocol(loaded)),
        "## Numbers",
        "Values of this run after this experience, in percent. `R[i, j]` is the accuracy on experience j "
        "after training on experience i, and T the number of experiences so far.",
        _table(
            [(f"`{name}`", f"{value:.2f}", DEFINITIONS[name]) for name, value in _numbers(loaded).items()],
            header=("metric", "value", "definition"),
        ),
        "## Licence",
        granted.sentence,
    ]
    return "\n\n".join(parts) + "\n"


def _numbers(loaded: Loaded) -> dict[str, float]:
    values = loaded.result.metrics_after(loaded.experience)
    return {name: value for name, value in values.items() if value == value}


def _protocol(loaded: Loaded) -> list[tuple[str, str]]:
    identity = loaded.result.protocol.identity
    names = ("evaluated_on", "decoding", "image_size", "train_transform", "test_transform", "precision")
    backbone = identity.get("backbone")
    shown = {name: identity.get(name) for name in names} | (backbone if isinstance(backbone, dict) else {})
    return [(name.replace("_", " "), in_markdown(_one_line(str(value)))) for name, value in shown.items()]


def _logits(plain: Plain) -> str:
    if plain.exact_logits:
        return "those of the strategy, up to rounding"
    return (
        "not those of the strategy, which compares by angle or distance; the predicted class is the same for "
        "every image"
    )


def _precision(loaded: Loaded) -> str:
    if loaded.trainer.precision == "32-true":
        return "float32, as in the run"
    return f"float32; the run was in {loaded.trainer.precision}, so its numbers may differ in single images"


def _peft(absence: str | None) -> str:
    if absence is not None:
        return f"no adapter: {absence}"
    return "`adapter/` is the same change as a LoRA adapter, for a model with the pre-trained weights"


def _table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ("", "")) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
