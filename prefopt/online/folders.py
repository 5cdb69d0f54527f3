"""The folder of a run of rounds, and its manifest: which stages are done, with the hashes of their files.

RUN/manifest.json
RUN/prompts.jsonl, RUN/heldout_prompts.jsonl
RUN/round-0/   the held-out evaluation of the initial model
RUN/round-1/   samples.jsonl, judgements.jsonl, pairs.jsonl, model/, heldout_*.jsonl, summary.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from prefopt.generation.processes import on_main
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_text

SCHEMA = "prefopt.rounds/1"

STAGES = ("sample", "judge", "pair", "train", "evaluate")


@dataclass(frozen=True)
class RoundFolder:
    """The files of one round.

    Attributes:
        run: the folder of the run.
        number: of the round, from 1; 0 for the initial model.
    """

    run: Path
    number: int

    @property
    def path(self) -> Path:
        return self.run / f"round-{self.number}"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def judgements(self) -> Path:
        return self.path / "judgements.jsonl"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs.jsonl"

    @property
    def counts(self) -> Path:
        """What became of the samples when they were paired."""
        return self.path / "pair_counts.json"

    @property
    def training(self) -> Path:
        """Steps and last logged values of the training."""
        return self.path / "training.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def reference(self) -> Path:
        """The moving average that is the round's reference."""
        return self.path / "reference"

    @property
    def optimizer(self) -> Path:
        """The optimizer's state after the round's last step."""
        return self.path / "optimizer.pt"

    @property
    def heldout_samples(self) -> Path:
        return self.path / "heldout_samples.jsonl"

    @property
    def heldout_judgements(self) -> Path:
        return self.path / "heldout_judgements.jsonl"

    @property
    def against_start(self) -> Path:
        """What judges that compare say of the round's held-out answers and the initial model's."""
        return self.path / "heldout_against_start.jsonl"

    @property
    def against_previous(self) -> Path:
        """The same with the answers of the round before; the first round has no such file."""
        return self.path / "heldout_against_previous.jsonl"

    @property
    def kl_samples(self) -> Path:
        """Completions of held-out prompts at temperature 1, where the held-out answers are not."""
        return self.path / "heldout_kl_samples.jsonl"

    @property
    def kl(self) -> Path:
        """Log-probabilities of completions under the round's model and the initial one."""
        return self.path / "heldout_kl.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"


class Manifest:
    """What a run is and how far it is: `RUN/manifest.json`.

    Under `accelerate launch` every process has one and calls its methods; the main process writes.

    Args:
        run: the folder of the run.
        settings: all that its files depend on.

    Raises:
        UsageError: if the folder holds a run with other settings, or a file of a finished stage has changed.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]):
        self._run, self._file = run, run / "manifest.json"
        self._settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
        self._stages = on_main(self._finished)

    @property
    def begun(self) -> bool:
        """Whether any stage was done before."""
        return bool(self._stages)

    def is_done(self, number: int, stage: str) -> bool:
        return any((entry["round"], entry["stage"]) == (number, stage) for entry in self._stages)

    def done(self, number: int, stage: str, files: Iterable[Path] = ()) -> None:
        """Note that a stage is done, with the hashes of its files."""
        state = PartialState()
        state.wait_for_everyone()
        entry: dict[str, Any] = {"round": number, "stage": stage}
        self._stages.append(entry)
        if state.is_main_process:
            entry["files"] = {self._name(file): _facts(file) for file in files}
            self._run.mkdir(parents=True, exist_ok=True)
            stored = {"schema": SCHEMA, "settings": self._settings, "stages": self._stages}
            write_text(self._file, json.dumps(stored, indent=2) + "\n")
        state.wait_for_everyone()

    def once(self, number: int, stage: str, files: Iterable[Path], work: Callable[[], object]) -> None:
        """Do a stage, unless it is done."""
        if not self.is_done(number, stage):
            work()
            self.done(number, stage, files)

    def _finished(self) -> list[dict[str, Any]]:
        """The stages that an earlier call did; the files of each are as they were."""
        if not self._file.exists():
            return []
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            settings, stages = stored["settings"], stored["stages"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self._file} cannot be read ({error}): name another --output_dir") from None
        if stored.get("schema") != SCHEMA:
            raise UsageError(f"{self._file}: schema is {stored.get('schema')!r}; this version reads {SCHEMA}")
        self._refuse_others(settings)
        finished = []
        for entry in stages:
            if any(not (self._run / name).exists() for name in entry["files"]):
                break  # somebody deleted it: this stage and all later ones are done again
            for name, facts in entry["files"].items():
                self._check(name, facts, entry)
            finished.append(entry)
        return finished

    def _refuse_others(self, settings: Mapping[str, Any]) -> None:
        names = {name for name in {**settings, **self._settings} if settings.get(name) != self._settings.get(name)}
        if names:
            name = sorted(names)[0]
            more = f", and so do {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"{self._run} holds a run with other settings: {name} was {settings.get(name)!r}, now "
                f"{self._settings.get(name)!r}{more}. Name another --output_dir, or repeat the earlier settings"
            )

    def _check(self, name: str, facts: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
        file = self._run / name
        if _facts(file)["sha256"] != facts["sha256"]:
            raise UsageError(
                f"{file} has changed since round {entry['round']} was done with it ({entry['stage']}). Restore it; or "
                "delete it, to have this stage and all later ones done again"
            )

    def _name(self, file: Path) -> str:
        return file.relative_to(self._run).as_posix()


def _facts(file: Path) -> dict[str, Any]:
    """The hash of a file, and the number of its lines if it has lines."""
    digest, lines = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            lines += block.count(b"\n")
    facts: dict[str, Any] = {"sha256": digest.hexdigest()}
    return {"lines": lines, **facts} if file.suffix == ".jsonl" else facts
