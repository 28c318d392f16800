"""`hpctrain config`: a run file with every value and where it came from.

Layer: cli.
"""

from __future__ import annotations

import argparse

from hpctrain.cli.common import add_run_arguments, resolved

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "config",
        help="show a run file with every value and its origin",
        description="Show the values that the run file, the environment (HPCTRAIN_SECTION_KEY) and "
        "--set add up to, each with its origin.",
    )
    add_run_arguments(parser)
    parser.add_argument("--toml", action="store_true", help="print a run file, without origins")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the resolved configuration."""
    configuration = resolved(arguments)
    if arguments.toml:
        print(configuration.to_toml(), end="")
        return 0
    rows = [(key, toml_value(value), origin) for key, value, origin in configuration.items()]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    for key, value, origin in rows:
        print(f"{key:<{key_width}} = {value:<{value_width}}   # {origin}")
    return 0


def toml_value(value: object) -> str:
    """A value as a run file spells it."""
    import tomli_w

    text = tomli_w.dumps({"x": value}).removeprefix("x = ")
    return " ".join(text.split())
