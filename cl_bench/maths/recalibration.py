"""How much of a trained low-rank product to keep, between what it does for new inputs and to old ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Recalibration = Literal["diag", "full", "none"]
"""Each direction by itself, all of them together, or as trained."""


def recalibration(
    down: Tensor, old: Tensor, new: Tensor, gamma: float, kind: Recalibration = "full"
) -> Tensor:
    """Return the scaling Λ (r, r) of a product ``B Λ A`` with the down-projection ``A`` (r, n), in float64.

    With ``G = A S Aᵀ`` for the second moments of old and new inputs,

        Λ = g G_new (G_old + g G_new)⁻¹,    g the weight gamma,

    minimises ‖B Λ A X_oldᵀ‖² + g ‖B (Λ - I) A X_newᵀ‖², whatever ``B``. The diagonal form does so for each
    direction as if it were alone; its entries lie in [0, 1].

    Source: LoDA, https://arxiv.org/abs/2603.00191: the full form is the paper's, the diagonal its code's.

    Args:
        down: Down-projection ``A``.
        old: Uncentred second moment (n, n) of old inputs, on the scale of ``new``.
        new: That of the new inputs.
        gamma: What a change missed for new inputs weighs against one made to old inputs.
        kind: Which form.

    >>> down, old, new = torch.eye(2), torch.diag(torch.tensor([3.0, 0.0])), torch.eye(2)
    >>> recalibration(down, old, new, gamma=1.0).diagonal()
    tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    rows = down.double()
    of_old = rows @ old.double() @ rows.mT
    of_new = gamma * (rows @ new.double() @ rows.mT)
    match kind:
        case "diag":
            return torch.diag(of_new.diagonal() / (of_old + of_new).diagonal())
        case "full":
            scaling: Tensor = torch.linalg.solve(of_old + of_new, of_new, left=False)
            return scaling
        case "none":
            return torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
