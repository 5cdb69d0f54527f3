"""The recipe script and the `prefopt` command, run on a tiny model as a person would run them."""

from __future__ import annotations

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.data import DataError
from prefopt.recipe import Data, Recipe, load_data, main, parse_arguments, preflight
from tests.trainer.runs import make_pairs, save_model

ROOT = Path(__file__).parents[2]


def pairs_file(folder: Path, rows: int = 30, name: str = "pairs.jsonl", **changes) -> str:
    """A JSONL file of pairs; `changes` replaces row numbers' values: bad_3={"chosen": None}."""
    lines = [dict(row) for row in make_pairs(rows)]
    for key, change in changes.items():
        lines[int(key.split("_")[1])].update(change)
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in lines))
    return str(path)


def arguments(folder: Path, data: str, *more: str) -> list[str]:
    return [
        "--model_name_or_path", save_model(folder), "--dataset_name", data, "--output_dir", str(folder / "out"),
        "--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_strategy", "no",
        "--gradient_checkpointing", "false", "--overwrite_output_dir", "true", *more,
    ]  # fmt: skip


def loaded(recipe: Recipe) -> Data:
    """The rows of a run, as its trainer would get them."""
    return load_data(recipe, preflight(recipe))


def test_trains_evaluates_and_saves(tmp_path, capsys):
    results = main("dpo(beta=0.1)", arguments(tmp_path, pairs_file(tmp_path), "--learning_rate", "1e-3"))
    assert results["loss"] == "dpo(beta=0.1, label_smoothing=0.0)"
    assert results["before"]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert results["after"]["eval_loss"] != results["before"]["eval_loss"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert (tmp_path / "out" / "model.safetensors").exists()
    shown = capsys.readouterr().out
    assert "6 of its 30 rows are held out" in shown
    assert "step 2/2" in shown


@pytest.mark.parametrize("first", ["true", "false"])
def test_a_metric_that_evaluations_do_not_have_is_named(tmp_path, first):
    words = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "best", "--evaluate_first", first]
    run = arguments(tmp_path, pairs_file(tmp_path), *words, "--metric_for_best_model")
    with pytest.raises(
        ValueError,
        match=r"metric_for_best_model='accuracy' is not a metric .* have loss, .*rewards/accur.*--best_round_by",
    ):
        main("dpo", [*run, "accuracy"])
    main("dpo", [*run, "rewards/accuracies"])


def test_the_script_runs_under_accelerate(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(ROOT / "recipes" / "dpo.py")]
    done = subprocess.run(
        [*command, *arguments(tmp_path, pairs_file(tmp_path), "--use_peft", "--loss", "ipo(beta=0.2)")],
        cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["a whole model", "an adapter"])
def test_the_script_makes_the_trainer_that_main_makes(tmp_path, monkeypatch, kind):
    """`recipes/dpo.py` writes out what `prefopt.recipe.build` does: nothing may be left out of either."""
    calls = []

    class Trainer:
        def __init__(self, *positional, **named):
            calls.append((positional, named))
            raise InterruptedError

    words = [*arguments(tmp_path, pairs_file(tmp_path)), "--ref_model_name_or_path", save_model(tmp_path, seed=1)]
    if kind == "an adapter":
        main("sft", [*words[:-2], "--use_peft", "--output_dir", str(tmp_path / "first")])
        words += ["--model_name_or_path", str(tmp_path / "first")]
    else:
        words += ["--use_peft", "--chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"]
    monkeypatch.setattr("prefopt.PreferenceTrainer", Trainer)
    monkeypatch.setattr("prefopt.recipe.build.PreferenceTrainer", Trainer)
    monkeypatch.setattr(sys, "argv", ["dpo.py", *words])
    with pytest.raises(InterruptedError):
        main("dpo(beta=0.1)", words)
    with pytest.raises(InterruptedError):
        runpy.run_path(str(ROOT / "recipes" / "dpo.py"), run_name="__main__")
    of_main, of_script = (
        [type(value) if hasattr(value, "state_dict") else str(value) for value in (*positional, *named.values())]
        for positional, named in calls
    )
    assert of_main == of_script
    assert list(calls[0][1]) == list(calls[1][1])


def test_yaml_config_with_command_line_overrides(tmp_path):
    config = tmp_path / "run.yaml"
    settings = dict(
        zip(*[iter(w.removeprefix("--") for w in arguments(tmp_path, pairs_file(tmp_path)))] * 2, strict=True)
    )
    config.write_text(yaml.safe_dump({**settings, "max_steps": 1, "loss": "hinge(beta=0.3)", "learning_rate": 1e-4}))
    results = main("dpo", ["--config", str(config), "--loss", "hinge(beta=0.2)"])
    assert results["loss"] == "hinge(beta=0.2)"


def test_trl_loss_options_work_on_the_command_line(tmp_path):
    results = main("dpo", arguments(tmp_path, pairs_file(tmp_path), "--loss_type", "ipo", "--beta", "0.2"))
    assert results["loss"] == "ipo(beta=0.2, average=True)"


