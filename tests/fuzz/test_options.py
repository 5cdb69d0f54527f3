"""Recipe files and command lines of every kind: the run's settings, or an end with a message that names the option."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prefopt.recipe.arguments import RecipeArguments, parse_arguments
from prefopt.trainer import PreferenceConfig
from tests.fuzz.hostile import NASTY, NESTED, SCALARS, TEXTS, examples, no_hang

OPTIONS = sorted({field.name for kind in (RecipeArguments, PreferenceConfig) for field in dataclasses.fields(kind)})
USED = [
    "loss", "learning_rate", "max_length", "max_steps", "seed", "columns", "dataset_name", "eval_rows", "output_dir",
    "report_to", "loss_type", "beta", "loss_weights", "bf16", "optim", "eval_strategy", "token_budget",
    "chat_template", "per_device_train_batch_size", "num_train_epochs", "on_bad_rows", "demo", "dry_run",
    "env", "paper",
]  # fmt: skip


@contextlib.contextmanager
def ends_with_a_message():
    """Passes over an end of the program with words; puts the environment back, which a config may change."""
    before = dict(os.environ)
    try:
        yield
    except SystemExit as error:
        message = error.code
        assert isinstance(message, str)
        assert len(message) < 3000
        assert "--" in message or "options" in message
    finally:
        os.environ.clear()
        os.environ.update(before)


@given(st.dictionaries(st.sampled_from([*USED, *USED, *OPTIONS]) | TEXTS, st.one_of(SCALARS, NESTED), max_size=3))
@examples(4)
def test_any_mapping_is_read_or_refused(tmp_path_factory, options):
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(yaml.safe_dump(options, allow_unicode=False), encoding="utf-8")
    with no_hang(), ends_with_a_message():
        parse_arguments("dpo", ["--config", str(path)])


PIECES = (
    "loss: dpo\n", "seed: 1\n", "&a", "*a", "&a [*a, *a]\n", "!!python/object/apply:os.system ['true']\n",
    "x: &x {y: *x}\n", "- a\n", "  ", "\t", ": ", "{", "}", "[", "]", "'", '"', "\n---\n", "...", "%YAML 9.9\n",
    "!!binary aGk=\n", "? ", "| \n", "!!set {a}\n", "<<: *a\n", "env: {A: 1}\n", "2001-01-01\n", "0x" + "f" * 50,
    "1" * 5000, ".nan\n", "[" * 500, "# c\n", "beta: !!float x\n", "max_steps: 1_0\n", "~: ~\n", "seed: 1:30:00\n",
)  # fmt: skip


@given(
    st.lists(st.sampled_from([*PIECES, *NASTY]), max_size=8).map("".join) | st.text(max_size=40),
    st.sampled_from(["utf-8", "utf-8", "utf-16", "latin-1"]),
)
@examples(4)
def test_any_text_is_read_or_refused(tmp_path_factory, text, encoding):
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_bytes(text.encode(encoding, "surrogatepass" if encoding != "latin-1" else "replace"))
    with no_hang(), ends_with_a_message():
        parse_arguments("dpo", ["--config", str(path)])


WORDS = st.one_of(
    st.sampled_from(
        ["--help_me", "--config", "--config=", "--loss", "--", "-x", "--max_length", "-1", "--columns", "a=b"]
    ),
    st.sampled_from(OPTIONS).map("--{}".format),
    st.sampled_from(OPTIONS).map("--{}=x".format),
    TEXTS,
)


@given(st.lists(WORDS, max_size=4).filter(lambda words: not {"-h", "--help"} & set(words)))
@examples(4)
def test_any_command_line_is_read_or_refused(words):
    with no_hang(), ends_with_a_message():
        parse_arguments("dpo", words)


LAUGHS = b"a: &a [x,x,x,x,x,x,x,x]\n" + b"".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 8)}]\n".encode() for old, new in zip("abcdef", "bcdefg", strict=True)
)


def _write(folder: Path, raw: bytes) -> str:
    path = folder / "run.yaml"
    path.write_bytes(raw)
    return str(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"!!python/object/apply:os.system ['touch /tmp/x']", "could not determine a constructor"),
        (b"loss: dpo\nseed: 1\nloss: ipo\n", r"found 'loss' twice\n.*line 3"),
        (b"paper: &a {x: *a}\n", "its aliases"),
        (LAUGHS, "more than 10000 values"),
        ("loss: dpo # é".encode("latin-1"), "byte 12 is not UTF-8 text"),
        (b"loss: " + b"[" * 3000, "nested too deeply"),
        (b"max_steps: " + b"1" * 5000, "a value cannot be read"),
        (b"env: {1: 2}", "env: 1 cannot be set"),
        (b"env: {'': 2}", "env: '' cannot be set"),
        (b"learning_rate: [1, 2]", "learning_rate: must be a number, got a list of 2"),
        (b"learning_rate: fast", "learning_rate: must be a number, got 'fast'"),
        (b"learning_rate: .nan", "--learning_rate must be a finite number"),
        (b"learning_rate: -1", "--learning_rate must be a finite number of at least 0, got -1"),
        (b"seed: 99999999999", "--seed must be a finite number from 0 to 4294967295"),
        (b"max_length: 1", "--max_length must be"),
        (b"loss: 3", "loss: must be text or null, got 3"),
        (b"dry_run: maybe", "dry_run: .*got 'maybe'"),
        (b"truncation_mode: middle", "truncation_mode: must be one of keep_end, keep_start, got 'middle'"),
        (b"loss: dpo(bta=1)", "--loss: in the loss expression, column 5"),
        (b"help: 1", "there is no option 'help'"),
    ],
)  # fmt: skip
def test_what_the_fuzzing_found_in_files(tmp_path, raw, message):
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        parse_arguments("dpo", ["--config", _write(tmp_path, raw)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "there is no option --learning_rat.*Did you mean '--learning_rate'"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--config"], "there is no such file"),
        (["--config=nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
        (["--config", "a\0b"], "there is no such file"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
    ],
)
def test_what_the_fuzzing_found_in_words(words, message):
    with pytest.raises(SystemExit, match=message):
        parse_arguments("dpo", words)


def test_one_word_for_a_list_and_no_value_where_there_may_be_none(tmp_path):
    config = _write(
        tmp_path,
        b"columns: prompt=q\ndataset_name: x\nmax_length: ~\nuse_peft: true\nlora_target_modules: all-linear\n"
        b"gradient_checkpointing: 'false'\nlearning_rate: '1e-4'\n",
    )
    recipe = parse_arguments("dpo", ["--config", config])
    assert (recipe.script.columns, recipe.training.max_length) == (["prompt=q"], None)
    assert (recipe.training.gradient_checkpointing, recipe.training.learning_rate) == (False, 1e-4)
