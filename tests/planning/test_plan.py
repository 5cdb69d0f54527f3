"""`prefopt plan`: what it chooses, what it says, and that its commands are ones that the recipes take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.planning.engines import ENGINES
from prefopt.planning.plan import FAMILIES, PARTS, RECIPE_DEFAULTS, model_config
from prefopt.recipe.arguments import parse_arguments
from prefopt.trainer import PreferenceConfig
from tests.tiny import make_config

ROOT = Path(__file__).parents[2]


def plan(*words: str, columns: int = 200) -> str:
    done = CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": str(columns)}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def rows_of(shown: str) -> dict[tuple[str, str], list[str]]:
    """The tables' cells by method and engine: those of the parts, the sum, whether it fits, main memory."""
    found: dict[tuple[str, str], list[str]] = {}
    for method, table in re.findall(r"^(\S[^\n]*): GB a GPU *\n(.*?)└", shown, re.MULTILINE | re.DOTALL):
        heading, body = table.split("┡")
        lines = [[cell.strip() for cell in line.split("┃")[2:-1]] for line in heading.splitlines() if "┃" in line]
        engines = [" ".join(filter(None, words)) for words in zip(*lines, strict=True)]
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in body.splitlines() if "│" in line]
        assert [row[0] for row in rows[: len(PARTS)]] == list(PARTS)
        for engine, *cells in zip(engines, *(row[1:] for row in rows), strict=True):
            found[method.replace("Full", "full"), engine] = [*cells, ""][: len(PARTS) + 3]
    return found


def commands(shown: str) -> list[list[str]]:
    lines = shown.replace("\\\n", "").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("accelerate launch")]


def test_it_takes_the_simplest_engine_that_fits_and_says_why():
    shown = plan("--model", "8B", "--gpus", "8", "--memory", "80", "--method", "full")
    found = rows_of(shown)
    assert [engine for _, engine in found] == ["DDP", "ZeRO-1", "ZeRO-2", "FSDP2", "ZeRO-3", "ZeRO-3 + offload"]
    fitting = [engine for (_, engine), cells in found.items() if cells[-2] == "yes"]
    assert f"full fine-tuning: {fitting[0]}, the simplest that fits" in shown
    for cells in found.values():
        assert float(cells[-3]) == pytest.approx(sum(float(c) for c in cells[: len(PARTS)] if c != "-"), abs=0.5)
        assert cells[-2] == ("yes" if float(cells[-3]) <= 0.92 * 80 else "no")
    (words,) = commands(shown)
    file = words[words.index("--config_file") + 1]
    assert (ROOT / "configs" / "accelerate" / file).is_file()
    assert f"\n  prefopt new config accelerate/{file.removesuffix('.yaml')}\n" in shown


def test_more_gpus_make_what_is_sharded_smaller_and_nothing_else():
    few, many = (rows_of(plan("--model", "1B", "--gpus", n, "--method", "full")) for n in ("2", "8"))
    name = ("full fine-tuning", "ZeRO-3")
    assert float(many[name][0]) == pytest.approx(float(few[name][0]) / 4, abs=0.1)
    assert many["full fine-tuning", "DDP"] == few["full fine-tuning", "DDP"]


def test_a_reference_free_loss_and_adapters_keep_no_reference():
    column = list(PARTS).index("reference")
    shown = plan("--model", "1B", "--gpus", "2", "--loss", "simpo(beta=2.0)")
    assert {cells[column] for cells in rows_of(shown).values()} == {"-"}
    assert "no reference model, since simpo(beta=2.0) compares with none" in shown
    with_reference = rows_of(plan("--model", "1B", "--gpus", "2"))
    assert {method for (method, _), cells in with_reference.items() if cells[column] != "-"} == {"full fine-tuning"}
    before = rows_of(plan("--model", "1B", "--gpus", "2", "--precompute_ref_log_probs"))
    assert {cells[column] for cells in before.values()} == {"-"}


