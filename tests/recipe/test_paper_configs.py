"""Every file of configs/papers and configs/unlearning: it parses, names its sources, and resolves without a network.

No model is loaded; where a config leaves the model open, a tiny one stands in for the bundled one.
"""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast
from trl import ModelConfig
from typer.testing import CliRunner

from prefopt import PreferenceConfig
from prefopt.cli import app
from prefopt.losses import parse
from prefopt.losses.parse import LossSyntaxError
from prefopt.losses.registry import presets
from prefopt.models.load import load_tokenizer
from prefopt.online.options import RoundsArguments
from prefopt.recipe import Recipe, RecipeArguments, main, parse_arguments
from prefopt.recipe.unlearning import UnlearningArguments
from prefopt.recipe.unlearning import main as unlearn
from tests.tiny import make_tokenizer
from tests.trainer.runs import save_model

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "papers"
FILES = sorted([*FOLDER.glob("*.yaml"), *(ROOT / "configs" / "unlearning").glob("*.yaml")])
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FAMILIES = (
    "asft_two_stage", "cringe_safety", "discopop", "gvpo", "hdpo", "hmk", "hypo_tldr", "inpo", "ipo_zephyr",
    "irpo_gsm8k", "kernel_dpo", "kto", "orpo_two_stage", "rpo_zephyr", "simpo",
)  # fmt: skip
PAPER = "arxiv", "title", "setting", "reported", "claim", "devices", "global_batch", "source", "unknown", "differs"

configs = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
recipes = pytest.mark.parametrize("script", RECIPES, ids=lambda script: script.stem)


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch):
    # Paths in a config are those of a clone, where recipes are run.
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("bundled"))


@pytest.fixture
def _bundled_is_tiny(monkeypatch, tiny):
    monkeypatch.setattr("prefopt.recipe.ready.resolve_demo_model", lambda say: Path(tiny))


