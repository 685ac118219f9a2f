"""JANUS-LoRA: estimate in training what the inputs use, and update both factors so that it stays untouched.

Three parts work together, and each can be switched off:

* *Online Estimation* (OE) records the inputs of every adapted layer during training and, at the end of an
  experience, adds the directions that hold most of their energy to a memory. It takes no extra pass over the
  data and keeps no image.
* *Gradient Rectification* (GR) takes the gradient of the whole weight without those directions and finds the
  updates of both factors, ``A`` and ``B``, whose joint effect is nearest to it.
* The *Decoupled Margin Loss* (DML) pushes new features away from the prototypes of old classes, separately
  from classification.

Source: JANUS-LoRA, ICML 2026, https://arxiv.org/abs/2605.28495: the three parts and their purpose, the
projected update and the closed form through the tangent space, both factors trained, on the keys and values
of every block. Inferred from its figures: that OE takes no pass of its own, that the margin loss works on
angles, and that its prototypes are class means.

===========================================  ===========================================================
paper                                        here
===========================================  ===========================================================
``W = W_0 + s B A``, both factors trained    ``LowRankStrategy``, ``AdaptedLinear``
OE: S = XᵀX / N of the inputs, in training   ``training_step`` records, ``SecondMoments`` or ``InputSketch``
OE: V, basis memory                          ``protect``, by the rule ``reaching`` of ``GPM.update``
GR: ΔW_safe = G (I - V Vᵀ)                   ``project_gradients`` for ``A``, ``ShieldedLinear`` for ``B``
GR: min ‖s (B X + Y A) - ΔW_safe‖ in X, Y    ``rectify_factors``, ``maths.rectification.rectified``
DML: [cos(f, nearest old prototype) - m]₊    ``margin_term``, ``maths.losses.decoupled_margin``
===========================================  ===========================================================

Departures: this is a reconstruction. The paper's text was not at hand and no code of it is public, so these
are ours, and none of them may be called reproduced:

1. OE: the uncentred second moment of all tokens seen in training, projected once at the end, with the energy
   rule of GPM and the threshold schedule of InfLoRA. ``stream`` keeps a sketch of it in less memory.
2. GR: the formula, its gauge and its damping; see ``cl_bench/maths/rectification.py``. It edits gradients
   before the optimizer, Adam included. Without GR only the gradient of ``A`` is projected.
3. ``row_space: safe``: rows of ``A`` are cleared of protected directions at the start of an experience and
   after every step, which makes the update exactly safe under any optimizer. The paper reports a violation
   above zero, so it has no such step; ``free`` is nearer to it. If fewer than r directions are free, the
   cleared rows span those that are, with a warning: both factors train, so the adapter keeps learning there.
4. DML: a hinge on the cosine to the nearest old prototype, its margin, its weight, and prototypes measured
   once, when their class has been learnt, from images as at test time.
5. A fresh adapter of rank 10 without a scale for every experience, merged at its end; a linear head for each,
   trained by the cross-entropy over its own classes; optimizer, schedule and epochs: all as in InfLoRA's
   code, https://arxiv.org/abs/2404.00228.

With all three parts off it is plain LoRA, ``merge``, bit for bit.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts.margin import DecoupledMargin
from cl_bench.contracts.protection import ProtectedStrategy, RowSpace
from cl_bench.contracts.strategy import TrainingData
from cl_bench.data.experience import Batch
from cl_bench.maths.losses import local_cross_entropy
from cl_bench.measure.moments import SecondMoments
from cl_bench.measure.sketch import InputSketch
from cl_bench.network.backbones import Backbone
from cl_bench.network.heads import GrowingLinear


class JanusLoRA(DecoupledMargin, ProtectedStrategy):
    """Both factors trained, outside of what older inputs were seen to use, away from old prototypes.

    Args:
        backbone: Pre-trained vision transformer.
        online_estimation: OE: ``exact`` second moments, a ``stream`` sketch of them, or null for none.
        rectification: GR: whether both gradients are rectified, or only that of A is projected.
        decoupled_margin: DML: whether new features are pushed away from old prototypes.
        row_space: ``safe`` keeps the rows of A outside the protected directions; ``free`` does not.
        estimate_every: OE records every so many steps, the first included.
        sketch_rows: Directions that a ``stream`` keeps, and so the most that one experience can add.
        kwargs: Settings of every strategy with protected directions, and of the decoupled margin.
    """

    name = "JANUS-LoRA"
    head: GrowingLinear

    def __init__(
        self,
        backbone: Backbone,
        *,
        online_estimation: Literal["exact", "stream"] | None = "exact",
        rectification: bool = True,
        decoupled_margin: bool = True,
        row_space: RowSpace = "safe",
        estimate_every: int = 1,
        sketch_rows: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone,
            rectification=rectification,
            decoupled_margin=decoupled_margin,
            row_space=row_space,
            **kwargs,
        )
        if online_estimation is None:  # then no basis grows
            grown = tuple(name for name in self.promises.step_grows_with if name != "basis")
            self.promises = replace(self.promises, step_grows_with=grown)
        self.inputs: SecondMoments | InputSketch | None = None
        if online_estimation == "exact":
            # OE needs only shares of energy, and they are the same from float32 products.
            self.inputs = SecondMoments(self.layers, estimate_every, torch.float32)
        elif online_estimation == "stream":
            self.inputs = InputSketch(self.layers, self.memory, sketch_rows, estimate_every)
        parts = {"OE": online_estimation, "GR": rectification, "DML": decoupled_margin}
        on = [part for part, setting in parts.items() if setting]
        self.variant = None if len(on) == len(parts) else " + ".join(on) or "all parts off"

    # OE

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch; OE records the inputs of the layers meanwhile."""
        with nullcontext() if self.inputs is None else self.inputs.recording_after():
            return super().training_step(batch, batch_idx)

    def after_training(self, data: TrainingData) -> None:
        """Protect what OE has recorded, then merge, and keep prototypes for DML."""
        if self.inputs is not None:
            known = self.inputs.rows if isinstance(self.inputs, InputSketch) else None
            self.protect(self.inputs.mean(), known)  # V
            self.inputs.clear()
        super().after_training(data)

    # GR

    def rectify_gradients(self) -> None:
        """Make the gradients of both factors those of a safe update of the weight."""
        self.project_gradients()  # of A: s Bᵀ ΔW_safe
        if self.rectification:
            self.rectify_factors()  # X, Y nearest to ΔW_safe

    # DML

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy over the new classes plus the decoupled margin term."""
        logits = self.head.current(features)
        entropy = local_cross_entropy(logits, labels, self.experience.classes.start)
        return entropy + self.margin_term(features, labels)
