"""From samples and judgements to a file of pairs: what is written, and what is counted instead."""

from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.data import load_preferences, validate
from prefopt.evaluation.judgements import Preference, Score, text_hash
from prefopt.generation.samples import PromptRow, Sample, prompt_id
from prefopt.online.builders import parse_builder
from prefopt.online.pairing import PairCounts, PairSettings, check_gold, pairs_of, write_pairs
from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import JsonlWriter, read_jsonl

CHAT = [{"role": "user", "content": "2 + 2"}]
TEXT = "Name a fruit:"


def sample(prompt, index, completion, **more):
    return Sample(
        prompt_id(prompt), prompt, index, completion, len(completion), **{"finished": True, "round": 1, **more}
    )


def score(prompt, index, value, judge="exact", **more):
    return Score(prompt_id(prompt), index, judge, value, round=1, **more)


SAMPLES = [sample(CHAT, i, text) for i, text in enumerate(["4", "5", "it is 4", "four?"])]
SCORES = [score(CHAT, i, value) for i, value in enumerate([1, 0, 1, 0])]


def pairs(samples, judgements, builder="best_worst", prompts=(), **settings):
    counts = PairCounts()
    lines = list(pairs_of(samples, judgements, PairSettings(parse_builder(builder), **settings), counts, prompts))
    return lines, counts


def test_a_line_is_what_a_recipe_reads_and_says_where_it_comes_from():
    lines, counts = pairs(SAMPLES, SCORES)
    assert lines == [
        {
            "schema": "prefopt.pairs/1",
            "prompt": CHAT,
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
            "chosen_score": 1,
            "rejected_score": 0,
            "margin": 1,
            "chosen_index": 0,
            "rejected_index": 1,
            "prompt_id": prompt_id(CHAT),
            "round": 1,
            "why": "best against worst",
        }
    ]
    assert counts.as_json() == {
        "prompts": 1, "samples": 4, "pairs": 1, "samples_left_out": {}, "prompts_without_pair": {},
        "pairs_left_out": {},
    }  # fmt: skip


def test_a_text_prompt_has_texts_and_the_best_k_are_rows_of_supervised_training():
    samples = [sample(TEXT, i, text) for i, text in enumerate([" apple", " stone"])]
    lines, _ = pairs(samples, [score(TEXT, 0, 2.5), score(TEXT, 1, -1)], "top_k(k=1)")
    assert [(line["prompt"], line["completion"], line["score"], line["index"]) for line in lines] == [
        (TEXT, " apple", 2.5, 0)
    ]


def test_what_cannot_be_used_is_counted_by_reason():
    samples = [
        sample(CHAT, 0, "4"), sample(CHAT, 1, "5", finished=False), sample(CHAT, 2, "4"), sample(CHAT, 3, "6"),
        sample(CHAT, 4, " "), sample(CHAT, 5, "7"), sample(CHAT, 6, "8"), sample(TEXT, 0, "a"), sample(TEXT, 1, "b"),
    ]  # fmt: skip
    judgements = [
        score(CHAT, 0, 1), score(CHAT, 1, 1), score(CHAT, 2, 0), score(CHAT, 3, None, reason="raised: KeyError('x')"),
        score(CHAT, 4, 0), score(CHAT, 5, None, abstain=True, reason="abstained"),
        score(TEXT, 0, 1), score(TEXT, 1, 1),
    ]  # fmt: skip
    lines, counts = pairs(samples, judgements)
    assert lines == []
    assert counts.samples_left_out == {
        "unfinished": 1, "duplicate": 1, "empty": 1, "no score (raised)": 1, "no score (abstained)": 1,
        "no score (not judged)": 1,
    }  # fmt: skip
    assert counts.prompts_without_pair == {"fewer than two scored completions": 1, "all scores are equal": 1}
    assert counts.pairs_left_out == {"tie": 1}
    assert counts.as_json()["pairs_left_out"] == {"tie": 1}
    assert "2 prompts without a pair: 1 fewer than two scored completions, 1 all scores are equal" in counts.lines()


def test_samples_with_the_same_text_have_their_mean_score():
    samples = [sample(CHAT, i, text) for i, text in enumerate(["4", "5", "4"])]
    lines, _ = pairs(samples, [score(CHAT, 0, 2), score(CHAT, 1, 1), score(CHAT, 2, 1)])
    assert (lines[0]["chosen_score"], lines[0]["margin"]) == (1.5, 0.5)
    lines, counts = pairs(samples, [score(CHAT, 0, 1), score(CHAT, 1, 0.6), score(CHAT, 2, 0)], duplicates="keep")
    assert counts.pairs_left_out == {"same text": 1}
    assert (lines[0]["chosen_index"], lines[0]["rejected_index"]) == (1, 2)


def test_judges_count_by_their_weights():
    judgements = [score(CHAT, 0, 1), score(CHAT, 1, 0), score(CHAT, 0, 0, "short"), score(CHAT, 1, 1, "short")]
    two = SAMPLES[:2]
    assert pairs(two, judgements)[1].pairs_left_out == {"tie": 1}
    assert pairs(two, judgements, weights={"exact": 3, "short": 1})[0][0]["margin"] == 0.5
    assert pairs(two, judgements, weights={"short": 1})[0][0]["chosen_index"] == 1


def test_the_gold_answer_joins_the_winners():
    rows = [PromptRow(CHAT, {"solution": "It is 4.", "tools": [{"name": "add"}]})]
    wrong = [score(CHAT, i, 0) for i in range(4)]
    lines, _ = pairs(SAMPLES, wrong, "round_robin(pairs=2)", rows, gold="solution")
    assert [(line["chosen"][0]["content"], line["chosen_score"], line["margin"]) for line in lines] == [
        ("It is 4.", None, None)
    ] * 2
    assert lines[0]["tools"] == [{"name": "add"}]
    assert pairs(SAMPLES, wrong, "round_robin(pairs=2)", rows)[1].prompts_without_pair == {"none is correct": 1}


