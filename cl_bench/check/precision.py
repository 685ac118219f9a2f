"""The claim that a strategy runs from end to end, in full and in mixed precision."""

from __future__ import annotations

import torch

from cl_bench.check.subject import Run, Subject, copied_state, some
from cl_bench.check.verdict import Broken

PRECISIONS = ("32-true", "bf16-mixed")


def precision(subject: Subject) -> str:
    """Claim: in float32 and in mixed bfloat16 a stream runs to its end, and what is kept stays precise."""
    accuracies = []
    for name in PRECISIONS:
        run = subject.run({"trainer.precision": name})
        result = run.trainer.run(run.strategy, run.stream)
        _require_precise(run, name)
        accuracies.append(f"{name} ends at {result.metrics()['acc/sample']:.0f} %")
    return ", ".join(accuracies)


def _require_precise(run: Run, name: str) -> None:
    state = copied_state(run.strategy)
    coarse = [key for key, value in state.items() if value.dtype in (torch.bfloat16, torch.float16)]
    if coarse:
        raise Broken(
            f"under {name} the strategy keeps {some(coarse)} in half precision: convert to float32 before "
            "storing"
        )
    endless = [key for key, value in state.items() if not value.isfinite().all()]
    if endless:
        raise Broken(f"under {name} {some(endless)} end up not finite: find where, with --detect_anomaly")
