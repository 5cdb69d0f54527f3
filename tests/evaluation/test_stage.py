import json
import os
import signal
import subprocess
import sys

import pytest

from prefopt.evaluation.cache import JudgementCache
from prefopt.evaluation.judgements import Preference, Score, read_judgements
from prefopt.evaluation.judges.base import Candidate, Choice, Verdict
from prefopt.evaluation.judges.build import make_judge, parse_judge
from prefopt.evaluation.stage import Pairing, judge_to_file
from prefopt.generation.samples import PromptRow, Sample, prompt_id
from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import JsonlWriter
from tests.evaluation import my_judges

HERE = "tests.evaluation.my_judges"


def samples_of(**completions):
    return [
        Sample(prompt_id(prompt), prompt, i, text, len(text), True)
        for prompt, texts in completions.items()
        for i, text in enumerate(texts)
    ]


def judge(text):
    return make_judge(parse_judge(text))


def judged(tmp_path, samples, *specs, **options):
    path = tmp_path / "judgements.jsonl"
    judge_to_file(samples, [judge(spec) for spec in specs], path, **options)
    return list(read_judgements(path))


def test_lines_are_prompt_by_prompt_and_judge_by_judge(tmp_path):
    rows = {prompt_id("p"): PromptRow("p", {"answer": 7})}
    samples = samples_of(p=["#### 7", "8"])
    lines = judged(tmp_path, samples, "number", f"{HERE}:length,name=size", rows=rows)
    assert [(one.judge, one.index, one.score) for one in lines] == [
        ("number", 0, 1), ("number", 1, 0), ("size", 0, 6), ("size", 1, 1),
    ]  # fmt: skip
    assert len({one.judge_hash for one in lines}) == len({one.text_hash for one in lines}) == 2


def test_a_judge_that_raises_or_gives_no_number_is_reported_per_sample(tmp_path):
    lines = judged(tmp_path, samples_of(p=["fine", "raise", "nan", "abstain", "none"]), f"{HERE}:sometimes")
    assert [(one.score, one.abstain, one.reason) for one in lines] == [
        (0, False, ""),
        (None, False, "raised: RuntimeError: no idea"),
        (None, False, "not a number: nan"),
        (None, True, "abstained"),
        (1, False, ""),
    ]


class Model:
    """Fails on a whole batch if one text is bad, as models do."""

    name, settings, cached = "model", {"kind": "model"}, True

    def score(self, candidates):
        if any("bad" in one.completion for one in candidates):
            raise ValueError("bad text")
        return [Verdict(float(len(candidates))) for one in candidates]


def test_a_judge_that_fails_on_a_batch_is_asked_one_by_one(tmp_path):
    path = tmp_path / "j.jsonl"
    judge_to_file(samples_of(p=["a", "bad", "c"]), [Model()], path)
    lines = list(read_judgements(path))
    assert [one.score for one in lines] == [1, None, 1]
    assert lines[1].reason == "raised: ValueError: bad text"


def test_errors_for_the_user_end_the_stage(tmp_path):
    with pytest.raises(UsageError, match="needs the right answer in the column 'answer'"):
        judged(tmp_path, samples_of(p=["7"]), "number")
    with pytest.raises(UsageError, match="different names, got length, length"):
        judged(tmp_path, samples_of(p=["7"]), f"{HERE}:length", f"{HERE}:length")


def test_pairs_are_asked_in_both_orders(tmp_path):
    lines = judged(tmp_path, samples_of(p=["long", "a", "b", "a"]), f"{HERE}:shorter", f"{HERE}:shown_first,repeats=2")
    of_length = [one for one in lines if one.judge == "shorter"]
    assert [(one.indices, one.winner, one.tie, one.order) for one in of_length[:4]] == [
        ((0, 1), 1, False, 0), ((1, 0), 1, False, 1), ((0, 2), 2, False, 0), ((2, 0), 2, False, 1),
    ]  # fmt: skip
    assert len(of_length) == 12
    assert {one.tie for one in of_length[6:]} == {True}
    first = [one for one in lines if one.judge == "shown_first" and one.indices[0] == 0]
    assert [(one.winner, one.probability, one.repeat) for one in first[:2]] == [(0, 0.75, 0), (0, 0.75, 1)]
    # Samples 1 and 3 are the same text: a tie, without asking.
    assert {one.first_share for one in lines if sorted(one.indices) == [1, 3]} == {0.5}


