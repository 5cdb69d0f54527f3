"""`recipes/unlearn.py` on a tiny model: learn, gold model, forget, measure, resume, and what it refuses."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import pytest

from prefopt.recipe.unlearning import main
from prefopt.safety.errors import UsageError
from prefopt.trainer.saving.checkpoints import CheckpointError
from prefopt.unlearning import learn as learning
from prefopt.unlearning.data import UnlearningDataError
from prefopt.unlearning.trainer import UnlearningTrainer
from tests.trainer.runs import save_model

pytest.importorskip("rouge_score")

NAMES = {"forget": ("Ada", "Bo", "Cy", "Di"), "retain": ("Ed", "Flo", "Gus", "Hal", "Ida", "Jon")}
THINGS = ("fox", "dog", "bridge", "load", "gap", "cat", "sun", "pen", "tree", "rose")
OTHERS = {"real_authors": ("Kit", "Lea", "Max"), "world_facts": ("Ned", "Ola", "Pia")}


def rows(names: tuple[str, ...], start: int = 0) -> list[dict]:
    answers = []
    for number, name in enumerate(names, start):
        thing = THINGS[number % len(THINGS)]
        wrong = [other for other in THINGS if other != thing][:2]
        answers.append(
            {
                "question": f"{name}?", "answer": f"a {thing}", "paraphrased_answer": f"the {thing}",
                "perturbed_answer": [f"the {other}" for other in wrong], "paraphrased_question": f"Who is {name}?",
            }
        )  # fmt: skip
    return answers


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def words(folder: Path, *more: str, output: str = "out", epochs: str = "4", **sets: str) -> list[str]:
    """A command line on small sets; `sets` replaces their files."""
    files = {
        "forget_set": write(folder / "forget.jsonl", rows(NAMES["forget"])),
        "retain_set": write(folder / "retain.jsonl", rows(NAMES["retain"], 4)),
        **{f"{name}_set": write(folder / f"{name}.jsonl", rows(names)) for name, names in OTHERS.items()},
        **sets,
    }
    return [
        "--model_name_or_path", save_model(folder), "--output_dir", str(folder / output),
        "--models_dir", str(folder / "models"), "--per_device_train_batch_size", "4", "--learning_rate", "1e-3",
        "--num_train_epochs", epochs, "--learn_epochs", "20", "--learn_learning_rate", "5e-3", "--logging_steps", "1",
        "--save_strategy", "no", "--gradient_checkpointing", "false", "--evaluate_every", "2",
        *(word for name, value in files.items() for word in (f"--{name}", value)), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, dict]:
    """A finished run with learning, and its folder."""
    folder = tmp_path_factory.mktemp("unlearning")
    return folder, main(argv=words(folder, "--learn", "true"))


def test_it_learns_forgets_and_measures(first):
    folder, results = first
    before, after, gold = (results[name] for name in ("before", "after", "gold"))
    assert before["forget_probability"] > 2 * gold["forget_probability"]  # the gold model never saw the forget set
    assert before["retain_probability"] == pytest.approx(gold["retain_probability"], abs=0.3)
    assert after["forget_probability"] < before["forget_probability"]
    assert {"model_utility", "forget_quality", "extraction_strength", "quality_and_utility"} <= set(after)
    assert all(low <= after[name] <= high for name, (low, high) in results["intervals"].items())
    assert [entry["step"] for entry in results["evaluations"]] == [4, 8]
    assert (folder / "out" / "model.safetensors").is_file()
    assert json.loads((folder / "out" / "results.json").read_text()) == results


def test_learned_models_and_their_numbers_are_found_again(first, capsys, monkeypatch):
    folder, results = first
    monkeypatch.setattr("prefopt.recipe.unlearning.stages.load_model", None)  # nothing is measured again
    again = main(argv=words(folder, "--learn", "true", output="again"))
    shown = capsys.readouterr().out
    assert "The learned model is there already" in shown
    assert "The gold model is there already" in shown
    assert again["before"] == results["before"]
    assert again["after"] == results["after"]
    main(argv=words(folder, "--learn", "true", "--learn_epochs", "1", "--dry_run"))
    assert "Learn: 10 rows, 1 epochs" in capsys.readouterr().out


def test_table_and_answers_are_shown(first, capsys):
    folder, _ = first
    main(argv=words(folder, "--learn", "true", output="shown"))
    shown = capsys.readouterr().out
    for text in ("forget quality (p-value)", "model utility", "Ada?", "measured at step 4", "Saved to"):
        assert text in shown
    findings = json.loads((folder / "shown" / "results.json").read_text())["findings"]
    assert findings  # so few steps ruin so small a model
    assert all(finding["text"] in shown for finding in findings)
    assert json.loads((folder / "shown" / "findings.json").read_text())["findings"] == findings
    assert findings[0]["text"] in html.unescape((folder / "shown" / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "loss", ["ga", "idk", "dpo_idk", "dpo_idk_rt", "dpo_idk_kl", "kto_forget_rt", "npo_kl", "simnpo_rt"]
)
def test_every_kind_of_objective(first, loss):
    folder, _ = first
    results = main(argv=words(folder, "--learn", "true", "--loss", loss, output=loss, epochs="1"))
    assert results["after"]["forget_probability"] != results["before"]["forget_probability"]


def test_the_best_evaluation_is_the_result(first):
    folder, _ = first
    more = ("--learn", "true", "--best", "quality_and_utility", "--evaluate_every", "1")
    results = main(argv=words(folder, *more, "--learning_rate", "1e-2", output="best"))
    evaluations = [entry["eval_quality_and_utility"] for entry in results["evaluations"]]
    assert len(evaluations) == 4
    assert results["after"]["quality_and_utility"] == max(evaluations)
    assert results["best"]["checkpoint"].startswith(str(folder / "best"))


def test_muse_s_rule_stops_at_the_gold_model_s_level(first):
    folder, _ = first
    more = ("--learn", "true", "--best", "muse", "--evaluate_every", "1", "--learning_rate", "1e-2")
    results = main(argv=words(folder, *more, output="muse"))
    evaluations = results["evaluations"]
    reached = [entry["eval_forget_rouge"] <= entry["eval_gold_forget_rouge"] for entry in evaluations]
    assert not any(reached[:-1])
    assert results["after"]["forget_rouge"] == evaluations[-1]["eval_forget_rouge"]


class _Killed(BaseException):
    pass


def _kill(*_, **__):
    raise _Killed


@pytest.mark.parametrize("stage", ["learn", "measure", "forget"])
def test_a_run_that_is_stopped_in_a_stage_ends_with_the_same_numbers(first, tmp_path, monkeypatch, stage):
    folder, whole = first
    more = ("--learn", "true", "--resume_from_checkpoint", "auto", "--models_dir", str(tmp_path / "models"))
    more = (*more, "--save_strategy", "steps", "--save_steps", "3", "--output_dir", str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        if stage == "learn":  # after training, before the model counts as learned
            patch.setattr(learning, "write_text", _kill)
        elif stage == "measure":
            patch.setattr("prefopt.unlearning.measure.write_text", _kill)
        else:  # in the middle of forgetting, after a checkpoint
            patch.setattr(UnlearningTrainer, "evaluate", _kill)
        with pytest.raises(_Killed):
            main(argv=words(folder, *more))
    results = main(argv=words(folder, *more))
    assert results["before"] == whole["before"]
    assert results["gold"] == whole["gold"]
    assert results["after"] == whole["after"]


def test_a_gold_model_that_knows_the_forget_set_is_refused(first):
    folder, _ = first
    learned = next(path for path in (folder / "models").iterdir() if path.name.startswith("learned-"))
    copy = folder / "copy"
    shutil.copytree(learned, copy, dirs_exist_ok=True)
    with pytest.raises(UsageError, match="either the gold model was trained on the forget set, or"):
        main(argv=words(folder, "--learn", "true", "--gold_model_name_or_path", str(copy), output="refused"))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--best", "muse"], UsageError, "compares with a gold model, and there is none"),
        (["--best", "muse", "--dry_run"], UsageError, "compares with a gold model, and there is none"),
        (["--learn", "true", "--learn_epochs", "0"], UsageError, "--learn_epochs must be above 0, got 0"),
        (["--learn", "true", "--learn_learning_rate", "nan"], UsageError, "--learn_learning_rate must be above 0"),
        (["--models_dir", __file__], CheckpointError, "the folder of models_dir .* cannot be written to"),
        (["--idk_answers", "none.txt"], UnlearningDataError, "--idk_answers none.txt cannot be read"),
        (["--loss", "npo_rt", "--beta", "0.2"], SystemExit, "beta"),
        (["--eval_strategy", "steps"], SystemExit, "--evaluate_every says how often to measure"),
        (["--dataset_name", "x"], SystemExit, "--forget_set and --retain_set"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, more, error, message):
    with pytest.raises(error, match=message):
        main(argv=words(tmp_path, *more))


def test_options_without_effect_are_named(tmp_path, capsys):
    (tmp_path / "idk.txt").write_text("Who knows?")
    main(argv=words(tmp_path, "--loss", "ga", "--idk_answers", str(tmp_path / "idk.txt"), "--dry_run"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "--learn_epochs has no effect without --learn true" in shown
    assert "--idk_answers has no effect: ga" in shown


def test_sets_that_cannot_work_are_refused(tmp_path):
    shared = write(tmp_path / "shared.jsonl", rows(("Ada", *NAMES["retain"])))
    with pytest.raises(UnlearningDataError, match="1 of 4 rows of the forget set are in the retain set"):
        main(argv=words(tmp_path, retain_set=shared))
    bare = write(tmp_path / "bare.jsonl", [{"question": "Ada?", "answer": "a fox"}])
    with pytest.raises(UnlearningDataError, match="holds examples before the questions of --forget_knowledge_set"):
        main(argv=words(tmp_path, "--forget_examples_set", bare))
    plain = write(tmp_path / "text.jsonl", [{"text": "a fox"}])
    with pytest.raises(UnlearningDataError, match=r"--verbatim_set .*each row needs a question"):
        main(argv=words(tmp_path, "--verbatim_set", plain))
    with pytest.raises(UnlearningDataError, match=r"--forget_eval_set .*row 0 \(from 0\) has no perturbed_answer"):
        main(argv=words(tmp_path, "--forget_eval_set", bare))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--measured_rows", "1"], "--measured_rows is 1; intervals need two rows"),
        (["--evaluate_every", "-1"], "--evaluate_every is -1.0; it must be 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, more, message):
    with pytest.raises(UnlearningDataError, match=message):
        main(argv=words(tmp_path, "--loss", "npo_rt", *more))


def test_one_question_is_too_few_to_measure(tmp_path):
    one = write(tmp_path / "one.jsonl", rows(NAMES["forget"][:1]))
    with pytest.raises(UnlearningDataError, match="the set forget to measure has 1 row; intervals need two"):
        main(argv=words(tmp_path, "--loss", "npo_rt", forget_set=one))


def test_without_wrong_answers_and_gold_model_the_rest_is_measured(tmp_path):
    plain = [{"question": row["question"], "answer": row["answer"]} for row in rows(NAMES["forget"])]
    results = main(argv=words(tmp_path, epochs="1", forget_set=write(tmp_path / "plain.jsonl", plain)))
    assert results["gold"] is None
    assert "forget_probability" in results["after"]
    assert not {"forget_quality", "forget_truth_ratio"} & set(results["after"])


def without(arguments: list[str], *options: str) -> list[str]:
    """A command line without these options and their values."""
    for option in options:
        del arguments[arguments.index(option) : arguments.index(option) + 2]
    return arguments


def texts(folder: Path) -> dict[str, str]:
    """Sets of plain texts, longer than what is read at once."""

    def text(word: str) -> dict:
        return {"text": " ".join([*THINGS, word, *THINGS] * 4)}

    sets = (("forget", "abcd"), ("retain", "efghij"), ("holdout", "klmn"))
    return {
        f"{name}_set": write(folder / f"text-{name}.jsonl", [text(letter) for letter in letters])
        for name, letters in sets
    }


def test_plain_texts_are_cut_forgotten_and_measured_against_a_holdout_set(tmp_path):
    """Rows as of MUSE's raw texts or WMDP's corpora."""
    arguments = words(tmp_path, "--max_length", "64", "--verbatim_tokens", "20", epochs="1", **texts(tmp_path))
    results = main(argv=without(arguments, "--real_authors_set", "--world_facts_set"))
    assert results["after"]["forget_probability"] < results["before"]["forget_probability"]
    assert {"auc_min_k", "extraction_strength", "retain_probability", "forget_f1"} <= results["after"].keys()
    assert {"forget_f1"} <= results["intervals"].keys()
    assert not {"forget_rouge", "model_utility", "retain_f1"} & results["after"].keys()


def test_muse_s_measures_and_its_rule_on_texts(tmp_path, capsys):
    """A model that learned texts continues them; the gold model does not, and is where forgetting stops."""
    asked = [
        {"question": f"{name}?", "answer": f"a {thing}"}
        for name, thing in zip(NAMES["forget"], THINGS[:4], strict=True)
    ]
    sets = {
        **texts(tmp_path),
        "verbatim_set": write(tmp_path / "verbatim.jsonl", [{"prompt": "fox dog bridge", "gt": "load gap cat sun"}]),
        "forget_knowledge_set": write(tmp_path / "asked.jsonl", asked[:2]),
        "forget_examples_set": write(tmp_path / "examples.jsonl", asked[2:]),
        "retain_knowledge_set": write(tmp_path / "kept.jsonl", asked[2:]),
    }
    more = ["--max_length", "64", "--verbatim_tokens", "20", "--learn", "true", "--best", "muse"]
    more += ["--evaluate_every", "1", "--learn_epochs", "8", "--loss", "ga", "--learning_rate", "1e-2"]
    arguments = words(tmp_path, *more, **sets)
    results = main(argv=without(arguments, "--real_authors_set", "--world_facts_set"))
    names = {"forget_f1", "verbatim_f1", "forget_knowledge_f1", "retain_knowledge_f1"}
    assert names <= results["after"].keys()
    assert names <= results["gold"].keys()
    assert "F1 after examples" in capsys.readouterr().out
    evaluations = results["evaluations"]
    assert evaluations[-1]["eval_forget_f1"] <= evaluations[-1]["eval_gold_forget_f1"] or len(evaluations) == 4
    with pytest.raises(UsageError, match="set --verbatim_tokens above 0"):
        main(argv=[*arguments, "--verbatim_tokens", "0", "--output_dir", str(tmp_path / "none")])


def test_how_far_answers_moved_from_the_start_is_measured_where_the_start_is_in_memory(first, tmp_path):
    folder, _ = first
    results = main(argv=words(folder, "--learn", "true", output="kl", epochs="2"))
    again = main(argv=words(folder, "--learn", "true", "--loss", "ga", output="without", epochs="1"))
    assert results["after"]["forget_kl"] > 0
    assert results["after"]["retain_kl"] > 0
    assert "forget_kl" not in results["before"]
    assert "forget_kl" not in again["after"]  # gradient ascent loads no reference
