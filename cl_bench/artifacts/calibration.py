"""How far the confidence of kept predictions is from their accuracy."""

from __future__ import annotations

import pandas as pd
import torch
from torchmetrics.functional.classification import binary_calibration_error

_BINS = 15


def expected_calibration_error(table: pd.DataFrame) -> pd.Series:
    """Return the expected calibration error by ``after``, a fraction in [0, 1].

    Predictions fall into 15 bins of equal width by their probability; the error is the mean over the images
    of the distance between the accuracy and the mean probability of their bin. It needs no logits, since only
    the probability of the prediction enters.

    Source: Guo et al., https://arxiv.org/abs/1706.04599, equation 3, as torchmetrics computes it.

    >>> table = pd.DataFrame({"after": 0, "probability": [0.5, 1.0], "label": [0, 0], "prediction": [0, 0]})
    >>> expected_calibration_error(table).to_dict()
    {0: 0.25}
    """
    return pd.Series(
        {after: _error(own) for after, own in table.groupby("after")}, name="ece", dtype=float
    ).rename_axis("after")


def _error(own: pd.DataFrame) -> float:
    confidence = torch.tensor(own["probability"].to_numpy(), dtype=torch.float64)
    correct = torch.tensor((own["prediction"] == own["label"]).to_numpy())
    # Confidence and hits are all that the error of several classes depends on.
    return float(binary_calibration_error(confidence, correct.long(), n_bins=_BINS, norm="l1"))
