"""Linear probe: a frozen backbone and one linear head for each experience.

Only the head of the current experience is trained, by cross-entropy over the classes of that experience. A
method must beat its accuracy before one can conclude that its adapters have learnt anything.

Source: the usual control, without a paper of its own; loss and heads are those of every trained strategy.

=============================  =================================
usual form                     here
=============================  =================================
``W f + b``, ``f`` frozen      ``GrowingLinear`` on ``features``
cross-entropy over new labels  ``local_cross_entropy``
=============================  =================================

Departures: None.
"""

from __future__ import annotations

from cl_bench.contracts.strategy import Promises, Strategy


class LinearProbe(Strategy):
    """Heads on frozen features."""

    name = "linear probe"
    promises = Promises(constant="features")
