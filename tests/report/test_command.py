from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_bench.__main__ import main
from cl_bench.artifacts.predictions import file_of, write
from cl_bench.report.command import FORMATS, Format, report, results_below, with_confusions
from cl_bench.report.comparison import comparisons
from cl_bench.report.pictures import confusions, costs
from cl_bench.results.result import Result

Made = Callable[..., Result]


def _folder(results: list[Result], root: Path) -> Path:
    for number, result in enumerate(results):
        result.write(root / result.benchmark / str(number))
    return root


def test_a_report_leaves_its_table_and_pictures(made: Made, tmp_path: Path) -> None:
    left = report(_folder([made(), made("NCM", seed=2)], tmp_path), "md")
    folder = tmp_path / "report"
    names = ["table.md", "curves_digits-T2.png", "matrix_digits-T2.png", "cost_digits-T2.png"]
    assert left.files == [folder / name for name in names]
    assert left.text == (folder / "table.md").read_text(encoding="utf-8")
    assert "| LoRA (merge) |" in left.text


def test_a_report_for_a_paper_has_pictures_of_the_width_asked(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["report", str(_folder([made(), made("NCM")], tmp_path)), "--format", "latex"]
    assert main([*words, "--figure-width", "column", "--font-size", "7"]) == 0
    kinds = ("curves", "matrix", "cost")
    names = {f"{kind}_digits-T2.{ending}" for kind in kinds for ending in ("pdf", "svg")}
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"table.tex", *names}
    drawn = (tmp_path / "report" / "cost_digits-T2.svg").read_text()
    assert re.search(r'<svg [^>]*width="23[345]', drawn)  # 3.25 inches of 72 points
    assert "font: 7px" in drawn or "font-size: 7px" in drawn


