"""Runs that are killed: where, how, and what is left of them. Shared by the tests and `scripts/bench/chaos.py`.

A run is a forked child, since importing everything takes longer than a run does. A fault is set before it starts: a
place in the code at whose n-th visit the child kills itself, or a moment of a step at which its parent kills it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate.optimizer
import datasets
import peft.peft_model
import torch
import transformers.modeling_utils
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerState

import prefopt.safety.files
import prefopt.scoring.cache
from prefopt import LossMixin, PreferenceTrainer
from prefopt.data import load_preferences, normalise
from prefopt.data.collect import Findings
from prefopt.data.row_check import RowCheck
from prefopt.trainer.saving import checkpoints
from tests.trainer.runs import make_labelled, make_pairs, make_trainer, save_model

TIMINGS = ("runtime", "per_second")
"""What is in the names of logged values that no two runs have in common."""


@dataclass(frozen=True)
class Fault:
    """One kill.

    Attributes:
        place: a name in `PLACES`, or "time".
        visit: which visit of the place it is, from 1; for "time", how many batches have begun.
        signum: SIGKILL, or SIGTERM as a scheduler sends it.
        seconds: after that batch began, for "time". Less than a few steps take on a fast machine: how far a run gets
            between two faults must not depend on the machine.
    """

    place: str
    visit: int = 1
    signum: int = signal.SIGKILL
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """A small training run; options are those of `PreferenceConfig`."""

    loss: str = "dpo"
    kind: str = "full"
    labelled: bool = False
    cache: bool = False
    rows: int = 14
    options: dict[str, Any] = field(default_factory=dict)


# ---- a run -------------------------------------------------------------------------------------------------------


def prepare(folder: Path, job: Job) -> None:
    """The model and the data of a job, on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder)
    for name, seed, rows in (("train", 0, job.rows), ("heldout", 1, 4)):
        made = make_labelled(rows, seed) if job.labelled else make_pairs(rows, seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def train(folder: Path, job: Job, resume: str | bool | None = "auto") -> Any:
    """Train to the end, from where an earlier attempt got to; leaves `run/` and `done.json`."""
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    datasets.disable_progress_bars()
    rows = {
        name: normalise(load_preferences(str(folder / f"{name}.jsonl"), split="train"))
        for name in ("train", "heldout")
    }
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    trainer = make_trainer(
        folder,
        loss=job.loss,
        model=str(folder / "llama-0"),
        train_dataset=rows["train"],
        trainer_options={
            "eval_dataset": rows["heldout"],
            "peft_config": adapter if job.kind == "lora" else None,
        },
        **{
            "reference_cache": str(folder / "cache") if job.cache else "off",
            "num_train_epochs": 3,
            "max_steps": -1,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            # Out of step with the checkpoints, so that these fall between two log lines.
            "logging_steps": 3,
            "step0_check": "off",
            **job.options,
        },
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    log = [{k: v for k, v in entry.items() if not any(t in k for t in TIMINGS)} for entry in trainer.state.log_history]
    # transformers' sum over this process's own steps.
    log = [entry for entry in log if "train_loss" not in entry]
    state = {name: value.tolist() for name, value in trainer.objective.state_dict().items()}
    done = {"log": log, "objective": state}
    prefopt.safety.files.write_whole(folder / "done.json", lambda path: path.write_text(json.dumps(done)))
    return trainer


def result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Final weights, and what was logged."""
    found = [folder / "run" / name for name in ("model.safetensors", "adapter_model.safetensors")]
    return load_file(next(path for path in found if path.exists())), json.loads((folder / "done.json").read_text())


def forked(work: Callable[[], Any], fault: Fault | None = None, output: Path | None = None) -> int:
    """Do something in a child process, and wait for it.

    Returns:
        Its exit status, negative for the signal that ended it, as `subprocess` has it.
    """
    started_read, started_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(started_read)
        _be_the_child(work, fault, output, started_write)
    os.close(started_write)
    if fault is not None and fault.place == "time":
        # Until that batch begins, or the child is gone.
        for _ in range(fault.visit):
            os.read(started_read, 1)
        time.sleep(fault.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, fault.signum)
    _, status = os.waitpid(child, 0)
    os.close(started_read)
    return os.waitstatus_to_exitcode(status)


def _be_the_child(work: Callable[[], Any], fault: Fault | None, output: Path | None, started: int) -> None:
    code = 1
    try:
        if output is not None:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
        # A pool of threads does not come along into a fork: it would be waited for without end.
        torch.set_num_threads(1)
        _tell_batches(started)
        if fault is not None and fault.place != "time":
            PLACES[fault.place](functools.partial(_die, fault.signum), fault.visit)
        work()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # What pytest or the parent would do at its end is not for the child.
        os._exit(code)


def _tell_batches(pipe: int) -> None:
    def told(_: int, compute_loss: Any, *arguments: Any, **keywords: Any) -> Any:
        os.write(pipe, b"x")
        return compute_loss(*arguments, **keywords)

    wrap(LossMixin, "compute_loss", told)


def _die(signum: int) -> None:
    os.kill(os.getpid(), signum)
    if signum == signal.SIGKILL:
        time.sleep(60)


# ---- places ------------------------------------------------------------------------------------------------------


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by `around(its nth call, the function, *its arguments)`."""
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def replaced(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return around(calls, original, *arguments, **keywords)

    setattr(owner, name, replaced)


def before(owner: Any, name: str) -> Callable[[Callable[[], None], int], None]:
    """Kill as the function is entered."""

    def install(die: Callable[[], None], visit: int) -> None:
        def around(call: int, original: Any, *arguments: Any, **keywords: Any) -> Any:
            if call == visit:
                die()
            return original(*arguments, **keywords)

        wrap(owner, name, around)

    return install


def half_written(owners: tuple[Any, ...], name: str) -> Callable[[Callable[[], None], int], None]:
    """Kill when half of the bytes of a file are there; the path is the function's second argument."""

    def install(die: Callable[[], None], visit: int) -> None:
        calls = 0

        def around(_: int, original: Any, what: Any, path: Any, *arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            done = original(what, path, *arguments, **keywords)
            if calls == visit:
                os.truncate(path, os.path.getsize(path) // 2)
                die()
                original(what, path, *arguments, **keywords)
            return done

        for owner in owners:
            wrap(owner, name, around)

    return install


def half_deleted(die: Callable[[], None], visit: int) -> None:
    """Kill when half of the files of a checkpoint that makes room are gone."""

    def around(call: int, original: Any, folder: Any, *arguments: Any, **keywords: Any) -> Any:
        if call == visit:
            for path in sorted(Path(folder).iterdir())[::2]:
                path.unlink() if path.is_file() else original(path)
            die()
        return original(folder, *arguments, **keywords)

    # A namespace of its own, as others delete folders too.
    checkpoints.shutil = type("shutil", (), {"rmtree": staticmethod(shutil.rmtree)})
    wrap(checkpoints.shutil, "rmtree", around)


PLACES: dict[str, Callable[[Callable[[], None], int], None]] = {
    "preparing the data": before(RowCheck, "batch"),
    "finishing the data": before(Findings, "facts"),
    "within a step": before(LossMixin, "compute_loss"),
    "before the optimizer": before(accelerate.optimizer.AcceleratedOptimizer, "step"),
    "evaluating": before(PreferenceTrainer, "prediction_step"),
    "beginning a checkpoint": before(checkpoints, "begin"),
    "saving weights": half_written((transformers.modeling_utils, peft.peft_model), "safe_save_file"),
    "saving the optimizer": half_written((torch,), "save"),
    "saving the trainer's state": before(TrainerState, "save_to_json"),
    "completing a checkpoint": before(checkpoints, "complete"),
    "naming a finished file": before(prefopt.safety.files.os, "replace"),
    "deleting an old checkpoint": half_deleted,
    "writing the reference cache": half_written((prefopt.scoring.cache,), "save_file"),
}


def draw(count: int, seed: int, terms: int, cache: bool) -> list[Fault]:
    """Faults at random places and times, in the order in which one run can meet all of them.

    Args:
        terms: how many are SIGTERM at a random moment of training; the others are SIGKILL.
        cache: whether the run has a reference cache.
    """
    rng = random.Random(seed)
    # Later attempts find what the first have prepared and cached.
    first = ["preparing the data", "finishing the data", *(["writing the reference cache"] if cache else [])]
    others = [place for place in PLACES if place not in first and "cache" not in place]
    others += [*others, "time", "time", "time"]
    places = [rng.choice(others) for _ in range(count - terms - len(first))]
    visits = {"saving the optimizer": 6, "time": 8}
    faults = [Fault(place, rng.randint(1, visits.get(place, 2)), seconds=rng.uniform(0.0, 0.02)) for place in places]
    for _ in range(terms):
        fault = Fault("time", rng.randint(1, 8), signal.SIGTERM, rng.uniform(0.0, 0.02))
        faults.insert(rng.randint(0, len(faults)), fault)
    return [*(Fault(place, visits.get(place, 1)) for place in first), *faults]


# ---- one run, many faults ----------------------------------------------------------------------------------------

CHAOS_JOBS = {
    "full": Job("dpo", "full", cache=True, rows=26, options={"num_train_epochs": 10}),
    "lora": Job(
        "beta_dpo + 0.1*sft", "lora", rows=26,
        options={"disable_dropout": False, "token_budget": 64, "gradient_accumulation_steps": 2,
                 "per_device_train_batch_size": 2, "num_train_epochs": 10},
    ),
    "sampled": Job(
        "hypo", "lora", rows=26,
        options={"sample_max_new_tokens": 4, "disable_dropout": False, "num_train_epochs": 10},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Chaos:
    """What came of a run that was killed again and again.

    Attributes:
        hits: the faults that took effect; the others' places were not visited again before the end of the run.
        steps: optimizer steps that were taken, those of killed attempts included.
        differing: weights and log entries that are not those of an undisturbed run, bit for bit.
        whole: optimizer steps of the undisturbed run.
    """

    hits: list[Fault]
    steps: int
    differing: list[str]
    whole: int


def chaos(folder: Path, job: Job, faults: list[Fault]) -> Chaos:
    """Train undisturbed; train again, each attempt with the next fault and from where the one before got to.

    Raises:
        RuntimeError: if an attempt ends in any other way than its fault has it.
    """
    prepare(folder / "whole", job)
    _attempt(folder / "whole", job, None, (0,))
    killed = folder / "killed"
    prepare(killed, job)
    hits = []
    for fault in faults:
        code = _attempt(killed, job, fault, (0, -9 if fault.signum == signal.SIGKILL else 128 + signal.SIGTERM, -15))
        if code == 0:
            break
        hits.append(fault)
    _attempt(killed, job, None, (0,))
    (weights, log), (again, log_again) = result(folder / "whole"), result(killed)
    differing = [name for name in weights if name not in again or not torch.equal(weights[name], again[name])]
    differing += [f"log entry {i}" for i, (a, b) in enumerate(_padded(log["log"], log_again["log"])) if a != b]
    differing += [name for name, value in log["objective"].items() if log_again["objective"].get(name) != value]
    return Chaos(hits, _steps(killed), differing, _steps(folder / "whole"))


def _padded(one: list[Any], other: list[Any]) -> list[tuple[Any, Any]]:
    return list(itertools.zip_longest(one, other))


def _attempt(folder: Path, job: Job, fault: Fault | None, expected: tuple[int, ...]) -> int:
    def work() -> None:
        wrap(accelerate.optimizer.AcceleratedOptimizer, "step", count)
        train(folder, job)

    def count(_: int, step: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with (folder / "steps").open("a") as file:
            file.write("x")
        return step(*arguments, **keywords)

    code = forked(work, fault, folder / "output.txt")
    if code not in expected:
        said = (folder / "output.txt").read_text()[-3000:]
        raise RuntimeError(f"the attempt with {fault} ended with {code}:\n{said}")
    return code


def _steps(folder: Path) -> int:
    return len((folder / "steps").read_text())
