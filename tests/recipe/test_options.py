"""What wins over what among a recipe's options, and the models they name: adapters, references, previous iterates."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from prefopt.models.bundled import HUB_ID
from prefopt.models.load import load_model
from prefopt.recipe import main, parse_arguments
from prefopt.recipe.arguments.options import RecipeArguments
from tests.recipe.test_recipe import arguments, loaded, pairs_file
from tests.trainer.runs import save_model

LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]


@pytest.fixture(autouse=True)
def _bundled_is_tiny(monkeypatch, tmp_path):
    monkeypatch.setattr("prefopt.recipe.ready.resolve_demo_model", lambda say: Path(save_model(tmp_path)))


def config_file(folder: Path, **options) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


class TestDemo:
    def test_it_runs_a_config_with_the_bundled_model_pairs_and_settings(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "250")
        config = config_file(
            tmp_path, model_name_or_path="some/model", dataset_name="some/data", loss="simpo(beta=2.0, gamma=0.5)",
            optim="rmsprop", gradient_accumulation_steps=64, load_in_4bit=True,
        )  # fmt: skip
        few = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--eval_rows", "0"]
        results = main("dpo", ["--config", config, "--demo", "--output_dir", str(tmp_path / "out"), *few])
        assert results["loss"] == "simpo(beta=2.0, gamma=0.5)"
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
        assert (
            "--demo: the bundled model in place of some/model, the bundled pairs in place of some/data, "
            "the bundled job's settings in place of the config's; the loss stays simpo(beta=2.0, gamma=0.5)."
        ) in capsys.readouterr().out

    def test_the_command_line_wins_over_it(self, tmp_path, capsys):
        config = config_file(tmp_path, model_name_or_path="some/model", dataset_name="some/data", loss="ipo")
        data = pairs_file(tmp_path)
        words = ["--config", config, "--demo", "--learning_rate", "0.5", "--dataset_name", data, "--loss", "hinge"]
        recipe = parse_arguments("dpo", words)
        assert recipe.training.learning_rate == 0.5
        assert recipe.training.loss == "hinge"
        assert recipe.script.dataset_name == data
        assert recipe.training.max_steps == 16
        line = capsys.readouterr().out.replace("\n", " ")
        assert "some/data" not in line
        assert "the loss stays hinge." in line

    def test_without_a_config_it_is_the_bundled_job(self, capsys):
        recipe = parse_arguments("ipo(beta=0.3)", ["--demo"])
        assert recipe.training.loss == "ipo(beta=0.3)"
        assert recipe.training.learning_rate == 1e-4
        assert "--demo: the bundled model, the bundled pairs, the bundled job's settings; the loss" in (
            capsys.readouterr().out.replace("\n", " ")
        )

    def test_trls_loss_options_of_a_config_stay_too(self, tmp_path):
        config = config_file(tmp_path, model_name_or_path="some/model", loss_type=["ipo"], beta=0.3, learning_rate=1.0)
        recipe = parse_arguments("dpo", ["--config", config, "--demo"])
        assert recipe.training.loss is None
        assert recipe.training.loss_type == ["ipo"]
        assert recipe.training.beta == 0.3
        assert recipe.training.learning_rate == 1e-4

    def test_a_config_may_ask_for_it(self, tmp_path):
        config = config_file(tmp_path, model_name_or_path="some/model", demo=True, loss="ipo")
        assert parse_arguments("dpo", ["--config", config]).model.model_name_or_path is None


class TestConfigFiles:
    def test_the_paper_mapping_travels_without_effect(self, tmp_path):
        paper = {"title": "A paper", "unknown": ["seed"]}
        recipe = parse_arguments("dpo", ["--config", config_file(tmp_path, paper=paper, learning_rate=0.5)])
        assert recipe.paper == paper
        assert recipe.training.learning_rate == 0.5

    def test_dry_run_shows_it_with_our_value_for_what_is_unknown(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        paper = {"title": "A paper", "devices": 4, "source": {1: "a/b"}, "unknown": ["seed", "dataset_name", "x"]}
        main("dpo", ["--config", config_file(tmp_path, paper=paper, seed=7), "--dry_run"])
        shown = capsys.readouterr().out
        for part in ["A paper", "[1] a/b", "seed: 7", "dataset_name: the bundled pairs", "= 8", "4 device(s) 32"]:
            assert part in shown

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"learning_rat": 1.0}, r"no option 'learning_rat'. Did you mean 'learning_rate'"),
            ({"paper": "2305.18290"}, r"'paper' must be a mapping"),
            ({"env": ["A"]}, r"'env' must be a mapping"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, tmp_path, options, message):
        with pytest.raises(SystemExit, match=message):
            parse_arguments("dpo", ["--config", config_file(tmp_path, **options)])

    def test_values_are_what_the_command_line_makes_of_them(self, tmp_path):
        values = {"loss": None, "loss_type": ["sigmoid", "sft"], "loss_weights": ["1e-1", 1], "bf16": 0}
        training = parse_arguments("dpo", ["--config", config_file(tmp_path, **values)]).training
        assert training.loss_weights == [0.1, 1.0]
        assert training.bf16 is False

    def test_env_sets_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.delenv("PREFOPT_TEST_ONLY", raising=False)
        monkeypatch.setenv("PREFOPT_TEST_ONLY", "before")
        parse_arguments("dpo", ["--config", config_file(tmp_path, env={"PREFOPT_TEST_ONLY": 3})])
        assert os.environ["PREFOPT_TEST_ONLY"] == "3"


class TestDryRun:
    def test_a_name_that_the_hub_does_not_answer_for_is_said_in_one_line(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        data = pairs_file(tmp_path)
        assert main("ipo", ["--model_name_or_path", "nobody/nothing", "--dataset_name", data, "--dry_run"]) is None
        shown = capsys.readouterr().out
        assert "ipo(beta=0.1, average=True)" in shown
        assert "nobody/nothing is not on this machine and the Hub cannot be reached" in shown

    def test_training_still_fails_there(self, tmp_path):
        with pytest.raises(OSError, match=r"nobody/nothing|huggingface"):
            main("ipo", ["--model_name_or_path", "nobody/nothing", "--dataset_name", pairs_file(tmp_path)])

    def test_a_missing_file_is_an_error_as_ever(self, tmp_path):
        with pytest.raises(ValueError, match="No file at"):
            main("ipo", [*arguments(tmp_path, str(tmp_path / "none.jsonl")), "--dry_run"])

    def test_a_silent_hub_is_asked_once(self, tmp_path, capsys, monkeypatch):
        asked = []
        monkeypatch.setattr("prefopt.recipe.ready.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            "prefopt.recipe.ready.HfApi.model_info", lambda self, name, timeout: asked.append(name) or 1 / 0
        )
        data = pairs_file(tmp_path)
        main("ipo", ["--model_name_or_path", "nobody/nothing", "--dataset_name", data, "--dry_run"])
        assert asked == [HUB_ID]
        assert "the Hub cannot be reached" in capsys.readouterr().out.replace("\n", " ")


class TestTwoStages:
    """Likelihood first, then an alignment term, each with an adapter."""

    def stages(self, folder: Path, *more: str) -> tuple[Path, Path, dict]:
        data = pairs_file(folder)
        first, second = folder / "sft", folder / "aligned"
        main(
            "sft(nll='token')",
            [*arguments(folder, data), *LORA, "--learning_rate", "1e-2", "--output_dir", str(first)],
        )
        words = [*arguments(folder, data), "--model_name_or_path", str(first), "--output_dir", str(second)]
        results = main("orpo(beta=0.5)", [*words, "--learning_rate", "1e-2", *more])
        return first, second, results

    def test_the_second_trains_the_adapter_of_the_first(self, tmp_path, capsys):
        first, second, results = self.stages(tmp_path)
        assert f"It is an adapter of {save_model(tmp_path)} and is trained on" in capsys.readouterr().out.replace(
            "\n", ""
        )
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[name], after[name]) for name in before)
        settings = json.loads((second / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == save_model(tmp_path)
        assert settings["r"] == 4
        assert results["loss"] == "orpo(beta=0.5)"

    def test_it_starts_where_the_first_ended(self, tmp_path):
        data = pairs_file(tmp_path)
        first = tmp_path / "sft"
        ended = main("sft", [*arguments(tmp_path, data), *LORA, "--learning_rate", "1e-2", "--output_dir", str(first)])
        words = [*arguments(tmp_path, data), "--model_name_or_path", str(first), "--output_dir", str(tmp_path / "b")]
        started = main("sft", [*words, "--learning_rate", "0"])
        assert started["before"]["eval_loss"] == pytest.approx(ended["after"]["eval_loss"], rel=1e-5)
        assert ended["before"]["eval_loss"] - ended["after"]["eval_loss"] > 1e-3

    def test_the_adapter_as_it_was_is_the_reference(self, tmp_path):
        """At the start every ratio is 0, though the adapter is far from its model; then it is not."""
        data = pairs_file(tmp_path)
        first = tmp_path / "sft"
        main("sft", [*arguments(tmp_path, data), *LORA, "--learning_rate", "1e-2", "--output_dir", str(first)])
        words = [*arguments(tmp_path, data), "--model_name_or_path", str(first), "--output_dir", str(tmp_path / "b")]
        results = main("dpo", [*words, "--learning_rate", "1e-2"])
        assert results["before"]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
        assert results["before"]["eval_ratios/chosen"] == pytest.approx(0, abs=1e-4)
        assert abs(results["after"]["eval_ratios/chosen"]) > 1e-3

    def test_demo_settings_do_not_put_a_second_adapter_on_it(self, tmp_path):
        data = pairs_file(tmp_path)
        first = tmp_path / "sft"
        main("sft", [*arguments(tmp_path, data), *LORA, "--output_dir", str(first)])
        few = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--eval_rows", "0"]
        words = ["--demo", "--model_name_or_path", str(first), "--output_dir", str(tmp_path / "b"), *few]
        assert main("asft(beta=0.5)", words)["loss"] == "asft(beta=0.5)"
        assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 4
        assert not [name for name in load_file(tmp_path / "b" / "adapter_model.safetensors") if "ref" in name]

    def test_dry_run_counts_the_saved_adapters_weights(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        data = pairs_file(tmp_path)
        first = tmp_path / "sft"
        main("sft", [*arguments(tmp_path, data), *LORA, "--output_dir", str(first)])
        capsys.readouterr()
        main("dpo", [*arguments(tmp_path, data), "--model_name_or_path", str(first), "--dry_run"])
        shown = capsys.readouterr().out
        assert "gradients, 0.0M" in shown
        assert "reference model" not in shown

    def test_options_that_shape_a_new_adapter_are_refused(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
        with pytest.raises(SystemExit, match="--lora_r is for a new adapter"):
            parse_arguments("orpo", ["--model_name_or_path", str(tmp_path), "--lora_r", "8"])

    def test_an_adapter_without_a_model_says_so(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(OSError, match="base_model_name_or_path"):
            load_model(str(tmp_path), {})


class TestOtherModels:
    def test_a_reference_of_its_own_is_compared_with(self, tmp_path):
        words = arguments(tmp_path, pairs_file(tmp_path), "--ref_model_name_or_path", save_model(tmp_path, seed=1))
        results = main("dpo", words)
        assert abs(results["before"]["eval_ratios/chosen"]) > 0.1

    def test_a_reference_without_effect_is_refused(self, tmp_path):
        recipe = parse_arguments(
            "simpo",
            arguments(tmp_path, pairs_file(tmp_path), "--ref_model_name_or_path", save_model(tmp_path, seed=1)),
        )
        with pytest.raises(ValueError, match="compares with no reference"):
            loaded(recipe)

    def test_inpo_compares_with_the_previous_iterate(self, tmp_path):
        """With tau = 0 only the previous iterate counts, so at the start, where it is the policy, h is 0."""
        data = pairs_file(tmp_path)
        eta = 0.5
        same = main(f"inpo(eta={eta}, tau=0.0)", arguments(tmp_path, data))
        assert same["before"]["eval_loss"] == pytest.approx((1 / (2 * eta)) ** 2, rel=1e-4)
        other = ["--previous_model_name_or_path", save_model(tmp_path, seed=1)]
        moved = main(f"inpo(eta={eta}, tau=0.0)", [*arguments(tmp_path, data), *other])
        assert abs(moved["before"]["eval_loss"] - 1.0) > 0.01

    def test_a_chat_template_is_used_and_saved(self, tmp_path, capsys):
        template = tmp_path / "plain.jinja"
        template.write_text(
            "{% for m in messages %}{{ m['role'] + ' says ' + m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant says ' }}{% endif %}"
        )
        words = arguments(tmp_path, pairs_file(tmp_path), "--chat_template", str(template))
        main("dpo", [*words, "--dry_run"])
        assert "user says" in capsys.readouterr().out
        main("dpo", [*words, "--eval_rows", "0"])
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template.read_text()


def test_every_option_of_a_recipe_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8")
    section = page.partition("## Options of the recipes")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z0-9_]+)`", section))
    assert {field.name for field in dataclasses.fields(RecipeArguments)} - named == set()
