import os
import subprocess
import sys
from pathlib import Path

IMPORT = """
import os

expanded = os.path.expanduser
from cl_bench.data.avalanche import nc_benchmark
from avalanche.benchmarks.datasets.dataset_utils import default_dataset_location

assert os.path.expanduser is expanded
print(default_dataset_location("x"))
"""


def test_settings_of_avalanche_in_the_home_folder_are_read_as_they_are(tmp_path: Path) -> None:
    settings = tmp_path / ".avalanche" / "config.json"
    settings.parent.mkdir()
    settings.write_text('{"dataset_location": "/data/mine"}')
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "/data/mine/x\n", done.stderr
    assert settings.read_text() == '{"dataset_location": "/data/mine"}'
    assert [path.name for path in settings.parent.iterdir()] == ["config.json"]
