"""What is not printed: a library's error beside ours, a line twice, warnings that a user can do nothing about."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from prefopt import PreferenceConfig
from prefopt.data import DataError, load_preferences
from prefopt.recipe import main
from prefopt.safety.noise import quiet_libraries
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import make_pairs, make_trainer

ROOT = Path(__file__).parents[2]


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def logged(request):
    """What a library's logger is given, whatever its handlers."""
    handler, logger = Lines(), logging.getLogger(request.param)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.mark.parametrize("logged", ["datasets"], indirect=True)
def test_a_file_that_cannot_be_read_is_told_once(tmp_path, logged):
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="could not be read as parquet"):
        load_preferences(str(tmp_path / "pairs.parquet"))
    assert logged == []


@pytest.mark.parametrize("logged", ["transformers.trainer"], indirect=True)
def test_a_tied_head_is_not_missing_when_a_run_resumes(tmp_path, logged):
    options = {"train_dataset": make_pairs(8), "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **options).train()
    resumed = make_trainer(tmp_path, max_steps=2, **options)
    assert resumed.model.config.tie_word_embeddings
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert [line for line in logged if "missing keys" in line] == []


@pytest.mark.parametrize("logged", ["transformers.trainer"], indirect=True)
def test_what_is_missing_is_said(tmp_path, logged):
    trainer = make_trainer(tmp_path, train_dataset=make_pairs(8))
    found = trainer.model.load_state_dict({}, strict=False)
    trainer._issue_warnings_after_load(found)
    assert any("missing keys" in line and "lm_head.weight" in line for line in logged)


def test_a_configuration_warns_of_no_name_that_it_does_not_set():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for given in (
            {},
            {"gradient_checkpointing": False},
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ):
            made = PreferenceConfig("unused", bf16=False, **given)
            assert made.gradient_checkpointing is given.get("gradient_checkpointing", True)
            assert made.gradient_checkpointing_kwargs == given.get("gradient_checkpointing_kwargs")


def test_bad_rows_are_told_once(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "a", "chosen": f" b{i}", "rejected": "" if i == 3 else " c"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="empty rejected") as error:
        main("dpo", ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl"),
                     "--output_dir", str(tmp_path / "run"), "--bf16", "false"])  # fmt: skip
    assert str(error.value).count("empty rejected") == 1
    assert "empty rejected" not in capsys.readouterr().out


@pytest.mark.parametrize("ci", ["", "true"])
def test_a_librarys_line_is_printed_once_by_a_recipe(ci):
    code = (
        "import logging, datasets, huggingface_hub.utils\n"
        "from prefopt.safety.noise import quiet_libraries\n"
        "quiet_libraries()\n"
        "for name in ('datasets.builder', 'huggingface_hub.utils._http', 'transformers.trainer'):\n"
        "    logging.getLogger(name).warning('a line of %s', name)\n"
    )
    env = os.environ | {"CI": ci}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    for name in ("datasets.builder", "huggingface_hub.utils._http", "transformers.trainer"):
        assert done.stderr.count(f"a line of {name}") == 1, done.stderr


@pytest.mark.parametrize("logged", ["DeepSpeed"], indirect=True)
def test_deepspeed_does_not_warn_of_a_cpu(logged):
    quiet_libraries()
    logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU, we were unable to detect it.")
    logging.getLogger("DeepSpeed").warning("an overflow")
    assert logged == ["an overflow"]


def test_lines_of_ours_say_their_level_and_others_whose_they_are() -> None:
    script = (
        "import logging; from prefopt.safety.noise import quiet_libraries; quiet_libraries();"
        "logging.getLogger('prefopt.trainer.mixin').warning('row %d', 3); logging.getLogger('peft.x').warning('so')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-2:] == ["WARNING: row 3", "WARNING peft.x: so"]
