import io
from pathlib import Path

from rich.console import Console

from cl_bench.configuration import layers, resolve
from cl_bench.console import RunConsole, closing_lines, opening_lines
from cl_bench.results import read
from cl_bench.run import finished, quiet, run


def test_a_terminal_sees_a_bar_and_keeps_one_line_for_each_experience(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    configuration = resolve(
        layers("lora", "toy"), [f"--results={tmp_path}", "--trainer.accelerator=cpu", "--max_epochs=2"]
    )
    with quiet():
        result = run(configuration, [RunConsole(console)])
    text = output.getvalue()
    assert "epoch 2/2" in text
    assert text.count("accuracy over") == 3
    assert opening_lines(configuration).startswith("LoRA on toy-T3")
    assert closing_lines(result, configuration.folder).startswith("LoRA (merge): ")
    path = finished(configuration)
    assert path is not None
    assert read(path) == result
    assert str(path) in closing_lines(result, configuration.folder)


def test_a_method_has_its_printed_name_from_the_first_line_on(tmp_path: Path) -> None:
    opening = [
        opening_lines(resolve(layers(name, "toy"), [f"--results={tmp_path}"])).partition(" on toy")[0]
        for name in ("janus_lora", "ncm", "joint")
    ]
    assert opening == ["JANUS-LoRA", "NCM", "LoRA (joint)"]