@pytest.mark.parametrize(
    ("words", "error"),
    (
        (["--figure-width", "wide"], "write column, page, or a number of inches"),
        (["--figure-width", "0.2"], "cannot be 0.2 inches wide: give 1 to 50"),
        (["--font-size", "nan"], "A font size cannot be nan points: give 3 to 40"),
        (["--format", "html", "--font-size", "9"], "--font-size has no effect with --format html"),
    ),
)
def test_a_size_that_cannot_be_drawn_is_one_sentence(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], error: str
) -> None:
    assert main(["report", str(_folder([made()], tmp_path)), *words]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def _keep(result: Result, folder: Path) -> Path:
    """Write ``result`` with predictions: of two classes, a wrong image is taken for the other one."""
    for after, row in enumerate(result.rows):
        assert row is not None
        right = [
            [place < correct for place in range(images)]
            for correct, images in zip(row.correct, result.test_images, strict=False)
        ]
        label = np.repeat(np.arange(len(right)), [len(one) for one in right])
        prediction = np.where(np.concatenate(right), label, 1 - label)
        columns: dict[str, Any] = dict.fromkeys(("label", "experience"), label)
        columns |= dict.fromkeys(("prediction", "predicted_experience", "within"), prediction)
        columns |= {"after": np.full_like(label, after), "sample": np.arange(len(label))}
        columns |= {"top5": prediction[:, None], "probability": np.ones(len(label))}
        write(file_of(folder, after), columns)
    return result.write(folder)


def test_kept_predictions_become_a_confusion(made: Made, tmp_path: Path) -> None:
    _keep(made(counts=((10,), (5, 8)), seed=1), tmp_path / "1")
    _keep(made(counts=((10,), (7, 10)), seed=2), tmp_path / "2")
    made("NCM").write(tmp_path / "ncm")
    written = report(tmp_path, "md")
    assert tmp_path / "report" / "confusion_digits-T2.png" in written.files
    assert written.notices == []
    (comparison,) = comparisons(results_below(tmp_path)[0])
    assert with_confusions([comparison], tmp_path) == []
    assert [len(entry.confusions) for entry in comparison.entries] == [2, 0]
    picture = confusions(comparison)
    assert picture is not None
    numbers = [text.get_text() for text in picture.axes[0].texts if text.get_text().isdigit()]
    assert numbers == ["60", "40", "10", "90"]  # of (5 + 7) / 20 and (8 + 10) / 20


def test_predictions_of_another_run_are_one_notice(made: Made, tmp_path: Path) -> None:
    path = _keep(made(counts=((10,), (5, 8))), tmp_path / "1")
    made(counts=((10,), (5, 9))).write(path.parent)
    (tmp_path / "2" / "predictions").mkdir(parents=True)
    (tmp_path / "2" / "predictions" / "experience1.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    made("NCM").write(tmp_path / "2")
    written = report(tmp_path, "md")
    assert len(written.notices) == 2
    assert all(line.startswith(f"Not read: {tmp_path}/") for line in written.notices)
    assert "do not add up to the counts of its result" in written.notices[0]
    assert not [*(tmp_path / "report").glob("confusion*")]


def test_a_report_in_csv_has_a_separate_file_for_absent_runs(made: Made, tmp_path: Path) -> None:
    left = report(_folder([made(), made("NCM", status="failed", error="no space")], tmp_path), "csv")
    assert [path.name for path in left.files[:2]] == ["table.csv", "absent.csv"]
    assert left.text.startswith("benchmark,fingerprint,strategy,label,group,metric,mean,std,n,low,high,")
    assert "NCM,1,identity,failed,no space" in (tmp_path / "report" / "absent.csv").read_text()


@pytest.mark.parametrize(("format", "name"), (("latex", "table.tex"), ("json", "table.json")))
def test_a_format_leaves_its_file(made: Made, tmp_path: Path, format: Format, name: str) -> None:  # noqa: A002
    left = report(_folder([made()], tmp_path), format)
    assert left.files[0] == tmp_path / "report" / name
    assert left.text == left.files[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("format", ["json", "csv"])
def test_standard_output_holds_only_csv_or_json(
    made: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format: str,  # noqa: A002
) -> None:
    assert main(["report", str(_folder([made()], tmp_path)), "--format", format]) == 0
    printed = capsys.readouterr()
    assert printed.out.rstrip() == (tmp_path / "report" / f"table.{format}").read_text().rstrip()
    assert f"wrote {tmp_path / 'report' / f'table.{format}'}" in printed.err


def test_the_command_line_offers_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert f"--format {{{','.join(FORMATS)}}}" in capsys.readouterr().out


def test_a_report_shows_the_metrics_asked_for(made: Made, tmp_path: Path) -> None:
    text = report(_folder([made()], tmp_path), "md", ["plasticity/experience"]).text
    assert "plasticity/experience" in text
    assert "bwt/gem" not in text


def test_a_name_in_a_result_never_leaves_the_folder_of_the_report(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cl_bench.report.pictures.PICTURES", {"cost": costs})  # one for each is enough
    names = [
        "x/../../../../ESCAPED",
        "/tmp/absolute",
        "..",
        "nul",
        "n" * 400,
        "toy",
        "Toy",
        ".hidden",
        "\u00e9",
    ]
    folder = tmp_path / "deep" / "results"
    for number, name in enumerate(names):
        made(dataset=name).write(folder / str(number))
    before = {path for path in tmp_path.rglob("*") if "report" not in path.parts}
    written = report(folder, "md")
    assert {path for path in tmp_path.rglob("*") if "report" not in path.parts} == before
    pictures = [path for path in (folder / "report").iterdir() if path.suffix == ".png"]
    assert len({path.name.casefold() for path in pictures}) == len(names) == len(written.files) - 1
    assert written.notices == []


def test_pictures_of_two_protocols_have_two_names(made: Made, tmp_path: Path) -> None:
    results = [made(), made(identity={"image_size": 64})]
    names = [path.name for path in report(_folder(results, tmp_path), "md").files if "curves" in path.name]
    assert names == [f"curves_digits-T2-{one}.png" for one in sorted(r.protocol.fingerprint for r in results)]


def test_a_report_folder_that_is_a_link_is_not_written_to(made: Made, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = _folder([made()], tmp_path / "results")
    (folder / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link to another folder"):
        report(folder, "md")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_formats_stand_side_by_side(made: Made, tmp_path: Path) -> None:
    folder = _folder([made()], tmp_path)
    left = [path for name in FORMATS for path in report(folder, name).files]
    assert all(path.exists() for path in left)
    assert len(set(left)) >= len(FORMATS)


def test_a_second_report_is_equal_and_removes_stale_pictures(made: Made, tmp_path: Path) -> None:
    first = report(_folder([made()], tmp_path), "md")
    stale = tmp_path / "report" / "curves_gone-T5.png"
    stale.touch()
    assert report(tmp_path, "md") == first
    assert not stale.exists()


def test_an_unknown_metric_names_the_nearest(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no metric .acc/samples.\. Did you mean acc/sample"):
        report(_folder([made()], tmp_path), "md", ["acc/samples"])


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run a cell first"):
        report(tmp_path, "md")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_report_imports_neither_torch_nor_pyplot(
    made: Made,
    tmp_path: Path,
    checkout: Path,
    format: Format,  # noqa: A002
) -> None:
    folder = _folder([made(name, seed=seed) for name in ("a", "b") for seed in range(10)], tmp_path)
    program = (
        "import sys; from pathlib import Path; from cl_bench.report.command import report; "
        f"report(Path({str(folder)!r}), {format!r}); "
        "heavy = {'torch', 'lightning', 'timm', 'wandb', 'matplotlib.pyplot'}; "
        "heavy |= {'cl_bench.artifacts.predictions'}; "
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.soak
@pytest.mark.parametrize("format", ("md", "html"))
def test_ten_thousand_results_are_reported_in_a_minute(
    drawn: Made,
    tmp_path: Path,
    checkout: Path,
    format: Format,  # noqa: A002
) -> None:
    names = [f"strategy {number}" for number in range(20)]
    for dataset in ("cifar100", "imagenet_r", "imagenet100", "domainnet", "digits"):
        for number, name in enumerate(names):
            one = drawn(name, 1, dataset=dataset, classes=20, lost=0.002 * number, domains=True)
            path = one.write(tmp_path / dataset / str(number))
            payload = json.loads(path.read_text())
            path.unlink()
            for block in range(100):
                seed, order = block % 10, f"numpy-{block // 10}"
                payload |= {"seed": seed, "order": order}
                payload["config"] |= {"seed": seed, "order": order}
                payload["rows"][-1]["correct"][0] = (7 * block + number) % 48
                folder = path.parent / str(block)
                folder.mkdir()
                (folder / path.name).write_text(json.dumps(payload))
    began = time.perf_counter()
    words = ["-m", "cl_bench", "report", str(tmp_path), "--format", format]
    subprocess.run([sys.executable, *words], cwd=checkout, check=True, capture_output=True)
    assert time.perf_counter() - began < 60
