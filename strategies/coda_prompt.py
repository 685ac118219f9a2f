"""CODA-Prompt: every image sees a sum of prompt components, each weighted by how well its key fits the image.

In each of the first blocks, the prefix to keys and values is a weighted sum over a pool of components. The
weight is the cosine between the component's key and the query, the image's feature without prompts; the
component attends to some entries of the query. An experience adds its share of the pool, orthogonal to what
is there, and trains that; older components are frozen and remain in the sum.

Source: CODA-Prompt, CVPR 2023, https://arxiv.org/abs/2211.13218, and its released code
https://github.com/GT-RIPL/CODA-Prompt.

========================================  =====================================================
paper                                     here
========================================  =====================================================
``P``, ``K``, ``A``: M components         ``Components``, one for each experience
``alpha = γ(q(x) ⊙ A, K)``, cosine        ``Components.weights``
``p = Σ_m alpha_m P_m``                   ``prompts``: first half of p to keys, second to values
M / T components for each experience      ``expand``; older ones without gradients
``‖BBᵀ - I‖²`` of P, K and A, times λ     ``penalty``, ``orthogonality`` is λ
========================================  =====================================================

Departures:

* The penalty is a mean over the entries, as in the released code, where the paper has a squared norm; and
  ``orthogonality`` is 0, as in every config of that code, where the paper has 0.1.
* New components start orthonormal to the span of all older ones, by a QR decomposition. The released code
  subtracts the projection onto each older one, which overlaps once training has made those overlap.
* A smaller last batch is trained on; the released code drops it.
* If the pool does not divide evenly, the remainder is left out, as in the released code, and takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.contracts.strategy import Promises
from cl_bench.data.experience import Experience
from cl_bench.network.backbones import Backbone
from cl_bench.network.prompts import Prompts


class Components(nn.Module):
    """What one experience adds to the pool: m components for each of L blocks.

    Args:
        prompts: ``P`` (L, m, length, d).
        keys: ``K`` (L, m, d).
        attention: ``A`` (L, m, d).
    """

    def __init__(self, prompts: Tensor, keys: Tensor, attention: Tensor) -> None:
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.keys = nn.Parameter(keys)
        self.attention = nn.Parameter(attention)

    def weights(self, query: Tensor) -> Tensor:
        """Return alpha (L, B, m), the cosine between q ⊙ a_m and k_m, for queries (B, d)."""
        along = query @ (self.attention * F.normalize(self.keys, dim=-1)).mT
        length = (query.square() @ self.attention.square().mT).clamp(min=1e-24).sqrt()  # |q ⊙ a_m|
        return along / length

    def forward(self, query: Tensor) -> Tensor:
        """Return the weighted sum of components (L, B, length, d) for queries (B, d), in full precision."""
        with torch.autocast(query.device.type, enabled=False):
            weights = self.weights(query.to(self.keys.dtype))
            summed: Tensor = weights @ self.prompts.flatten(2)  # Σ_m alpha_m P_m
            return summed.reshape(*summed.shape[:2], *self.prompts.shape[2:])


class CODAPrompt(PromptedStrategy):
    """Prefixes composed of components that grow with the stream.

    Args:
        backbone: Pre-trained vision transformer.
        pool: Components of the whole stream in each block, ``M``; every experience gets an equal share.
        length: Length of a component; half of it is keys, half values.
        blocks: Blocks that see a prefix, from 0; the first five if null, or all of fewer.
        orthogonality: Weight ``λ`` of the penalty on components that are not orthonormal.
        kwargs: Settings of every strategy.

    Raises:
        ValueError: If components have an odd length, or are more than can be orthogonal.
    """

    name = "CODA-Prompt"
    promises = Promises(
        start_within=None,  # new components add to the prefix of every image
        state_grows_with=("experiences",),  # components
        step_grows_with=("experiences",),
        drawn_once=True,  # the first components are part of every later sum
        constant="query",
    )
    small: ClassVar[Mapping[str, object]] = {"pool": 20}

    def __init__(
        self,
        backbone: Backbone,
        *,
        pool: int = 100,
        length: int = 8,
        blocks: Sequence[int] | None = None,
        orthogonality: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        if length < 2 or length % 2:
            raise ValueError(
                f"A component of length {length} has no equal halves for keys and values: make it even."
            )
        if pool > backbone.feature_dim:
            raise ValueError(
                f"{pool} keys of width {backbone.feature_dim} cannot be orthogonal: "
                f"set pool to at most {backbone.feature_dim}."
            )
        self.pool = pool
        self.length = length
        self.blocks = tuple(range(min(5, backbone.depth)) if blocks is None else blocks)
        self.orthogonality = orthogonality
        self.parts = nn.ModuleList()

    def expand(self, experience: Experience) -> None:
        """Grow the head, freeze older components, and add a share of the pool.

        Raises:
            ValueError: If the stream has more experiences than the pool has components.
        """
        super().expand(experience)
        share = self.pool // experience.num_experiences
        if not share:
            raise ValueError(
                f"A pool of {self.pool} components is too small for {experience.num_experiences} "
                f"experiences: set pool to at least {experience.num_experiences}."
            )
        self.parts.requires_grad_(False)
        prompts, keys, attention = (orthonormal(rows, share) for rows in self._pools())
        self.parts.append(Components(prompts.unflatten(2, (self.length, -1)), keys, attention))

    def prompts(self, query: Tensor) -> tuple[Prompts, None]:
        """Return the prefixes of images with queries (B, d)."""
        summed = torch.stack([part(query) for part in self.components]).sum(dim=0)  # p, (L, B, length, d)
        pairs = (one.chunk(2, dim=1) for one in summed)
        return Prompts(prefixes=dict(zip(self.blocks, pairs, strict=True))), None

    def loss(self, features: Any, labels: Tensor) -> Tensor:
        """Return the cross-entropy, and the weighted penalty."""
        loss = super().loss(features, labels)
        return loss + self.orthogonality * self.penalty() if self.orthogonality else loss

    def penalty(self) -> Tensor:
        """Return the sum over blocks, and over P, K and A, of the mean squared entry of B Bᵀ - I."""
        with torch.autocast(self.device.type, enabled=False):
            grams = [rows @ rows.mT for rows in self._pools()]
            eye = torch.eye(grams[0].shape[-1], device=grams[0].device, dtype=grams[0].dtype)
            return torch.stack([(gram - eye).square().mean(dim=(1, 2)).sum() for gram in grams]).sum()

    @property
    def components(self) -> list[Components]:
        """What each experience has added to the pool."""
        return [part for part in self.parts if isinstance(part, Components)]

    def _pools(self) -> list[Tensor]:
        """Return the components so far as rows (L, M_t, n): of P, flattened, of K and of A."""
        width = self.backbone.feature_dim
        none = [torch.empty(len(self.blocks), 0, n) for n in (self.length * width, width, width)]
        parts = [(part.prompts.flatten(2), part.keys, part.attention) for part in self.components]
        return [torch.cat(rows, dim=1) for rows in zip(*parts, strict=True)] if parts else none


def orthonormal(rows: Tensor, count: int) -> Tensor:
    """Draw ``count`` orthonormal rows (L, count, n), each orthogonal to all of ``rows`` (L, m, n).

    >>> new = orthonormal(torch.tensor([[[3.0, 0.0, 0.0], [1.0, 1.0, 0.0]]]), 1)
    >>> new.abs().round(decimals=6)
    tensor([[[0., 0., 1.]]])
    """
    old = rows.detach().cpu().double()
    drawn = torch.randn(len(rows), count, rows.shape[2], dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(torch.cat([old, drawn], dim=1).mT).Q  # Gram-Schmidt, column by column
    return basis[..., old.shape[1] :].mT.to(torch.get_default_dtype()).contiguous()
