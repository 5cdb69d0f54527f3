"""The `prefopt` command: look objectives up, check data, plan a run, run the bundled job, merge adapters.

What a command needs is imported inside it, so that `--help` does not wait for torch. The only room that prints help
and ends a program.
"""

from __future__ import annotations

from prefopt.cli import (  # noqa: F401  (each adds its commands)
    data,
    discover,
    evaluate,
    health,
    judge,
    losses,
    new,
    pair,
    prepare,
    report,
    reproduce,
    rounds,
    runs,
    sample,
    sweep,
    unlearn,
)
from prefopt.cli.app import app
from prefopt.safety.noise import quiet_warnings

__all__ = ["app", "main"]


def main() -> None:
    """The command line."""
    quiet_warnings()
    app(prog_name="prefopt")  # also for `python -m prefopt`: completion is for this name
