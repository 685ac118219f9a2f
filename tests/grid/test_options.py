from pathlib import Path

import pytest

from cl_bench.__main__ import main
from cl_bench.results.result import FILE_NAME


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workers", "0"], "A grid cannot run with 0 workers: give at least one."),
        (
            ["--engine", "ray", "--gpus-per-cell=-1"],
            "A cell cannot have -1 GPUs: give 0 or more, such as 0.5.",
        ),
        (["--address", "auto"], "--address has no effect with the engine local: add --engine ray."),
        (["--gpus-per-cell", "1"], "--gpus-per-cell has no effect with the engine local: add --engine ray."),
        (["--slurm", "partition=gpu"], "--slurm has no effect with the engine local: add --engine slurm."),
        (["--engine", "slurm", "--slurm", "gpu"], "'gpu' is not a parameter of sbatch: write KEY=VALUE"),
    ],
)
def test_an_option_without_effect_is_refused_before_any_cell_runs(
    tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(f"{{strategies: [ncm], datasets: [toy], results: {tmp_path}/results}}")
    assert main(["grid", str(path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")
    assert not list(tmp_path.rglob(FILE_NAME))
