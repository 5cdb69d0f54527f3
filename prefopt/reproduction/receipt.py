"""The receipt of a run: what was run, of which code, rows, tokenizer, template and environment, and what it measured.

`repeat` runs it again and says what differs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt import __version__
from prefopt.reproduction import code
from prefopt.reproduction.paper import Paper, select
from prefopt.reproduction.run import Say, reproduce
from prefopt.reproduction.stored import EXPERIMENTS, Stored, load
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_text

SCHEMA = 1


@dataclass(frozen=True)
class Receipt:
    """What a run was, as `receipt.json` has it.

    Attributes:
        schema: of this file.
        prefopt: release.
        papers: their names.
        quick: whether experiments marked `full` were left out.
        threads: of torch.
        machine: processor and cores.
        seconds: of processor time of all experiments together.
        experiments: by name: hashes of code, rows and model; the environment; and hash and text of what was measured.
    """

    schema: int
    prefopt: str
    papers: list[str]
    quick: bool
    threads: int
    machine: dict[str, str]
    seconds: float
    experiments: dict[str, dict[str, Any]]


def receipt_of(papers: Sequence[Paper], quick: bool, threads: int, folder: Path) -> Receipt:
    """The receipt of what `folder` (an output folder of `reproduce`) holds."""
    names = list(dict.fromkeys(name for paper in papers for name in paper.experiments(quick)))
    kept = {name: stored for name in names if (stored := load(name, folder / "experiments")) is not None}
    return Receipt(
        *(SCHEMA, __version__, [paper.name for paper in papers], quick, threads, machine()),
        seconds=round(sum(stored.seconds for stored in kept.values()), 1),
        experiments={name: _entry(stored) for name, stored in kept.items()},
    )


def _entry(stored: Stored) -> dict[str, Any]:
    inputs = dataclasses.asdict(stored.inputs)
    outcomes = {
        outcome.claim: {"measured": outcome.measured, "hash": code.key_of(dataclasses.asdict(outcome))}
        for outcome in stored.outcomes
    }
    # Experiments on tables and on models of characters have no tokenizer and no template: `model` is empty for them.
    return {**inputs, "seconds": stored.seconds, "outcomes": outcomes, "error": stored.error}


def facts_of(receipt: Receipt, command: str) -> list[str]:
    """Lines about a run, for its pages: command, machine and time."""
    machine, threads = receipt.machine, receipt.threads
    return [
        f"`{command}`, prefopt {receipt.prefopt}",
        f"{machine['processor']}, {threads} thread{'s' * (threads > 1)} of {machine['cores']} cores; "
        f"{len(receipt.experiments)} experiments, {receipt.seconds:.0f} s of processor time together",
    ]


def machine() -> dict[str, str]:
    import os

    return {"processor": _processor(), "cores": str(os.cpu_count()), "system": platform.platform()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def write_receipt(receipt: Receipt, out: Path) -> Path:
    path = out / "receipt.json"
    write_text(path, json.dumps(dataclasses.asdict(receipt), indent=1) + "\n")
    return path


def read_receipt(file: Path) -> Receipt:
    """A receipt from its file.

    Raises:
        UsageError: if it is none, or of another release's form.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is not a receipt of `prefopt reproduce`: {error}") from error
    fields = {field.name for field in dataclasses.fields(Receipt)}
    if not isinstance(content, dict) or not {"schema", "papers"} <= content.keys():
        raise UsageError(f"{file} is not a receipt of `prefopt reproduce`: name the receipt.json of its folder")
    if content["schema"] != SCHEMA:
        raise UsageError(f"{file} is a receipt of form {content['schema']}; this release reads {SCHEMA}")
    if content.keys() != fields or not _is_whole(content):
        raise UsageError(f"{file} is a receipt of `prefopt reproduce`, but parts of it are missing or changed")
    return Receipt(**content)


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether the parts that are compared have the types and fields that they are written with."""
    experiments, parts = content["experiments"], {"code", "rows", "model", "environment", "outcomes"}
    if not isinstance(experiments, dict) or not isinstance(content["machine"], dict):
        return False
    if not isinstance(content["papers"], list) or not isinstance(content["threads"], int):
        return False
    return all(isinstance(one, dict) and parts <= one.keys() for one in experiments.values())


def repeat(file: Path, out: Path, say: Say = lambda line: None, package: str = EXPERIMENTS) -> tuple[list[str], bool]:
    """Run what a receipt names again, into `out`, and compare.

    Returns:
        A line for each difference of inputs or outcomes, and whether every outcome is the same.

    Raises:
        UsageError: if the file is not a receipt, or `out` is the folder that it came from.
    """
    old = read_receipt(file)
    if file.resolve().parent == out.resolve():
        raise UsageError(f"{out} holds the run of this receipt: its results would be read, not repeated. Pass --out")
    papers = select(old.papers)
    reproduce(papers, out, old.quick, old.threads, say, package)
    new = receipt_of(papers, old.quick, old.threads, out)
    write_receipt(new, out)
    return differences(old, new)


def differences(old: Receipt, new: Receipt) -> tuple[list[str], bool]:
    """Lines about what differs, and whether every outcome of the old receipt is in the new one, bit by bit."""
    lines = [f"prefopt: {old.prefopt} then, {new.prefopt} now"] if old.prefopt != new.prefopt else []
    lines += [line for name in ("processor", "cores", "system") for line in _differs(name, old.machine, new.machine)]
    same, environments = True, dict[str, None]()
    for name, before in old.experiments.items():
        now = new.experiments.get(name)
        if now is None:
            lines.append(f"{name}: no longer an experiment of these papers")
            same = False
            continue
        lines += [f"{name}: its code differs"] * (before["code"] != now["code"])
        for part in ("rows", "model"):
            keys = sorted({*before[part], *now[part]})
            lines += [f"{name}: {key} differs" for key in keys if before[part].get(key) != now[part].get(key)]
        old_one, new_one = before["environment"], now["environment"]
        environments |= {
            line: None for key in sorted({*old_one, *new_one}) for line in _differs(key, old_one, new_one)
        }
        outcome_lines = _outcome_differences(name, before["outcomes"], now["outcomes"])
        same = same and not outcome_lines
        lines += outcome_lines
    return [*environments, *lines], same


def _differs(key: str, old: dict[str, str], new: dict[str, str]) -> list[str]:
    before, now = old.get(key, "none"), new.get(key, "none")
    return [] if before == now else [f"{key}: {before} then, {now} now"]


def _outcome_differences(experiment: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = []
    for claim in {**old, **new}:
        before, now = old.get(claim), new.get(claim)
        if before is None or now is None:
            lines.append(f"{experiment}, {claim}: measured {'only now' if before is None else 'only then'}")
        elif before["hash"] != now["hash"]:
            lines.append(f"{experiment}, {claim}: then {before['measured']}; now {now['measured']}")
    return lines
