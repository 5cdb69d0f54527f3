import pytest

from prefopt.evaluation.judgements import read_judgements
from prefopt.evaluation.judges.build import make_judge, parse_judge
from prefopt.evaluation.judges.llm import llm_judge, read_choice, read_score
from prefopt.evaluation.stage import judge_to_file
from prefopt.generation.samples import Sample, SamplingSettings, prompt_id
from prefopt.safety.errors import UsageError


class Writer:
    """A generator whose replies are a function of the question."""

    name, chunk_prompts = "writer", 1

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def sample(self, prompts, settings, round_number=0):
        for row in prompts:
            text = row.prompt[0]["content"]
            self.asked.append(text)
            yield [Sample(row.id, row.prompt, i, self.reply(text, i), 1, True) for i in range(settings.samples)]

    def close(self):
        pass


def rubric(tmp_path, text):
    path = tmp_path / "rubric.txt"
    path.write_text(text)
    return path


def samples_of(prompt, *completions):
    return [Sample(prompt_id(prompt), prompt, i, text, 1, True) for i, text in enumerate(completions)]


def judged(tmp_path, samples, judge):
    judge_to_file(samples, [judge], tmp_path / "j.jsonl")
    return list(read_judgements(tmp_path / "j.jsonl"))


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("Score: 7", 7, ""), ("score = 3.5\nno: **Score: 4**", 4, ""), ("[[9]]", 9, ""), ("Score: -1", -1, ""),
        ("Score: none", None, "abstained"), ("It is good.", None, "unparsable"), ("", None, "unparsable"),
    ],
)  # fmt: skip
def test_scores_are_read(text, score, reason):
    verdict = read_score(text)
    assert (verdict.score, verdict.reason, verdict.raw) == (score, reason, text)


@pytest.mark.parametrize(("text", "score"), [("Score: 1", None), ("Score: 3.", None), ("Score: 1\nFor", 1)])
def test_a_score_that_may_have_been_cut_is_none(text, score):
    verdict = read_score(text, finished=False)
    assert (verdict.score, verdict.reason) == (score, "" if score else "cut")


@pytest.mark.parametrize(
    ("text", "first", "reason"),
    [
        ("Verdict: A", 1, ""), ("verdict: B.", 0, ""), ("Verdict: [[A]]", 1, ""), ("[[B]] or rather [[C]]", 0.5, ""),
        ("**Verdict: tie**", 0.5, ""), ("Verdict: none", None, "abstained"), ("A is better", None, "unparsable"),
        ("Verdict: Apples", None, "unparsable"),
    ],
)  # fmt: skip
def test_choices_are_read(text, first, reason):
    choice = read_choice(text)
    assert (choice.first, choice.reason, choice.abstain) == (first, reason, reason == "abstained")


def test_a_rubric_with_a_completion_scores(tmp_path):
    writer = Writer(lambda text, i: "hm" if "{prompt}" in text else f"Score: {i + 1}")
    path = rubric(tmp_path, "Q: {prompt} A: {completion}")
    judge = llm_judge(path, writer, SamplingSettings(2, temperature=1))
    lines = judged(tmp_path, samples_of("what", "fine", "{prompt}"), judge)
    # The mean over repeats; what stands in an answer is not filled in.
    assert [(one.score, one.reason) for one in lines] == [(1.5, ""), (None, "unparsable")]
    assert writer.asked == ["Q: what A: fine", "Q: what A: {prompt}"]
    assert lines[0].raw == "Score: 1\n---\nScore: 2"


def test_a_rubric_with_two_answers_compares_in_both_orders(tmp_path):
    writer = Writer(lambda text, i: "Verdict: A" if i == 0 else "Verdict: tie")
    path = rubric(tmp_path, "{prompt}|{first}|{second}")
    judge = llm_judge(path, writer, SamplingSettings(2, temperature=1))
    lines = judged(tmp_path, samples_of([{"role": "user", "content": "what"}], "x", "y"), judge)
    assert [(one.indices, one.repeat, one.winner, one.tie) for one in lines] == [
        ((0, 1), 0, 0, False), ((0, 1), 1, None, True), ((1, 0), 0, 1, False), ((1, 0), 1, None, True),
    ]  # fmt: skip
    assert writer.asked == ["what|x|y", "what|y|x"]


def test_what_a_rubric_must_have(tmp_path):
    for text in ("{prompt}", "{completion} {first} {second}", "{first}"):
        with pytest.raises(UsageError, match="where the answers are to stand"):
            llm_judge(rubric(tmp_path, text), Writer(None), SamplingSettings(1, temperature=0))
    with pytest.raises(UsageError, match="same answer 3 times"):
        llm_judge(rubric(tmp_path, "{completion}"), Writer(None), SamplingSettings(3, temperature=0))
    with pytest.raises(UsageError, match="there is no rubric"):
        llm_judge(tmp_path / "none.txt", Writer(None), SamplingSettings(1, temperature=0))


def test_the_policy_judges_itself(tmp_path):
    spec = parse_judge(f"policy:{rubric(tmp_path, '{completion}')},repeats=2,temperature=0.7")
    judge = make_judge(spec, Writer(lambda text, i: "Score: 2"))
    assert judge.name == "policy"
    assert judged(tmp_path, samples_of("p", "x"), judge)[0].score == 2
    with pytest.raises(UsageError, match="the model of a run of rounds"):
        make_judge(spec)
