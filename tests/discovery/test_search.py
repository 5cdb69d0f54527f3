"""The search: its archive, what bad proposals cost, and that a stopped search ends as an unbroken one."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from prefopt.discovery import search as module
from prefopt.discovery.archive import FILE, Archive, Candidate, Result
from prefopt.discovery.evolve import Proposal
from prefopt.discovery.held_out import MEASURES
from prefopt.discovery.levels import ToyLevel
from prefopt.discovery.ranking import KL_BUDGETS, frontier, layers, ranking, reward_at_equal_kl, scores
from prefopt.discovery.search import Search, SearchOptions
from prefopt.safety.errors import UsageError

QUICK = (ToyLevel("screen", (0.1, 0.5), (0,), 4), ToyLevel("toy", (0.05, 0.5), (0, 1), 6))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name, level in zip(("SCREEN", "TOY"), QUICK, strict=True):
        monkeypatch.setattr(module, name, level)


def run(folder: Path, candidates: int, proposer=None, **options) -> list[Candidate]:
    archive = Archive(folder)
    options = {"generation": 6, **options}
    Search(SearchOptions(folder, candidates=candidates, **options), archive, proposer, say=lambda line: None).run()
    rows = archive.candidates()
    archive.close()
    return rows


def without_time(rows: list[Candidate]) -> list[Candidate]:
    return [dataclasses.replace(row, seconds=0.0) for row in rows]


def test_seeds_are_trained_and_the_better_half_of_a_generation_goes_on(tmp_path):
    rows = run(tmp_path, 21)
    assert [row.id for row in rows] == list(range(21))
    assert [(row.proposer, row.level) for row in rows[:3]] == [
        ("seed: dpo", "toy"),
        ("seed: hinge", "toy"),
        ("seed: ipo", "toy"),
    ]
    for generation in (1, 2, 3):
        mine = [row for row in rows if row.generation == generation]
        screened = [row for row in mine if row.level in ("screen", "toy")]
        assert sum(row.level == "toy" for row in mine) == (len(screened) + 1) // 2
        assert all(row.parents and max(row.parents) < mine[0].id for row in mine)
    assert all(row.reason for row in rows if row.level != "toy")
    assert {row.seed for row in rows} == {f"0:{n}" for n in range(21)}
    results = Archive(tmp_path).results("toy")
    assert len(results) == 4 * sum(row.level == "toy" for row in rows)


def test_a_search_in_pieces_equals_one_in_one(tmp_path):
    whole = run(tmp_path / "whole", 27)
    for end in (1, 5, 11, 16, 27):
        pieces = run(tmp_path / "pieces", end)
    assert without_time(pieces) == without_time(whole)


@pytest.mark.slow
def test_two_processes_fill_the_same_archive(tmp_path):
    whole, shared = (run(tmp_path / str(workers), 15, workers=workers) for workers in (1, 2))
    assert without_time(shared) == without_time(whole)
    assert Archive(tmp_path / "2").results("toy") == Archive(tmp_path / "1").results("toy")


def _search(folder: Path, candidates: int) -> None:
    torch.set_num_threads(1)  # threads of the process that forked are not here
    module.SCREEN, module.TOY = QUICK
    run(folder, candidates)


def _count(file: Path) -> int:
    """Candidates in an archive that another process writes; 0 where there is none yet."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            return database.execute("SELECT count(*) FROM candidates").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_a_killed_search_ends_as_an_unbroken_one(tmp_path):
    whole = run(tmp_path / "whole", 40)
    process = multiprocessing.get_context("fork").Process(target=_search, args=(tmp_path / "killed", 40))
    process.start()
    while process.is_alive() and _count(tmp_path / "killed" / FILE) < 12:
        time.sleep(0.005)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert without_time(run(tmp_path / "killed", 40)) == without_time(whole)


def test_other_options_do_not_continue_a_search(tmp_path):
    run(tmp_path, 4)
    with pytest.raises(UsageError, match="holds a search with --seed 0, not 1"):
        run(tmp_path, 5, seed=1)


def test_two_processes_do_not_search_in_one_folder(tmp_path):
    run(tmp_path, 4)
    with FileLock(tmp_path / "archive.lock"), pytest.raises(UsageError, match="another process searches"):
        run(tmp_path, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ("dpoo",)}, "Did you mean 'dpo'"),
        ({"seeds": ()}, "at least one"),
        ({"candidates": None}, "needs an end"),
        ({"generation": 1}, "at least 2"),
    ],
)
def test_options_without_sense_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        SearchOptions(tmp_path, **{"candidates": 5, **options})


