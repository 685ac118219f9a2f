from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from cl_bench.results.dashboard import _has_login, mode


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The home folder of a user without any W&B setting."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield tmp_path
    wandb.teardown()  # W&B caches its settings when it is first set up


def test_without_a_login_a_run_is_offline(home: Path) -> None:
    assert mode() == "offline"


def test_with_a_login_a_run_is_online(home: Path) -> None:
    host = wandb.setup().settings.base_url.removeprefix("https://")
    (home / ".netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    (home / ".netrc").chmod(0o600)
    assert mode() == "online"


def test_a_login_is_found_in_the_file_that_netrc_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = wandb.setup().settings.base_url.removeprefix("https://")
    (home / "elsewhere").write_text(f"machine {host} login user password {'0' * 40}\n")
    (home / "elsewhere").chmod(0o600)
    monkeypatch.setenv("NETRC", str(home / "elsewhere"))
    wandb.teardown()
    assert mode() == "online"


def test_a_malformed_netrc_is_one_sentence(home: Path) -> None:
    (home / ".netrc").write_text("nonsense here\n")
    with pytest.raises(
        ValueError, match=r"line 1, is not a netrc file .*: correct that line, or set WANDB_MODE"
    ):
        _has_login("https://api.wandb.ai")


def test_a_mode_that_the_user_sets_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() is None
