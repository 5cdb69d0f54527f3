"""What `--dry_run` shows: the resolved settings, one decoded batch with its roles, expected steps and memory.

Loads a tokenizer and a model's configuration, never its weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig
from trl import ModelConfig, ScriptArguments, get_peft_config

from prefopt.data import tokenize_dataset
from prefopt.data.columns import column_names
from prefopt.losses import Loss, Need, parse
from prefopt.losses.scores import EMBEDDINGS
from prefopt.models.bundled import HUB_ID
from prefopt.models.load import adapter_base
from prefopt.planning.activations import Rows, causal_model
from prefopt.planning.engines import ENGINES
from prefopt.planning.memory import estimate, kept_under
from prefopt.planning.setting import FOUR_BIT, FOUR_BIT_PLAIN, Setting, count, of_terms
from prefopt.recipe.announce import announce
from prefopt.recipe.data import load_data
from prefopt.recipe.preflight import HubUnreachable, to_be_made, tokenizer_of
from prefopt.safety.redaction import redacted
from prefopt.safety.tables import table
from prefopt.scoring import ROLES
from prefopt.scoring.rows import RowBatch
from prefopt.trainer import PreferenceConfig, expression_from_trl_options
from prefopt.trainer.collator import collator_for
from prefopt.trainer.config import default_of

if TYPE_CHECKING:
    from prefopt.recipe.arguments import Recipe

_MAIN = {"output_dir", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "seed", "max_length"}
_DERIVED = {
    "accelerator_config",
    "activation_checkpointing",
    "dataloader_pin_memory",
    "demo",
    "disable_tqdm",
    "dry_run",
    "fsdp",
    "loss",
}


def show_settings(recipe: Recipe) -> None:
    """Print what is known before any model or data is looked at: objective, settings, global batch, the paper."""
    console, script, training, model, paper = (
        recipe.console, recipe.script, recipe.training, recipe.model, recipe.paper,
    )  # fmt: skip
    expression = training.loss or expression_from_trl_options(training)
    if expression:
        console.print(_objective(parse(expression)), soft_wrap=True)
    console.print(_settings(script, training, model, expression))
    console.print(_global_batch(training, paper), soft_wrap=True)
    if paper:
        console.print(_paper(paper, script, model, training))


def show_batch(console: Console, training: PreferenceConfig, model: ModelConfig, train: Any, tokenizer: Any) -> None:
    """Print the first batch as the loss will see it, and a memory estimate."""
    expression = training.loss or expression_from_trl_options(training)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = _first_batch(training, tokenizer, train, expression)
    console.print(*_decoded(batch, tokenizer), sep="\n")
    console.print(_memory(training, model, expression, batch))


def _objective(loss: Loss) -> Text:
    """Every term with all its hyperparameters, its formula and what it asks of the scorer."""
    text = Text("Objective\n", style="bold")
    for weight, _, term in loss.terms():
        paper = f"; arXiv {term.paper}" if term.paper else ""
        text.append(f"  {'' if weight == 1 else f'{weight:g} * '}{term}\n", style="not bold")
        text.append(f"      {term.formula}\n      needs {term.needs.words}{paper}\n", style="not bold dim")
    return text


def _global_batch(training: PreferenceConfig, paper: dict[str, Any]) -> str:
    each, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    world = PartialState().num_processes
    line = f"Global batch: {each} a process x {steps} accumulated x {world} process(es) = {each * steps * world}"
    if isinstance(devices := paper.get("devices"), int):
        line += f"; on the paper's {devices} device(s) {each * steps * devices}"
    return line


def _paper(paper: dict[str, Any], *parts: Any) -> Table:
    """What the config says about the paper; for what the paper leaves open, the value that applies instead."""
    made = table("what", "value", title="The paper, as the config has it")
    values = {name: value for part in parts for name, value in vars(part).items()}
    bundled = {"model_name_or_path": "the bundled model", "dataset_name": "the bundled pairs"}
    for key, value in paper.items():
        if isinstance(value, dict):
            lines = [f"[{mark}] {source}" for mark, source in value.items()]
        else:
            lines = list(value) if isinstance(value, list) else [value]
        if key == "unknown":
            key = "unknown: ours"
            used = {name: values[name] or bundled.get(name, values[name]) for name in lines if name in values}
            lines = [f"{name}: {getattr(used[name], 'value', used[name])}" if name in used else name for name in lines]
        made.add_row(key, Text("\n".join(map(str, lines)) or "nothing"))
    return made


def _settings(
    script: ScriptArguments, training: PreferenceConfig, model: ModelConfig, expression: str | None
) -> Table:
    """Every setting that differs from its default, and the few that people look for."""
    made = table("option", "value", title="Settings that differ from TRL's defaults, and the main ones")
    made.add_row("loss", str(parse(expression)) if expression else f"TRL's own {training.loss_type}")
    if model.model_name_or_path is None:
        made.add_row("model_name_or_path", f"the bundled {HUB_ID}")
    for part in (model, script, training):
        for option in dataclasses.fields(part):
            value = getattr(part, option.name)
            # Settings that transformers derives by itself say nothing about the run.
            hidden = option.name in _DERIVED or option.name.endswith("token") or value in (None, [], "")
            if option.name in _MAIN or (value != default_of(option) and not hidden):
                made.add_row(option.name, Text(str(redacted(getattr(value, "value", value), option.name))))
    return made


def _first_batch(
    training: PreferenceConfig, tokenizer: Any, train: Any, expression: str | None
) -> dict[str, torch.Tensor]:
    tokenised = tokenize_dataset(train.take(training.per_device_train_batch_size), tokenizer)
    objective = parse(expression) if expression else None
    collator = collator_for(objective, training, tokenizer.pad_token_id)
    # A dry run leaves the vectors of --embeddings uncomputed.
    collator.embeddings &= set(EMBEDDINGS) <= set(column_names(tokenised))
    return collator(list(tokenised))


def _decoded(batch: dict[str, torch.Tensor], tokenizer: Any, shown: int = 4) -> list[Any]:
    """The rows of the first examples token by token: prompt dim, completion marked, padding counted."""
    order = sorted(range(len(batch["roles"])), key=lambda row: int(batch["examples"][row]))[:shown]
    lines: list[Any] = [Text("\nFirst rows of the first batch, token by token", style="bold")]
    for row in order:
        ids = batch["input_ids"][row].tolist()
        scored, real = batch["completion_mask"][row].tolist(), batch["attention_mask"][row].tolist()
        role = ROLES[int(batch["roles"][row])]
        head = f"example {int(batch['examples'][row])}, {role}: {sum(real) - sum(scored)} prompt tokens, "
        head += f"{sum(scored)} scored, {len(real) - sum(real)} padding\n"
        line = Text(head, style="bold")
        whole = [(token, bool(mark)) for token, mark, there in zip(ids, scored, real, strict=True) if there]
        for i, (text, is_scored) in enumerate(_readable(whole, tokenizer)):
            style = "reverse green" if is_scored else "dim"
            line.append(f"[{text}]" if is_scored else text, style=style if i % 2 or not is_scored else "green")
        lines.append(line)
    lines.append(
        Text(
            "[bracketed] tokens are scored; the rest is context. Tokens that make up one character share brackets.\n",
            style="dim",
        )
    )
    return lines


_TOKENS_OF_A_CHARACTER = 4
"""Most tokens that one character can take: a character has at most so many bytes."""


def _readable(tokens: list[tuple[int, bool]], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text of tokens, scored or not, one by one, or together where only several make a whole character."""
    start = 0
    while start < len(tokens):
        scored = tokens[start][1]
        length, text = 1, ""
        for end in range(start + 1, min(start + _TOKENS_OF_A_CHARACTER, len(tokens)) + 1):
            if tokens[end - 1][1] != scored:
                break
            longer = tokenizer.decode([token for token, _ in tokens[start:end]])
            if end == start + 1 or "\ufffd" not in longer:
                length, text = end - start, longer
            if "\ufffd" not in longer:
                break
        yield text.replace("\n", "\\n"), scored
        start += length