def test_conflict_free_is_planned_with_what_it_keeps_on_the_engine_that_takes_it():
    words = ("--model", "1B", "--gpus", "2", "--method", "full", "--loss")
    plain, free = plan(*words, "dpo + sft"), plan(*words, "conflict_free(dpo + sft)")
    assert [engine for _, engine in rows_of(free)] == ["DDP"]
    assert "conflict_free works only with one process or DDP" in free
    column = list(PARTS).index("gradients")
    name = ("full fine-tuning", "DDP")
    # A float32 copy of each term beside the gradient.
    assert float(rows_of(free)[name][column]) == pytest.approx(3 * float(rows_of(plain)[name][column]), abs=0.2)


def test_pair_normalized_is_planned_with_two_more_copies_of_the_gradients():
    words = ("--model", "1B", "--gpus", "2", "--method", "full", "--loss")
    plain, own = plan(*words, "dpo"), plan(*words, "pair_normalized(dpo)")
    assert [engine for _, engine in rows_of(own)] == ["DDP"]
    assert "pair_normalized works only with one process or DDP" in own
    column, name = list(PARTS).index("gradients"), ("full fine-tuning", "DDP")
    assert float(rows_of(own)[name][column]) == pytest.approx(3 * float(rows_of(plain)[name][column]), abs=0.2)


def test_it_says_where_dropping_the_reference_would_save_an_engine():
    shown = plan("--model", "1B", "--gpus", "2", "--memory", "32", "--method", "full")
    assert "DDP would fit with --precompute_ref_log_probs" in shown
    again = plan("--model", "1B", "--gpus", "2", "--memory", "32", "--method", "full", "--precompute_ref_log_probs")
    assert "full fine-tuning: DDP, nothing is simpler." in again


def test_where_nothing_fits_it_says_what_would_help():
    shown = plan("--model", "70B", "--memory", "24", "--method", "qlora")
    assert re.search(r"QLoRA: nothing fits; one process needs least, \d+ GB. More GPUs", shown)
    assert commands(shown) == []


def test_one_gpu_has_no_engines_but_offloading():
    found = rows_of(plan("--model", "1B"))
    assert [engine for _, engine in found] == ["one process", "ZeRO-3 + offload"] * 2 + ["one process"]


@pytest.mark.parametrize("options", [
    [], ["--gpus", "8", "--memory", "40"],
    ["--gpus", "16", "--nodes", "2", "--token_budget", "4096", "--dtype", "bfloat16"],
    ["--max_length", "2048", "--gradient_checkpointing", "false", "--per_device_train_batch_size", "2", "--layout",
     "padded",
     "--gradient_accumulation_steps", "4", "--precompute_ref_log_probs", "true", "--lora_r", "64"],
])  # fmt: skip
def test_its_commands_are_ones_that_the_recipe_takes(options):
    given = dict(zip(options[::2], options[1::2], strict=False))
    shown = plan("--model", "8B", "--loss", "ipo(beta=0.2) + 0.1*sft", "--memory", "80", *options)
    launched = commands(shown)
    assert launched
    for words in launched:
        assert words[words.index("--num_processes") + 1] == given.get("--gpus", "1")
        script = words.index("train")
        assert words[script - 2 : script] == ["-m", "prefopt"]
        # There is no GPU here, which bf16 would ask for.
        recipe = parse_arguments("dpo", [*words[script + 1 :], "--bf16", "false"])
        assert recipe.training.loss == "ipo(beta=0.2) + 0.1*sft"
        assert recipe.model.model_name_or_path == FAMILIES["8B"][0]
        training = recipe.training
        assert training.token_budget == (4096 if "--token_budget" in options else None)
        assert training.gradient_checkpointing is ("--gradient_checkpointing" not in options)
        assert training.per_device_train_batch_size == int(given.get("--per_device_train_batch_size", 8))
        assert training.max_length == int(given.get("--max_length", 1024))
        assert recipe.model.use_peft == ("--lora_r" in words)
        if recipe.model.load_in_4bit:
            assert recipe.model.dtype == "bfloat16"
            assert recipe.model.bnb_4bit_quant_storage == "bfloat16"


