"""A pool of generated scenes with their descriptions, rendered once and read from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cl_bench.network.embedded import OPTIONS
from cl_bench.prepare.pretraining.descriptors import Descriptors
from cl_bench.prepare.pretraining.scenes import random_scenes

_BATCH = 100


@dataclass(frozen=True)
class Recipe:
    """What a pool is made of; another recipe needs another folder.

    Attributes:
        scenes: How many.
        leaves: Shapes in a scene.
        entries: Patches in the dictionary of the descriptors.
        fitted: Scenes that the descriptors are made from; more than a description has numbers.
        shard: Scenes in a file.
        seed: Of all that is drawn.
    """

    scenes: int = 30_000
    leaves: int = 10
    entries: int = 200
    fitted: int = 3_000
    shard: int = 2_000
    seed: int = 0


class ScenePool(Dataset[tuple[Tensor, Tensor]]):
    """Scenes and their descriptions, made where ``folder`` lacks them.

    A shard depends on the recipe and its number alone, so a pool that was cut off is completed.

    Args:
        folder: Where the files are.
        recipe: What to make.
        device: What renders.
    """

    def __init__(self, folder: Path, recipe: Recipe, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe = recipe
        self.descriptors = _descriptors(folder / "descriptors.safetensors", recipe, device)
        self._scenes, self._answers = [], []
        for shard in range(-(-recipe.scenes // recipe.shard)):
            scenes, answers = (folder / f"{kind}-{shard:05}.npy" for kind in ("scenes", "answers"))
            if not scenes.exists():
                _save(scenes, _rendered(recipe.shard, recipe, _generator(recipe.seed, 1 + shard, device)))
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
        """Return scenes (B, 3, size, size), uint8, and the answer of each token (B, tokens, dim)."""
        places = [divmod(index, self.recipe.shard) for index in indices]
        scenes = np.stack([self._scenes[shard][place] for shard, place in places])
        answers = np.stack([self._answers[shard][place] for shard, place in places])
        return torch.from_numpy(scenes), torch.from_numpy(answers).float()


def _descriptors(file: Path, recipe: Recipe, device: torch.device) -> Descriptors:
    describe = Descriptors(recipe.entries, OPTIONS["embed_dim"], OPTIONS["img_size"] // OPTIONS["patch_size"])
    if not file.exists():
        describe.to(device)
        generator = _generator(recipe.seed, 0, device)
        describe.fit(_rendered(recipe.fitted, recipe, generator), generator)
        tensors = {name: tensor.cpu() for name, tensor in describe.state_dict().items()}
        safetensors.torch.save_file(tensors, file)
    describe.load_state_dict(safetensors.torch.load_file(file))
    return describe.to(device)


def _rendered(number: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    sizes = [min(_BATCH, number - start) for start in range(0, number, _BATCH)]
    size = OPTIONS["img_size"]
    return torch.cat([random_scenes(part, size, recipe.leaves, generator) for part in sizes])


def _generator(seed: int, part: int, device: torch.device) -> torch.Generator:
    """Return a generator whose numbers depend on ``seed`` and ``part``."""
    (state,) = np.random.SeedSequence((seed, part)).generate_state(1, np.uint64).tolist()
    return torch.Generator(device).manual_seed(state >> 1)


def _save(file: Path, tensor: Tensor) -> None:
    # Under its name a file is whole: that it is there says that nothing is missing.
    part = file.with_suffix(".part.npy")
    np.save(part, tensor.cpu().numpy())
    part.rename(file)
