"""Throw-away strategies, shaped like the methods to come: the contract must serve them as it stands.

None of them is a reproduction. Each is as short as its idea allows, and may be the start of the real method.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import cosine_similarities, local_cross_entropy
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Features, Prototypes, pooled
from cl_bench.network.prompts import Prompts


class PrefixPool(Strategy):
    """A pool of keys with prefixes: every image takes those whose keys are most similar to its query.

    Shaped like DualPrompt and L2P: the query is the feature of the frozen backbone, and a term of the loss
    pulls the chosen keys towards it. One optimizer serves the whole stream.
    """

    promises = Promises(drawn_once=True)
    optimizer_scope = "stream"

    def __init__(
        self,
        backbone: Backbone,
        *,
        pool: int = 6,
        chosen: int = 2,
        length: int = 3,
        pull: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.pool = pool
        self.chosen = chosen
        self.length = length
        self.pull = pull

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        if experience.is_first:
            width = self.backbone.feature_dim
            self.keys = nn.Parameter(torch.empty(self.pool, width).uniform_(-1, 1))
            shape = (self.pool, self.length, self.vectors * width)
            self.prompts = nn.Parameter(torch.empty(shape).uniform_(-0.02, 0.02))

    @property
    def vectors(self) -> int:
        """Number of vectors that make a prompt: a key and a value for every block."""
        return 2 * self.backbone.depth

    def features(self, images: Tensor) -> Features:
        with torch.no_grad():
            query = self.backbone(images)
        similarity, chosen = cosine_similarities(query, self.keys).topk(self.chosen)
        return Features(self.prompted(images, self.prompts[chosen].flatten(1, 2)), similarity)

    def prompted(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Return the features (B, d) of images with their prompts (B, n, vectors d)."""
        vectors = prompts.chunk(self.vectors, dim=-1)
        prefixes = zip(vectors[::2], vectors[1::2], strict=True)
        found: Tensor = self.backbone(images, Prompts(prefixes=dict(enumerate(prefixes))))
        return found

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        similarity: Tensor = features.extra.sum(dim=1).mean()
        return super().loss(features, labels) - self.pull * similarity


class GrowingGates(LowRankStrategy):
    """A gated adapter for every experience, with one learnt scale for all its layers; nothing is merged.

    Shaped like SD-LoRA and GainLoRA.
    """

    promises = Promises(state_grows_with=("experiences",), step_grows_with=("experiences",))

    def renew(self) -> None:
        """Add an adapter to every projection, and freeze the older ones; the first is there already."""
        if self.experience.is_first:
            super().renew()
            newest = [adapter for _, adapter in self.adapters()]
        else:
            for layer in self.layers:
                layer.adapters.requires_grad_(False)
            newest = [
                layer.add(f"{target}_{self.experience.index}", layer.rows[target], self.rank)
                for layer in self.layers
                for target in ("k", "v")
            ]
        scale = nn.Parameter(torch.ones(()))
        for adapter in newest:
            adapter.scale = scale
            adapter.gate = nn.Sequential(nn.Linear(adapter.A.shape[1], 1), nn.Sigmoid())

    def after_training(self, data: TrainingData) -> None:
        """Keep the adapters."""


class TextHead(LowRankStrategy):
    """Adapters trained towards fixed vectors of the class names: the logit is the cosine to them.

    Shaped like the text tower of CLIP, for which a hash stands in.
    """

    head: Prototypes

    def __init__(self, backbone: Backbone, *, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.temperature = temperature
        self.head = Prototypes(backbone.feature_dim, "cosine")

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        vectors = [self.vector(name) for name in experience.class_names]
        self.head.write(torch.stack(vectors).to(self.head.means), experience.classes)

    def vector(self, name: str) -> Tensor:
        bits = hashlib.shake_256(name.encode()).digest(self.backbone.feature_dim)
        return torch.tensor([1.0 if byte % 2 else -1.0 for byte in bits])

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        classes = self.experience.classes
        cosines = cosine_similarities(pooled(features), self.head.means[classes.start :])
        return local_cross_entropy(cosines / self.temperature, labels, classes.start)
