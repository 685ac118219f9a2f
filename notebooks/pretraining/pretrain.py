"""Pre-train the embedded transformer: ``python -m pretraining.pretrain --folder FOLDER``.

The transformer learns to describe scenes, and to recognise a glyph in two drawings of it. The same command
resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Sampler

from cl_bench.network.embedded import OPTIONS
from datamodules.fractals import seeded
from pretraining.glyphs import drawings, random_glyphs
from pretraining.pool import Recipe, ScenePool

BATCH = 64  # scenes
STEPS_AN_EPOCH = 100

GLYPHS = ((64, 32), (64, 32), (64, 32), (32, 64))
"""Number of glyphs, and pixels along a side of their drawings, in turn."""

_OF_GLYPHS = 1 << 20  # sets the seeds of glyphs apart from those of the pool
_PROJECTED = 96  # dimensions in which drawings are compared
_TEMPERATURE = 0.1

_WHITENED = 500  # scenes that the first layer's whitening is made from
_FLOOR = 0.01  # share of the mean variance that is added to the variance of each direction
_POSITIONS = 0.3  # standard deviation of the initial position embeddings


class Pretraining(LightningModule):
    """A transformer that learns to describe scenes and to tell glyphs apart.

    Args:
        pool: Scenes with their descriptions; its seed is also that of the glyphs.
        steps: Number of training steps.
        lr: Peak learning rate, after a warm-up over the first tenth; it then falls to zero.
    """

    deviation: Tensor

    def __init__(self, pool: ScenePool, steps: int, lr: float) -> None:
        super().__init__()
        self.steps = steps
        self.lr = lr
        self.register_buffer("deviation", pool.descriptors.deviation.cpu().clone())
        self.seed = pool.recipe.seed
        self.vit = _first_weights(pool, self.deviation)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            self.projection = nn.Linear(OPTIONS["embed_dim"], _PROJECTED)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss on scenes (B, 3, H, W), uint8, with the target of each token (B, tokens, dim).

        Targets of tokens are in units of the standard deviation of each direction. The target of an image is
        the mean over its tokens, scaled to the length √dim. The contrastive loss of two drawings of each of
        some new glyphs is added.
        """
        scenes, targets = batch
        tokens = self.vit.forward_features(scenes.float() / 127.5 - 1)
        features = self.vit.forward_head(tokens).float()
        descriptions = F.normalize(targets.mean(dim=1)) * targets.shape[-1] ** 0.5
        losses = {
            "tokens": F.mse_loss(tokens.float(), targets / self.deviation),
            "images": F.mse_loss(features, descriptions),
            "glyphs": self._loss_on_glyphs(*GLYPHS[self.global_step % len(GLYPHS)]),
        }
        loss = losses["tokens"] + losses["images"] + losses["glyphs"]
        self.log_dict(losses | {"loss": loss})
        return loss

    def _loss_on_glyphs(self, number: int, size: int) -> Tensor:
        """Return the cross-entropy of finding the other drawing of a glyph, in units of what chance has.

        Source: NT-Xent of SimCLR, https://arxiv.org/abs/2002.05709.
        """
        generator = seeded(self.seed, _OF_GLYPHS, self.global_step, device=self.device)
        glyphs = random_glyphs(number, generator)
        pairs = torch.cat([drawings(glyphs, size, generator) for _ in range(2)])
        projected = self.projection(self.vit(pairs.float() / 127.5 - 1)).float()
        cosines = F.normalize(projected) @ F.normalize(projected).T
        others = cosines.fill_diagonal_(-torch.inf) / _TEMPERATURE
        partners = torch.arange(2 * number, device=self.device).roll(number)
        return F.cross_entropy(others, partners) / math.log(2 * number - 1)

    def configure_optimizers(self) -> Any:
        """Return AdamW with weight decay on all but one-dimensional parameters, and a one-cycle schedule."""
        parameters = list(self.parameters())
        groups = [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.05},
            {"params": [each for each in parameters if each.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        schedule = OneCycleLR(optimizer, self.lr, total_steps=self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def exported(self) -> dict[str, Tensor]:
        """Return the weights for images in [0, 1], in half precision except for the first layer."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.vit.state_dict().items()}
        weight, bias = "patch_embed.proj.weight", "patch_embed.proj.bias"
        # Training scaled scenes to [-1, 1] by 2x - 1, which the first layer takes over here. Its large sums
        # nearly cancel, so it needs single precision.
        state[bias] -= state[weight].sum(dim=(1, 2, 3))
        state[weight] *= 2
        return {name: tensor if name in (weight, bias) else tensor.half() for name, tensor in state.items()}


def _first_weights(pool: ScenePool, deviation: Tensor) -> VisionTransformer:
    """Build the transformer; its first layer whitens patches of scenes, its last has the scale of targets."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(pool.recipe.seed)
        vit: Any = VisionTransformer(num_classes=0, dynamic_img_size=True, **OPTIONS)
    for block in vit.blocks:
        block.attn.fused_attn = False  # in bf16 on a CPU, plain products are faster than the kernel
    embedding = vit.patch_embed.proj
    size = embedding.kernel_size[0]
    scenes, _ = pool[list(range(_WHITENED))]
    patches = F.unfold(scenes.float() / 127.5 - 1, size, stride=size).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    strongest = (
        vectors[:, -embedding.out_channels :]
        * (values[-embedding.out_channels :] + _FLOOR * values.mean()).rsqrt()
    )
    with torch.no_grad():
        embedding.weight[: strongest.shape[1]] = strongest.T.view(-1, *embedding.weight.shape[1:])
        embedding.bias.zero_()
        vit.pos_embed.mul_(_POSITIONS / vit.pos_embed.std())
        vit.fc_norm.weight.copy_(deviation / deviation.square().mean().sqrt())
    built: VisionTransformer = vit
    return built


class Batches(Sampler[list[int]]):
    """Batches from the current step on; a function of seed and step.

    Each round through the pool has an order of its own. An epoch of Lightning is only the interval between
    two checkpoints.

    Args:
        number: Number of scenes in the pool.
        seed: Seed of the orders.
        steps_done: Returns the number of steps taken.
    """

    def __init__(self, number: int, seed: int, steps_done: Callable[[], int]) -> None:
        self.number = number
        self.seed = seed
        self.steps_done = steps_done

    def __len__(self) -> int:
        """Return the number of batches until the next checkpoint, at most."""
        return STEPS_AN_EPOCH

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch."""
        start = self.steps_done()
        for step in range(start, start + STEPS_AN_EPOCH):
            round_, place = divmod(step, self.number // BATCH)
            yield self._order(round_)[place * BATCH : (place + 1) * BATCH].tolist()

    @lru_cache(maxsize=1)  # noqa: B019
    def _order(self, round_: int) -> npt.NDArray[np.int64]:
        bits = np.random.MT19937(np.random.SeedSequence((self.seed, round_)))
        return np.random.RandomState(bits).permutation(self.number)


class Export(Callback):
    """Writes the weights after every epoch."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights."""
        assert isinstance(pl_module, Pretraining)
        safetensors.torch.save_file(pl_module.exported(), self.file)


def pretrain(
    folder: Path,
    *,
    recipe: Recipe,
    steps: int,
    lr: float = 1.5e-3,
    accelerator: str = "auto",
    stop_after: int | None = None,
) -> Pretraining:
    """Render the pool into ``folder`` and train on it; both resume where an earlier call ended.

    Args:
        folder: Folder for the pool, the checkpoint, the loss curve and ``vit.safetensors``.
        recipe: Settings of the pool; its seed is also that of the weights and of the order of the scenes.
        steps: Number of training steps.
        lr: Peak learning rate.
        accelerator: Lightning's name of the accelerator.
        stop_after: Number of steps after which to stop early, or None.

    Returns:
        The trained module.
    """
    checkpoint = folder / "last.ckpt"
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        max_epochs=-1,
        max_steps=steps if stop_after is None else stop_after,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="curves"),
        callbacks=[
            ModelCheckpoint(folder, filename="last", enable_version_counter=False),
            Export(folder / "vit.safetensors"),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    pool = ScenePool(folder / "pool", recipe, trainer.strategy.root_device)
    module = Pretraining(pool, steps, lr)
    loader = DataLoader(
        pool, batch_size=None, sampler=Batches(len(pool), recipe.seed, lambda: module.global_step)
    )
    trainer.fit(module, loader, ckpt_path=checkpoint if checkpoint.exists() else None)
    return module


def main() -> None:
    """Pre-train with the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m pretraining.pretrain", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder for pool, checkpoint and weights")
    parser.add_argument("--scenes", type=int, default=Recipe.scenes, help="scenes in the pool (%(default)s)")
    parser.add_argument("--steps", type=int, default=6_000, help=f"steps of {BATCH} scenes (%(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (%(default)s)")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu or auto (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(scenes=arguments.scenes, seed=arguments.seed)
    pretrain(
        arguments.folder,
        recipe=recipe,
        steps=arguments.steps,
        lr=arguments.lr,
        accelerator=arguments.accelerator,
    )


if __name__ == "__main__":
    main()
