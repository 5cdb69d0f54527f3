"""`prefopt plan`: which way of training fits on which GPUs, what it needs by part, and the command that starts it.

Reads a model's configuration, never its weights. The numbers come from `memory`; the simplest engine that fits is
chosen.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, HfArgumentParser, LlamaConfig

from prefopt.losses import Loss, parse, register_file
from prefopt.losses.conflict import OwnGradient
from prefopt.models.causal import why_not_causal
from prefopt.models.load import ModelError, adapter_base
from prefopt.planning.activations import Rows, causal_model, made_up_rows
from prefopt.planning.engines import ENGINES
from prefopt.planning.memory import Estimate, estimate, kept_under
from prefopt.planning.setting import FOUR_BIT, Setting, count, of_terms
from prefopt.safety.errors import UsageError, retold
from prefopt.safety.tables import table

METHODS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
TITLES = {
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "fsdp2": "FSDP2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3 + offload",
}
USABLE = 0.92
"""Share of a GPU's memory that tensors may take; the CUDA context, NCCL and fragmentation take the rest."""

FAMILIES = {
    "1B": ("meta-llama/Llama-3.2-1B-Instruct", 2048, 8192, 16, 32, 8, True),
    "3B": ("meta-llama/Llama-3.2-3B-Instruct", 3072, 8192, 28, 24, 8, True),
    "8B": ("meta-llama/Llama-3.1-8B-Instruct", 4096, 14336, 32, 32, 8, False),
    "70B": ("meta-llama/Llama-3.3-70B-Instruct", 8192, 28672, 80, 64, 8, False),
}
"""Llama's shapes: name, hidden and MLP width, layers, heads of queries and of keys, whether the head is tied."""