def read(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def unlearns(file: Path) -> bool:
    """Whether the config is one of `recipes/unlearn.py`."""
    return "forget_set" in read(file)


def arguments(file: Path, *more: str) -> Recipe:
    options = UnlearningArguments if unlearns(file) else RecipeArguments
    return parse_arguments("dpo", ["--config", str(file), *more], options)


def papers_of(expression: str) -> set[str]:
    """arXiv ids of the losses and presets that an expression names."""
    names = set(re.findall(r"[a-z_]\w*", expression))
    ids = {preset.paper for name, preset in presets().items() if name in names}
    return ids | {term.paper for _, _, term in parse(expression).terms()}


def test_every_paper_with_a_recipe_is_here():
    assert len(FILES) >= 60
    covered = {number for file in FILES for number in _numbers(read(file))}
    missions = {"2411.07595", "2211.05826", "2312.16682", "2404.05868", "2405.16436", "2404.19733", "2406.01462",
                "2407.00617", "2406.08414", "2501.03271", "2310.16763", "2502.01237", "2305.18290",
                "2310.12036"}  # fmt: skip
    assert missions <= covered


def _numbers(config: dict) -> list[str]:
    number = config["paper"]["arxiv"]
    return number if isinstance(number, list) else [number]


@configs
def test_a_config_parses_and_so_does_its_loss(file):
    recipe = arguments(file)
    given = read(file)
    assert str(parse(recipe.training.loss)) == str(parse(given["loss"]))
    for name, value in given.items():
        if name != "paper":
            part = next(p for p in (recipe.script, recipe.training, recipe.model) if hasattr(p, name))
            found = getattr(part, name)
            assert getattr(found, "value", found) == value, name
    assert recipe.training.output_dir == f"runs/{file.stem}"


@configs
def test_its_paper_mapping_is_complete(file):
    paper = read(file)["paper"]
    assert tuple(paper) == PAPER
    assert all(isinstance(paper[name], str) and paper[name] for name in ("title", "setting", "reported", "claim"))
    assert all(re.fullmatch(r"\d{4}\.\d{5}", number) for number in _numbers(read(file)))
    assert all(isinstance(entry, str) for name in ("unknown", "differs") for entry in paper[name])


@configs
def test_its_arxiv_id_is_that_of_its_loss(file):
    config = read(file)
    assert set(_numbers(config)) & papers_of(config["loss"])


@configs
def test_every_value_says_where_it_comes_from(file):
    text = file.read_text(encoding="utf-8")
    sources = read(file)["paper"]["source"]
    for line in text.split("\n\n", 1)[1].splitlines():
        assert re.search(r"  # (\[\d\]( \[\d\])*|from memory|ours)(: .*)?$", line), line
    cited = {int(mark) for mark in re.findall(r"\[(\d)\]", text)}
    assert cited == set(sources), "marks and sources do not match"
    assert all("@" in source or "arXiv" in source or "pull request" in source for source in sources.values())


@configs
def test_no_rows_are_held_out_of_the_training_split(file):
    """Papers train on all of it. The bundled pairs have held-out rows of their own."""
    recipe = arguments(file)
    assert unlearns(file) or recipe.script.eval_rows == (100 if recipe.bundled_data else 0)


@configs
def test_what_is_unknown_is_left_out(file):
    config = read(file)
    paper = config["paper"]
    recipe = arguments(file)
    for name in paper["unknown"]:
        if name.startswith("loss."):
            terms = [term for _, _, term in parse(config["loss"]).terms()]
            known = {hyper for term in terms for hyper in term.hyperparameters()}
            known |= set(re.findall(r"(\w+)=", config["loss"]))
            assert name.removeprefix("loss.") in known
        elif name != "devices":
            assert any(hasattr(part, name) for part in (recipe.script, recipe.training, recipe.model)), name
            assert name not in config


@configs
def test_its_numbers_are_numbers_and_its_batch_adds_up(file):
    config = read(file)
    paper = config["paper"]
    for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs", "lora_dropout"):
        assert isinstance(config.get(name, 0), (int, float)), f"{name} is a string to YAML"
    if paper["global_batch"] == "unknown":
        assert paper["devices"] == "unknown"
        assert "per_device_train_batch_size" not in config
    else:
        each = config["per_device_train_batch_size"] * config.get("gradient_accumulation_steps", 1)
        assert each * paper["devices"] == paper["global_batch"]


@configs
@pytest.mark.usefixtures("_bundled_is_tiny")
def test_dry_run_resolves_it_without_a_network(file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert (unlearn if unlearns(file) else main)("dpo", ["--config", str(file), "--dry_run"]) is None
    shown = capsys.readouterr().out
    config = read(file)
    for _, _, term in parse(config["loss"]).terms():
        assert str(term) in shown
        assert term.formula in shown
    assert config["paper"]["title"] in shown
    assert "Global batch" in shown
    complete = "model_name_or_path" not in config and "dataset_name" not in config
    assert ("First rows of the first batch" in shown) == complete
    lacking = "No sets and no steps:" if unlearns(file) else "No batch, steps or memory:"
    assert (lacking in shown) != complete
    assert shown.rstrip().endswith("Dry run: nothing was trained.")


@configs
def test_demo_keeps_the_loss_and_puts_the_rest_aside(file, capsys):
    recipe = arguments(file, "--demo")
    assert str(parse(recipe.training.loss)) == str(parse(read(file)["loss"]))
    assert recipe.model.model_name_or_path is None
    assert recipe.bundled_data
    for name, value in yaml.safe_load(recipe.script.demo_config.read_text(encoding="utf-8")).items():
        part = next(p for p in (recipe.model, recipe.script, recipe.training) if hasattr(p, name))
        found = getattr(part, name)
        assert getattr(found, "value", found) == value, name
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--demo:")]
    assert recipe.training.loss in line


@configs
def test_its_command_names_a_recipe_and_itself(file):
    command = file.read_text(encoding="utf-8").split("paper:")[0].splitlines()[-1]
    script, config = re.search(r"(recipes/\w+\.py) --config (\S+)", command).groups()
    assert (ROOT / script).is_file()
    assert (script == "recipes/unlearn.py") == unlearns(file)
    assert ROOT / config == file


@configs
def test_the_commands_above_it_work(file):
    check_words(file.read_text(encoding="utf-8").split("paper:")[0])


@recipes
def test_every_recipe_has_a_loss_and_its_commands_work(script):
    module = runpy.run_path(str(script))
    assert parse(module["LOSS"])
    text = module["__doc__"]
    assert f"recipes/{script.name}" in text
    check_words(text)


OPTIONS = {"recipes/unlearn.py": UnlearningArguments, "recipes/irpo.py": RoundsArguments}


def check_words(text: str) -> None:
    """Files, expressions and options that a text for people names are there."""
    for config in re.findall(r"--config (\S+)", text):
        assert (ROOT / config).is_file()
    for expression in re.findall(r'--loss "([^"]+)"', text):
        try:
            parse(expression)
        except LossSyntaxError as error:
            pytest.fail(str(error))
    options = next((kind for recipe, kind in OPTIONS.items() if recipe in text), RecipeArguments)
    known = {field.name for kind in (options, PreferenceConfig, ModelConfig) for field in dataclasses.fields(kind)}
    assert {*re.findall(r"--([a-z_]+)", text.replace("--help", ""))} <= known | {"config"}


FEW = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--eval_rows", "0", "--max_length", "128",
       "--sample_max_new_tokens", "8"]  # fmt: skip


@recipes
@pytest.mark.usefixtures("_bundled_is_tiny")
def test_every_recipe_trains_here(script, tmp_path):
    loss = runpy.run_path(str(script))["LOSS"]
    assert main(loss, ["--demo", "--output_dir", str(tmp_path), *FEW])["loss"] == str(parse(loss))
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("_bundled_is_tiny")
def test_a_config_of_every_family_trains_here(name, tmp_path):
    file = FOLDER / f"{name}.yaml"
    results = main("dpo", ["--config", str(file), "--demo", "--output_dir", str(tmp_path), *FEW])
    assert results["loss"] == str(parse(read(file)["loss"]))
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.usefixtures("_bundled_is_tiny")
def test_a_config_of_unlearning_trains_here(tmp_path):
    pytest.importorskip("rouge_score")
    few = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--measured_rows", "2", "--learn_epochs", "0.2"]
    words = ["--config", str(FOLDER / "npo_tofu.yaml"), "--demo", "--learn_learning_rate", "1e-2", *few]
    more = ["--output_dir", str(tmp_path / "out"), "--models_dir", str(tmp_path / "models")]
    results = unlearn("ga", [*words, *more])
    assert results["loss"] == str(parse(read(FOLDER / "npo_tofu.yaml")["loss"]))
    assert results["after"].keys() >= {"model_utility", "forget_quality"}


def test_what_a_config_of_unlearning_needs_from_elsewhere_is_named(capsys):
    """Files that must be downloaded first, and all sets of the Hub that are not on this machine."""
    assert unlearn("ga", ["--config", str(FOLDER / "npo_tofu_forget50.yaml"), "--dry_run"]) is None
    assert "data/tofu/forget50.json and data/tofu/retain50.json must be made first" in shown_in(capsys)
    assert unlearn("ga", ["--config", str(FOLDER / "npo_tofu_1b.yaml"), "--dry_run"]) is None
    assert "_full or locuslab/TOFU is not on this machine" in shown_in(capsys)


def shown_in(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("_bundled_is_tiny")
@pytest.mark.parametrize("program", ["recipe", "command"])
def test_a_paper_config_runs_here(tmp_path, monkeypatch, capsys, program):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--config", str(FOLDER / "simpo.yaml"), "--demo", "--dry_run", "--output_dir", str(tmp_path)]
    if program == "recipe":
        monkeypatch.setattr(sys, "argv", ["dpo.py", *words])
        runpy.run_path(str(ROOT / "recipes" / "dpo.py"), run_name="__main__")
        shown = capsys.readouterr().out
    else:
        shown = CliRunner().invoke(app, ["train", *words], catch_exceptions=False).output
    assert "the bundled model in place of alignment-handbook/zephyr-7b-sft-full" in shown
    assert "the bundled pairs in place of HuggingFaceH4/ultrafeedback_binarized" in shown
    assert "simpo(beta=2.0, gamma=1.6)" in shown
    assert "flash_attention_2" not in shown
    assert "example 0, chosen" in shown


@pytest.mark.parametrize("command", ["train", "demo"])
def test_the_command_lists_every_option(command):
    shown = CliRunner().invoke(app, [command, "--help"], catch_exceptions=False).output
    assert "--loss LOSS" in shown
    assert "--per_device_train_batch_size" in shown


def test_the_page_has_the_table_of_the_files():
    table = runpy.run_path(str(ROOT / "scripts" / "papers_table.py"))["papers_table"]()
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert table in page, "stale: run `python scripts/papers_table.py --write`"
    assert len(table.splitlines()) == len([*FOLDER.glob("*.yaml")]) + 2


class TestTemplates:
    messages = [  # noqa: RUF012
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Since."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "So."},
    ]

    def render(self, name: str, tmp_path: Path) -> tuple[str, str]:
        """The prompt as it opens an answer, and the whole conversation."""
        make_tokenizer().save_pretrained(tmp_path)
        tokenizer: PreTrainedTokenizerFast = load_tokenizer(str(tmp_path), chat_template=str(FOLDER / name))
        opening = tokenizer.apply_chat_template(self.messages[:-1], tokenize=False, add_generation_prompt=True)
        return opening, tokenizer.apply_chat_template(self.messages, tokenize=False)

    @pytest.mark.parametrize(
        ("name", "whole"),
        [
            ("hh.jinja", "\n\nHuman: Why?\n\nAssistant: Since.\n\nHuman: And?\n\nAssistant: So.<|im_end|>"),
            ("mistral.jinja", "[INST] Why? [/INST] Since. <|im_end|>[INST] And? [/INST] So. <|im_end|>"),
            (
                "zephyr.jinja",
                "<|user|>\nWhy?<|im_end|>\n<|assistant|>\nSince.<|im_end|>\n"
                "<|user|>\nAnd?<|im_end|>\n<|assistant|>\nSo.<|im_end|>",
            ),
        ],
    )
    def test_a_template_writes_what_it_should_and_the_prompt_begins_it(self, tmp_path, name, whole):
        opening, rendered = self.render(name, tmp_path)
        assert rendered == whole
        assert rendered.startswith(opening)
        assert rendered.removeprefix(opening).strip().startswith("So.")
