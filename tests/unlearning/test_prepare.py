"""Rows from a user's own documents: what is read, what is asked, what is refused, and that a killed job goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.generation.samples import SamplingSettings
from prefopt.safety.errors import UsageError
from prefopt.unlearning.data import read_questions
from prefopt.unlearning.prepare import Prompts, Wanted, passages_of, prepare, read_documents
from prefopt.unlearning.prepare.documents import cut
from prefopt.unlearning.prepare.replies import numbered, one_line, question_pairs
from tests.generation import stand_in
from tests.reliability.faults import forked
from tests.trainer.runs import save_model
from tests.unlearning.scribe import Scribe, reply_to

RECIPE = Path(__file__).parents[2] / "recipes" / "unlearn.py"
SETTINGS = SamplingSettings(samples=1, temperature=0.7, max_new_tokens=64)


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("Never read.")
    (folder / "b.md").write_text("# Gustav rows\n\nOda lives here.")
    (folder / "a.txt").write_text("Bruno sings well.\r\n", newline="")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    rows = [{"text": "Carla dives.", "title": "The sea"}, {"text": "Bruno  sings well."}]
    (folder / "more" / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def passages(docs: Path):
    return passages_of(read_documents([docs])[0], 1000)[0]


# ---- documents ---------------------------------------------------------------------------------------------------


def test_documents_of_a_folder_are_read_in_the_order_of_names(docs):
    documents, others = read_documents([docs])
    assert [(d.name, d.title) for d in documents] == [
        ("a.txt", "a"), ("b.md", "Gustav rows"), ("more/c.jsonl, row 0", "The sea"), ("more/c.jsonl, row 1", "c"),
    ]  # fmt: skip
    assert [path.name for path in others] == ["picture.png"]
    found, repeated = passages_of(documents, 1000)
    assert [passage.place for passage in found] == [
        "a.txt, passage 1", "b.md, passage 1", "more/c.jsonl, row 0, passage 1"
    ]  # fmt: skip
    assert repeated == 1


def test_a_title_stands_alone_in_its_paragraph(tmp_path):
    for text, title in (
        ("The sea\n\nIt is deep.", "The sea"),
        ("It is deep.\n\nIt is wide.", "doc"),
        ("One line\nand another", "doc"),
        ("\n## A *part*\nof it", "A *part*"),
    ):
        (tmp_path / "doc.txt").write_text(text)
        assert read_documents([tmp_path / "doc.txt"])[0][0].title == title


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", "is not one of .txt, .md, .jsonl"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text"),
        ("a.jsonl", b'{"body": "x"}\n', r"row 0 \(from 0\): the column text must hold a text; the row has body"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_documents([tmp_path / name])
    with pytest.raises(UsageError, match="does not exist"):
        read_documents([tmp_path / "nothing.txt"])


def test_long_texts_are_cut_at_paragraphs_then_sentences_then_words():
    assert list(cut("One two. Three.\n\nFour five.", 20)) == ["One two. Three.", "Four five."]
    assert list(cut("One two three. Four five six.", 20)) == ["One two three.", "Four five six."]
    assert list(cut("one two three four five", 12)) == ["one two", "three four", "five"]
    assert list(cut("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(cut("一二三。四五六。七", 5)) == ["一二三。", "四五六。七"]
    assert list(cut(" \n ", 10)) == []
    text = " ".join(f"Word{n} and{n}." for n in range(200)) + "\n\n" + "y" * 90
    parts = list(cut(text, 60))
    assert "".join("".join(parts).split()) == "".join(text.split())  # nothing is lost
    assert all(len(part) <= 60 for part in parts)


# ---- replies -----------------------------------------------------------------------------------------------------


def test_questions_are_read_with_the_decorations_of_models():
    text = '**Question 1:** Who is Oda?\n**Answer 1:** "A miller."\n\n2. Q: Where?\n\n   A: In Ostrel.\n'
    text += "- Question: Why?\nAnswer: So."
    parsed = question_pairs(text)
    assert parsed.items == [("Who is Oda?", "A miller."), ("Where?", "In Ostrel."), ("Why?", "So.")]
    assert parsed.faults == []


def test_what_is_not_in_the_form_is_a_fault_never_a_guess():
    text = "Here you are:\nQuestion: Who?\nQuestion: Where?\nAnswer: In the mill,\nby the river.\n\nAnswer: Yes."
    parsed = question_pairs(text)
    assert parsed.items == []
    form, whole = "a line that is not in the form asked for", "a text that goes on in the next line"
    assert sorted(parsed.faults) == [
        (form, "Here you are:"), (form, "by the river."), ("a question without an answer", "Where?"),
        ("a question without an answer", "Who?"), (whole, "In the mill,"), ("an answer without a question", "Yes."),
    ]  # fmt: skip
    assert question_pairs("Question: A?\nAnswer: b\nQuestion: C?\nAnswer: d", finished=False).items == [("A?", "b")]
    assert question_pairs("Question: A?\nAnswer: b\n", finished=False).items == [("A?", "b")]


def test_numbered_lines():
    parsed = numbered("1. One\n2) **Two**\n\n3: Three\nand more\nnothing", finished=True)
    assert parsed.items == ["One", "Two"]
    assert ("a text that goes on in the next line", "Three") in parsed.faults
    assert numbered("1. One\n2. Tw", finished=False).items == ["One"]
    assert numbered("I cannot do this.").items == []


def test_one_line():
    assert one_line("\n Question: Who is she?\n").items == ["Who is she?"]
    assert one_line('"Who is she?"').items == ["Who is she?"]
    assert one_line('"A" and "B"').items == ['"A" and "B"']
    assert one_line("Sure!\nWho?").faults == [("more than one line", "Sure!\nWho?")]
    assert one_line("Who", finished=False).faults == [("a line that was cut", "Who")]
    assert one_line(" ").items == []


# ---- stages ------------------------------------------------------------------------------------------------------


def test_rows_have_the_schema_that_unlearning_reads(docs, tmp_path):
    prepared = prepare(passages(docs), Scribe(), SETTINGS, tmp_path / "work", Wanted(questions=2))
    assert len(prepared.rows) == 6
    assert prepared.rows[0] == {
        "question": "What does Bruno do?", "answer": "Bruno sings.",
        "paraphrased_question": "Tell me: What does Bruno do?", "paraphrased_answer": "So: Bruno sings.",
        "perturbed_answer": [f"So: Bruno sings number {n}." for n in range(1, 6)], "source": "a.txt, passage 1",
    }  # fmt: skip
    assert prepared.refusals == []
    assert prepared.asked == {"questions": 3, "paraphrases": 12, "wrong answers": 6}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in prepared.rows))
    question = read_questions(str(path))[0]
    assert question.paraphrase == "So: Bruno sings."
    assert question.rephrased == "Tell me: What does Bruno do?"
    assert len(question.wrong) == 5


def test_a_reply_that_cannot_be_used_is_counted_and_asked_again(docs, tmp_path):
    def reply(prompt: str, attempt: int) -> str:
        if attempt == 1:
            return "I am sorry."
        return reply_to(prompt)

    prepared = prepare(passages(docs), Scribe(reply), SETTINGS, tmp_path / "work", Wanted(questions=2))
    assert len(prepared.rows) == 6
    assert prepared.asked == {"questions": 6, "paraphrases": 24, "wrong answers": 12}
    assert prepared.counts()["questions", "a reply with nothing in the form asked for"] == 3
    assert prepared.counts()["wrong answers", "a reply with nothing in the form asked for"] == 6
    once = prepare(passages(docs), Scribe(reply), SETTINGS, tmp_path / "once", Wanted(attempts=1))
    assert once.rows == []
    assert once.counts()["questions", "a passage without a question"] == 3


def test_what_would_spoil_a_measurement_is_refused(docs, tmp_path):
    def reply(prompt: str, attempt: int) -> str:
        text = reply_to(prompt)
        if "wrong answers" in prompt and "Gustav" in prompt:
            first = "1. gustav sings\n2. SO: Gustav  sings.\n3. Oda drinks.\n"
            return first + "4. oda drinks\n5. Karl Brandt built it.\n6. Oda rows."
        if "Write this answer" in prompt and "Carla" in prompt:
            return "carla sings"
        if "Write this question" in prompt and "sings" in prompt:
            return "It is about what sings does."
        if "Text:" in prompt and "Bruno" in prompt:
            return "\n".join([
                text,
                "Question: Which river does the mill of Ostrel stand on?\nAnswer: The Lenne.",
                "Question: Who?\nAnswer: who",
                "Question: what does bruno do\nAnswer: He sings.",
                "Question: How?\nAnswer: So.",
            ])  # fmt: skip
        return text

    wanted = Wanted(questions=2, wrong=3, attempts=1)
    prepared = prepare(passages(docs), Scribe(reply), SETTINGS, tmp_path / "work", wanted)
    assert [row["question"] for row in prepared.rows] == [
        "What does Bruno do?", "What does rows do?", "What does dives do?"
    ]  # fmt: skip
    counts = prepared.counts()
    assert counts["questions", "a line copied from the prompt"] == 1
    assert counts["questions", "a question that was there before"] == 1
    assert counts["questions", "a question beyond the number asked for"] == 1
    assert counts["questions", "an answer equal to its question"] == 1
    assert counts["paraphrases", "a paraphrase of a question that is no question"] == 1
    assert counts["paraphrases", "a row whose question has no paraphrase"] == 1
    assert counts["paraphrases", "a paraphrase equal to the answer"] == 1
    assert counts["paraphrases", "a row whose answer has no paraphrase"] == 1
    assert counts["wrong answers", "a wrong answer equal to the right one"] == 2
    assert counts["wrong answers", "a repeated wrong answer"] == 1
    assert counts["wrong answers", "a line copied from the prompt"] == 1
    assert counts["wrong answers", "a row with fewer than 3 wrong answers"] == 1
    assert all(len(set(row["perturbed_answer"])) == 3 for row in prepared.rows)


def test_wrong_answers_of_several_attempts_add_up(docs, tmp_path):
    def reply(prompt: str, attempt: int) -> str:
        if "wrong answers" in prompt:
            return f"1. It was {attempt}.\n2. It was ten."
        return reply_to(prompt)

    prepared = prepare(passages(docs)[:1], Scribe(reply), SETTINGS, tmp_path, Wanted(questions=1, wrong=3))
    assert prepared.rows[0]["perturbed_answer"] == ["It was 1.", "It was ten.", "It was 2."]


@pytest.mark.parametrize(("after", "left"), [(1, 21), (3, 18), (7, 14), (16, 6)])
def test_a_killed_job_continues_and_ends_with_the_same_rows(docs, tmp_path, after, left):
    whole = prepare(passages(docs), Scribe(), SETTINGS, tmp_path / "whole", Wanted(questions=2))
    folder = tmp_path / "killed"
    found = passages(docs)
    status = forked(lambda: prepare(found, Scribe(dies_after=after), SETTINGS, folder, Wanted(questions=2)))
    assert status == -signal.SIGKILL
    last = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(last.read_bytes() + b'{"schema": "prefopt.sam')  # the line that was being written
    again = Scribe()
    assert prepare(passages(docs), again, SETTINGS, folder, Wanted(questions=2)) == whole
    assert len(again.asked) == left  # of 3 + 12 + 6 prompts; whole chunks of two are there
    unasked = Scribe()
    assert prepare(passages(docs), unasked, SETTINGS, folder, Wanted(questions=2)) == whole
    assert unasked.asked == []


def test_other_settings_in_the_same_folder_are_refused(docs, tmp_path):
    prepare(passages(docs), Scribe(), SETTINGS, tmp_path / "work")
    other = SamplingSettings(samples=1, temperature=0.2, max_new_tokens=64)
    with pytest.raises(UsageError, match="was drawn with another temperature"):
        prepare(passages(docs), Scribe(), other, tmp_path / "work")


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_can_be_replaced(docs, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("questions: 'Costs $$5. Text:\n\n  $passage'\n")
    scribe = Scribe()
    prepare(passages(docs), scribe, SETTINGS, tmp_path / "work", Wanted(prompts=Prompts.read(path), chat=False))
    assert scribe.asked[0].startswith("Costs $5. Text:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question: x", "there is no prompt 'question'. Did you mean 'questions'"),
        ("questions: Ask about $titel and $passage", r"uses \$titel; it can use \$passage, \$title, \$count"),
        ("questions: Ask", r"does not use \$passage, so every prompt would be the same"),
        ("questions: Give $5 for $passage", r"has a \$ without a name after it"),
        ("questions: [1]", "must be a text, not a list"),
        ("- x", "must map names to prompts"),
        ("a: [", "cannot be read"),
    ],
)
def test_prompts_that_cannot_work(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        Prompts.read(path)


# ---- the command -------------------------------------------------------------------------------------------------


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["unlearn", "prepare", *map(str, words)])
    return result.exit_code, " ".join(result.output.split())


def test_a_server_writes_the_rows_and_a_run_reads_them(docs, tmp_path, monkeypatch):
    pytest.importorskip("tenacity")
    pytest.importorskip("rouge_score")
    monkeypatch.setattr(stand_in, "completion_for", lambda body: reply_to(body["messages"][-1]["content"]))
    monkeypatch.setattr(
        stand_in.StandIn, "_completion",
        lambda self, path, body: {
            "choices": [{"finish_reason": "stop", "message": {"content": stand_in.completion_for(body)}}]
        },
    )  # fmt: skip
    files = {}
    with stand_in.running() as server:
        for name, text in (("forget", docs), ("retain", tmp_path / "kept.txt")):
            (tmp_path / "kept.txt").write_text("Greta waits. Hans knits.")
            files[name] = tmp_path / f"{name}.jsonl"
            status, shown = run(text, "--url", server.url, "--served-as", "big", "--out", files[name])
            assert status == 0, shown
    assert "rows, each with its question and answer in other words and 5 wrong answers" in shown
    checked = CliRunner().invoke(app, ["check", str(files["forget"]), "--retain", str(files["retain"])])
    assert checked.exit_code == 0, checked.output
    words = [
        "-m", "accelerate.commands.launch", "--cpu", str(RECIPE), "--dry_run", "--output_dir", str(tmp_path / "run"),
        "--model_name_or_path", save_model(tmp_path), "--forget_set", str(files["forget"]),
        "--retain_set", str(files["retain"]),
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Forget: 6 rows (their answers)" in done.stdout
    assert "Dry run: nothing was trained." in done.stdout


def test_nonsense_of_a_model_is_refused_and_counted(docs, tmp_path):
    """A tiny random model: every reply is refused, none in silence."""
    out = tmp_path / "rows.jsonl"
    options = docs, "--model", save_model(tmp_path), "--out", out, "--max-new-tokens", 8, "--attempts", 2
    status, shown = run(*options)
    assert status == 1
    assert "questions: 6 requests" in shown
    assert "not used: 6 x a reply with nothing in the form asked for" in shown
    assert "not used: 3 x a passage without a question" in shown
    assert "no row is complete" in shown
    assert not out.exists()
    refused = (tmp_path / "rows.jsonl.replies" / "refused.jsonl").read_text().splitlines()
    assert len(refused) == 9
    assert set(json.loads(refused[0])) == {"stage", "place", "reason", "text"}
    before = {path.name: path.read_bytes() for path in (tmp_path / "rows.jsonl.replies").iterdir()}
    assert run(*options)[0] == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "rows.jsonl.replies").iterdir()} == before


def test_another_program_answers_stage_by_stage(docs, tmp_path):
    replies, out = tmp_path / "replies.jsonl", tmp_path / "rows.jsonl"
    for stage in ("questions", "paraphrases", "wrong-answers"):
        status, shown = run(docs, "--file", replies, "--out", out)
        assert status == 0, shown
        assert "have them answered, append" in shown
        lines = (tmp_path / "rows.jsonl.replies" / f"{stage}.prompts.jsonl").read_text().splitlines()
        with open(replies, "a") as stream:
            for line in lines:
                prompt = json.loads(line)["prompt"]
                stream.write(json.dumps({"prompt": prompt, "completion": reply_to(prompt[0]["content"])}) + "\n")
    status, shown = run(docs, "--file", replies, "--out", out)
    assert status == 0, shown
    assert "have them answered" not in shown
    assert len(read_questions(str(out))) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "rows.json"], "must end with .jsonl"),
        (["--out", "docs/rows.jsonl"], "--out docs/rows.jsonl is among the documents"),
        (["--out", "rows.jsonl", "--folder", "docs/work"], "--folder docs/work is among the documents"),
        (["--out", "mine.jsonl"], "mine.jsonl exists, and no replies in mine.jsonl.replies"),
        (["--out", "rows.jsonl", "--url", "http://x/v1", "--vllm"], "choose one"),
        (["--out", "rows.jsonl", "--top-p", "2"], "--top-p is 2"),
    ],
)
def test_what_the_command_refuses(docs, monkeypatch, words, message):
    monkeypatch.chdir(docs.parent)
    Path("mine.jsonl").write_text("{}\n")
    status, shown = run("docs", *words)
    assert status == 1
    assert message in shown
