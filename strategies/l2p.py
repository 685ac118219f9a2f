"""L2P: a pool of prompt tokens, of which every image takes those whose keys are most similar to it.

The query of an image is its feature from the frozen backbone. The prompts of the most similar keys are put
between the class token and the patches, and their mean after the last block is the feature that the head
classifies. Prompts and head learn by cross-entropy, and the loss pulls the chosen keys towards the query.

Source: L2P, CVPR 2022, https://arxiv.org/abs/2112.08654, and its released code
https://github.com/google-research/l2p; sizes and rates are those of its port in LAMDA-PILOT.

==========================================  ====================================================
paper                                       here
==========================================  ====================================================
``q(x)``, class token of the frozen model   ``query``
``K``, ``P``: M keys and prompts            ``keys`` (M, d), ``pool`` (M, length, d)
``γ(q(x), k_m)``, cosine                    ``cosine_similarities``
``K_x``, the top N keys (eq. 3)             ``topk`` of each image, ``chosen`` of them
``f_avg``, mean of the prompt tokens        ``read_out``
``L - λ Σ γ(q(x), k)`` over K_x (eq. 5)     ``loss``, ``pull`` is λ
==========================================  ====================================================

Departures:

* Every image takes its own prompts, as in the paper. Both codes let a batch vote: the prompts chosen most
  often serve all of its images, in training and at test. A prediction then depends on the images that share
  its batch, which the protocol of this suite excludes.
* Prompts have no position, as in the original code. The port gives each that of the class token, a constant
  that a prompt can learn.
* Keys and prompts start uniform in [0, 0.01] as in the original code; in the port in [-1, 1], where the mean
  of the prompt tokens shows little of a small image.
* No gradient is clipped, as in the port; the original clips to norm 1, ``--trainer.gradient_clip_val 1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.contracts.strategy import Promises
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import cosine_similarities
from cl_bench.network.backbones import Backbone
from cl_bench.network.prompts import Prompts


class L2P(PromptedStrategy):
    """A shared pool of prompt tokens, chosen by image.

    Args:
        backbone: Pre-trained vision transformer.
        pool: Number of prompts in the pool, ``M``.
        length: Tokens of a prompt.
        chosen: Prompts that an image takes, ``N``.
        pull: Weight ``λ`` of the term that pulls chosen keys towards the query.
        kwargs: Settings of every strategy.

    Raises:
        ValueError: If an image should take more prompts than there are.
    """

    name = "L2P"
    promises = Promises(drawn_once=True, constant="query")
    small: ClassVar[Mapping[str, object]] = {
        "pool": 20,
        "chosen": 1,
    }  # more prompts would outnumber the tokens

    def __init__(
        self,
        backbone: Backbone,
        *,
        pool: int = 10,
        length: int = 5,
        chosen: int = 5,
        pull: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, pull=pull, **kwargs)
        if not 1 <= chosen <= pool:
            raise ValueError(
                f"An image cannot take {chosen} of {pool} prompts: set chosen to a number from 1 to {pool}."
            )
        self.shape = pool, length, backbone.feature_dim
        self.chosen = chosen

    def expand(self, experience: Experience) -> None:
        """Grow the head; the first experience draws the pool."""
        super().expand(experience)
        if experience.is_first:
            size, _, width = self.shape
            self.keys = nn.Parameter(torch.empty(size, width).uniform_(0, 0.01))  # K
            self.pool = nn.Parameter(torch.empty(self.shape).uniform_(0, 0.01))  # P

    def prompts(self, query: Tensor) -> tuple[Prompts, Tensor]:
        """Return the tokens (B, N length, d) that images with queries (B, d) take, and the N cosines."""
        similarity, chosen = cosine_similarities(query, self.keys).topk(self.chosen)  # eq. 3
        return Prompts(self.pool[chosen].flatten(1, 2)), similarity

    def read_out(self, images: Tensor, prompts: Prompts) -> Tensor:
        """Return the mean (B, d) of the prompt tokens after the final norm."""
        assert prompts.tokens is not None
        first, count = self.backbone.num_prefix_tokens, prompts.tokens.shape[1]
        return self.backbone.tokens(images, prompts)[:, first : first + count].mean(dim=1)  # f_avg