def _memory(
    training: PreferenceConfig, model: ModelConfig, expression: str | None, batch: dict[str, torch.Tensor]
) -> Table:
    """The parts of `prefopt.planning.memory` for this batch, on the engine that this process was started under."""
    name = str(model.model_name_or_path)
    config = AutoConfig.from_pretrained(
        adapter_base(name) or name, revision=model.model_revision, trust_remote_code=training.trust_remote_code
    )
    adapter = _adapter_settings(model)
    with torch.device("meta"):
        sizes = count(causal_model(config), adapter)
    engine, half = _engine(training), bool(training.bf16 or training.fp16)
    named = config.dtype if model.dtype == "auto" else model.dtype
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, str(named or "float32"))
    loss = parse(expression) if expression else None
    needs = Need.REFERENCE if loss is None else loss.needs
    quantized = FOUR_BIT if model.use_bnb_nested_quant else FOUR_BIT_PLAIN
    setting = Setting(
        dtype=dtype, half=half, checkpointed=bool(training.gradient_checkpointing),
        accumulates=training.gradient_accumulation_steps > 1,
        reference=needs.frozen and not training.precompute_ref_log_probs,
        quantized=quantized if model.load_in_4bit else None, processes=PartialState().num_processes,
        device="cpu" if not torch.accelerator.is_available() or training.use_cpu else "accelerator",
        **of_terms(loss),
    )  # fmt: skip
    rows = _rows(training, batch).within(training.token_budget)
    kept = kept_under(engine, config, rows, setting, adapter)
    need = estimate(sizes, kept, kept.rows.scored, setting, engine)
    labels = {
        "weights": f"weights, {sizes.total / 1e6:.0f}M",
        "gradients": f"gradients, {sizes.trainable / 1e6:.1f}M",
        "activations": f"activations of {kept.rows.tokens} tokens" + ("" if kept.counted else ", a rule of thumb"),
    }
    shape = f"{rows.count} x {rows.length}, {rows.scored} scored"
    made = table("part", "GB", right=("GB",), title=f"Memory per process for rows like these ({shape}), {engine}")
    for part, size in need.parts.items():
        made.add_row(labels.get(part, part), f"{size / 1e9:.2f}")
    made.add_row("sum", f"{need.total / 1e9:.2f}", style="bold")
    return made