def test_some_pairs_are_drawn_the_same_each_time(tmp_path):
    samples = samples_of(p=list("abcdefgh"), q=list("abcdefgh"))
    lines = judged(tmp_path, samples, f"{HERE}:shorter,both_orders=no", pairing=Pairing(5, seed=1))
    assert len(lines) == 10
    assert [one.indices for one in lines[:5]] != [one.indices for one in lines[5:]]
    judge_to_file(
        samples, [judge(f"{HERE}:shorter,both_orders=no")], tmp_path / "again.jsonl", pairing=Pairing(5, seed=1)
    )
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "judgements.jsonl").read_bytes()


def test_what_was_judged_comes_from_the_cache_and_failures_do_not(tmp_path):
    samples = samples_of(p=["fine", "raise", "abstain"], q=["fine"])
    with JudgementCache(tmp_path / "cache" / "c.sqlite") as cache:
        first = judged(tmp_path, samples, f"{HERE}:sometimes", cache=cache)
        my_judges.CALLS.clear()
        (tmp_path / "judgements.jsonl").unlink()
        assert judged(tmp_path, samples, f"{HERE}:sometimes", cache=cache) == first
        assert my_judges.CALLS == ["raise"]
        # Another answer to compare with is another question.
        judged(tmp_path / "other", samples, f"{HERE}:sometimes", cache=cache,
               rows={prompt_id("p"): PromptRow("p", {"answer": "fine"})})  # fmt: skip
        assert my_judges.CALLS == ["raise", "fine", "raise", "abstain"]


def test_several_processes_use_one_cache(tmp_path):
    script = """
import sys
from pathlib import Path
from prefopt.evaluation.cache import JudgementCache
from prefopt.evaluation.judges.base import Choice, Verdict
with JudgementCache(Path(sys.argv[1])) as cache:
    for i in range(100):
        cache.put({f"{i}/{j}": Verdict(i + j) for j in range(5)})
        assert len(cache.get([f"{i}/{j}" for j in range(5)])) == 5
"""
    path = tmp_path / "c.sqlite"
    jobs = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(3)]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    with JudgementCache(path) as cache:
        stored = cache.get([f"{i}/{j}" for i in range(100) for j in range(5)])
        assert len(stored) == 500
        assert stored["3/4"] == Verdict(7)
        cache.put({"x": Choice(0.25, is_probability=True, raw="A"), "y": Verdict(None, "raised: E: e")})
        assert cache.get(["x", "y"]) == {"x": Choice(0.25, is_probability=True, raw="A")}


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "c.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 50)
    with pytest.raises(UsageError, match=r"c.sqlite cannot be used .*Delete it"):
        JudgementCache(tmp_path / "c.sqlite")


def test_a_run_cut_anywhere_ends_with_the_same_file(tmp_path):
    samples = samples_of(**{f"p{i}": ["a", "bb", "raise"] for i in range(20)})
    specs = (f"{HERE}:length", f"{HERE}:shorter,repeats=2")
    judged(tmp_path, samples, *specs)
    path = tmp_path / "judgements.jsonl"
    whole = path.read_bytes()
    for end in (0, 1, 400, 5000, whole.rfind(b"\n", 0, 6000) + 1, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:end])
        judged(tmp_path, samples, *specs)
        assert path.read_bytes() == whole, end


def test_a_file_of_other_samples_or_judges_is_refused(tmp_path):
    judged(tmp_path, samples_of(p=["a", "b"]), f"{HERE}:length")
    for samples, spec in [
        (samples_of(p=["a", "c"]), f"{HERE}:length"),
        (samples_of(p=["a", "b"]), f"{HERE}:sometimes,name=length"),
    ]:
        with pytest.raises(UsageError, match=r"object . is not a judgement of these samples by these judges"):
            judged(tmp_path, samples, spec)
    with pytest.raises(UsageError, match="more samples than there are"):
        judged(tmp_path, samples_of(p=["a"]), f"{HERE}:length")


