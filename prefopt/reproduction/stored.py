"""One experiment run: what it depended on, what it measured, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.reproduction import code
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.safety.errors import message_of
from prefopt.safety.files import write_text

EXPERIMENTS = "prefopt.reproduction.experiments"


@dataclass(frozen=True)
class Inputs:
    """What an experiment's numbers depend on.

    Attributes:
        code: hash of its module and of all that this imports of prefopt.
        rows: hashes of the files of rows, by name.
        model: hashes of tokenizer, chat template and weights of the bundled model; empty where it has no part.
        environment: versions, processor and threads.
    """

    code: str
    rows: dict[str, str]
    model: dict[str, str]
    environment: dict[str, str]

    @property
    def key(self) -> str:
        return code.key_of(dataclasses.asdict(self))


@dataclass(frozen=True)
class Stored:
    """One experiment's outcomes.

    Attributes:
        experiment: its module and function.
        inputs: what they depend on.
        seconds: of processor time.
        outcomes: by claim.
        error: what it raised, or "".
    """

    experiment: str
    inputs: Inputs
    seconds: float
    outcomes: tuple[Outcome, ...]
    error: str = ""


def inputs_of(experiment: str, package: str = EXPERIMENTS) -> Inputs:
    """What an experiment would depend on if it ran now."""
    module = f"{package}.{experiment.partition('.')[0]}"
    model = {}
    if code.uses_bundled_model(module):
        from prefopt.models.bundled import resolve_demo_model

        model = code.model_hashes(resolve_demo_model(say=lambda line: None))
    return Inputs(code.code_hash(module), code.row_hashes(module), model, code.environment())


def run_experiment(experiment: str, inputs: Inputs, package: str = EXPERIMENTS) -> Stored:
    """Run it, from the same seed each time. What it raises becomes its `error`."""
    import numpy
    import torch

    name, _, function = experiment.partition(".")
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    started = time.process_time()
    outcomes: tuple[Outcome, ...] = ()
    error = ""
    try:
        returned = getattr(importlib.import_module(f"{package}.{name}"), function)()
        outcomes = (returned,) if isinstance(returned, Outcome) else tuple(returned)
    except Exception as raised:
        error = message_of(raised) or "".join(traceback.format_exception_only(raised)).strip()
    return Stored(experiment, inputs, round(time.process_time() - started, 1), outcomes, error)


def save(stored: Stored, folder: Path) -> Stored:
    """Write its file, and return what `load` will read from it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(stored), indent=1)
    write_text(folder / f"{stored.experiment}.json", f"{text}\n")
    return stored_of(json.loads(text))


def load(experiment: str, folder: Path) -> Stored | None:
    """What is kept of an experiment; None if nothing is, or the file is of another release."""
    try:
        return stored_of(json.loads((folder / f"{experiment}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def stored_of(content: dict[str, Any]) -> Stored:
    outcomes = tuple(_outcome(row) for row in content["outcomes"])
    return Stored(**{**content, "inputs": Inputs(**content["inputs"]), "outcomes": outcomes})


def _outcome(row: dict[str, Any]) -> Outcome:
    picture = row["picture"]
    return Outcome(**{**row, "picture": None if picture is None else Picture(**picture)})
