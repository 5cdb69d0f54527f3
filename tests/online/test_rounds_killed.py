"""Runs of rounds that are killed (SIGKILL) at random points, and continued: the same files and the same weights."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from prefopt.online import folders
from prefopt.online.run import main
from prefopt.safety.jsonl import JsonlWriter
from prefopt.trainer import LossMixin
from tests.online.rounds import files, same_weights, weights, words
from tests.reliability.faults import forked, wrap
from tests.trainer.runs import save_model


class Bomb:
    """Counts events of a run, and kills its process at the n-th: in the middle of it, if it writes a line."""

    def __init__(self, count_file: Path, at: int | None):
        self._count_file, self._at, self._count = count_file, at, 0

    def install(self) -> None:
        wrap(JsonlWriter, "write", self._written)
        wrap(LossMixin, "training_step", self._entered)
        wrap(folders.Manifest, "done", self._entered)
        wrap(os, "replace", self._entered)  # of a whole file by `write_whole`, and of a saved model

    def _tick(self) -> bool:
        self._count += 1
        self._count_file.write_text(str(self._count))
        return self._count == self._at

    def _entered(self, _: int, original: Any, *arguments: Any, **keywords: Any) -> Any:
        if self._tick():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    def _written(self, _: int, original: Any, writer: Any, rows: Any) -> Any:
        rows = list(rows)
        if self._tick():
            original(writer, rows[: len(rows) // 2])
            writer._stream.write(b'{"schema": "prefopt.sam')
            writer._stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(writer, rows)


def attempt(folder: Path, at: int | None, **options: Any) -> int:
    """Run or continue the rounds in a child that dies at an event; returns its exit status."""

    def work() -> None:
        os.environ["PREFOPT_CACHE"] = str(folder / "cache")
        Bomb(folder / "events", at).install()
        main(argv=words(folder, **options))

    return forked(work, output=folder / "output.txt")


def killed_until_done(folder: Path, kills: int, most: int, seed: int, **options: Any) -> int:
    """Continue a run that is killed at random events, up to `kills` times; returns how often it was."""
    rng, done = random.Random(seed), 0
    while done < kills:
        status = attempt(folder, rng.randint(1, most), **options)
        if status == 0:
            return done
        assert status == -signal.SIGKILL, (folder / "output.txt").read_text()[-3000:]
        done += 1
    assert attempt(folder, None, **options) == 0, (folder / "output.txt").read_text()[-3000:]
    return done


def compare(tmp_path: Path, kills: int, share: float, seed: int, **options: Any) -> int:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    options["model_name_or_path"] = save_model(tmp_path)
    assert attempt(whole, None, **options) == 0, (whole / "output.txt").read_text()[-3000:]
    events = int((whole / "events").read_text())
    done = killed_until_done(killed, kills, max(2, int(events * share)), seed, **options)
    one, other = files(whole / "out"), files(killed / "out")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    for number in (1, 2):
        assert same_weights(weights(whole / "out", number), weights(killed / "out", number))
    return done


def test_a_run_that_is_killed_three_times_ends_as_one_that_is_not(tmp_path):
    assert compare(tmp_path, 3, 0.5, seed=0, prompts=20) > 0


def test_a_run_on_groups_that_is_killed_ends_as_one_that_is_not(tmp_path):
    assert compare(tmp_path, 2, 0.6, seed=1, pairs="groups", loss="gvpo") > 0


@pytest.mark.slow
def test_twenty_kills_over_one_run(tmp_path):
    options = {"prompts": 40, "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "round_optimizer": "keep"}
    assert compare(tmp_path, 20, 0.1, seed=0, **options) == 20
