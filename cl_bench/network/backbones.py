"""Vision transformers of timm by pinned weight tag, by local checkpoint, drawn from a seed, or our own."""

from __future__ import annotations

import hashlib
import inspect
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
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
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_CLASSIFIERS = ("head.", "head_dist.")


class Backbone(nn.Module):
    """A frozen vision transformer without classifier: images (B, 3, H, W) in [0, 1] to features (B, d).

    The feature is what the model gives after pooling and its final norm, the class token for a plain ViT.

    Args:
        model: A timm vision transformer with its weight tag, such as vit_base_patch16_224.augreg_in21k;
            vision_transformer, built from the options alone; or embedded, which is shipped with the suite.
        weights: pretrained: downloaded by timm, or shipped; random: drawn from the seed; otherwise the path
            of a checkpoint, a .safetensors file or a torch file that holds nothing but tensors.
        options: Arguments of the timm model, such as img_size, patch_size, embed_dim, depth and num_heads.
        normalisation: What becomes of images in [0, 1]. unit: they stay; half: they are mapped to [-1, 1];
            imagenet and clip: the mean and deviation of those data are taken out.
        seed: Seed of random weights.
        compiler: Backend of torch.compile, such as inductor; null to run the model as it is written. What is
            compiled serves every experience of a stream. As long as somebody listens to a layer, as online
            estimation does in training, the model runs as it is written.

    Attributes:
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
            _load(self.vit, file, model)
        # Taken now: merged adapters will change the tensors.
        self.weights_sha256 = _sha256_of_tensors(self.vit) if file is None else _sha256_of_file(file)
        freeze_layers(self.vit)
        self.compiler = compiler
        self._compile()
        mean, std = _MEAN_AND_STD[normalisation]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.pretrained_names = frozenset(self.state_dict())

    @classmethod
    def named(cls, model: str) -> dict[str, Any]:
        """Return the settings that a model's name alone stands for: the name, and every default."""
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

    def fuse_attention(self, fused: bool) -> None:
        """Let attention run in one kernel, or as the products it is made of; results agree to rounding.

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

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to features (B, d).

        Raises:
            ValueError: If the images have another size.
        """
        expected = (3, self.image_size, self.image_size)
        if images.shape[1:] != expected:
            raise ValueError(
                f"Images of shape {tuple(images.shape)} do not fit a backbone of {self.image_size} pixels: "
                f"set the image_size of the data to {self.image_size}, or img_size in the backbone's options."
            )
        refresh(self.vit)
        if self.normalisation != "unit":
            images = (images - self.mean) / self.std
        if self._compiled is None or self._is_listened_to() or self._is_trained():
            return self._run(images)
        return self._compiled(images)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled code, which belongs to this backbone and not to a copy of it."""
        return self.__dict__ | {"_compiled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile the copy by itself."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def _compile(self) -> None:
        # Heads stay outside: they grow with every experience, and a compiled one would be compiled anew.
        self._compiled = None if self.compiler is None else torch.compile(self._run, backend=self.compiler)

    def _is_trained(self) -> bool:
        """Whether a measurement asks for gradients of frozen weights: code would be compiled for it."""
        return any(layer.is_trained for layer in self.vit.modules() if isinstance(layer, Frozen))

    def _run(self, images: Tensor) -> Tensor:
        features: Tensor = self.vit(images)
        return features

    def _is_listened_to(self) -> bool:
        """Whether a layer has a hook, which compiled code would not call."""
        return any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.vit.modules())


def weights_identity(model: str, weights: str) -> str:
    """Return what stands for ``weights`` where a path may not: a file's sha256, or the word itself.

    Raises:
        FileNotFoundError: If there is no such file.

    >>> weights_identity("vit_tiny_patch16_224", "random")
    'random'
    """
    file = _file(model, weights)
    return weights if file is None else f"sha256:{_sha256_of_file(file)}"


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
    """Refuse a name that timm does not know today, or that leaves open which weights it means."""
    if model == _BY_OPTIONS:
        if tagged:
            raise ValueError(
                f"No pretrained weights belong to {model}: name a timm model with its tag, "
                "or set weights to random or to the path of a checkpoint."
            )
        return
    current = get_deprecated_models().get(model)
    if current is not None:
        raise ValueError(f"{model} is an old name that timm gave up: write {current}.")
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        names = by_likeness(model, [_BY_OPTIONS, _EMBEDDED, *timm.list_models(pretrained=tagged)])
        raise ValueError(f"timm has no model {model}: the nearest names are {', '.join(names[:3])}.")
    tags = by_likeness(model, timm.list_pretrained(f"{architecture}.*"))
    choice = f"choose among {', '.join(tags)}" if tags else "it has none, set weights to random or to a path"
    if tag and model not in tags:
        raise ValueError(f"timm has no weights {model}: {choice}.")
    if tagged and not tag:
        raise ValueError(f"{model} names no weights, and timm's versions differ in what they add: {choice}.")


def _require_compiler(compiler: str | None) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if compiler is not None and compiler not in known:
        raise ValueError(f"torch.compile has no backend {compiler!r}. {suggestion(compiler, known)}")


# Building


def _vision_transformer(model: str, options: dict[str, Any], seed: int, *, pretrained: bool) -> nn.Module:
    """Build the model; what is random is drawn from ``seed`` and leaves the global generator as it was."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if model == _BY_OPTIONS:
                return VisionTransformer(num_classes=0, **options)
            return timm.create_model(model, pretrained=pretrained, num_classes=0, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"The weights of {model} could not be downloaded ({type(error).__name__}): get model.safetensors "
            f"of timm/{model} from the Hugging Face Hub by other means, and give its path as weights."
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
        raise ValueError(f"{model} is no row of attention blocks over patches: choose a vision transformer.")
    height, width = size
    if height != width:
        raise ValueError(f"Images are square, not of {height} x {width} pixels: give one number as img_size.")
    return int(height)


# Checkpoints


def _load(vit: nn.Module, file: Path, model: str) -> None:
    """Copy the tensors of ``file`` into ``vit``; every key and shape must agree, but for a classifier."""
    state = _without_classifier(_state_dict(file), vit)
    problems = _problems(state, vit.state_dict())
    if problems:
        made_with = ", ".join(f"{name} {value}" for name, value in _options_of(state).items())
        raise ValueError(
            f"{file} does not fit {model}: {'; '.join(problems)}. "
            "Choose the model and the options that it was made with"
            + (f": its shapes speak of {made_with}." if made_with else ".")
        )
    vit.load_state_dict(state)


def _state_dict(file: Path) -> dict[str, Tensor]:
    """Read the tensors of ``file`` by name, without running anything that it may contain."""
    content = _content(file)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{file} holds no tensors by name, at its top or under state_dict or model: "
            "save the state dict of the model alone."
        )
    return dict(content)


