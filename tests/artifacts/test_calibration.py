import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from cl_bench.artifacts.calibration import expected_calibration_error


def test_calibration_error_weights_the_gap_of_every_bin_by_its_images() -> None:
    # Three images at 0.9, of which two are right, and one at 0.3, which is wrong: 3/4 (0.9 - 2/3) + 1/4 0.3.
    table = pd.DataFrame(
        {"after": 0, "probability": [0.9, 0.9, 0.9, 0.3], "label": 0, "prediction": [0, 0, 1, 1]}
    )
    error = expected_calibration_error(table)
    assert error.to_dict() == {0: pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.3)}


def test_calibration_error_needs_only_the_probability_of_the_prediction() -> None:
    probabilities = torch.randn(300, 7, generator=torch.manual_seed(0)).softmax(dim=1)
    labels = torch.randint(7, (300,), generator=torch.manual_seed(1))
    confidence, prediction = probabilities.max(dim=1)
    table = pd.DataFrame(
        {"after": 2, "probability": confidence, "label": labels, "prediction": prediction}, dtype=np.float64
    )
    expected = multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=15)
    assert expected_calibration_error(table)[2] == pytest.approx(float(expected), abs=1e-6)
