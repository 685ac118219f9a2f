from pathlib import Path

import pytest
import torch

from cl_bench.artifacts.models import Origin, file_of, read, write
from cl_bench.loop.snapshot import Snapshot

ORIGIN = Origin(cell="0123abcd", strategy="strategies.lora.LoRA", weights_sha256="f" * 64, experience=2)


def model() -> Snapshot:
    """A snapshot of every kind of value: whole tensors of several types, changed rows, extra states."""
    return {
        "names": ["head.weight", "count", "rows/of.weight"],
        "tensors": {
            "head.weight": torch.arange(6, dtype=torch.float64).view(2, 3),
            "count": torch.tensor(7),
            "rows/of.weight": (torch.tensor([1, 4]), torch.ones(2, 3)),
        },
        "extra": {"memory._extra_state": {"passes": [3, 4], "name": "é", "share": 0.1}},
        "trained": ["head.weight"],
    }


def test_a_kept_model_is_read_again_bit_by_bit(tmp_path: Path) -> None:
    path = file_of(tmp_path, 2)
    write(path, ORIGIN, model())
    origin, found = read(path)
    assert origin == ORIGIN
    expected = model()
    assert {name: found[name] for name in ("names", "extra", "trained")} == {
        name: expected[name] for name in ("names", "extra", "trained")
    }
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name in ("head.weight", "count"):
        tensor = found["tensors"][name]
        assert tensor.dtype == expected["tensors"][name].dtype
        assert torch.equal(tensor, expected["tensors"][name])
    rows, values = found["tensors"]["rows/of.weight"]
    assert rows.tolist() == [1, 4]
    assert torch.equal(values, torch.ones(2, 3))


@pytest.mark.parametrize(
    "state", ((1, 2), {3: "an integer as key"}, torch.ones(2)), ids=lambda state: type(state).__name__
)
def test_an_extra_state_that_json_would_change_is_refused(tmp_path: Path, state: object) -> None:
    with pytest.raises(ValueError, match="state memory of this strategy cannot be kept"):
        write(tmp_path / "model.safetensors", ORIGIN, model() | {"extra": {"memory": state}})
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"weights": torch.ones(2)}, path)  # a pickle
    with pytest.raises(ValueError, match="is not a model that this version has kept"):
        read(path)


def test_a_model_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, ORIGIN, model())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not a model that this version has kept"):
        read(path)


def test_a_model_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no kept model .*experience3\.safetensors"):
        read(file_of(tmp_path, 2))