def _content(file: Path) -> Any:
    if file.suffix not in _SUFFIXES:
        raise ValueError(f"{file} is no checkpoint by its name: give a file in {', '.join(_SUFFIXES)}.")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds something else than tensors, and reading it could run code: "
            "save its state dict as .safetensors where you trust it, and give that file."
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as a checkpoint ({_one_line(error)}): see that it is whole and readable."
        ) from error


def _without_classifier(state: Mapping[str, Tensor], vit: nn.Module) -> dict[str, Tensor]:
    own = vit.state_dict()
    return {key: tensor for key, tensor in state.items() if key in own or not key.startswith(_CLASSIFIERS)}


def _problems(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return one phrase for each way in which the two differ, naming the first keys."""
    missing = [f"{key} {tuple(own[key].shape)}" for key in own if key not in state]
    unexpected = [f"{key} {tuple(state[key].shape)}" for key in state if key not in own]
    reshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [f"{what}: {_first(keys)}" for what, keys in found.items() if keys]


def _first(keys: Sequence[str], shown: int = 3) -> str:
    rest = len(keys) - shown
    return ", ".join(keys[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _options_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Read off the shapes which options a plain ViT was made with; the number of heads leaves no trace."""
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patches is None or positions is None:
        return {}
    patch_size = patches.shape[-1]
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    return {
        # Class and register tokens are too few to complete another row of patches.
        "img_size": math.isqrt(positions.shape[1]) * patch_size,
        "patch_size": patch_size,
        "embed_dim": patches.shape[0],
        "depth": len(blocks),
    }


# Hashes


def _sha256_of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of_tensors(module: nn.Module) -> str:
    """Return the sha256 over names, types, shapes and bytes of the state, by name."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
