"""configs/accelerate as accelerate itself reads it: its loader, its launcher's options, the environment of a process.

Nothing is launched: the plugins that a process would make from the environment are made here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from prefopt.planning.engines import ENGINES
from prefopt.recipe.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
SECTIONS = {"deepspeed_config": "", "fsdp_config": ""}


def launch_arguments(name: str, *options: str):
    """The launcher's arguments after it has read the file, as `accelerate launch` has them."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), *options, "recipes/dpo.py", "--loss", "dpo"]
    parser = launch_command_parser()
    arguments = parser.parse_args(words)
    arguments, defaults, _ = _validate_launch_command(arguments)
    # As `launch_command` goes on.
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return arguments


def environment_of(name: str, *options: str) -> dict[str, str]:
    arguments = launch_arguments(name, *options)
    if arguments.use_deepspeed:
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


def plugin_of(name: str):
    """What a process makes of its environment."""
    given = {
        key.lower(): value for key, value in environment_of(name).items() if key.startswith(("ACCELERATE", "FSDP"))
    }
    with patch_environment(**given):
        return FullyShardedDataParallelPlugin() if name.startswith("fsdp") else DeepSpeedPlugin()


def unknown_keys(text: str) -> list[str]:
    """Keys of the sections that no option of the launcher stands for: accelerate takes them and does nothing."""
    known = {action.dest for action in launch_command_parser()._actions}
    settings = yaml.safe_load(text)
    return [key for section in SECTIONS for key in settings.get(section, {}) if key not in known]


def test_there_is_a_file_for_every_engine_of_the_plan():
    assert {file.stem for file in FILES} == set(ENGINES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
class TestEveryFile:
    def test_the_loader_takes_it(self, file):
        config = load_config_from_file(str(file))
        assert config.mixed_precision == "bf16"
        assert config.num_machines == 1

    def test_it_has_no_key_that_would_be_ignored(self, file):
        assert unknown_keys(file.read_text()) == []

    def test_an_unknown_key_is_caught(self, file, tmp_path):
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text(file.read_text() + "num_procesess: 8\n")
        with pytest.raises(ValueError, match=r"unknown keys.*num_procesess"):
            load_config_from_file(str(wrong))
        if "_config:" in file.read_text():
            section = re.sub(r"(\w+_config:\n)", r"\1  zero_stadium: 3\n", file.read_text())
            assert unknown_keys(section) == ["zero_stadium"]

    def test_processes_and_machines_come_from_the_command_line(self, file):
        arguments = launch_arguments(
            file.stem, "--num_processes", "16", "--num_machines", "2", "--machine_rank", "1", "--main_process_ip",
            "10.0.0.1", "--main_process_port", "29511",
        )  # fmt: skip
        if arguments.use_deepspeed:
            # No `deepspeed` command: with the standard launcher every machine starts its own processes.
            command, environment = prepare_deepspeed_cmd_env(arguments)
            assert command is None
        else:
            environment = prepare_multi_gpu_env(arguments)
        assert (arguments.nproc_per_node, arguments.nnodes, arguments.node_rank) == ("8", "2", 1)
        assert arguments.rdzv_backend == "static"
        assert arguments.rdzv_endpoint == "10.0.0.1:29511"
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"

    def test_its_head_says_when_to_take_it_and_what_it_needs(self, file):
        head = file.read_text().partition("compute_environment")[0]
        assert "Choose it" in head
        assert "# Needs:" in head
        assert f"--config_file configs/accelerate/{file.name}" in head


def test_ddp_sets_no_engine():
    arguments = launch_arguments("ddp", "--num_processes", "4")
    assert arguments.multi_gpu
    assert not arguments.use_deepspeed
    assert not arguments.use_fsdp
    environment = environment_of("ddp", "--num_processes", "4")
    assert "ACCELERATE_USE_FSDP" not in environment
    assert "ACCELERATE_USE_DEEPSPEED" not in environment


@pytest.mark.parametrize(("name", "stage", "device"), [
    ("zero1", 1, "none"), ("zero2", 2, "none"), ("zero3", 3, "none"), ("zero3_offload", 3, "cpu"),
])  # fmt: skip
def test_deepspeed_gets_the_stage_and_the_rest_from_the_recipe(name, stage, device):
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    environment = environment_of(name)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    plugin = plugin_of(name)
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (
        stage, device, device,
    )  # fmt: skip
    # The recipe's own --gradient_accumulation_steps and --max_grad_norm fill these in.
    for option in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert config[option] == "auto", option
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    assert plugin.zero3_init_flag is (stage == 3)
    filled = {key: value for key, value in config.items() if value != "auto"} | {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": True},
    }  # fmt: skip
    read = deepspeed_config.DeepSpeedConfig(filled)
    assert int(read.zero_config.stage) == stage
    offloaded = read.zero_config.offload_param
    assert (str(getattr(offloaded.device, "value", offloaded.device)) if offloaded else "none") == device
    # What prefopt.planning.engines counts with.
    from prefopt.planning.engines import LIVE_PARAMETERS, REDUCE_BUCKET

    assert read.zero_config.reduce_bucket_size == REDUCE_BUCKET
    assert read.zero_config.max_live_parameters == LIVE_PARAMETERS


def test_fsdp2_shards_layer_by_layer_and_saves_whole_weights():
    environment = environment_of("fsdp2")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    plugin = plugin_of("fsdp2")
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is True
    assert not plugin.activation_checkpointing
    # No offloading: the policy is there, but not the one that keeps weights in main memory.
    assert type(plugin.cpu_offload).__name__ != "CPUOffloadPolicy"


class TestQlora:
    WORDS = ("--config", str(ROOT / "configs" / "qlora.yaml"), "--bf16", "false")

    def test_the_recipe_reads_it_as_nf4_stored_so_that_fsdp_can_shard_it(self):
        import torch
        from trl import get_peft_config, get_quantization_config

        recipe = parse_arguments("dpo", list(self.WORDS))
        quantised = get_quantization_config(recipe.model)
        assert quantised.load_in_4bit
        assert quantised.bnb_4bit_quant_type == "nf4"
        assert quantised.bnb_4bit_use_double_quant
        assert quantised.bnb_4bit_compute_dtype == torch.bfloat16
        # The same type as what trains and as what is left unquantised, or FSDP could not put them in one group.
        assert quantised.bnb_4bit_quant_storage == torch.bfloat16
        assert recipe.model.dtype == "bfloat16"
        assert get_peft_config(recipe.model).r == 16

    def test_a_misspelt_option_is_refused(self, tmp_path):
        wrong = tmp_path / "qlora.yaml"
        wrong.write_text(
            (ROOT / "configs" / "qlora.yaml").read_text().replace("use_bnb_nested_quant", "use_bnb_quant")
        )
        with pytest.raises(SystemExit, match=r"no option 'use_bnb_quant'.*use_bnb_nested_quant"):
            parse_arguments("dpo", ["--config", str(wrong)])
