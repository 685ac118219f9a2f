from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cl_bench
from cl_bench import compared as module
from cl_bench.__main__ import main
from cl_bench.compared import Compared, compare
from cl_bench.grid.engine import Engine
from cl_bench.grid.work import Job, Outcome, in_this_process
from cl_bench.loop.callbacks import StreamMetrics
from cl_bench.results.result import FILE_NAME
from cl_bench.run.run import RunFailed

STRATEGIES = ["ncm", "linear_probe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def compared(folder: Path) -> Compared:
    return compare(STRATEGIES, "toy", seeds=[1, 2], results=folder, max_epochs=1)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a finished cell ran again")

    monkeypatch.setattr(module, "run", refuse)


def _files(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.rglob(FILE_NAME)):
        yield json.loads(path.read_text())


def test_the_package_has_the_function() -> None:
    assert cl_bench.compare is compare


def test_a_comparison_prints_nothing_and_warns_of_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    compare(["lora"], "toy", results=tmp_path, max_epochs=1)
    assert tuple(capfd.readouterr()) == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_progress_is_a_line_for_every_experience(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(["ncm"], "toy", results=tmp_path, progress=True)
    assert capsys.readouterr().out.count("accuracy over") == 3


def test_a_finished_cell_of_the_command_line_is_served(tmp_path: Path, nothing_runs: None) -> None:
    words = ["run", "ncm", "toy", "--seed", "3", "--order", "numpy:1", "--results", str(tmp_path)]
    assert main([*words, "--max_epochs", "1"]) == 0
    (result,) = compare(["ncm"], "toy", seeds=[3], orders=["numpy:1"], results=tmp_path, max_epochs=1).results
    assert (result.seed, result.order, result.status) == (3, "numpy-1", "done")


def test_a_second_call_runs_nothing(compared: Compared, folder: Path, nothing_runs: None) -> None:
    again = compare(STRATEGIES, "toy", seeds=[1, 2], results=folder, max_epochs=1)
    assert again.to_frame().equals(compared.to_frame())


def test_the_matrix_is_the_mean_over_the_files(compared: Compared, folder: Path) -> None:
    matrix = np.full((3, 3), np.nan)
    files = [file for file in _files(folder) if file["strategy"] == "linear probe"]
    for i in range(3):
        for j, (start, stop) in enumerate(files[0]["experiences"][: i + 1]):
            right = [sum(file["rows"][i]["correct"][start:stop]) for file in files]
            matrix[i, j] = 100 * np.mean(right) / sum(files[0]["test_images"][start:stop])
    assert len(files) == 2
    np.testing.assert_allclose(compared.accuracy_matrix("linear probe"), matrix)


def test_a_frame_has_a_row_for_every_run(compared: Compared, folder: Path) -> None:
    frame = compared.to_frame()
    assert sorted(zip(frame["strategy"], frame["seed"], strict=True)) == [
        *(("NCM", 1), ("NCM", 2)),
        *(("linear probe", 1), ("linear probe", 2)),
    ]
    for file in _files(folder):
        (row,) = frame[(frame["strategy"] == file["strategy"]) & (frame["seed"] == file["seed"])].to_dict(
            "records"
        )
        right = sum(file["rows"][-1]["correct"])
        assert row["acc/sample"] == pytest.approx(100 * right / sum(file["test_images"]))


def test_printed_it_is_a_table(compared: Compared) -> None:
    assert "| NCM " in str(compared)
    assert str(compared).startswith("toy: 6 classes in 3 experiences")


def test_a_picture_names_the_strategies_and_a_notebook_shows_it(compared: Compared, tmp_path: Path) -> None:
    picture = compared.plot()
    assert {"NCM", "linear probe"} <= {text.get_text() for text in picture.axes[0].texts}
    assert picture._repr_png_().startswith(b"\x89PNG")
    compared.plot("cost").savefig(tmp_path / "cost.svg")
    assert "linear probe" in (tmp_path / "cost.svg").read_text()


def test_what_does_not_exist_is_answered_with_the_nearest(compared: Compared, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no picture 'curve'\. Did you mean curves\?"):
        compared.plot("curve")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"There is no strategy 'ncm' here\. Choose among NCM, linear probe"):
        compared.accuracy_matrix("ncm")
    with pytest.raises(ValueError, match=r"There is no key rnk\. Did you mean model\.rank\?"):
        compare(["lora"], "toy", results=tmp_path, rnk=4)
    with pytest.raises(ValueError, match=r"seed cannot be in common, .* use seeds"):
        compare(["lora"], "toy", results=tmp_path, seed=3)
    with pytest.raises(ValueError, match="settings for loar, which is not among the strategies"):
        compare(["lora"], "toy", results=tmp_path, settings={"loar": {"small": {"rank": 2}}})


def test_finished_results_of_two_sizes_of_image_are_read_again(tmp_path: Path) -> None:
    sizes = {str(size): {"image_size": size, "backbone.options.img_size": size} for size in (16, 24)}
    first, second = (compare(["ncm"], "toy", settings={"ncm": sizes}, results=tmp_path) for _ in range(2))
    assert [one.cell for one in first.results] == [one.cell for one in second.results]


def test_settings_are_rows_of_their_own(tmp_path: Path) -> None:
    settings = {"linear_probe": {"slow": {"optimizer.lr": 1e-4}, "fast": {"optimizer.lr": 1e-2}}}
    compared = compare(["linear_probe"], "toy", settings=settings, results=tmp_path, max_epochs=1)
    assert set(compared.to_frame()["strategy"]) == {"linear probe, slow", "linear probe, fast"}


def test_unequal_protocols_share_no_picture(compared: Compared, tmp_path: Path) -> None:
    other = compare(["ncm"], "toy", results=tmp_path, noise=0.5)
    with pytest.raises(ValueError, match="2 protocols, which share no table"):
        Compared([*compared.results, *other.results], tmp_path).plot()


def test_a_cell_that_fails_costs_no_other_and_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_test_start = StreamMetrics.on_test_start

    def failing(metrics: StreamMetrics, *arguments: Any) -> None:
        if metrics.result.strategy == "NCM":
            raise ArithmeticError("power cut")
        on_test_start(metrics, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(StreamMetrics, "on_test_start", failing)
        with pytest.raises(RunFailed, match=r"ncm on toy-T3.*power cut.*\nRepeat the call"):
            compare(STRATEGIES, "toy", results=tmp_path, max_epochs=1)
    assert sorted(file["status"] for file in _files(tmp_path)) == ["done", "failed"]
    assert len(compare(STRATEGIES, "toy", results=tmp_path, max_epochs=1).results) == 2


def test_an_interrupted_comparison_resumes(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_test_start = StreamMetrics.on_test_start

    def interrupted(metrics: StreamMetrics, *arguments: Any) -> None:
        if len(metrics.result.rows) == 1:
            signal.raise_signal(signal.SIGINT)
        on_test_start(metrics, *arguments)

    # Shells may start tests that ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(StreamMetrics, "on_test_start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                compare(["linear_probe"], "toy", results=tmp_path, max_epochs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    (resumed,) = compare(["linear_probe"], "toy", results=tmp_path, max_epochs=1).results
    assert resumed.provenance["resumed"]
    (whole,) = (one for one in compared.results if one.cell == resumed.cell)
    assert resumed.rows == whole.rows


class Here(Engine):
    """Runs jobs in this process, as an engine of a cluster does on another machine."""

    def close(self) -> None: ...

    def call(self, function: Callable[[], Any]) -> list[Any]:
        return [function()]

    def run(
        self, jobs: Sequence[Job], started: Callable[[Job], None], ended: Callable[[Job, Outcome], None]
    ) -> None:
        for job in jobs:
            ended(job, in_this_process(job))


def test_an_engine_runs_the_same_cells(
    compared: Compared, tmp_path: Path, nothing_runs: None, capfd: pytest.CaptureFixture[str]
) -> None:
    there = compare(["ncm"], "toy", seeds=[1, 2], results=tmp_path, engine=Here(), max_epochs=1)
    own = [result for result in compared.results if result.strategy == "NCM"]
    assert [(one.cell, one.rows) for one in there.results] == [(one.cell, one.rows) for one in own]
    assert tuple(capfd.readouterr()) == ("", "")
