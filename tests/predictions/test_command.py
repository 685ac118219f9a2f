from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from cl_bench import __main__ as cli
from cl_bench.artifacts.predictions import file_of, write
from cl_bench.results.result import Protocol, Result, Row

LABELS = np.array([0, 0, 1, 1, 2, 2, 3, 3])
DOMAINS = np.array([0, 1] * 4)


def counts(hit: npt.NDArray[np.bool_]) -> list[int]:
    listed: list[int] = np.bincount(LABELS[hit], minlength=4).tolist()
    return listed


def cell(folder: Path, predicted: list[int], images: str = "a") -> str:
    """Write a joint result on eight images of four classes in two experiences, with its predictions."""
    prediction = np.array(predicted)
    placed = prediction // 2 == LABELS // 2
    within = np.where(placed, prediction, LABELS)
    right = prediction == LABELS
    row = Row(
        counts(right),
        correct_within_experience=counts(within == LABELS),
        correct_experience=counts(placed),
        correct_by_domain=[counts(right & (DOMAINS == domain)) for domain in range(2)],
    )
    Result(
        strategy=folder.name,
        dataset="toy",
        experiences=[(0, 2), (2, 4)],
        class_names=["ant", "bee", "cat", "=cmd()"],
        test_images=[2, 2, 2, 2],
        order="identity",
        seed=1,
        regime="joint",
        protocol=Protocol({"test_images": images}, {}, {}),
        rows=[None, row],
        status="done",
        domains=["photo", "sketch"],
        domain_images=[[1, 1, 1, 1], [1, 1, 1, 1]],
    ).write(folder)
    columns = {
        "after": np.ones(8, dtype=int),
        "sample": np.arange(8),
        "label": LABELS,
        "experience": LABELS // 2,
        "prediction": prediction,
        "predicted_experience": prediction // 2,
        "within": within,
        "top5": np.stack([(prediction + shift) % 4 for shift in range(4)], axis=1),
        "probability": np.full(8, 0.5),
        "domain": DOMAINS,
    }
    write(file_of(folder, 1), columns)
    return str(folder)


def test_numbers_and_confusion_of_a_cell_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predictions", cell(tmp_path / "LoRA", [0, 0, 1, 2, 2, 2, 2, 3])]) == cli.DONE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["LoRA", "on", "toy-T2,", "LoRA"]
    # 6 of 8 right, 7 in their experience, 5 placed in the newest, whose images are 4; all at probability 1/2.
    assert ["2", "75.00", "87.50", "62.50", "50.00", "12.50", "25.00"] in lines
    assert lines[-2:] == [["1", "3", "1"], ["2", "0", "4"]]


def test_two_cells_on_the_same_images_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = cell(tmp_path / "LoRA", [0, 0, 1, 1, 2, 2, 0, 0])
    second = cell(tmp_path / "NCM", [0, 1, 0, 0, 0, 0, 3, 0])
    other = cell(tmp_path / "other", [0] * 8, images="b")
    assert cli.main(["predictions", first, second, other]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    found = [line.partition(": ")[2] for line in lines if " | " in line]
    # Five images are right only in the first, one only in the second: two-sided binomial, 2 (1 + 6) / 2⁶.
    assert found[0] == "only the first is right on 5, only the second on 1, p = 0.22"
    assert found[1:] == ["not compared, since their test images differ"] * 2


def test_csv_files_hold_classes_domains_and_confusion_by_name(tmp_path: Path) -> None:
    folder = cell(tmp_path / "LoRA", [0, 0, 1, 2, 2, 2, 2, 3])
    assert cli.main(["predictions", folder, "--output", str(tmp_path / "out")]) == cli.DONE
    (classes,), (domains,), (confusion,) = (
        [pd.read_csv(path, index_col=0) for path in (tmp_path / "out").glob(f"{kind}_*.csv")]
        for kind in ("classes", "domains", "confusion")
    )
    assert classes.loc[2].to_dict() == {"ant": 1.0, "bee": 0.5, "cat": 1.0, "'=cmd()": 0.5}
    assert domains.loc[2].to_dict() == {"photo": 0.75, "sketch": 0.75}
    assert confusion.loc["bee"].tolist() == [0, 1, 1, 0]


def test_a_cell_without_predictions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cell(tmp_path / "LoRA", [0] * 8)
    file_of(tmp_path / "LoRA", 1).unlink()
    assert cli.main(["predictions", folder]) == cli.REFUSED
    assert "run its cell again with --keep predictions" in capsys.readouterr().err