def test_dry_run_shows_the_plan_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    data = pairs_file(tmp_path)
    assert main("dpo", arguments(tmp_path, data, "--dry_run", "--loss", "dpo(beta=0.1) + 0.2*sft")) is None
    shown = capsys.readouterr().out
    for part in ["dpo(beta=0.1, label_smoothing=0.0) + 0.2*sft", "example 0, chosen", "example 0, rejected", "scored",
                 "24 examples", "2 steps", "optimizer (AdamW)", "Dry run: nothing was trained."]:  # fmt: skip
        assert part in shown
    assert not (tmp_path / "out").exists()


def test_bad_rows_stop_the_run_with_their_numbers(tmp_path):
    data = pairs_file(tmp_path, bad_3={"chosen": []}, bad_7={"chosen": []})
    with pytest.raises(DataError, match=r"(?s)empty chosen.*3, 7.*--on_bad_rows drop"):
        main("dpo", arguments(tmp_path, data))


def test_dropped_rows_are_written_beside_the_run(tmp_path):
    data = pairs_file(tmp_path, bad_3={"chosen": []})
    main("dpo", arguments(tmp_path, data, "--on_bad_rows", "drop"))
    (line,) = (tmp_path / "out" / "dropped_training_rows.jsonl").read_text().splitlines()
    assert "empty chosen" in line


def test_columns_are_mapped(tmp_path):
    path = tmp_path / "qa.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(20):
            row = {"question": f"Why {i}?", "response_j": f" Since {i} is good.", "response_k": f" No {i}."}
            file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="--columns prompt=question chosen=response_j rejected=response_k"):
        main("dpo", arguments(tmp_path, str(path)))
    mapping = ["--columns", "prompt=question", "chosen=response_j", "rejected=response_k"]
    assert main("dpo", arguments(tmp_path, str(path), *mapping))["after"]["eval_loss"] > 0


def test_sources_are_mixed(tmp_path, capsys):
    one, two = pairs_file(tmp_path, name="one.jsonl"), pairs_file(tmp_path, name="two.jsonl", rows=10)
    main("dpo", arguments(tmp_path, f"{one}:0.5,{two}:0.5", "--dry_run"))
    assert "one.jsonl" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss", "dop"], "did you mean 'dpop' or 'dpo'"),
        (["--loss", "__import__('os')"], "no loss is named '__import__'"),
        (["--loss", "dpo", "--beta", "0.3"], "beta=0.3 would have no effect"),
        (["--eval_rows", "-1"], "--eval_rows must be 0 or more"),
        (["--config", "missing.yaml"], "there is no such file"),
    ],
)
def test_wrong_options_are_named(tmp_path, more, message):
    with pytest.raises((ValueError, SystemExit), match=message.replace("(", r"\(")):
        main("dpo", arguments(tmp_path, pairs_file(tmp_path), *more))