@dataclass
class Job:
    """What is to be trained, on what."""

    model: str = field(
        metadata={
            "aliases": ["--model_name_or_path"],
            "help": f"A Hub name, a folder, or without either a size: {', '.join(FAMILIES)}.",
        }
    )
    loss: str = field(default="dpo(beta=0.1)", metadata={"help": "Loss expression; says whether a reference is kept."})
    loss_file: str | None = field(default=None, metadata={"help": "A Python file of yours with losses for --loss."})
    gpus: int = field(default=1, metadata={"help": "GPUs of all machines together."})
    nodes: int = field(default=1, metadata={"help": "Machines they are in."})
    memory: float = field(default=80.0, metadata={"help": "Memory of a GPU in GB (1e9 bytes)."})
    method: str = field(default="all", metadata={"help": "What trains.", "choices": ["all", *METHODS]})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Pairs, or completions, a GPU."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches a step."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a prompt with a completion."})
    prompt_length: int | None = field(default=None, metadata={"help": "Of those, the prompt's. Not set: half."})
    token_budget: int | None = field(default=None, metadata={"help": "The recipes' option of this name."})
    layout: str = field(
        default="auto", metadata={"help": "The recipes' option.", "choices": ["auto", "tree", "padded"]}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the loaded weights. Not set: float32 to train them, bfloat16 to train adapters.",
            "choices": ["float32", "bfloat16"],
        },
    )
    bf16: bool = field(default=True, metadata={"help": "bfloat16 mixed precision."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Compute activations again."})
    precompute_ref_log_probs: bool = field(default=False, metadata={"help": "Drops the reference before training."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Layers that get one."}
    )

    def __post_init__(self) -> None:
        least = {"gpus": 1, "nodes": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
                 "max_length": 2, "lora_r": 1}  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UsageError(f"--{name} must be at least {smallest}, got {getattr(self, name)}")
        if not 0 < self.memory < math.inf:
            raise UsageError(f"--memory is in GB and must be more than 0, got {self.memory}")
        if self.gpus % self.nodes:
            raise UsageError(f"--gpus {self.gpus} cannot be divided evenly over --nodes {self.nodes}")
        if self.token_budget is not None and self.token_budget < 1:
            raise UsageError(f"--token_budget must be at least 1 token, got {self.token_budget}")
        if not 0 < self.prompt < self.max_length:
            raise UsageError(
                f"--prompt_length must leave room for a completion within --max_length {self.max_length}, "
                f"got {self.prompt_length}"
            )

    @property
    def prompt(self) -> int:
        return self.max_length // 2 if self.prompt_length is None else self.prompt_length

    def dtype_of(self, method: str) -> str:
        return self.dtype or ("float32" if method == "full" else "bfloat16")


_OF_RECIPES = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "token_budget", "layout", "bf16",
    "gradient_checkpointing", "precompute_ref_log_probs",
)  # fmt: skip
RECIPE_DEFAULTS: dict[str, Any] = {
    **{option.name: option.default for option in fields(Job) if option.name in _OF_RECIPES},
    "dtype": "float32",
}
"""Defaults that a command can leave out; a test compares them with the recipes' own."""


@dataclass(frozen=True)
class Way:
    """One method on one engine."""

    method: str
    engine: str
    need: Estimate


def main(argv: Sequence[str]) -> None:
    """Print the plan for the options of a command line.

    Raises:
        ValueError: naming the option, or the place in the loss, that is invalid.
        ModelError: if the model is not on this machine and the Hub cannot be reached.
    """
    parser = HfArgumentParser(Job, prog="prefopt plan", description="Which way of training fits, and its command.")
    job, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    if unknown:
        raise UsageError(f"prefopt plan has no option {unknown[0]}; --help lists them")
    if job.loss_file is not None:
        register_file(job.loss_file)
    loss = parse(job.loss)
    name, config, built_in = model_config(job.model)
    rows = made_up_rows(
        job.per_device_train_batch_size, job.prompt, job.max_length - job.prompt,
        4 if loss.grouped else 2 if loss.paired else 1,
        job.layout == "padded",
    ).within(job.token_budget)  # fmt: skip
    with torch.device("meta"), retold(UsageError, f"--model {job.model}"):
        network = causal_model(config)
    ways = ways_of(job, loss, network, config, rows)
    console = Console()
    for line in [*_head(job, loss, name, built_in, rows, network.num_parameters()), *_advice(job, name, ways)]:
        console.print(line, crop=False)
    for method in dict.fromkeys(way.method for way in ways):
        console.print()
        console.print(_table(job, [way for way in ways if way.method == method]))


def model_config(model: str) -> tuple[str, Any, bool]:
    """A model's name, its configuration, and whether that is a built-in shape of its size.

    Raises:
        ModelError: naming the sizes that go without the Hub.
    """
    if model.upper() in FAMILIES:
        name, hidden, inner, layers, heads, groups, tied = FAMILIES[model.upper()]
        config = LlamaConfig(
            vocab_size=128256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=tied,
            max_position_embeddings=131072, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        return name, config, True
    try:
        config = AutoConfig.from_pretrained(adapter_base(model) or model)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"--model {model}: {first} Name a folder or a model of the Hub, or a size with built-in shapes: "
            f"{', '.join(FAMILIES)}"
        ) from error
    if reason := why_not_causal(config):
        raise ModelError(f"--model {model} {reason}")
    return model, config, False


def ways_of(job: Job, loss: Loss, network: Any, config: Any, rows: Rows) -> list[Way]:
    """Every method on every engine that it goes with, the simplest engine first; `network` is on the meta device."""
    ways = []
    for method in METHODS if job.method == "all" else [job.method]:
        adapter = None
        if method != "full":
            target: Any = job.lora_target_modules
            target = target[0] if target == ["all-linear"] else target
            adapter = LoraConfig(r=job.lora_r, target_modules=target, task_type="CAUSAL_LM")
        with torch.device("meta"), retold(UsageError, f"--lora_target_modules {' '.join(job.lora_target_modules)}"):
            sizes = count(causal_model(config) if adapter is not None else network, adapter)
        setting = Setting(
            dtype=getattr(torch, job.dtype_of(method)), half=job.bf16, checkpointed=job.gradient_checkpointing,
            accumulates=job.gradient_accumulation_steps > 1,
            reference=loss.needs.frozen and not job.precompute_ref_log_probs,
            quantized=FOUR_BIT if method == "qlora" else None, processes=job.gpus, nodes=job.nodes,
            **of_terms(loss),
        )  # fmt: skip
        # Counted once for all sharded engines, which keep the same.
        whole, sharded = (kept_under(engine, config, rows, setting, adapter) for engine in ("ddp", "zero3"))
        for engine in _engines(job, method, loss):
            saved = whole if engine == "ddp" else sharded
            ways.append(Way(method, engine, estimate(sizes, saved, saved.rows.scored, setting, engine)))
    return ways


def _engines(job: Job, method: str, loss: Loss) -> list[str]:
    """One GPU needs no sharding; 4-bit weights are sharded by FSDP2 only; gradients by term or answer by no engine."""
    if isinstance(loss, OwnGradient):
        return ["ddp"]
    if method == "qlora":
        return ["ddp"] if job.gpus == 1 else ["ddp", "fsdp2"]
    return ["ddp", "zero3_offload"] if job.gpus == 1 else list(ENGINES)


def fits(job: Job, way: Way) -> bool:
    return way.need.total <= USABLE * job.memory * 1e9


# ---- what is printed ------------------------------------------------------------------------------------------------


def _head(job: Job, loss: Loss, name: str, built_in: bool, rows: Rows, parameters: int) -> list[Text]:
    source = f"{name} ({'its shapes are built in; the Hub was not asked' if built_in else 'from its configuration'})"
    shape = (
        f"{rows.tokens} tokens at once on a GPU: prompts of {job.prompt}, completions of {job.max_length - job.prompt}"
    )
    if not loss.needs.frozen:
        reference = f"no reference model, since {job.loss} compares with none"
    elif job.precompute_ref_log_probs:
        reference = "no reference model while training, since its log-probabilities are computed before"
    else:
        reference = "a reference model for full fine-tuning; with adapters it is the model without them"
    lines = [f"{source}: {parameters / 1e9:.2f} billion parameters", f"{shape}; {reference}."]
    if isinstance(loss, OwnGradient):
        lines.append(f"{loss.name} works only with one process or DDP: DeepSpeed and FSDP keep no gradients apart.")
    return [Text(line) for line in lines]


def _title(job: Job, engine: str) -> str:
    return "one process" if job.gpus == 1 and engine == "ddp" else TITLES[engine]


PARTS = {
    "weights": ("weights",),
    "reference": ("reference model",),
    "gradients": ("gradients", "terms' gradients"),
    "optimizer": ("optimizer (AdamW)",),
    "activations": ("activations", "a layer going backward", "head and layer take turns", "freed as gradients come"),
    "copies": ("autocast's copies of weights",),
    "logits": ("logits, a chunk at a time",),
    "buffers": ("buffers",),
}
"""A row of the table and the parts of an estimate that it adds up."""


def _table(job: Job, ways: list[Way]) -> Table:
    """What one method needs: a column an engine, so that all of them fit into 80 columns."""
    method = METHODS[ways[0].method]
    title = f"{method[0].upper()}{method[1:]}: GB a GPU"
    engines = [_title(job, way.engine).replace(" + ", "\n+ ") for way in ways]
    shown = table("", *engines, right=engines, title=title, title_justify="left", min_width=len(title))
    for name, group in PARTS.items():
        sizes = [sum(way.need.parts.get(part, 0) for part in group) for way in ways]
        shown.add_row(name, *(f"{size / 1e9:.1f}" if size else "-" for size in sizes))
    shown.add_section()
    shown.add_row("sum", *(f"{way.need.total / 1e9:.1f}" for way in ways), style="bold")
    answers = (Text("yes", style="green") if fits(job, way) else Text("no", style="red") for way in ways)
    shown.add_row(f"fits in {USABLE * job.memory:.0f}", *answers)
    if any(way.need.host for way in ways):
        shown.add_row("main memory", *(f"{way.need.host / 1e9:.0f}" if way.need.host else "-" for way in ways))
    return shown


def _advice(job: Job, name: str, ways: list[Way]) -> list[Text]:
    """For every method: the simplest engine that fits and why, with its commands; or what would help."""
    lines = []
    for method in dict.fromkeys(way.method for way in ways):
        own = [way for way in ways if way.method == method]
        chosen = next((way for way in own if fits(job, way)), None)
        if chosen is None:
            least = min(own, key=lambda way: way.need.total)
            lines.append(
                f"\n{METHODS[method]}: nothing fits; {_title(job, least.engine)} needs least, "
                f"{least.need.total / 1e9:.0f} GB. More GPUs, a smaller --per_device_train_batch_size or a "
                "--token_budget would lower it."
            )
            continue
        lines.append(f"\n{METHODS[method]}: {_title(job, chosen.engine)}, {_reason(job, own[: own.index(chosen)])}")
        if job.nodes > 1:
            lines.append("On every machine, with its --machine_rank and the first one's --main_process_ip added:")
        lines += _commands(job, name, chosen)
    return [Text(line, **(_AS_IT_IS if line.startswith("  ") else {})) for line in lines]


_AS_IT_IS: dict[str, Any] = {"no_wrap": True, "overflow": "ignore"}
"""For commands, which are copied."""


def _reason(job: Job, simpler: list[Way]) -> str:
    """Why not one of these."""
    if not simpler:
        return "nothing is simpler."
    least = min(way.need.total for way in simpler)
    text = f"the simplest that fits: what is simpler needs {least / 1e9:.0f} GB or more."
    without = [
        w for w in simpler if w.need.total - w.need.parts.get("reference model", 0) <= USABLE * job.memory * 1e9
    ]
    if without:
        text += f" {_title(job, without[0].engine)} would fit with --precompute_ref_log_probs."
    return text


def _commands(job: Job, name: str, way: Way) -> list[str]:
    """The commands that write the engine's settings and start the training; neither needs a clone."""
    launch, commands = ["accelerate", "launch"], []
    if job.gpus > 1 or way.engine != "ddp":
        commands.append(f"  prefopt new config accelerate/{way.engine}")
        launch += ["--config_file", f"{way.engine}.yaml"]
    launch += ["--num_processes", str(job.gpus)]
    if job.nodes > 1:
        launch += ["--num_machines", str(job.nodes)]
    words = [*launch, "-m", "prefopt", "train", "--model_name_or_path", name, "--dataset_name", "PAIRS"]
    words += ["--loss", job.loss]
    words += [] if job.loss_file is None else ["--loss_file", job.loss_file]
    settings = vars(job) | {"dtype": job.dtype_of(way.method)}
    for option, usual in RECIPE_DEFAULTS.items():
        if (value := settings[option]) != usual:
            words += [f"--{option}", str(value).lower() if isinstance(value, bool) else str(value)]
    if way.method != "full":
        words += ["--use_peft", "--lora_r", str(job.lora_r), "--lora_target_modules", *job.lora_target_modules]
    if way.method == "qlora":
        words += ["--load_in_4bit", "--use_bnb_nested_quant", "--bnb_4bit_quant_storage", "bfloat16"]
    return [*commands, _in_lines(words)]


def _in_lines(words: list[str], width: int = 78) -> str:
    """A command as a shell reads it, over several lines that end with a backslash; options stay with their values."""
    groups: list[str] = []
    for word in map(shlex.quote, words):
        if groups and not word.startswith("-"):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines = [f"  {groups[0]}"]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) < width:
            lines[-1] += f" {group}"
        else:
            lines.append(f"      {group}")
    return " \\\n".join(lines)
