from pathlib import Path
from typing import Any

import pytest

from cl_bench.grid.cells import configurations, read_grid
from cl_bench.run.configs import CONFIGS


def grid_file(folder: Path, text: str) -> str:
    path = folder / "grid.yaml"
    path.write_text(text)
    return str(path)


def test_a_grid_is_the_product_of_its_axes(tmp_path: Path) -> None:
    text = """
    strategies: [ncm, lora]
    datasets: [toy]
    settings:
      lora: {small: {rank: 2}, wide: {rank: 8}}
    orders: [identity, numpy:1993]
    seeds: [1, 2]
    common: {trainer.max_epochs: 2}
    """
    cells = list(read_grid(grid_file(tmp_path, text)).cells())
    assert len(cells) == 3 * 2 * 2
    assert len({cell.configuration().hash for cell in cells}) == len(cells)
    assert cells[2].command == (
        "cl-bench run lora toy --trainer.max_epochs=2 --rank=8 --setting=wide "
        "--order=identity --seed=1 --results=results"
    )
    configuration = cells[2].configuration()
    assert configuration.cell["model"]["init_args"]["rank"] == 8
    assert configuration.folder.parent.name == "lora-wide"


def test_the_first_cells_are_every_strategy_with_the_first_seed(tmp_path: Path) -> None:
    text = "{strategies: [ncm, lora, joint], datasets: [toy], seeds: [1, 2, 3]}"
    cells = list(read_grid(grid_file(tmp_path, text)).cells())
    assert [cell.strategy for cell in cells[:3]] == ["ncm", "lora", "joint"]


def test_cells_that_share_a_setting_resolve_as_each_would_by_itself(tmp_path: Path) -> None:
    text = """
    strategies: [ncm, loda]
    datasets: [toy, digits]
    settings: {loda: {slow: {optimizer.lr: 1e-5}, sgd: {optimizer: SGD, data.batch_size: 4}}}
    orders: [identity, numpy:1993, [5, 4, 3, 2, 1, 0]]
    seeds: [3, 1]
    common: {trainer.max_epochs: 2}
    """
    cells = list(read_grid(grid_file(tmp_path, text)).cells())
    for cell, shared in zip(cells[::5], list(configurations(cells))[::5], strict=True):
        own = cell.configuration()
        assert (shared.hash, shared.folder, shared.yaml) == (own.hash, own.folder, own.yaml)
        for name in ("seed", "order"):
            assert getattr(shared.datamodule, name) == getattr(own.datamodule, name)
        assert shared.namespace == own.namespace


def test_a_wrong_seed_is_refused_among_cells_that_share_a_setting(tmp_path: Path) -> None:
    cells = read_grid(grid_file(tmp_path, "{strategies: [ncm], datasets: [toy], seeds: [1, one]}")).cells()
    with pytest.raises(ValueError, match=r"--seed cannot be 'one': expected int."):
        list(configurations(cells))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{strategies: [lora]}", "it must name strategies and datasets"),
        ("{strategies: [lora], datasets: [toy], seed: [1]}", r"cannot contain 'seed'. Did you mean seeds\?"),
        (
            "{strategies: [lora], datasets: [toy], settings: {ncm: {a: {}}}}",
            "settings for ncm, which is not among",
        ),
        (
            "{strategies: [lora], datasets: [toy], common: {rank: 2, model.rank: 4}}",
            "rank and model.rank are one key in common: keep one of them",
        ),
        (
            "{strategies: [lora], datasets: [toy], settings: {lora: {a: {optimizer.lr: 1, "
            "model.optimizer.init_args.lr: 2}}}}",
            "are one key in the setting a of lora",
        ),
        (
            "{strategies: [lora], datasets: [toy], common: {seed: 3}}",
            r"seed cannot be in common, because each cell has its own: use seeds: \[3\]",
        ),
        (
            "{strategies: [lora], datasets: [toy], settings: {lora: {a: {results: here}}}}",
            "results cannot be in the setting a of lora",
        ),
        ("a: [", "is not valid YAML"),
        ("{strategies: lora, datasets: [toy]}", "strategies must be a list"),
    ],
)
def test_a_broken_grid_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_grid(grid_file(tmp_path, text))


def test_the_error_of_a_missing_grid_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no config 'quickstrt' among grids. Did you mean quickstart\?"):
        read_grid("quickstrt")


@pytest.mark.parametrize("path", sorted((CONFIGS / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_cells_of_every_shipped_grid_differ(path: Path) -> None:
    cells = list(read_grid(path.stem).cells())
    assert cells
    assert len({found.hash for found in configurations(cells)}) == len(cells)


def test_a_setting_of_its_own_is_parsed_once_on_top_of_complete_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "{strategies: [ncm], datasets: [toy], seeds: [1, 2], settings: {ncm: {a: {batch_size: 2}, b: {}}}}"
    cells = list(read_grid(grid_file(tmp_path, text)).cells())
    parser = cells[0].configuration().schema.parser
    whole, parsed = parser.parse_args, []

    def counted(words: list[str], **options: Any) -> Any:
        parsed.append(options.get("defaults"))
        return whole(words, **options)

    monkeypatch.setattr(parser, "parse_args", counted)
    assert len({found.hash for found in configurations(cells)}) == 4
    assert parsed == [False] * 3  # the pair, and two settings for both seeds
