"""A strategy with prompts: what L2P, DualPrompt and CODA-Prompt have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.strategy import Strategy
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Features, pooled
from cl_bench.network.prompts import Prompts


class PromptedStrategy(Strategy):
    """Prompts for a frozen backbone, made for each image from its feature without prompts, the query.

    A method overrides :meth:`prompts`. A training step and a prediction take two forward passes.

    Args:
        backbone: Pre-trained vision transformer; it stays as it is.
        pull: Weight of the similarity to the chosen keys in the loss.
        kwargs: Settings of every strategy.
    """

    def __init__(self, backbone: Backbone, *, pull: float = 0.0, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.pull = pull

    def query(self, images: Tensor) -> Tensor:
        """Return the features (B, d) of images (B, 3, H, W) without prompts and without gradients.

        The backbone never changes, so neither does the query of an image: it can be computed once a stream.
        """
        with torch.no_grad():
            found: Tensor = self.backbone(images)
        return found

    def prompts(self, query: Tensor) -> tuple[Prompts, Tensor | None]:
        """Return the prompts of images with queries (B, d), and their similarity (B, k) to the chosen keys.

        A method that chooses no keys returns None in place of the similarity.
        """
        raise NotImplementedError

    def read_out(self, images: Tensor, prompts: Prompts) -> Tensor:
        """Return the features (B, d) of images (B, 3, H, W) with their prompts."""
        found: Tensor = self.backbone(images, prompts)
        return found

    def features(self, images: Tensor) -> Features:
        """Map images (B, 3, H, W) to features (B, d), and the similarity of each to its keys."""
        prompts, similarity = self.prompts(self.query(images))
        return Features(self.read_out(images, prompts), similarity)

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the cross-entropy, minus the mean over the images of the similarity to all chosen keys."""
        loss = super().loss(pooled(features), labels)
        return loss - self.pull * features.extra.sum(dim=1).mean() if self.pull else loss
