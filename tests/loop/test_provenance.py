import json
import subprocess
from pathlib import Path

import pytest
import torch

from cl_bench.loop.provenance import commit, provenance


def test_provenance_is_plain_json_without_a_path_or_a_host(checkout: Path) -> None:
    text = json.dumps(provenance(torch.device("cpu")))
    assert str(checkout) not in text
    assert json.loads(text)["versions"]["torch"] == torch.__version__


def test_the_commit_is_the_checkouts_own_and_marked_when_files_differ(checkout: Path) -> None:
    if not (checkout / ".git").exists():
        pytest.skip("This copy of the source is not a git checkout.")
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    found = commit()
    assert found is not None
    assert head.startswith(found.removesuffix("+"))