class TestCommand:
    def run(self, *words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
        return result.exit_code, result.output

    def test_losses_lists_every_objective(self):
        code, shown = self.run("losses")
        assert code == 0
        for name in ("dpo", "hinge", "ipo", "kto", "sft", "simpo", "2305.18290"):
            assert name in shown

    def test_losses_explains_one(self):
        code, shown = self.run("losses", "ipo")
        assert code == 0
        for part in ("ipo(beta=0.1, average=True)", "eq. 17", "Needs of the scorer: reference", "abs/2310.12036"):
            assert part in shown

    def test_losses_suggests_a_name(self):
        code, shown = self.run("losses", "dop")
        assert code == 1
        assert "did you mean 'dpop' or 'dpo'" in shown

    def test_losses_writes_an_expression_out(self):
        assert "dpo(beta=0.1, label_smoothing=0.0) + 0.2*sft(nll='mean')\n" in self.run("losses", "dpo + 0.2*sft")[1]

    def test_check_counts_problems(self, tmp_path):
        code, shown = self.run("check", pairs_file(tmp_path, bad_3={"chosen": []}))
        assert code == 1
        assert "empty chosen" in shown
        assert "30 pairs, 1 that cannot be trained on" in shown

    def test_check_passes_good_data(self, tmp_path):
        code, shown = self.run("check", pairs_file(tmp_path), "--model", save_model(tmp_path), "--max-length", "200")
        assert code == 0
        assert "30 pairs, 0 that cannot be trained on" in shown

    def test_check_takes_the_mapping_that_it_suggests(self, tmp_path):
        path = tmp_path / "qa.csv"
        path.write_text("question,good,bad\nWhy?,Since.,No.\nHow?,So.,Never.\n")
        assert "--columns prompt=question" in self.run("check", str(path))[1]
        mapping = ["--columns", "prompt=question", "chosen=good", "rejected=bad"]
        assert "2 pairs, 0 that cannot" in self.run("check", str(path), *mapping)[1]

    def test_check_takes_a_template_and_its_arguments(self, tmp_path):
        rows = [{"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello."}],
                 "rejected": [{"role": "assistant", "content": "Go."}]}]  # fmt: skip
        (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
        template = tmp_path / "turns.jinja"
        template.write_text(
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' or answers %}{{ m.content }}{% endif %}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        )
        words = [
            "check",
            str(tmp_path / "chat.jsonl"),
            "--model",
            save_model(tmp_path),
            "--chat-template",
            str(template),
        ]
        assert self.run(*words)[0] == 1
        assert self.run(*words, "--chat-template-kwargs", '{"answers": true}')[0] == 0
        assert "must be a JSON object" in self.run(*words, "--chat-template-kwargs", "answers")[1]
        assert "name it with --model" in self.run(*words[:2], "--chat-template", str(template))[1]

    @pytest.mark.parametrize(
        ("loss", "row", "message"),
        [
            ("dpo", {"completion": " a", "label": True}, "compares two completions of one prompt"),
            ("dpo", {"completions": [" a", " b"], "scores": [1.0, 0.0]}, "compares no groups"),
            ("lipo_lambda", {"chosen": " a", "rejected": " b"}, "compares the completions of a group"),
            ("lipo_lambda", {"completions": [" a", " b"]}, "reads scores"),
            ("margin_dpo", {"chosen": " a", "rejected": " b"}, "needs a numeric column 'margin'"),
            ("margin_dpo", {"chosen": " a", "rejected": " b", "margin": None}, "found None in row 1"),
            ("kto", {"chosen": " a", "rejected": " b"}, ""),
            ("hmk(embeddings='given')", {"chosen": " a", "rejected": " b"}, ""),
        ],
    )
    def test_check_says_what_the_loss_would_refuse(self, tmp_path, loss, row, message):
        path = tmp_path / "rows.jsonl"
        first = {**row, "margin": 1.0} if "margin" in row else row
        path.write_text("".join(json.dumps({"prompt": f"p{n}", **one}) + "\n" for n, one in enumerate((first, row))))
        code, shown = self.run("check", str(path), "--loss", loss)
        assert code == (1 if message else 0)
        assert message in shown
        assert "not used" not in shown
        assert "Not read" not in shown

    def test_check_names_a_missing_file(self, tmp_path):
        code, shown = self.run("check", str(tmp_path / "nothing.jsonl"))
        assert code == 1
        assert "nothing.jsonl" in shown


def test_held_out_rows_are_set_apart_before_a_mixture_repeats_rows(tmp_path):
    one, two = pairs_file(tmp_path, name="one.jsonl"), tmp_path / "two.jsonl"
    two.write_text("\n".join(json.dumps(dict(row)) for row in make_pairs(20, seed=9)))
    recipe = parse_arguments("dpo", arguments(tmp_path, f"{one}:0.9,{two}:0.1"))
    data = loaded(recipe)
    key = [json.dumps(row["prompt"]) + json.dumps(row["chosen"]) for row in data.train]
    held = [json.dumps(row["prompt"]) + json.dumps(row["chosen"]) for row in data.heldout]
    assert len(key) > 40
    assert not set(key) & set(held)
    assert len(set(held)) == len(held) == 10


def test_keep_end_cuts_prompts_and_drops_no_row(tmp_path):
    data = pairs_file(tmp_path, bad_3={"prompt": [{"role": "user", "content": "quick " * 80}]})
    results = main("dpo", arguments(tmp_path, data, "--max_length", "64", "--truncation_mode", "keep_end"))
    assert results["after"]["eval_loss"] > 0


@pytest.mark.parametrize(
    "more",
    [
        ["--use_weighting"],
        ["--ld_alpha", "0.5"],
        # These two have no expression: TRL computes them itself.
        ["--loss_type", "ipo", "--f_divergence_type", "js_divergence"],
        ["--loss_type", "hinge", "--ld_alpha", "0.5"],
    ],
)
def test_trls_own_options_run(tmp_path, more):
    assert main("dpo", arguments(tmp_path, pairs_file(tmp_path), *more))["after"]["eval_loss"] > 0


def test_evaluating_without_held_out_rows_says_what_to_set(tmp_path):
    with pytest.raises(ValueError, match="--eval_strategy steps needs held-out rows"):
        main("dpo", arguments(tmp_path, pairs_file(tmp_path), "--eval_rows", "0", "--eval_strategy", "steps"))


def test_a_loss_without_rewards_reports_what_it_has(tmp_path, capsys):
    main("sft", arguments(tmp_path, pairs_file(tmp_path)))
    assert "Held-out rows" in capsys.readouterr().out


def test_sft_trains_on_answers_without_labels_and_other_losses_refuse_them(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in make_pairs(20)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    results = main("sft", arguments(tmp_path, str(path), "--learning_rate", "1e-3"))
    assert results["after"]["eval_loss"] < results["before"]["eval_loss"]
    assert "every completion is trained on as a desirable one" in capsys.readouterr().out
    with pytest.raises(DataError, match="--loss sft"):
        main("kto", arguments(tmp_path, str(path)))
    checked = CliRunner().invoke(app, ["check", str(path), "--loss", "sft"])
    assert "20 labelled completions, 0 that cannot be trained on." in checked.output
    assert CliRunner().invoke(app, ["check", str(path), "--loss", "dpo"]).exit_code == 1
