"""Vision transformers of timm: by weight tag, from a local checkpoint, with random weights, or our own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.models import get_deprecated_models
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cl_bench.errors import by_likeness, nearest, suggestion
from cl_bench.network import embedded
from cl_bench.network.frozen import Frozen, freeze_layers, refresh
from cl_bench.network.prompts import Prompts, pooled_tokens, prompted_tokens
from cl_bench.network.weights import load, sha256_of_file, sha256_of_tensors

Normalisation = Literal["unit", "half", "imagenet", "clip"]

_MEAN_AND_STD: dict[Normalisation, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
_BY_OPTIONS = "vision_transformer"
_EMBEDDED = "embedded"
_WORDS = ("pretrained", "random")


class Backbone(nn.Module):
    """A frozen vision transformer without classifier: images (B, 3, H, W) in [0, 1] to features (B, d).

    The feature is what the model gives after pooling and its final norm, the class token for a plain ViT.

    Args:
        model: A timm vision transformer with its weight tag, such as vit_base_patch16_224.augreg_in21k;
            vision_transformer, built only from the options; or embedded, which is shipped with the suite.
        weights: pretrained: downloaded by timm, or shipped; random: drawn from the seed; otherwise the path
            of a checkpoint, a .safetensors file or a torch file that holds nothing but tensors.
        options: Arguments of the timm model, such as img_size, patch_size, embed_dim, depth and num_heads.
        normalisation: What is done to images in [0, 1]. unit: nothing; half: they are mapped to [-1, 1];
            imagenet and clip: they are standardised by the mean and deviation of those data.
        seed: Seed of random weights.
        compiler: Backend of torch.compile, such as inductor; null to run the model as it is written. One
            compilation serves every experience of a stream. While a layer has a hook, as online estimation
            needs in training, the model runs as it is written.

    Attributes:
        vit: The timm model: a method may read its modules and parameters, such as ``pos_embed``. What a
            method trains inside it goes through adapters or prompts; everything else is frozen.
        image_size: Height and width of an image in pixels.
        feature_dim: Size of a feature, ``d``.
        weights_sha256: Of the checkpoint file; without one, of the tensors by name.
        pretrained_names: What of the state is pre-trained; a method may add to the state later.

    Raises:
        ValueError: If there is no such model, it takes no such options, or the checkpoint does not fit it.
        FileNotFoundError: If the checkpoint is missing or the weights cannot be downloaded.

    >>> tiny = dict(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    >>> backbone = Backbone("vision_transformer", weights="random", options=tiny)
    >>> backbone(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 32])
    >>> backbone.feature_dim, backbone.image_size, backbone.depth
    (32, 8, 2)
    >>> prefix = torch.zeros(3, 32), torch.zeros(3, 32)
    >>> backbone(torch.zeros(5, 3, 8, 8), Prompts(torch.zeros(4, 32), prefixes={1: prefix})).shape
    torch.Size([5, 32])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str = "vit_base_patch16_224.augreg_in21k",
        weights: str = "pretrained",
        options: dict[str, Any] | None = None,
        normalisation: Normalisation = "unit",
        seed: int = 0,
        compiler: str | None = None,
    ) -> None:
        super().__init__()
        _require_compiler(compiler)
        self.model = model
        self.weights = weights if weights in _WORDS else "file"
        self.options = dict(options or {})
        self.normalisation = normalisation
        file = _file(model, weights)
        downloaded = weights == "pretrained" and file is None
        architecture = _BY_OPTIONS if model == _EMBEDDED else model
        _require_name(architecture, tagged=downloaded)
        built_with = embedded.OPTIONS | self.options if model == _EMBEDDED else self.options
        vit: Any = _vision_transformer(architecture, built_with, seed, pretrained=downloaded)
        self.vit: nn.Module = vit.requires_grad_(False)
        self.image_size = _image_size(model, vit)
        self.feature_dim: int = vit.num_features
        if file is not None:
            load(self.vit, file, model, resample=model == _EMBEDDED)
        # Computed now: merged adapters will change the tensors.
        self.weights_sha256 = sha256_of_tensors(self.vit) if file is None else sha256_of_file(file)
        freeze_layers(self.vit)
        self.compiler = compiler
        self._compile()
        self._precision: Callable[[], AbstractContextManager[object]] = nullcontext
        mean, std = _MEAN_AND_STD[normalisation]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.pretrained_names = frozenset(self.state_dict())

    @classmethod
    def named(cls, model: str) -> dict[str, Any]:
        """Return the settings that the name of a model stands for: the name, and every default."""
        parameters = inspect.signature(cls).parameters
        return {name: parameter.default for name, parameter in parameters.items()} | {"model": model}

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in the order of the forward pass."""
        return list(self.vit.get_submodule("blocks").children())

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens, which come before prompts and patches."""
        vit: Any = self.vit
        return int(vit.num_prefix_tokens)

    def fuse_attention(self, fused: bool) -> None:
        """Choose whether attention runs in one kernel, or as separate products; results agree to rounding.

        Measured with torch 2.14 on two CPU cores, training in bf16: the kernel's backward pass makes a step
        of a small ViT twice as long as the products do, and one of ViT-B/16 a fifth longer. In float32 and
        without gradients the kernel is as fast or faster.
        """
        for block in self.blocks:
            attention: Any = getattr(block, "attn", None)
            if hasattr(attention, "fused_attn"):
                attention.fused_attn = fused

    def protocol(self) -> dict[str, Any]:
        """Return what must be equal for two numbers to stand side by side."""
        return {
            "model": self.model,
            "options": self.options,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
            "normalisation": self.normalisation,
        }

    def compute_in(self, precision: Callable[[], AbstractContextManager[object]]) -> None:
        """Run every later forward pass inside the context ``precision()``, such as autocast.

        The trainer sets its own, so measurements and tests see images as training does, while the hooks
        around training run in full precision.
        """
        self._precision = precision

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to features (B, d); ``prompts`` are left out of the pooling.

        Raises:
            ValueError: If the images have another size, or the model cannot take the prompts.
        """
        return self._in_precision(images, prompts, pool=True)

    def tokens(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to all tokens (B, N, d) after the final norm, prompts included.

        Class token and registers come first, then prompt tokens, then patches.

        Raises:
            ValueError: If the images have another size, or the model cannot take the prompts.
        """
        return self._in_precision(images, prompts, pool=False)

    def _in_precision(self, images: Tensor, prompts: Prompts | None, *, pool: bool) -> Tensor:
        expected = (3, self.image_size, self.image_size)
        if images.shape[1:] != expected:
            raise ValueError(
                f"Images of shape {tuple(images.shape)} do not fit a backbone of {self.image_size} pixels: "
                f"set the image_size of the data to {self.image_size}, or img_size in the backbone's options."
            )
        run = self._compiled
        if run is None or self._has_hooks() or self._is_trained():
            run = self._run
        with self._precision():
            refresh(self.vit)
            if self.normalisation != "unit":
                images = (images - self.mean) / self.std
            return run(images, prompts, pool)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled code and the trainer's precision, which a copy does not share."""
        return self.__dict__ | {"_compiled": None, "_precision": nullcontext}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile the copy again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def _compile(self) -> None:
        # Heads stay outside: they grow with every experience, so each would compile again.
        self._compiled = None if self.compiler is None else torch.compile(self._run, backend=self.compiler)

    def _is_trained(self) -> bool:
        """Whether a measurement needs gradients of frozen weights, which would compile again."""
        return any(layer.is_trained for layer in self.vit.modules() if isinstance(layer, Frozen))

    def _run(self, images: Tensor, prompts: Prompts | None, pool: bool) -> Tensor:
        if prompts is None:
            model: Any = self.vit
            found: Tensor = model(images) if pool else model.forward_features(images)
            return found
        tokens = prompted_tokens(self.vit, images, prompts)
        return pooled_tokens(self.vit, tokens, prompts) if pool else tokens

    def _has_hooks(self) -> bool:
        """Whether a layer has a hook, which compiled code would not call."""
        return any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.vit.modules())


