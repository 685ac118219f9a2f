"""Real offline runs of W&B, read back from the files it would send."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from cl_bench.report.upload import Uploaded, upload
from cl_bench.results.result import Result

Drawn = Callable[..., Result]

OfKind = Callable[[Path, str], list[Any]]

METRICS = ("acc/sample", "bwt/gem")


@pytest.fixture(scope="module")
def results(drawn: Drawn) -> list[Result]:
    made = [drawn(name, 1, length=3) for name in ("InfLoRA", "JANUS-LoRA")]
    return [*made, drawn("InfLoRA", 1, length=3, identity={"image_size": 64})]


@pytest.fixture(scope="module")
def uploaded(results: list[Result], tmp_path_factory: pytest.TempPathFactory) -> Uploaded:
    return upload(results, "team/comparison", tmp_path_factory.mktemp("report"), METRICS)


@pytest.fixture(scope="module")
def of_kind(wandb_records: Callable[[Path], list[Any]]) -> OfKind:
    """Function that returns the records of one kind from the folder of a run."""

    def found(folder: Path, kind: str) -> list[Any]:
        records = wandb_records(folder)
        return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]

    return found


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _folder(uploaded: Uploaded, result: Result) -> Path:
    (folder,) = (path for path in uploaded.runs if f"seed1-{result.cell}" in path.name)
    return folder


def test_every_result_is_a_run_of_its_own(uploaded: Uploaded, results: list[Result]) -> None:
    # The third has the cell of the first and another protocol, so their ids must differ.
    assert len(uploaded.runs) == len(results)


def test_curves_are_those_of_the_file_with_the_experience_as_step(
    uploaded: Uploaded, results: list[Result], of_kind: OfKind
) -> None:
    folder = _folder(uploaded, results[1])
    history = [_values(row.item) for row in of_kind(folder, "history")]
    rows = [row for row in history if "stream/experience" in row]
    assert [row["stream/experience"] for row in rows] == [1, 2, 3]
    for i, row in enumerate(rows):
        assert row["stream/acc/sample"] == pytest.approx(results[1].metrics_after(i)["acc/sample"])
    steps = {metric.glob_name: metric.step_metric for metric in of_kind(folder, "metric")}
    assert steps["stream/*"] == "stream/experience"


def test_summary_holds_metrics_and_costs(uploaded: Uploaded, results: list[Result], of_kind: OfKind) -> None:
    summary: dict[str, Any] = {}
    for update in of_kind(_folder(uploaded, results[1]), "summary"):
        summary |= _values(update.update)
    assert summary["final/bwt/gem"] == pytest.approx(results[1].metrics()["bwt/gem"])
    assert summary["cost/seconds"] == pytest.approx(results[1].spending()["seconds"])


def test_config_has_what_decides_comparability(
    uploaded: Uploaded, results: list[Result], of_kind: OfKind
) -> None:
    folder = _folder(uploaded, results[1])
    (start,) = of_kind(folder, "run")
    assert (start.entity, start.project, start.run_group) == ("team", "comparison", "imagenet_r-T3")
    config = _values(start.config.update)
    for update in of_kind(folder, "config"):
        config |= _values(update.update)
    assert config["label"] == "JANUS-LoRA"
    assert config["fingerprint"] == results[1].protocol.fingerprint
    assert config["seed"] == 1


def test_the_accuracy_matrix_is_a_table(uploaded: Uploaded, results: list[Result]) -> None:
    (path,) = (_folder(uploaded, results[1]) / "files" / "media" / "table").glob("accuracy_matrix*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["after", "on", "accuracy"]
    assert [line[:2] for line in table["data"]] == [[1, 1], [2, 1], [2, 2], [3, 1], [3, 2], [3, 3]]
    first = results[1].counts("correct")[2, 0] / results[1].totals[0]
    assert table["data"][3][2] == pytest.approx(100 * first)


def test_a_view_shows_one_protocol(uploaded: Uploaded, results: list[Result]) -> None:
    filters = [
        {one["key"]["name"]: one["value"] for one in run_set["filters"]["filters"]}
        for view in uploaded.views[:-1]
        for run_set in view["spec"]["section"]["runSets"]
    ]
    assert {one["fingerprint"] for one in filters} == {result.protocol.fingerprint for result in results}
    assert all(one["benchmark"] == "imagenet_r-T3" and one["status"] == "done" for one in filters)
    written = json.loads((uploaded.runs[0].parents[1] / "views.json").read_text())
    assert written == json.loads(json.dumps(uploaded.views))


def test_the_last_view_has_strategies_and_benchmarks_at_once(uploaded: Uploaded) -> None:
    (run_set,) = uploaded.views[-1]["spec"]["section"]["runSets"]
    assert [one["key"]["name"] for one in run_set["filters"]["filters"]] == ["status"]
    assert {"benchmark", "fingerprint", "label"} <= set(re.findall(r"\w+", json.dumps(run_set["grouping"])))


def test_a_matrix_is_also_a_picture(uploaded: Uploaded, results: list[Result]) -> None:
    (path,) = (_folder(uploaded, results[1]) / "files" / "media" / "images").glob("accuracy_matrix*.png")
    pixels = imread(path)
    assert len({tuple(pixel) for row in pixels[::4, ::4] for pixel in row}) > 6  # of six entries, and a scale


def test_offline_the_text_has_the_command_to_sync(uploaded: Uploaded) -> None:
    assert "Offline: nothing was sent. 3 runs and their views are in" in uploaded.text
    assert "wandb sync" in uploaded.text


@pytest.mark.parametrize("name", ("", "team/", "a/b/c"))
def test_an_invalid_project_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a W&B project: give a name, or ENTITY/PROJECT"):
        upload([], name, tmp_path, METRICS)


def test_the_command_line_uploads_runs_table_and_page_without_torch(
    results: list[Result], tmp_path: Path, checkout: Path, of_kind: OfKind
) -> None:
    results[0].write(tmp_path / "one")
    program = (
        "import sys; from cl_bench.__main__ import main; "
        f"main(['report', {str(tmp_path)!r}, '--format', 'csv', '--wandb', 'demo']); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    sent, one = sorted(
        tmp_path.glob("report/wandb/wandb/offline-run-*"), key=lambda path: "report-" not in path.name
    )
    assert f"seed1-{results[0].cell}" in one.name
    (artifact,) = of_kind(sent, "artifact")
    files = {content.path: content.size for content in artifact.manifest.contents}
    assert files == {name: (tmp_path / "report" / name).stat().st_size for name in ("table.csv", "page.html")}
