"""GainLoRA, carried over to images: InfLoRA whose adapters are kept, each behind a gate for every image.

The gate of an experience maps the mean patch embedding of an image to a number in [0, 1), by which all its
adapters are scaled. A new gate starts as a copy of the last one with a key outside of what old images give,
and steps change it only where old images have nothing, so that it is closed for them. Old gates and adapters
are frozen. Adapters are made and protected as in InfLoRA.

Source: GainLoRA, NeurIPS 2025, https://arxiv.org/abs/2505.15424, and its released code
https://github.com/liangyanshuo/gainlora, for language models. There is no result on images.

====================================================  ========================================================
released code                                         here
====================================================  ========================================================
``W_0 x + Σ_i g_i B_i A_i x``                         one adapter for each experience, ``LowRank.gate``
``x̄``, mean of the input embeddings                   ``summary``, mean of the patch embeddings
``x̂ = SiLU(W² SiLU(W¹ x̄))``                           ``Gate.inner``, ``Gate.outer``
``g = |2 σ(4 cos(x̂, key)) - 1|``                      ``Gate.forward``: σ and tanh differ by shift and scale
``W¹, W²`` start from those of the last experience    ``renew``
``key``: strongest direction of (I - M Mᵀ) E[x̂ x̂ᵀ]    ``before_training``; its length stays
``ΔW¹, ΔW², Δkey`` times I - M Mᵀ after every step    ``after_step``
GPM of ``x̄``, the inner activations and ``x̂``         ``free_inner``, ``free_outer``, ``free_key``: I - M Mᵀ
``A_t`` and GPM of InfLoRA                            ``before_training``, ``after_training``
====================================================  ========================================================

Departures:

* Carried over to images, so targets, rank, scale, heads, optimizer and InfLoRA's threshold are those of
  InfLoRA on images, https://arxiv.org/abs/2404.00228; the threshold of the gates is that of the code.
* The input of a gate is the mean of the patch embeddings without positions, as that of a text is the mean of
  its word embeddings without positions. It says less about the content of an image than about that of a text.
* The rows of W¹ and W² and the key are not scaled back to the lengths that the step of the optimizer gave
  them: scaled weights would no longer leave old inputs as they are.
* Bases are of whole inputs, where the code can split them into chunks of columns; and those of the gates are
  kept as projectors onto what is free, whose size is constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts.low_rank import LowRankStrategy
from cl_bench.contracts.strategy import Promises, TrainingData
from cl_bench.maths.memory import Count, DualGPM, below_first
from cl_bench.maths.subspace import energy_threshold, leading_directions, of_unit_energy, spectrum
from cl_bench.measure.moments import SecondMoments
from cl_bench.measure.passes import measure
from cl_bench.network.adapters import LowRank
from cl_bench.network.backbones import Backbone


class Gate(nn.Module):
    """Maps a summary of each image to a factor of an experience's adapters, at most tanh(2) = 0.964.

    Args:
        dim: Size of a summary, ``d``.
        width: Size in between.

    >>> gate = Gate(dim=2, width=1)
    >>> _ = nn.init.ones_(gate.inner.weight), nn.init.ones_(gate.outer.weight)
    >>> _ = gate.key.weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> gate(torch.ones(1, 2))
    tensor([0.], grad_fn=<AbsBackward0>)
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, width, bias=False)
        self.outer = nn.Linear(width, dim, bias=False)
        self.key = nn.Linear(dim, 1, bias=False)
        nn.init.uniform_(self.key.weight, -1, 1)

    def forward(self, summary: Tensor) -> Tensor:
        """Map summaries (B, d) to factors (B,)."""
        found = _silu(self.outer(_silu(self.inner(summary))))  # x̂
        lengths = found.norm(dim=1) * self.key.weight.norm()
        cosine: Tensor = self.key(found).squeeze(1) / lengths.clamp(min=1e-12)
        return (2 * cosine).tanh().abs()  # |2 σ(4 c) - 1|