def weights_identity(model: str, weights: str) -> str:
    """Return what identifies ``weights`` whatever its path: a file's sha256, or the word itself.

    Raises:
        FileNotFoundError: If there is no such file.

    >>> weights_identity("vit_tiny_patch16_224", "random")
    'random'
    """
    file = _file(model, weights)
    return weights if file is None else f"sha256:{sha256_of_file(file)}"


def _file(model: str, weights: str) -> Path | None:
    """Return the checkpoint that ``weights`` names, or None for a word that names none."""
    if model == _EMBEDDED and weights == "pretrained":
        return embedded.weights_file()
    if weights in _WORDS:
        return None
    path = Path(weights).expanduser()
    if not path.is_file():
        match = nearest(weights, _WORDS)
        raise FileNotFoundError(
            f"There is no weights file {weights}: "
            + (f"did you mean {match}?" if match else "give a path, or pretrained, or random.")
        )
    return path


# Names


def _require_name(model: str, *, tagged: bool) -> None:
    """Refuse a name that timm does not know, or that does not determine the weights."""
    if model == _BY_OPTIONS:
        if tagged:
            raise ValueError(
                f"No pretrained weights belong to {model}: name a timm model with its tag, "
                "or set weights to random or to the path of a checkpoint."
            )
        return
    current = get_deprecated_models().get(model)
    if current is not None:
        raise ValueError(f"{model} is a name that timm has dropped: write {current}.")
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        names = by_likeness(model, [_BY_OPTIONS, _EMBEDDED, *timm.list_models(pretrained=tagged)])
        raise ValueError(f"timm has no model {model}: the nearest names are {', '.join(names[:3])}.")
    tags = by_likeness(model, timm.list_pretrained(f"{architecture}.*"))
    choice = f"choose among {', '.join(tags)}" if tags else "it has none, set weights to random or to a path"
    if tag and model not in tags:
        raise ValueError(f"timm has no weights {model}: {choice}.")
    if tagged and not tag:
        raise ValueError(f"{model} does not determine the weights: {choice}.")