def test_what_a_command_leaves_out_is_the_recipes_default():
    usual = PreferenceConfig("unused", bf16=False)
    for option, value in RECIPE_DEFAULTS.items():
        if option not in ("bf16", "dtype"):
            assert getattr(usual, option) == value, option
    assert parse_arguments("dpo", ["--model_name_or_path", "x"]).model.dtype == RECIPE_DEFAULTS["dtype"]


def test_lengths_budget_and_checkpointing_reach_the_activations():
    def activations(*words: str) -> float:
        cells = rows_of(plan("--model", "1B", "--method", "lora", *words))["LoRA", "one process"]
        # The head's turn is in a column of its own and is taken off this one.
        return sum(float(cells[list(PARTS).index(name)]) for name in ("activations", "logits"))

    usual = activations()
    assert activations("--max_length", "2048") == pytest.approx(2 * usual, rel=0.2)
    assert activations("--per_device_train_batch_size", "4") == pytest.approx(usual / 2, rel=0.1)
    assert activations("--token_budget", "6140") == pytest.approx(usual / 2, rel=0.1)
    assert activations("--no_gradient_checkpointing") > 4 * usual
    assert activations("--layout", "padded") > 1.1 * usual
    # Single completions: 8 rows of 257 - 1 + 767.
    assert "8184 tokens at once" in plan("--model", "1B", "--loss", "kto", "--prompt_length", "257")


def test_it_fits_into_80_columns_whatever_its_numbers_with_the_summary_first():
    shown = plan("--model_name_or_path", "70B", "--gpus", "8", columns=80)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.index("full fine-tuning: ZeRO-3 + offload") < shown.index("GB a GPU")
    assert float(rows_of(shown)["full fine-tuning", "DDP"][-3]) > 1000


def test_a_folder_is_read_and_no_weights_are_needed(tmp_path):
    make_config().save_pretrained(tmp_path)
    shown = plan("--model", str(tmp_path), "--gpus", "2", "--max_length", "64")
    assert "from its configuration" in shown
    assert f"--model_name_or_path {tmp_path}" in shown


def test_built_in_shapes_have_the_sizes_that_they_are_named_for():
    import torch

    from prefopt.planning.activations import causal_model

    for name, billions in {"1B": 1.24, "3B": 3.21, "8B": 8.03, "70B": 70.55}.items():
        _, config, built_in = model_config(name.lower())
        with torch.device("meta"):
            total = sum(p.numel() for p in causal_model(config).parameters())
        assert built_in
        assert total / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(("words", "message"), [
    (["--model", "nobody/nothing"], r"--model nobody/nothing: .*built-in shapes: 1B, 3B, 8B, 70B"),
    (["--model", "1B", "--loss", "dpoo"], "no loss is named 'dpoo'"),
    (["--model", "1B", "--gppus", "8"], "prefopt plan has no option --gppus; --help lists them"),
    (["--model", "1B", "--gpus", "0"], "--gpus must be at least 1, got 0"),
    (["--model", "1B", "--gpus", "3", "--nodes", "2"], "--gpus 3 cannot be divided evenly over --nodes 2"),
    (["--model", "1B", "--memory", "-1"], "--memory is in GB and must be more than 0"),
    (["--model", "1B", "--prompt_length", "1024"], "must leave room for a completion within --max_length 1024"),
    (["--model", "1B", "--token_budget", "0"], "--token_budget must be at least 1"),
    (["--model", "1B", "--lora_target_modules", "no_such_layer", "--method", "lora"], "no_such_layer"),
])  # fmt: skip
def test_what_makes_no_sense_is_said_in_a_line(words, message):
    done = CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert re.search(message, done.output), done.output
    assert "Traceback" not in done.output


def test_every_engine_has_a_title():
    from prefopt.planning.plan import TITLES

    assert set(TITLES) == set(ENGINES)