class Opening(nn.Module):
    """What the adapters of an experience are multiplied by: a factor (B,) for each image of the batch."""

    factor: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the factors (B, 1, 1) of tokens (B, N, n)."""
        assert self.factor is not None
        return self.factor[:, None, None]


class GainLoRA(LowRankStrategy):
    """InfLoRA with an adapter and a gate for every experience.

    Args:
        backbone: Pre-trained vision transformer.
        threshold: Share of the energy of its inputs that the first experience protects.
        gate_threshold: Share of the energy in a gate that the first experience protects. Both shares rise,
            linearly, to 1 at the end of the stream.
        gate_width: Inner size of a gate.
        kwargs: Settings of every strategy with adapters.

    Attributes:
        gates: The gate of each experience.
    """

    promises = Promises(state_grows_with=("experiences",), step_grows_with=("experiences",))
    memory: DualGPM
    free_inner: Tensor
    free_outer: Tensor
    free_key: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        threshold: float = 0.95,
        gate_threshold: float = 0.995,
        gate_width: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.variant = "carried over to images"
        self.threshold = threshold
        self.gate_threshold = gate_threshold
        self.gate_width = gate_width
        dim = backbone.feature_dim
        self.memory = DualGPM(self.layer_of, self.input_width, "covariance", dtype=torch.float32)
        self.gates = nn.ModuleList()
        self.openings = nn.ModuleList()
        for name, size in (("inner", dim), ("outer", gate_width), ("key", dim)):
            self.register_buffer(f"free_{name}", torch.eye(size))
        self._targets = [dict(layer.rows) for layer in self.layers]

    @torch.no_grad()
    def renew(self) -> None:
        """Freeze old adapters and gates, and add new ones; the gate is a copy of the last with a new key."""
        gate, opening = Gate(self.backbone.feature_dim, self.gate_width), Opening()
        if not self.experience.is_first:
            gate.inner.weight.copy_(self._gate(-1).inner.weight)
            gate.outer.weight.copy_(self._gate(-1).outer.weight)
        self.gates.requires_grad_(False).append(gate)
        self.openings.append(opening)
        for layer, targets in zip(self.layers, self._targets, strict=True):
            layer.adapters.requires_grad_(False)
            for target, rows in targets.items():
                adapter = layer.adapter(target)
                if self.experience.is_first:
                    adapter.reset()
                else:
                    name, scale = f"{target}_{self.experience.index}", float(adapter.scale)
                    adapter = layer.add(name, rows, self.rank, scale)
                adapter.A.requires_grad_(False)
                adapter.B.requires_grad_(True)
                adapter.gate = opening

    def summary(self, images: Tensor) -> Tensor:
        """Return the mean patch embedding (B, d) of images (B, 3, H, W), in full precision."""
        vit: Any = self.backbone.vit
        with torch.autocast(images.device.type, enabled=False):
            patches: Tensor = vit.patch_embed((images - self.backbone.mean) / self.backbone.std)
            return patches.mean(dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, d), with every adapter behind its gate."""
        summary = self.summary(images)
        openings = [opening for opening in self.openings if isinstance(opening, Opening)]
        with torch.autocast(images.device.type, enabled=False):
            for gate, opening in zip(self.gates, openings, strict=True):
                opening.factor = gate(summary)
        try:
            found: Tensor = self.backbone(images)
        finally:
            for opening in openings:
                opening.factor = None
        return found

    def before_training(self, data: TrainingData) -> None:
        """Choose the rows of every A as InfLoRA does, and the key where old images have nothing."""
        of_layers, of_gate = self._moments(data)
        directions = self.memory.free_directions(of_layers, self.rank)
        for projection, adapter in self._newest():
            adapter.A.copy_(directions[projection].mT / math.sqrt(3))
        key = self._gate(-1).key.weight
        left = self.free_key.double() @ of_gate["key"]  # (I - M Mᵀ) E[x̂ x̂ᵀ]
        key.copy_(leading_directions(left @ left.mT, 1).mT * key.norm())

    def after_step(self) -> None:
        """Take back what the step changed in the new gate for old inputs."""
        if self.experience.is_first:
            return
        old, new = self._gate(-2), self._gate(-1)
        for start, weight, free in (
            (old.inner.weight, new.inner.weight, self.free_inner),
            (old.outer.weight, new.outer.weight, self.free_outer),
        ):
            weight.copy_(start + (weight - start) @ free)
        new.key.weight.copy_(new.key.weight @ self.free_key)  # it started there

    def after_training(self, data: TrainingData) -> None:
        """Protect what this experience uses, in the layers and in its gate; nothing is merged."""
        at, of = self.experience.index, self.experience.num_experiences
        of_layers, of_gate = self._moments(data)
        self.memory.update(of_layers, below_first(energy_threshold(at, of, self.threshold)))
        count = below_first(energy_threshold(at, of, self.gate_threshold))
        for name, moment in of_gate.items():
            free = self.get_buffer(f"free_{name}")
            free.copy_(narrowed(free, moment, count))

    def _newest(self) -> list[tuple[int, LowRank]]:
        return [(projection, adapter) for projection, adapter in self.adapters() if adapter.B.requires_grad]

    def _gate(self, index: int) -> Gate:
        gate = self.gates[index]
        assert isinstance(gate, Gate)
        return gate

    def _moments(self, data: TrainingData) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the second moments of the inputs of the adapted blocks, and of each part of the new gate."""
        gate = self._gate(-1)
        blocks = SecondMoments(self.layers, dtype=torch.float32)
        wide, narrow = SecondMoments([gate.inner, gate.key]), SecondMoments([gate.outer])
        measure(self.features, data.augmented(), blocks, wide, narrow)
        inner, key = wide.mean()
        return blocks.mean(), {"inner": inner, "outer": narrow.mean()[0], "key": key}


def _silu(x: Tensor) -> Tensor:
    """Return x σ(x), by operations whose gradients every device computes in the same way."""
    return x * x.sigmoid()


def narrowed(free: Tensor, moment: Tensor, count: Count) -> Tensor:
    """Return the projector ``free`` (d, d) without the strongest directions of a second moment (d, d).

    Source: GPM, https://arxiv.org/abs/2103.09762, with the energy of the covariance, as the released code.

    >>> narrowed(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 0.0])), lambda shares, held: [1])
    tensor([[0., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    wide = free.double()
    shares, directions = spectrum(wide @ of_unit_energy(moment, "covariance") @ wide)
    held = len(wide) - round(float(wide.trace()))
    (new,) = count(shares[None], [held])
    taken = directions[:, :new]
    return (wide - taken @ taken.mT).to(free.dtype)