def _require_compiler(compiler: str | None) -> None:
    if compiler is None:
        return  # to list the backends takes a second
    known = torch.compiler.list_backends(exclude_tags=())
    if compiler not in known:
        raise ValueError(f"torch.compile has no backend {compiler!r}. {suggestion(compiler, known)}")


# Building


def _vision_transformer(model: str, options: dict[str, Any], seed: int, *, pretrained: bool) -> nn.Module:
    """Build the model; random weights depend on ``seed``, and the global generator stays as it was."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if model == _BY_OPTIONS:
                return VisionTransformer(num_classes=0, **options)
            return timm.create_model(model, pretrained=pretrained, num_classes=0, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"The weights of {model} could not be downloaded ({type(error).__name__}): get model.safetensors "
            f"of timm/{model} from the Hugging Face Hub another way, and give its path as weights."
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{model} cannot be built with options {options}: {_one_line(error)}. {_unknown_options(options)}"
        ) from error


def _unknown_options(options: Mapping[str, Any]) -> str:
    known = list(inspect.signature(VisionTransformer).parameters)
    hints = [f"{by_likeness(option, known)[0]} for {option}" for option in options if option not in known]
    return f"Did you mean {', '.join(hints)}?" if hints else "See timm's VisionTransformer."


def _image_size(model: str, vit: nn.Module) -> int:
    """Return height and width of an image, once the model is known to be a vision transformer."""
    block = next(iter(getattr(vit, "blocks", ())), None)
    size = getattr(getattr(vit, "patch_embed", None), "img_size", None)
    if size is None or not hasattr(block, "attn"):
        raise ValueError(f"{model} does not consist of attention blocks: choose a vision transformer.")
    height, width = size
    if height != width:
        raise ValueError(f"Images must be square, not {height} x {width} pixels: give img_size one number.")
    return int(height)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
