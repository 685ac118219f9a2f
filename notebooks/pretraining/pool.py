"""A pool of generated scenes with their descriptions, rendered once and then read from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cl_bench.network.embedded import OPTIONS
from datamodules.fractals import seeded
from pretraining.descriptors import Descriptors
from pretraining.scenes import random_scenes

_BATCH = 100


@dataclass(frozen=True)
class Recipe:
    """The settings of a pool; each recipe needs a folder of its own.

    Attributes:
        scenes: Number of scenes.
        leaves: Number of shapes in a scene.
        entries: Number of patches in the dictionary of the descriptors.
        fitted: Number of scenes that the descriptors are fitted to; more than a description has dimensions.
        shard: Number of scenes in a file.
        seed: Seed of everything that is drawn.
    """

    scenes: int = 30_000
    leaves: int = 10
    entries: int = 200
    fitted: int = 3_000
    shard: int = 2_000
    seed: int = 0


class ScenePool(Dataset[tuple[Tensor, Tensor]]):
    """Scenes and their descriptions; what ``folder`` lacks is rendered.

    A shard depends only on the recipe and its number, so an interrupted pool can be completed.

    Args:
        folder: Folder of the files.
        recipe: Settings of the pool.
        device: Device that renders.
    """

    def __init__(self, folder: Path, recipe: Recipe, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe = recipe
        self.descriptors = _descriptors(folder / "descriptors.safetensors", recipe, device)
        self._scenes, self._answers = [], []
        for shard in range(-(-recipe.scenes // recipe.shard)):
            scenes, answers = (folder / f"{kind}-{shard:05}.npy" for kind in ("scenes", "answers"))
            if not scenes.exists():
                _save(scenes, _rendered(recipe.shard, recipe, seeded(recipe.seed, 1 + shard, device=device)))
            if not answers.exists():
                batches = torch.from_numpy(np.load(scenes)).split(_BATCH)
                _save(answers, torch.cat([self.descriptors(batch.to(device)).half() for batch in batches]))
                print(
                    f"rendered and described {(shard + 1) * recipe.shard} of {recipe.scenes} scenes",
                    flush=True,
                )
            self._scenes.append(np.load(scenes, mmap_mode="r"))
            self._answers.append(np.load(answers, mmap_mode="r"))

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.recipe.scenes

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return scenes (B, 3, size, size), uint8, and the target of each token (B, tokens, dim)."""
        places = [divmod(index, self.recipe.shard) for index in indices]
        scenes = np.stack([self._scenes[shard][place] for shard, place in places])
        answers = np.stack([self._answers[shard][place] for shard, place in places])
        return torch.from_numpy(scenes), torch.from_numpy(answers).float()


def _descriptors(file: Path, recipe: Recipe, device: torch.device) -> Descriptors:
    describe = Descriptors(recipe.entries, OPTIONS["embed_dim"], OPTIONS["img_size"] // OPTIONS["patch_size"])
    if not file.exists():
        describe.to(device)
        generator = seeded(recipe.seed, 0, device=device)
        describe.fit(_rendered(recipe.fitted, recipe, generator), generator)
        tensors = {name: tensor.cpu() for name, tensor in describe.state_dict().items()}
        safetensors.torch.save_file(tensors, file)
    describe.load_state_dict(safetensors.torch.load_file(file))
    return describe.to(device)


def _rendered(number: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    sizes = [min(_BATCH, number - start) for start in range(0, number, _BATCH)]
    size = OPTIONS["img_size"]
    return torch.cat([random_scenes(part, size, recipe.leaves, generator) for part in sizes])


def _save(file: Path, tensor: Tensor) -> None:
    # A file gets its name when it is complete.
    part = file.with_suffix(".part.npy")
    np.save(part, tensor.cpu().numpy())
    part.rename(file)
