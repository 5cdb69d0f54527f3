"""What a person sees who starts a recipe, or `prefopt check`, with something broken: a message, before any model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.recipe import main
from prefopt.safety import errors as short_errors
from tests.recipe.test_recipe import ROOT, arguments, pairs_file
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import save_model

LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}{{ messages }}"


def write(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


CASES = {
    "a truncated file": (lambda f: ["--dataset_name", write(f, "a.jsonl.gz", b"\x1f\x8b\x08\0")], "ends early"),
    "UTF-16": (lambda f: ["--dataset_name", write(f, "a.jsonl", "{}".encode("utf-16"))], "line 1: not UTF-8"),
    "no rows": (lambda f: ["--dataset_name", write(f, "a.csv", "prompt,chosen,rejected\n")], "it holds no rows"),
    "broken JSON": (lambda f: ["--dataset_name", write(f, "a.jsonl", '{"prompt":')], "line 1: not valid JSON"),
    "a directory": (lambda f: ["--dataset_name", str(f)], "split 'train'"),
    "a wrong mixture": (lambda f: ["--dataset_name", "a.jsonl:0.7,b.jsonl"], "'b.jsonl' has no weight"),
    "a wrong mapping": (lambda f: ["--columns", "prompt"], "--columns: 'prompt' is not of the form"),
    "a missing column": (lambda f: ["--columns", "prompt=quest"], "has no column 'quest'"),
    "bad rows": (lambda f: ["--dataset_name", pairs_file(f, 5, "b.jsonl", bad_2={"chosen": []})], "empty chosen: 1"),
    "broken YAML": (lambda f: ["--config", write(f, "a.yaml", "loss: [")], "a.yaml: not valid YAML"),
    "YAML's no": (lambda f: ["--config", write(f, "a.yaml", "save_strategy: no")], 'reads no as false: write "no")'),
    "no text": (lambda f: ["--config", write(f, "a.yaml", "loss: \xe9".encode("latin-1"))], "byte 6 is not UTF-8"),
    "an expression": (lambda f: ["--loss", "dpo(bta=1)"], "column 5: dpo has no argument 'bta'"),
    "a broken template": (lambda f: ["--chat_template", "{% for %}"], "--chat_template, line 1: not valid Jinja"),
    "an escape": (lambda f: ["--chat_template", "{{ ''.__class__.mro() }}"], "the sandbox stopped it"),
    "an endless template": (lambda f: ["--chat_template", LOOPS], "--chat_template: not done with one conversation"),
    "a template file": (lambda f: ["--chat_template", "nowhere.jinja"], "nor a file that can be read"),
    "no model": (lambda f: ["--model_name_or_path", str(f)], "no configuration can be loaded from"),
    "a broken model": (
        lambda f: [write(f, "config.json", "{"), "--model_name_or_path", str(f)][1:], "no configuration can be loaded"
    ),
    "a learning rate": (lambda f: ["--learning_rate", "-1"], "--learning_rate must be a finite number of at least 0"),
    "no option": (lambda f: ["--learning_rat", "1"], "there is no option --learning_rat. Did you mean"),
    "a stray word": (lambda f: ["--learning_rate", "1", "2"], "the word '2' belongs to no option"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_ends_with_a_message_before_the_model_is_loaded(tmp_path, monkeypatch, case):
    monkeypatch.setattr("prefopt.data.templates.SECONDS", 1.0)
    monkeypatch.setattr("prefopt.recipe.build.PreferenceTrainer", None)
    more, message = CASES[case]
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        main("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), *more(tmp_path)])
    assert message in str(caught.value)
    assert isinstance(caught.value, SystemExit) or short_errors.is_ours(caught.value)


def test_the_script_prints_it_and_nothing_else(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": ')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFOPT_VERBOSE": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "dpo.py"), *arguments(tmp_path, path)],
        capture_output=True, text=True, timeout=900, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {path}, line 2: not valid JSON")


class TestTheHook:
    """What python calls for an exception that nobody caught."""

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        self.passed_on = []
        monkeypatch.setattr(sys, "excepthook", lambda *info: self.passed_on.append(info))
        monkeypatch.delenv("PREFOPT_VERBOSE", raising=False)
        short_errors.show_short_errors()
        short_errors.show_short_errors()

    def raised(self, function, *arguments):
        try:
            function(*arguments)
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)

    def test_says_our_errors_shortly(self, capsys):
        from prefopt.losses import parse

        self.raised(parse, "dop")
        shown = capsys.readouterr().err
        assert shown.startswith("error: in the loss expression, column 1")
        assert "Traceback" not in shown
        assert not self.passed_on

    def test_passes_the_others_on(self, capsys):
        self.raised(json.loads, "{")
        assert len(self.passed_on) == 1
        assert not capsys.readouterr().err

    def test_passes_all_on_where_asked_to(self, monkeypatch):
        from prefopt.losses import parse

        monkeypatch.setenv("PREFOPT_VERBOSE", "1")
        self.raised(parse, "dop")
        assert len(self.passed_on) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: [write(f, "a.jsonl", b"\xff\xfe")], "not UTF-8 text"),
        (lambda f: [write(f, "a.parquet", b"PAR1")], "could not be read as parquet"),
        (lambda f: ["~nosuchuser/a.jsonl"], "cannot be opened"),
        (lambda f: ["a\0b.jsonl"], "cannot be opened"),
        (lambda f: ["x" * 5000 + ".jsonl"], "cannot be opened: File name too long"),
        (lambda f: [pairs_file(f), "--columns", "prompt"], "is not of the form OURS=THEIRS"),
        (lambda f: [pairs_file(f), "--model", str(f / "none")], "no tokenizer can be loaded from"),
        (lambda f: [pairs_file(f), "--model", save_model(f), "--max-length", "1"], "--max-length must be at least 2"),
        (lambda f: [pairs_file(f) + ":0.5,b"], "has no weight while others have"),
    ],
)
def test_the_check_command_ends_with_a_message(tmp_path, make, message):
    result = CliRunner().invoke(app, ["check", *make(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in result.output


class TestWhatTheModelCannotTake:
    def test_rows_longer_than_its_learned_positions_are_cut(self, tmp_path, capsys):
        rows = [{"prompt": f"Why {i}?", "chosen": " So." * (300 + i), "rejected": " No." * 200} for i in range(6)]
        data = write(tmp_path, "long.jsonl", "\n".join(map(json.dumps, rows)))
        words = arguments(tmp_path, data, "--max_steps", "1", "--eval_rows", "0", "--max_length", "4000")
        words[words.index("--model_name_or_path") + 1] = save_model(tmp_path, "gpt2")
        assert main("dpo", words) is not None
        assert "max_length is 512 instead of 4000" in capsys.readouterr().out.replace("\n", " ")

    def test_tokens_that_it_has_no_embeddings_for_stop_the_run(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["quick", *(f"<extra {i}>" for i in range(40))])
        make_model().save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        data = write(tmp_path, "a.jsonl", json.dumps({"prompt": "a", "chosen": "b <extra 39>", "rejected": "c"}))
        words = arguments(tmp_path, data)
        words[words.index("--model_name_or_path") + 1] = str(tmp_path / "model")
        with pytest.raises(ValueError, match="beyond the vocabulary: 1 row"):
            main("dpo", words)
