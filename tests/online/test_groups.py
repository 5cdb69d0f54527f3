"""Groups: pairs out of them, and groups out of samples with judgements and of rows that rate answers."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.evaluation.judgements import Score
from prefopt.generation.samples import PromptRow, Sample
from prefopt.online.builders import parse_builder
from prefopt.online.groups import pairs_of_groups
from prefopt.online.pairing import PairCounts, PairSettings, pairs_of
from prefopt.safety.errors import UsageError

GROUP = {"prompt": "q", "completions": ["a", "b", "c", "d"], "scores": [1.0, 4.0, 2.0, 2.0]}


def pairs(builder, row=GROUP):
    counts = PairCounts()
    lines = list(pairs_of_groups([row], parse_builder(builder), counts))
    return [line["chosen"] + line["rejected"] for line in lines], counts, lines


@pytest.mark.parametrize(
    ("builder", "expected", "left_out"),
    [
        ("all_pairs", ["bc", "bd", "ba", "ca", "da"], {"tie": 1}),
        ("all_pairs(min_margin=1.5)", ["bc", "bd", "ba"], {"tie": 1, "margin below 1.5": 2}),
        ("adjacent", ["bc", "da"], {"tie": 1}),
        ("best_worst", ["ba"], {}),
    ],
)
def test_builders_make_pairs_of_a_group(builder, expected, left_out):
    made, counts, lines = pairs(builder)
    assert made == expected
    assert counts.pairs_left_out == left_out
    assert lines[0]["margin"] == lines[0]["chosen_score"] - lines[0]["rejected_score"]


def test_a_list_without_scores_is_in_order():
    made, _, lines = pairs("all_pairs", {"prompt": "q", "completions": ["a", "b", "c"], "weight": 2.0})
    assert made == ["ab", "ac", "bc"]
    assert "chosen_score" not in lines[0]
    assert lines[0]["weight"] == 2.0


@pytest.mark.parametrize("builder", ["top_k(k=2)", "groups"])
def test_a_builder_that_makes_no_pairs_is_refused(builder):
    with pytest.raises(UsageError, match=re.escape(f"--builder {builder} does not make pairs") + ".*all_pairs"):
        pairs(builder)


def test_samples_with_scores_become_groups():
    samples = [
        Sample(prompt_id=p, prompt="q" + p, index=i, completion=f"{p}{i}", finished=True, token_count=1)
        for p in "xy"
        for i in range(3)
    ]
    judgements = [Score("x", 0, "j", 1.0), Score("x", 2, "j", 3.0), Score("y", 1, "j", 0.0), Score("x", 1, "j", None)]
    counts = PairCounts()
    (line,) = pairs_of(samples, judgements, PairSettings(parse_builder("groups")), counts)
    assert (line["prompt"], line["completions"], line["scores"]) == ("qx", ["x0", "x2"], [1.0, 3.0])
    assert (line["indices"], line["prompt_id"], line["round"]) == ([0, 2], "x", 0)
    assert counts.prompts_without_pair == {"fewer than two scored completions": 1}
    assert counts.samples_left_out.total() == 3
    assert counts.lines("groups")[0] == "1 groups from 6 samples of 2 prompts"
    assert counts.lines("groups")[2] == "1 prompts without a group: 1 fewer than two scored completions"


@pytest.mark.parametrize(
    ("builder", "scores", "rows", "left_out"),
    [
        ("groups", [2.0, 2.0], [[2.0, 2.0]], {"tie of a whole group (used)": 1}),
        ("groups(equal=False)", [2.0, 2.0], [], {"tie": 1}),
        ("groups(equal=False)", [2.0, 1.0], [[2.0, 1.0]], {}),
    ],
)
def test_a_group_whose_scores_are_equal_is_counted_and_used_or_left_out(builder, scores, rows, left_out):
    samples = [Sample("x", "q", i, f"a{i}", 1, True) for i in range(2)]
    judgements = [Score("x", i, "j", score) for i, score in enumerate(scores)]
    counts = PairCounts()
    lines = list(pairs_of(samples, judgements, PairSettings(parse_builder(builder)), counts))
    assert [line["scores"] for line in lines] == rows
    assert (counts.pairs, dict(counts.pairs_left_out)) == (len(rows), left_out)
    assert counts.prompts_without_pair == ({} if rows else {"all scores are equal": 1})


def test_lists_and_the_builder_of_groups_write_the_same_file(tmp_path):
    samples, judgements, prompts = (tmp_path / f"{name}.jsonl" for name in ("samples", "judgements", "prompts"))
    row = PromptRow("q", {"tools": [{"name": "search"}]})
    samples.write_text("".join(json.dumps(Sample(row.id, "q", i, f"a{i}", 1, True).line()) + "\n" for i in range(3)))
    judgements.write_text("".join(json.dumps(Score(row.id, i, "j", float(i)).line()) + "\n" for i in range(3)))
    prompts.write_text(json.dumps({"prompt": "q", **row.columns}) + "\n")
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for out, how in ((one, ["--lists"]), (other, ["--builder", "groups"])):
        result = run("pair", samples, judgements, "--out", out, "--prompts", prompts, *how)
        assert result.exit_code == 0, result.output
        assert "1 groups from 3 samples of 1 prompts" in result.output
    assert one.read_bytes() == other.read_bytes()
    assert json.loads(one.read_text())["tools"] == row.columns["tools"]
    assert run("check", one).exit_code == 0


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_configuration_of_a_data_set_of_groups_can_be_named(tmp_path):
    for name in ("first", "second"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        row = {"prompt": name, "completions": ["a", "b"], "scores": [1.0, 2.0]}
        (tmp_path / "sets" / name / "train.jsonl").write_text(json.dumps(row) + "\n")
    parts = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("first", "second"))
    (tmp_path / "sets" / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    out = tmp_path / "pairs.jsonl"
    result = run("pair", tmp_path / "sets", "--out", out, "--builder", "adjacent", "--config", "second")
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["prompt"] == "second"


def test_command_writes_groups_of_rated_answers_and_pairs_of_groups(tmp_path):
    rated, groups, made = tmp_path / "rated.jsonl", tmp_path / "groups.jsonl", tmp_path / "pairs.jsonl"
    answers = [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 3}]
    rated.write_text(json.dumps({"instruction": "q", "completions": answers}) + "\n")
    how = ("--prompt", "instruction", "--answers", "completions", "--text", "response", "--score", "overall_score")
    assert run("pair", rated, "--out", groups, "--lists", *how).exit_code == 0
    assert json.loads(groups.read_text()) == {"prompt": "q", "completions": ["b", "a"], "scores": [3.0, 1.0]}
    assert run("check", groups).exit_code == 0
    result = run("pair", groups, "--out", made, "--builder", "adjacent")
    assert "1 pairs from 2 samples of 1 prompts" in result.output
    assert json.loads(made.read_text())["chosen"] == "b"
    for more in (("--keep-duplicates",), ("--weight", "j=2"), ("--prompts", rated)):
        result = run("pair", groups, "--out", tmp_path / "other.jsonl", "--builder", "adjacent", *more)
        assert "has groups, and --prompts, --gold, --weight" in " ".join(result.output.split())
    how = ("--prompt", "prompt", "--answers", "answers", "--text", "answer", "--rank", "rank")
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(
        json.dumps({"prompt": "q", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]}) + "\n"
    )
    assert run("pair", ranked, "--out", groups, "--lists", *how).exit_code == 0
    assert json.loads(groups.read_text()) == {"prompt": "q", "completions": ["b", "a"]}