def preference(low, high, winner, **more):
    return Preference(prompt_id(CHAT), (low, high), "pairwise", winner, round=1, **more)


def test_preferences_alone_are_scores_by_the_share_of_wins():
    judgements = [preference(0, 1, 0), preference(0, 2, 0), preference(1, 2, None, tie=True)]
    lines, _ = pairs(SAMPLES[:3], judgements, "correct_incorrect(correct_at=0.9)")
    assert [(line["chosen_score"], line["rejected_score"]) for line in lines] == [(1, 0.25), (1, 0.25)]


def test_a_tournament_asks_the_preferences():
    judgements = [preference(0, 1, 1), preference(2, 3, 2), preference(1, 2, 2), preference(0, 3, 3)]
    _, counts = pairs(SAMPLES, judgements, "tournament")
    assert counts.prompts_without_pair == {"the best did not win against the worst": 1}
    assert counts.pairs_left_out == {"comparison without an answer": 1}
    lines, _ = pairs(SAMPLES, [*judgements, preference(0, 2, 2)], "tournament")
    assert [(line["chosen_index"], line["rejected_index"], line["margin"]) for line in lines] == [(2, 0, None)]


def test_judgements_of_other_texts_or_rounds_are_refused():
    with pytest.raises(UsageError, match=r"sample \[0\], is about another text"):
        pairs(SAMPLES, [score(CHAT, 0, 1, text_hash=text_hash("3"))])
    with pytest.raises(UsageError, match="judgements are of round 2, the samples of round 1"):
        pairs(SAMPLES, [Score(prompt_id(CHAT), 0, "exact", 1.0, round=2)])
    with pytest.raises(UsageError, match="of rounds 0, 1"):
        pairs([*SAMPLES, sample(CHAT, 0, "4", round=0)], SCORES)


# ---- files -------------------------------------------------------------------------------------------------------


def store(path, rows):
    with JsonlWriter(path) as file:
        file.write(rows)
    return str(path)


def test_a_file_of_pairs_can_be_trained_on(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", SAMPLES, SCORES, PairSettings(parse_builder("correct_incorrect")))
    data = load_preferences(str(tmp_path / "pairs.jsonl"), split="train")
    report = validate(data)
    assert (report.total, report.problems) == (4, [])


@pytest.fixture
def files(tmp_path):
    return (
        store(tmp_path / "samples.jsonl", (one.line() for one in SAMPLES)),
        store(tmp_path / "judgements.jsonl", (one.line() for one in SCORES)),
        str(tmp_path / "pairs.jsonl"),
    )


def run(*words):
    return CliRunner().invoke(app, ["pair", *words])


def test_the_command(files):
    samples, judgements, out = files
    result = run(samples, judgements, "--builder", "round_robin(pairs=3)", "--out", out)
    assert result.exit_code == 0, result.output
    assert "3 pairs from 4 samples of 1 prompts" in result.output
    assert "1 pairs or comparisons left out: 1 repeated pairs (used)" in result.output
    indices = [(row["chosen_index"], row["rejected_index"]) for row in read_jsonl(Path(out))]
    assert indices == [(0, 1), (2, 3), (0, 1)]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--builder", "best_wurst"], "no pair builder 'best_wurst'"),
        (["--builder", "best_worst", "--answers", "x"], "leave out the options for rows"),
        (["--builder", "best_worst", "--split", "test"], "samples are one file: leave them out"),
        ([], "need a --builder"),
        (["--builder", "best_worst", "--gold", "x"], "--gold names a column of --prompts: name that file, too"),
        (["--builder", "best_worst", "--weight", "x"], "--weight is a judge and a number"),
        (["--builder", "best_worst", "--weight", "exat=2"], "--weight must name each judge of the file once"),
        (["--builder", "against_gold"], "need gold answers"),
        (["--builder", "best_worst(min_margin=9)"], "pairs.jsonl is empty: no prompt makes a pair"),
    ],
)
def test_options_that_do_not_fit_are_refused(files, words, what):
    samples, judgements, out = files
    result = run(samples, judgements, "--out", out, *words)
    assert result.exit_code == 1
    assert what in " ".join(result.stderr.split())


def test_equal_files_have_equal_counts():
    assert pairs(SAMPLES, SCORES)[1] == pairs(list(reversed(SAMPLES)), SCORES)[1]
    assert Counter() == pairs(SAMPLES, SCORES)[1].samples_left_out


@pytest.mark.parametrize(
    ("builder", "gold", "what"),
    [
        ("best_worst", "answer", "has no effect with pairs best_worst"),
        ("round_robin", "anser", "no prompt has this column. Did you mean 'answer'"),
        ("against_gold", None, "need gold answers"),
    ],
)
def test_a_gold_answer_that_no_pair_would_have_is_refused(builder, gold, what):
    settings = PairSettings(parse_builder(builder), gold=gold)
    with pytest.raises(UsageError, match=what):
        check_gold(settings, [PromptRow("a", {"answer": "4"})])


def test_the_files_that_are_paired_are_not_overwritten(files):
    samples, judgements, _ = files
    for path in (samples, judgements):
        before = Path(path).read_bytes()
        result = run(samples, judgements, "--builder", "best_worst", "--out", path)
        assert "is the file that is read" in result.stderr
        assert Path(path).read_bytes() == before
