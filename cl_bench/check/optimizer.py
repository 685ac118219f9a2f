"""The claim that the optimizer moves what the strategy has, and all of it."""

from __future__ import annotations

from cl_bench.check.observation import Observed
from cl_bench.check.verdict import Broken


def optimizer(observed: list[Observed]) -> str:
    """Claim: before the first step and after each, the optimizer holds the strategy's own parameters.

    It was built before the hooks around training ran. A parameter that one of them replaces is trained no
    more, and nothing says so.
    """
    for index, seen in enumerate(observed, 1):
        if seen.strangers:
            raise Broken(
                f"{seen.strangers[0]}, in experience {index}: write parameters in place, and make new ones "
                "or thaw old ones in expand"
            )
    trained = sorted({len(seen.ready.trained) for seen in observed})
    return f"{' to '.join(map(str, trained))} tensors in each of {len(observed)} experiences"
