"""An adapted layer that returns a projected gradient for its up-projections, on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_bench.network.adapters import AdaptedLinear


class ShieldedLinear(AdaptedLinear):
    """An adapted layer whose backward pass gives every ``B`` a projected gradient instead of its own.

    Until :meth:`shield` is called it is an ordinary adapted layer. Afterwards ``B.grad`` is *not* the
    gradient of the loss. A shielded layer supports neither gates nor learnt scales.

    Args:
        linear: The layer to adapt; its weight and bias are frozen and shared, not copied.
        rows: Rows of the weight that each adapter adds to, by the adapter's name.
        rank: Rank of every adapter.
        scale: Factor of every adapter.
    """

    shielded: Tensor | None

    def __init__(self, linear: nn.Linear, rows: Mapping[str, slice], rank: int, scale: float = 1.0) -> None:
        super().__init__(linear, rows, rank, scale)
        self.register_buffer("shielded", None, persistent=False)

    def shield(self, basis: Tensor | None) -> None:
        """Set the directions ``basis`` (n, k) of the inputs that the gradient of every ``B`` leaves out.

        Let ``G`` (m, n) be the gradient of the weight and ``P = I - V V^T`` the projector on the complement
        of the basis ``V``. The backward pass then gives ``B`` the gradient ``s G P A^T`` instead of
        ``s G A^T``. Outputs and all other gradients stay, and so does that of ``A``: its safe form
        ``s B^T G P`` is ``A.grad`` without what lies in the span. ``G`` is never formed. A training step pays
        for one more product with a down-projection, and 4 n k flops for each row of ``A``; without gradients
        it costs nothing. If the rows of ``A`` lie outside the span, the two gradients of ``B`` agree.

        Source: the update of JANUS-LoRA, https://arxiv.org/abs/2605.28495, whose rectification starts from a
        projected full-weight gradient. Taking this product of it inside the layer is our choice.

        Args:
            basis: Orthonormal columns; None, or no column, for the true gradient.

        Raises:
            ValueError: If the basis has another width than the inputs.

        >>> layer = ShieldedLinear(nn.Linear(2, 1), {"v": slice(0, 1)}, rank=1)
        >>> _ = layer.adapter("v").A.data.copy_(torch.tensor([[1.0, 1.0]]))
        >>> layer.shield(torch.tensor([[1.0], [0.0]]))
        >>> layer(torch.tensor([[5.0, 3.0]])).sum().backward()
        >>> layer.adapter("v").B.grad  # the true gradient is 8
        tensor([[3.]])
        """
        features = self.weight.shape[1]
        if basis is not None and (basis.ndim != 2 or basis.shape[0] != features):
            raise ValueError(
                f"A basis of shape {tuple(basis.shape)} does not fit inputs of {features} features: "
                f"give orthonormal columns ({features}, k), or None."
            )
        self.shielded = None if basis is None or basis.shape[1] == 0 else basis.to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (…, n) to outputs (…, m), as the layer would without a shield.

        Raises:
            ValueError: If the inputs have another type than the layer, and autocast is off; or if a shielded
                layer has a gate or a learnt scale.
        """
        adapters = [self.adapter(name) for name in self.rows]
        needed = torch.is_grad_enabled() and any(adapter.B.requires_grad for adapter in adapters)
        if self.shielded is None or not needed:
            return super().forward(x)
        if not all(adapter.is_plain for adapter in adapters):
            raise ValueError(
                "A shielded layer cannot have a gate or a learnt scale: use an AdaptedLinear, or remove them."
            )
        return self._product(x, _outside([adapter.A for adapter in adapters], self.shielded))


@torch.no_grad()
def _outside(rows: Sequence[Tensor], basis: Tensor) -> Tensor:
    """Return all ``rows`` (R, n) without their parts in the span of ``basis`` (n, k)."""
    # If a row lies almost in the span, half precision would lose the little that is outside.
    with torch.autocast(basis.device.type, enabled=False):
        down = torch.cat(list(rows))
        return down - (down @ basis) @ basis.T
