"""Pre-train the embedded transformer: ``python -m cl_bench.prepare.pretraining.pretrain --folder FOLDER``.

The transformer sees a scene and answers with its description. A run that was stopped goes on when the command
is given again.
"""

from __future__ import annotations

import argparse
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
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Sampler

from cl_bench.network.embedded import OPTIONS
from cl_bench.prepare.pretraining.pool import Recipe, ScenePool

BATCH = 128
STEPS_AN_EPOCH = 100

_WHITENED = 500  # scenes whose patches are whitened
_FLOOR = 0.01  # of the mean variance, added to that of each direction
_POSITIONS = 0.3  # deviation of the first position embeddings


class Pretraining(LightningModule):
    """A transformer that learns to describe scenes.

    Args:
        pool: Scenes, and what describes them.
        steps: Length of the training.
        lr: Largest learning rate; it rises over the first tenth and falls to zero.
    """

    deviation: Tensor

    def __init__(self, pool: ScenePool, steps: int, lr: float) -> None:
        super().__init__()
        self.steps = steps
        self.lr = lr
        self.register_buffer("deviation", pool.descriptors.deviation.cpu().clone())
        self.vit = _first_weights(pool, self.deviation)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss on scenes (B, 3, H, W), uint8, with the answer of each token (B, tokens, dim).

        Tokens answer in units of the deviation of each direction. An image answers with the mean over its
        tokens, of unit length times √dim.
        """
        scenes, answers = batch
        tokens = self.vit.forward_features(scenes.float() / 127.5 - 1)
        features = self.vit.forward_head(tokens).float()
        descriptions = F.normalize(answers.mean(dim=1)) * answers.shape[-1] ** 0.5
        of_tokens = F.mse_loss(tokens.float(), answers / self.deviation)
        of_images = F.mse_loss(features, descriptions)
        self.log_dict({"loss": of_tokens + of_images, "tokens": of_tokens, "images": of_images})
        return of_tokens + of_images

    def configure_optimizers(self) -> Any:
        """AdamW, without decay of what has one dimension."""
        parameters = list(self.vit.parameters())
        groups = [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.05},
            {"params": [each for each in parameters if each.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        schedule = OneCycleLR(optimizer, self.lr, total_steps=self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def exported(self) -> dict[str, Tensor]:
        """Return the weights for images in [0, 1] as they are, in half precision but for the first layer."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.vit.state_dict().items()}
        weight, bias = "patch_embed.proj.weight", "patch_embed.proj.bias"
        # Scenes were scaled to [-1, 1] by 2x - 1; the first layer can do that itself. Its large sums nearly
        # cancel, which half precision would spoil.
        state[bias] -= state[weight].sum(dim=(1, 2, 3))
        state[weight] *= 2
        return {name: tensor if name in (weight, bias) else tensor.half() for name, tensor in state.items()}


def _first_weights(pool: ScenePool, deviation: Tensor) -> VisionTransformer:
    """Build the transformer; its first layer whitens patches of scenes, its last scales as answers do."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(pool.recipe.seed)
        vit: Any = VisionTransformer(num_classes=0, **OPTIONS)
    for block in vit.blocks:
        block.attn.fused_attn = False  # on a CPU the products are faster than the kernel, in bf16
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
    """Batches from the step that training has come to; a function of seed and step.

    The pool is gone through in rounds, each in an order of its own. Lightning's epochs are only the places
    where a checkpoint is written.

    Args:
        number: Scenes in the pool.
        seed: Of the orders.
        steps_done: Says how many steps were taken.
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
    """Write the weights after every epoch, so that there are always some to use."""

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
    """Render the pool into ``folder`` and train on it; both go on where an earlier call ended.

    Args:
        folder: Of the pool, the checkpoint, the loss curve and ``vit.safetensors``.
        recipe: Of the pool; its seed is that of the weights and the order of the scenes as well.
        steps: Length of the training.
        lr: Largest learning rate.
        accelerator: As Lightning names it.
        stop_after: Stop after so many of the steps; null for none.

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
    """Pre-train as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m cl_bench.prepare.pretraining.pretrain", description=__doc__
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="of the pool, the checkpoint and the weights"
    )
    parser.add_argument("--scenes", type=int, default=Recipe.scenes, help="in the pool (%(default)s)")
    parser.add_argument("--steps", type=int, default=700, help=f"of {BATCH} scenes (%(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="largest learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
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
