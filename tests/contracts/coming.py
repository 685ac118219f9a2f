"""Throw-away strategies, shaped like the methods to come: the contract must serve them as it stands.

None of them is a reproduction. Each is as short as its idea allows, and may be the start of the real method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, Strategy, TrainingData
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import cosine_similarities, local_cross_entropy
from cl_bench.maths.memory import GPM
from cl_bench.maths.subspace import complement
from cl_bench.measure.moments import second_moments
from cl_bench.measure.passes import Statistic, measure
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import Features, GrowingLinear, Prototypes, pooled
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


class PromptTokens(PrefixPool):
    """The same with prompt tokens, whose mean after the last block is the feature, as in L2P."""

    vectors = 1

    def prompted(self, images: Tensor, prompts: Tensor) -> Tensor:
        first = self.backbone.num_prefix_tokens
        tokens = self.backbone.tokens(images, Prompts(prompts))
        return tokens[:, first : first + prompts.shape[1]].mean(dim=1)


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


class Gram(Statistic):
    """Sums of what the ridge regression needs: h h^T (M, M), and h for each class (C, M)."""

    def __init__(self, head: RidgeHead) -> None:
        self.head = head
        self.products = torch.zeros_like(head.products)
        self.sums = torch.zeros_like(head.sums)

    def add(self, features: Tensor, labels: Tensor) -> None:
        hidden = self.head.hidden(features)
        self.products += hidden.T @ hidden
        self.sums.index_add_(0, labels, hidden)


class RidgeHead(nn.Module):
    """Ridge regression on random features, solved from sums over all classes seen."""

    projection: Tensor
    products: Tensor
    sums: Tensor
    weight: Tensor

    def __init__(self, feature_dim: int, width: int) -> None:
        super().__init__()
        self.num_classes = 0
        self.register_buffer("projection", torch.zeros(feature_dim, width, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(0, width, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(0, width, dtype=torch.float64))

    def grow(self, num_classes: int) -> None:
        if not self.num_classes:
            self.projection.normal_()
        self.num_classes += num_classes
        for name in ("sums", "weight"):
            setattr(self, name, F.pad(self.get_buffer(name), (0, 0, 0, num_classes)))

    def hidden(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return (features.double() @ self.projection).relu()

    def solve(self, ridge: float) -> None:
        regular = self.products + ridge * torch.eye(len(self.products)).to(self.products)
        self.weight.copy_(torch.linalg.solve(regular, self.sums.T).T)

    def forward(self, features: Tensor) -> Tensor:
        return self.hidden(features) @ self.weight.T


class RandomRidge(LowRankStrategy):
    """Adapters trained in the first experience, then a ridge head on random features of what they make.

    Shaped like RanPAC.
    """

    promises = Promises(keeps_old_head=False)
    head: RidgeHead

    def __init__(self, backbone: Backbone, *, width: int = 64, ridge: float = 1.0, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.ridge = ridge
        self.head = RidgeHead(backbone.feature_dim, width)
        self.first_head = GrowingLinear(backbone.feature_dim)

    def expand(self, experience: Experience) -> None:
        super().expand(experience)
        if experience.is_first:
            self.first_head.grow(experience.num_classes)
        else:
            self.requires_grad_(False)

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        return local_cross_entropy(self.first_head(pooled(features)), labels, 0)

    def after_training(self, data: TrainingData) -> None:
        super().after_training(data)
        gram = Gram(self.head)
        measure(self.features, data.plain(), gram)
        products, sums = self.summed([gram.products, gram.sums])
        self.head.products += products
        self.head.sums += sums
        self.head.solve(self.ridge)


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


class MinorSubspace(LowRankStrategy):
    """Down-projections drawn at random in what the inputs so far use least; only B is trained.

    Shaped like SplitLoRA: the split is made anew after every experience, from the moments of all of them.
    """

    moments: Tensor
    memory: GPM

    def __init__(self, backbone: Backbone, *, alpha: float = 2.0, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.alpha = alpha
        width = self.layers[0].weight.shape[1]
        self.memory = GPM(self.layer_of, width, dtype=torch.float32)
        self.register_buffer("moments", torch.zeros(len(self.layers), width, width, dtype=torch.float64))
        for _, adapter in self.adapters():
            adapter.A.requires_grad_(False)

    def before_training(self, data: TrainingData) -> None:
        for projection, adapter in self.adapters():
            minor = complement(self.memory.basis(projection))
            adapter.A.copy_((minor @ torch.randn(minor.shape[1], self.rank)).mT)

    def after_training(self, data: TrainingData) -> None:
        super().after_training(data)
        self.moments += second_moments(self.features, self.layers, data.plain())
        for projection, _ in self.adapters():
            self.memory.replace(projection, self.moments.new_zeros(self.memory.dim, 0))
        self.memory.update(self.moments, self.split)

    def split(self, shares: Tensor, held: Sequence[int]) -> list[int]:
        """Return the k of each layer that minimises t (1 - share of the first k) - alpha (d - k) / d."""
        width, learnt = shares.shape[1], self.experience.index + 1
        missing = 1 - shares.cumsum(dim=1)
        free = 1 - torch.arange(1, width + 1).to(shares) / width
        best = (learnt * missing - self.alpha * free)[:, :-1].argmin(dim=1)  # some directions stay free
        return [int(index) + 1 for index in best]
