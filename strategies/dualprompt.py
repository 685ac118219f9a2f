"""DualPrompt: a general prefix for all images, and an expert prefix for those of each experience.

Prefixes are keys and values that the attention of a frozen transformer sees before its own: the general one
in the first blocks, the expert one in later blocks. An experience trains the general prefix, an expert of its
own and a key, which the loss pulls towards the queries of its images, their features without prompts. At test
time an image takes the expert with the most similar key, so no task id is needed.

Source: DualPrompt, ECCV 2022, https://arxiv.org/abs/2204.04799, and its released code
https://github.com/google-research/l2p; sizes and rates are those of its port in LAMDA-PILOT.

======================================  =========================================================
paper                                   here
======================================  =========================================================
``g``, G-prompt, in blocks 0 and 1      ``general`` (blocks, 2, length, d), a key and a value part
``e_t``, E-prompt, in blocks 2 to 4     ``experts[t]`` (blocks, 2, length, d)
``k_t``, task key                       ``keys[t]`` (d,)
``f_Pre-T``: [p_K; h_K], [p_V; h_V]     ``Prompts.prefixes``
``argmax_t γ(q(x), k_t)``               ``prompts``, at test time
``L_match = γ(q(x), k_t)``              the similarity; ``loss`` adds ``-λ`` of it, ``pull`` is λ
======================================  =========================================================

Departures:

* ``ported_reshape`` repeats an error of the PyTorch ports, for those who must match one. They gather prefixes
  as (2, B, …) and reshape them to (B, 2, …) without a permutation, so an image gets the key parts, or the
  value parts, of two images of its batch as its key and value. The original code only names the two axes in
  the wrong order; its values are right, and so is the default here.
* Every image chooses its own expert at test time, as in the paper and the original on ImageNet-R. The
  original on CIFAR-100 and the port let a batch vote.
* The pool has an expert and a key for every experience so far, and old ones are frozen. The released codes
  hold ten from the start, of which the untrained can be chosen at test, and an experience past the tenth has
  none of its own.
* A new expert starts from the one before it, as in both codes; the paper does not say where it starts.
* Prefixes and keys start uniform in [-1, 1] as in the port; in the original code in [0, 0.01].
* No gradient is clipped, as in the port; the original clips to norm 1, ``--trainer.gradient_clip_val 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts.prompted import PromptedStrategy
from cl_bench.contracts.strategy import Promises
from cl_bench.data.experience import Experience
from cl_bench.maths.losses import cosine_similarities
from cl_bench.network.backbones import Backbone
from cl_bench.network.prompts import Prompts


class DualPrompt(PromptedStrategy):
    """General and expert prefixes, the experts chosen by image.

    Args:
        backbone: Pre-trained vision transformer.
        general_blocks: Blocks that see the general prefix, from 0; the first two if null.
        general_length: Keys, and values, of the general prefix in each of its blocks.
        expert_blocks: Blocks that see an expert prefix, from 0; in a shared block it follows the general one.
            If null, they are 2 to 4, as far as there are, and otherwise the last.
        length: Keys, and values, of an expert prefix in each of its blocks.
        pull: Weight ``λ`` of the term that pulls the key of the experience towards the queries.
        ported_reshape: Whether to mix prefixes within a batch as the PyTorch ports do; see the departures.
        kwargs: Settings of every strategy.
    """

    name = "DualPrompt"
    promises = Promises(
        state_grows_with=("experiences",),  # an expert and its key
        drawn_once=True,  # the general prefix
        constant="query",
    )

    def __init__(
        self,
        backbone: Backbone,
        *,
        general_blocks: Sequence[int] | None = None,
        general_length: int = 5,
        expert_blocks: Sequence[int] | None = None,
        length: int = 5,
        pull: float = 0.1,
        ported_reshape: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, pull=pull, **kwargs)
        depth = backbone.depth
        general = range(min(2, depth)) if general_blocks is None else general_blocks
        expert = (range(2, min(5, depth)) or [depth - 1]) if expert_blocks is None else expert_blocks
        self.general_blocks, self.general_length = tuple(general), general_length
        self.expert_blocks, self.length = tuple(expert), length
        self.ported_reshape = ported_reshape
        self.variant = "ported reshape" if ported_reshape else None
        self.experts, self.keys = nn.ParameterList(), nn.ParameterList()

    def expand(self, experience: Experience) -> None:
        """Grow the head, freeze old experts and keys, and add a new pair."""
        super().expand(experience)
        width = self.backbone.feature_dim
        expert = _uniform(len(self.expert_blocks), 2, self.length, width)
        if experience.is_first:
            self.general = nn.Parameter(_uniform(len(self.general_blocks), 2, self.general_length, width))
        else:
            expert = self.experts[-1].detach().clone()
        self.experts.requires_grad_(False)
        self.keys.requires_grad_(False)
        self.experts.append(nn.Parameter(expert))  # e_t
        self.keys.append(nn.Parameter(_uniform(width)))  # k_t

    def prompts(self, query: Tensor) -> tuple[Prompts, Tensor]:
        """Return the prefixes of images with queries (B, d), and their cosine (B, 1) to the key that counts.

        In training that is the key of the experience at hand, at test time the most similar one.
        """
        if self.training:
            similarity = cosine_similarities(query, self.keys[-1][None])
            experts = self.experts[-1].expand(len(query), *self.experts[-1].shape)
        else:
            similarity, chosen = cosine_similarities(query, torch.stack([*self.keys])).max(1, keepdim=True)
            experts = torch.stack([*self.experts])[chosen[:, 0]]
        if self.ported_reshape:
            gathered = experts.permute(1, 2, 0, 3, 4)  # (blocks, 2, B, length, d)
            experts = gathered.reshape(experts.transpose(0, 1).shape).transpose(0, 1)
        found: dict[int, list[Tensor]] = {}
        for block, general in zip(self.general_blocks, self.general, strict=True):
            found.setdefault(block, []).append(general.expand(len(query), *general.shape))
        for block, expert in zip(self.expert_blocks, experts.unbind(dim=1), strict=True):
            found.setdefault(block, []).append(expert)
        joined = {block: torch.cat(parts, dim=2) for block, parts in found.items()}  # (B, 2, length, d)
        return Prompts(prefixes={block: (x[:, 0], x[:, 1]) for block, x in joined.items()}), similarity


def _uniform(*shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1)
