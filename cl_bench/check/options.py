"""The options of ``cl-bench check``. Torch and Lightning are imported only when the command runs."""

from __future__ import annotations

from rich.console import Console

from cl_bench.run.configs import stems_of

_USAGE = "cl-bench check STRATEGY [--KEY VALUE ...]"


def run(words: list[str]) -> int:
    """Check the strategy that ``words`` name; return the exit status, 0 if every claim holds and 1 otherwise.

    Raises:
        ValueError: If the words are not valid, or the strategy cannot be built.
        FileNotFoundError: If the strategy's file does not exist.
    """
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    if "-h" in words or "--help" in words:
        console.print(_help(), markup=False)
        return 0
    name, *overrides = words or ["-"]
    if name.startswith("-") or (overrides and not overrides[0].startswith("-")):
        raise ValueError(f"Name one strategy: {_USAGE}")

    from cl_bench.check.command import check

    return 0 if check(name, [word for word in overrides if word != "-v"], console) else 1


def _help() -> str:
    return (
        f"usage: {_USAGE}\n\n"
        "Run a strategy on a tiny transformer and stream, and print a line for each claim of its contract.\n"
        "The exit status is 0 if every claim holds, 1 if one fails.\n\n"
        f"  STRATEGY        {', '.join(stems_of('strategies'))}; the path of a config; a class path,\n"
        "                  such as strategies.lora.LoRA; or a file, FILE.py or FILE.py:MyMethod\n"
        "  --KEY VALUE     any argument of the strategy, such as --variant shared\n"
        "  -v              print tracebacks"
    )
