"""Linear probe: a frozen backbone and one linear head for each experience.

Only the head of the current experience is trained, by cross-entropy over the classes of that experience. A
method must beat its accuracy before its adapters can be said to have learnt anything.

Source: the usual control; the loss and the heads are those of every trained strategy here.

Departures: None.
"""

from __future__ import annotations

from cl_bench.contracts.strategy import Strategy


class LinearProbe(Strategy):
    """Heads on frozen features."""

    name = "linear probe"