def test_killed_in_the_middle_of_judging(tmp_path):
    script = f"""
import sys
from pathlib import Path
from prefopt.evaluation.cache import JudgementCache
from prefopt.evaluation.judges.build import make_judge, parse_judge
from prefopt.evaluation.stage import judge_to_file
from tests.evaluation.test_stage import samples_of
from tests.evaluation.my_judges import CALLS
samples = samples_of(**{{f"p{{i}}": [f"a{{i}}", f"b{{i % 30}}"] for i in range(0, 60)}})
samples = samples[40:] + samples[:40]  # b7 is in the third chunk
with JudgementCache(Path(sys.argv[1])) as cache:
    judge_to_file(samples, [make_judge(parse_judge("{HERE}:kill_at_b7"))], Path(sys.argv[2]), cache=cache)
print(len(CALLS))
"""

    def run(out, kill):
        environment = {**os.environ, "KILL_AT_B7": "1" if kill else ""}
        command = [sys.executable, "-c", script, str(tmp_path / f"{out}.sqlite"), str(tmp_path / out)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    undisturbed = run("undisturbed.jsonl", False)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert run("killed.jsonl", True).returncode == -signal.SIGKILL
    there = (tmp_path / "killed.jsonl").read_bytes()
    assert 0 < len(there) < (tmp_path / "undisturbed.jsonl").stat().st_size
    resumed = run("killed.jsonl", False)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert int(resumed.stdout) < int(undisturbed.stdout)


def test_functions_get_what_their_parameters_name():
    def score(path, **columns):
        return judge(f"{HERE}:{path}").score([Candidate("prompt", "text", columns)])[0]

    assert score("length").score == 4
    assert score("with_row", level=2).score == 10
    assert "no column 'level'" in score("with_row").reason
    with pytest.raises(UsageError, match="has the parameters a, b, c; it needs completion"):
        judge(f"{HERE}:two_of_three")
    for path, what in [
        ("nowhere:f", "cannot be imported"),
        (f"{HERE}:none", "no function none"),
        ("a:b c", "must be"),
    ]:
        with pytest.raises(UsageError, match=what):
            judge(path)


def test_labels_are_scores_from_a_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [
        {"prompt": "p", "completion": "a", "score": 3},
        {"prompt_id": prompt_id("p"), "completion": "b", "score": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = judged(tmp_path, samples_of(p=["a", "b", "c"]), f"labels:{path},name=Ann")
    assert [(one.score, one.reason) for one in lines] == [(3, ""), (None, "abstained"), (None, "no label")]
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "p", "completion": "a", "score": 4}) + "\n")
    with pytest.raises(UsageError, match="object 3: another score for a completion"):
        judge(f"labels:{path}")


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("numbr", "Did you mean 'number'"),
        ("number,colum=gold", "no option 'colum'. Did you mean 'column'"),
        ("number:3", "must be written as number"),
        ("regex", "must be written as regex:PATTERN"),
        ("number,weight=heavy", "weight=heavy of the judge"),
        (f"{HERE}:shorter,repeats=0", "repeats=0 .* must be at least 1"),
        ({"column": "gold"}, "no judge ''"),
    ],
)
def test_judges_that_cannot_be_read_are_explained(spec, what):
    with pytest.raises(UsageError, match=what):
        parse_judge(spec)


def test_judges_are_read_from_texts_and_mappings():
    text = parse_judge(r"regex:(\d+),? apples,column=gold,weight=2")
    assert (text.kind, text.value, text.options, text.weight) == ("regex", r"(\d+),? apples", {"column": "gold"}, 2)
    assert parse_judge({"judge": r"regex:(\d+),? apples", "column": "gold", "weight": 2}) == text


def test_scores_and_preferences_stand_in_one_file(tmp_path):
    lines = judged(tmp_path, samples_of(p=["a", "bb"]), f"{HERE}:length", f"{HERE}:shorter")
    assert [type(one) for one in lines] == [Score, Score, Preference, Preference]


def test_a_function_may_change_its_row_and_return_a_tensor():
    columns = {"answer": 4}
    verdicts = judge(f"{HERE}:takes_out").score([Candidate("q", "a", columns)] * 2)
    assert [one.score for one in verdicts] == [4, 4]
    assert columns == {"answer": 4}


def test_a_file_that_another_process_writes_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    with JsonlWriter(path), pytest.raises(UsageError, match=r"another process writes .*j.jsonl"):
        judge_to_file(samples_of(a=["b"]), [judge(f"{HERE}:length")], path)