def _rows(training: PreferenceConfig, batch: dict[str, torch.Tensor]) -> Rows:
    """The batch's rows, planted as trees unless the padded layout is asked for."""
    count, length = batch["input_ids"].shape
    trees = None if training.layout == "padded" else tuple(RowBatch.of(batch).trees)
    return Rows(trees or None, count, length, int(batch["completion_mask"].sum()))


def _engine(training: PreferenceConfig) -> str:
    """What `accelerate launch` set this process up for, by its name in `prefopt.planning.engines.ENGINES`."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true" or training.deepspeed:
        plugin = training.deepspeed_plugin
        stage = 2 if plugin is None else plugin.zero_stage
        offloads = plugin is not None and str(plugin.offload_param_device) == "cpu"
        name = f"zero{stage}" + ("_offload" if offloads else "")
        return name if name in ENGINES else "ddp"
    # On a CPU accelerate takes DDP in FSDP's place.
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and torch.accelerator.is_available()
    return "fsdp2" if sharded else "ddp"


def dry_run(recipe: Recipe) -> None:
    """Show what the run would be, train nothing.

    Where the Hub cannot be reached, whatever does not need it is shown, and one line says what is missing.
    """
    console = recipe.console
    show_settings(recipe)
    if (missing := to_be_made(recipe)) is not None:
        console.print(f"No batch, steps or memory: {missing}.", soft_wrap=True)
    else:
        try:
            train, heldout = load_data(recipe)
        except HubUnreachable as error:
            console.print(f"No batch, steps or memory: {error}.", soft_wrap=True)
        else:
            announce(recipe, train, heldout)
            show_batch(console, recipe.training, recipe.model, train, tokenizer_of(recipe))
    console.print("Dry run: nothing was trained.")


def _adapter_settings(model: ModelConfig) -> Any:
    """The adapter that will be trained: the saved one, a new one, or None for all weights."""
    if model.model_name_or_path is not None and adapter_base(model.model_name_or_path) is not None:
        settings = PeftConfig.from_pretrained(model.model_name_or_path)
        settings.inference_mode = False
        return settings
    return get_peft_config(model)
