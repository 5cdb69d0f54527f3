"""A judge of two completions is asked only for the comparisons that a tournament needs."""

from __future__ import annotations

import itertools

import pytest

from prefopt.evaluation.judgements import Score, read_judgements
from prefopt.evaluation.judges.base import Choice, Verdict
from prefopt.evaluation.stage import judge_to_file
from prefopt.generation.samples import Sample, prompt_id
from prefopt.online.builders import parse_builder
from prefopt.online.comparisons import comparisons_of
from prefopt.online.pairing import PairCounts, PairSettings, pairs_of
from prefopt.safety.jsonl import read_jsonl


class ByLength:
    """Prefers the longer completion; counts what it is asked."""

    name, cached, both_orders, repeats = "longer", False, True, 1

    def __init__(self, fails=()):
        self.settings = {"fails": list(fails)}
        self.asked, self._fails = [], fails

    def compare(self, contests):
        self.asked += [(one.prompt, one.first, one.second) for one in contests]
        return [
            Choice(None, reason="unparsable")
            if {one.first, one.second} == set(self._fails)
            else Choice(float(len(one.first) > len(one.second)))
            for one in contests
        ]


class Vowels:
    name, cached = "vowels", False

    def __init__(self):
        self.settings = {}

    def score(self, candidates):
        return [Verdict(float(sum(letter in "aeiou" for letter in one.completion))) for one in candidates]


def samples_of(count, prompts=1, **changes):
    order = [3, 0, 6, 1, 7, 5, 2, 4, 8, 9][:count]
    return [
        Sample(prompt_id(f"p{number}"), f"p{number}", index, "x" * (length + 1), length + 1, True)
        for number in range(prompts)
        for index, length in enumerate(order)
    ]


SETTINGS = PairSettings(parse_builder("tournament"))


def judged(path, samples, judges, settings=SETTINGS):
    judge_to_file(samples, judges, path, pairing=comparisons_of(settings))
    return list(read_judgements(path))


@pytest.mark.parametrize(("count", "comparisons"), [(1, 0), (2, 1), (3, 3), (4, 5), (5, 7), (8, 11)])
def test_a_tournament_asks_for_its_own_comparisons(tmp_path, count, comparisons):
    samples, judge = samples_of(count), ByLength()
    lines = judged(tmp_path / "j.jsonl", samples, [judge])
    pairs = {tuple(sorted(line.indices)) for line in lines}
    assert len(lines) == 2 * len(pairs) == len(judge.asked)
    assert len(pairs) <= comparisons
    if count == 8:
        assert len(pairs) == 11
    if count > 1:
        counts = PairCounts()
        (pair,) = pairs_of(samples, lines, SETTINGS, counts)
        assert (len(pair["chosen"]), len(pair["rejected"])) == (max(len(s.completion) for s in samples), 1 + min(
            [3, 0, 6, 1, 7, 5, 2, 4][:count]
        ))  # fmt: skip
        assert counts.pairs_left_out == {}


def test_the_pairs_are_those_of_all_comparisons(tmp_path):
    samples = samples_of(8, prompts=20)
    few = judged(tmp_path / "few.jsonl", samples, [ByLength(("xxxx", "x"))])
    judge_to_file(samples, [ByLength(("xxxx", "x"))], tmp_path / "all.jsonl")
    every = list(read_judgements(tmp_path / "all.jsonl"))
    assert (len(few), len(every)) == (20 * 2 * 11, 20 * 2 * 28)
    one, other = (list(pairs_of(samples, lines, SETTINGS, PairCounts())) for lines in (few, every))
    assert one == other


def test_only_samples_that_may_become_a_pair_are_compared(tmp_path):
    changes = {0: {"finished": False}, 1: {"completion": "  "}, 2: {"completion": "xx"}, 3: {"completion": "xx"}}
    samples = [Sample(**{**vars(sample), **changes.get(sample.index, {})}) for sample in samples_of(6)]
    lines = judged(tmp_path / "j.jsonl", samples, [ByLength()])
    assert set(itertools.chain(*(line.indices for line in lines))) == {2, 4, 5}
    kept = PairSettings(parse_builder("tournament"), unfinished="keep", duplicates="keep")
    lines = judged(tmp_path / "kept.jsonl", samples, [ByLength()], kept)
    assert set(itertools.chain(*(line.indices for line in lines))) == {0, 2, 3, 4, 5}


def test_a_stage_that_was_stopped_anywhere_asks_only_for_the_rest(tmp_path):
    samples = samples_of(8, prompts=3)
    whole = tmp_path / "whole.jsonl"
    judged(whole, samples, [ByLength(), Vowels()])
    text = whole.read_bytes().splitlines(keepends=True)
    assert len(text) == 3 * (8 + 22)
    scores = [isinstance(one, Score) for one in read_judgements(whole)]
    assert (scores[:8], scores[8:16]) == ([True] * 8, [False] * 8)  # then the first level of the tournament
    for done in range(0, len(text), 7):
        path, judge = tmp_path / f"{done}.jsonl", ByLength()
        path.write_bytes(b"".join(text[:done]) + b'{"schema": "pre')
        judged(path, samples, [judge, Vowels()])
        assert path.read_bytes() == whole.read_bytes()
        assert len(judge.asked) == scores[done:].count(False)


def test_answers_in_the_file_decide_what_is_asked_next(tmp_path):
    path, samples = tmp_path / "j.jsonl", samples_of(4)
    judged(path, samples, [ByLength()])
    rows = list(read_jsonl(path))
    first = [row["indices"] for row in rows[:4]]
    assert first == [[0, 1], [1, 0], [2, 3], [3, 2]]
    assert [row["indices"] for row in rows[4:6]] == [[0, 2], [2, 0]]
