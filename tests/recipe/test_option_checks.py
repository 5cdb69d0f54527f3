"""Options that are refused as they are read: without effect, out of range, of another name by now."""

from __future__ import annotations

import pytest
import yaml

from prefopt.recipe import parse_arguments

OWN = ["--model_name_or_path", "some/model", "--dataset_name", "some/data"]


def read(*words: str) -> None:
    parse_arguments("dpo", ["--output_dir", "unused", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*OWN, "--lora_r", "8"], "--lora_r would have no effect without --use_peft"),
        ([*OWN, "--lora_target_modules", "all-linear"], "without --use_peft"),
        ([*OWN, "--use_bnb_nested_quant", "true"], "without --load_in_4bit"),
        ([*OWN, "--eval_steps", "10"], "--eval_steps would have no effect without --eval_strategy steps"),
        (["--save_steps", "5"], "--save_steps would have no effect without --save_strategy steps"),  # the bundled job
        ([*OWN, "--metric_for_best_model", "loss"], "without --load_best_model_at_end true"),
        ([*OWN, "--ref_model_sync_steps", "5"], "without --sync_ref_model true"),
        ([*OWN, "--precompute_ref_batch_size", "5"], "without --precompute_ref_log_probs true"),
        (["--dataset_test_split", "test_prefs"], "without --dataset_name"),
        (["--dataset_name", "some/data", "--model_revision", "v1"], "without --model_name_or_path"),
        ([*OWN, "--model_init_kwargs", "revision"], "--model_init_kwargs must be a JSON object"),
        ([*OWN, "--use_peft", "--lora_task_type", "SEQ_CLS"], "only CAUSAL_LM"),
        ([*OWN, "--use_peft", "--lora_r", "0"], "--lora_r must be a finite number of at least 1"),
        ([*OWN, "--use_peft", "--lora_dropout", "1.5"], "--lora_dropout must be a finite number from 0 to 1"),
        ([*OWN, "--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "0"], "--dataloader_prefetch_factor"),
        ([*OWN, "--warmup_ratio", "0.1"], "the option --warmup_ratio was removed: --warmup_steps takes a fraction"),
        ([*OWN, "--torch-dtype=bfloat16"], "was removed: write --dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_it_is_refused_by_name(words, message):
    with pytest.raises(SystemExit, match=message):
        read(*words)


@pytest.mark.parametrize(
    "words",
    [
        [*OWN, "--use_peft", "--lora_r", "8"],
        ["--lora_r", "8"],  # the bundled job has an adapter
        [*OWN, "--use_peft", "false", "--lora_r", "8"],  # turned off on purpose
        [*OWN, "--save_steps", "5"],
        [*OWN, "--eval_strategy", "epoch", "--eval_steps", "10"],
        [*OWN, "--eval_strategy", "epoch", "--save_strategy", "best", "--metric_for_best_model", "loss"],
        ["--dataset_name", "some/data", "--dataset_test_split", "test_prefs"],
        [*OWN, "--model_init_kwargs", '{"revision": "main"}'],
    ],
    ids=" ".join,
)
def test_what_has_an_effect_passes(words):
    read(*words)


def test_a_config_is_held_to_the_same_unless_it_is_set_aside(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "some/model", "dataset_name": "some/data", "lora_r": 8}))
    with pytest.raises(SystemExit, match="--lora_r would have no effect without --use_peft"):
        read("--config", str(file))
    read("--config", str(file), "--use_peft")
    read("--config", str(file), "--demo")