def test_a_search_that_is_over_still_knows_its_population(tmp_path):
    archive = Archive(tmp_path)
    ends = ({"candidates": 21}, {"candidates": 21}, {"minutes": 0.0})
    said = [Search(SearchOptions(tmp_path, generation=6, **end), archive, say=lambda line: None).run() for end in ends]
    assert said[0] == said[1] == said[2]
    assert max(member.number for member in said[0]) > 3


def test_minutes_end_a_search(tmp_path):
    archive = Archive(tmp_path)
    Search(SearchOptions(tmp_path, minutes=0.0), archive, say=lambda line: None).run()
    assert archive.candidates() == []


class Poor:
    """Proposes what no search can use."""

    share = 1.0
    ANSWERS = ("import os; os.remove('x')", "1e999 * x", "x" * 10_000, "", "softplus(x)", "logistic(x)")

    def ask(self, archive, members, numbers):
        return {number: Proposal(self.ANSWERS[number % 6], "poor") for number in numbers}


def test_a_bad_proposal_costs_one_line(tmp_path):
    rows = run(tmp_path, 9, Poor())[3:]
    assert len(rows) == 6
    reasons = {row.text[:20]: (row.level, row.reason) for row in rows}
    assert reasons["import os; os.remove"][0] == "text"
    assert "above" in reasons["1e999 * x"][1]
    assert reasons["x" * 20] == ("text", "the expression has 10000 characters; at most 400 are read")
    assert reasons[""] == ("text", "the proposer answered nothing")
    assert "does not push" in reasons["softplus(x)"][1]
    assert reasons["logistic(x)"] == ("static", "trains like candidate 0")
    assert (tmp_path / FILE).stat().st_size < 100_000
    assert len(rows[[row.text[:1] for row in rows].index("x")].text) <= 2000


class TestRanking:
    def result(self, candidate, beta, reward, kl, value=0.0):
        return Result(candidate, "toy", beta, 0, reward, kl, 0.0, value)

    def test_a_loss_that_collapses_at_one_beta_is_not_first(self):
        results = [
            self.result(0, 0.1, 1.0, 1.0, 0.8), self.result(0, 1.0, 0.5, 0.2, 0.6),
            self.result(1, 0.1, 1.1, 1.0, 0.9), self.result(1, 1.0, -1.0, 0.5, -0.1),
            self.result(2, 0.1, 0.9, 1.0, 0.7), self.result(2, 1.0, 0.5, 0.2, 0.5),
        ]  # fmt: skip
        scored = scores(results)
        assert [scored[n].value for n in range(3)] == [0.6, -0.1, 0.5]
        assert layers(scored) == {0: 0, 2: 1, 1: 2}
        assert ranking(scored) == [0, 2, 1]
        assert [(number, point.beta) for number, point in frontier(scored)] == [(1, 0.1), (0, 1.0), (2, 1.0)]

    def test_reward_is_compared_at_equal_kl(self):
        # One loss at four times the KL for the same reward; between points it is straight in the root of KL.
        near, far = (
            [self.result(0, beta, root, (factor * root) ** 2) for beta, root in ((0.1, 1.5), (1.0, 0.5))]
            for factor in (1, 2)
        )
        assert scores(near)[0].reward_at_kl == pytest.approx(sum(kl**0.5 for kl in KL_BUDGETS) / 4)
        assert scores(far)[0].reward_at_kl == pytest.approx(scores(near)[0].reward_at_kl / 2)

    def test_the_search_ranks_by_the_measure_of_the_page(self):
        points = ((0.05, 1.4, 2.5), (0.5, 1.1, 1.2), (1.0, 0.4, 0.1))
        score = scores([self.result(0, *point) for point in points])[0]
        rows = np.array([[[reward, kl, 0.0, 0.0] for _, reward, kl in points]])
        assert score.reward_at_kl == MEASURES["reward_at_kl"](rows)

    def test_a_point_of_less_kl_and_more_reward_counts(self):
        assert reward_at_equal_kl(np.array([0.2, 3.0]), np.array([1.0, 0.0])) == 1.0

    def test_a_training_that_broke_has_no_score(self):
        assert scores([self.result(0, 0.1, None, None), self.result(1, 0.1, 1.0, 1.0)]).keys() == {1}


def test_a_folder_without_an_archive_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"holds no archive\.sqlite"):
        Archive(tmp_path / "other", make=False)
    (tmp_path / FILE).write_text("no database at all, but some text that is long enough to be one" * 20)
    with pytest.raises(UsageError, match="cannot be read as an archive"):
        Archive(tmp_path)
