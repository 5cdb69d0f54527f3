"""The command that started this process, as a person would type it: for the model card."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from prefopt.safety.redaction import command_line


def launch_command(argv: Sequence[str] | None) -> str | None:
    """The command, without secrets and without folders of this machine; None if no command line was read.

    Args:
        argv: the words passed to the recipe, or None for those of the process.
    """
    words = sys.argv[1:]
    # `prefopt train` passes on what follows its name. Any other words come from a call in Python.
    handed_on = _program() == ["prefopt"] and argv is not None and words[len(words) - len(argv) :] == list(argv)
    if argv is not None and list(argv) != words and not handed_on:
        return None
    return command_line([*_launcher(), *words]).replace("'$(which prefopt)'", "$(which prefopt)")


def _launcher() -> list[str]:
    """How the program was started: by `accelerate launch`, `torchrun`, Python, or by its own name."""
    program = _program()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        engine = [f"--use_{name}" for name in ("fsdp", "deepspeed") if _is_on(f"ACCELERATE_USE_{name.upper()}")]
        # On a machine without GPUs, accelerate starts several processes only if it is told --multi_gpu.
        plain = [] if engine else ["--multi_gpu"]
        several = [*plain, "--num_processes", str(processes)] if processes > 1 else []
        if program == ["prefopt"]:
            program = ["$(which prefopt)"]  # the launcher runs files
        return ["accelerate", "launch", *several, *engine, *program]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(processes)), *program]
    return ["python", *program] if program[0] == "-m" or program[0].endswith(".py") else program


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _program() -> list[str]:
    """`recipes/dpo.py`, `-m package.module` or `prefopt`."""
    original = sys.orig_argv
    if "-m" in original[:-1] and not sys.argv[0].startswith("-"):
        module = original[original.index("-m") + 1]
        # A launcher that is itself a module runs the program under its own name.
        if Path(sys.argv[0]).stem in (module.rpartition(".")[2], "__main__"):
            return ["-m", module]
    script = Path(sys.argv[0])
    if not script.is_absolute():
        return [str(script)]
    # Only the part of a path that makes sense on another machine.
    name = script.name.removesuffix(".exe")
    return [f"recipes/{name}" if script.parent.name == "recipes" else name]
