"""Linear probe: a frozen backbone and one linear head for each experience.

Nothing but the head of the current experience is trained, by cross-entropy over the classes of that
experience. What it reaches is what a method must beat before its adapters can be said to have learnt.

Source: the usual control; the loss and the heads are those of every trained strategy here.

Departures: None.
"""

from __future__ import annotations

from cl_bench.contracts.strategy import Strategy


class LinearProbe(Strategy):
    """Heads on frozen features."""

    name = "linear probe"
