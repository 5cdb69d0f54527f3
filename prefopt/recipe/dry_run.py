"""Output of `--dry_run`: the resolved settings, one decoded batch with its roles, expected steps and memory.

Loads a tokenizer and a model's configuration, never its weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from rich.console import Group
from rich.table import Table
from rich.text import Text
from trl import get_peft_config

from prefopt.data import tokenize_dataset
from prefopt.data.columns import column_names
from prefopt.losses import Loss, Need
from prefopt.losses.scores import EMBEDDINGS
from prefopt.models.bundled import HUB_ID
from prefopt.planning.activations import Rows, causal_model
from prefopt.planning.engines import ENGINES
from prefopt.planning.memory import estimate, kept_under
from prefopt.planning.setting import FOUR_BIT, FOUR_BIT_PLAIN, Setting, count, of_terms
from prefopt.recipe.announce import announce
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.data import Data, load_data
from prefopt.recipe.ready import HubUnreachable, MustBeMade, Ready, preflight
from prefopt.safety.redaction import redacted
from prefopt.safety.tables import table
from prefopt.scoring import ROLES
from prefopt.scoring.rows import RowBatch
from prefopt.trainer import PreferenceConfig
from prefopt.trainer.collator import collator_for
from prefopt.trainer.config import default_of

_MAIN = {"output_dir", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "seed", "max_length"}
_DERIVED = {
    "accelerator_config", "activation_checkpointing", "dataloader_pin_memory", "demo", "disable_tqdm", "dry_run",
    "fsdp", "loss",
}  # fmt: skip


def dry_run(recipe: Recipe) -> None:
    """Show what the run would do, without training.

    If the Hub cannot be reached, everything that does not need it is shown, and one line says what is missing.
    """
    console = recipe.console
    show_settings(recipe)
    try:
        ready = preflight(recipe)
        data = load_data(recipe, ready)
    except (MustBeMade, HubUnreachable) as error:
        console.print(f"No batch, steps or memory: {error}.", soft_wrap=True)
    else:
        announce(recipe, ready, data, objective=recipe.objective is None)
        batch = _first_batch(recipe, ready, data)
        console.print(*_decoded(batch, ready.tokenizer), sep="\n")
        console.print(_memory(recipe, ready, batch))
    console.print("Dry run: nothing was trained.")


# ---- settings ----------------------------------------------------------------------------------------------------


def show_settings(recipe: Recipe) -> None:
    """Show what is known without model and data: objective, settings, the paper with its global batch."""
    console = recipe.console
    if recipe.objective is not None:
        console.print(_objective(recipe.objective), soft_wrap=True)
    console.print(_settings(recipe))
    if recipe.paper:
        console.print(_global_batch(recipe), soft_wrap=True)
        console.print(_paper(recipe))


def _objective(loss: Loss) -> Text:
    """Every term with all its hyperparameters, its formula and its needs."""
    text = Text("Objective\n", style="bold")
    for weight, _, term in loss.terms():
        paper = f"; arXiv {term.paper}" if term.paper else ""
        text.append(f"  {'' if weight == 1 else f'{weight:g} * '}{term}\n", style="not bold")
        text.append(f"      {term.formula}\n      needs {term.needs.words}{paper}\n", style="not bold dim")
    return text


def _global_batch(recipe: Recipe) -> str:
    training = recipe.training
    each, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    world = PartialState().num_processes
    line = f"Global batch: {each} a process x {steps} accumulated x {world} process(es) = {each * steps * world}"
    if isinstance(devices := recipe.paper.get("devices"), int):
        line += f"; on the paper's {devices} device(s) {each * steps * devices}"
    return line


def _paper(recipe: Recipe) -> Table:
    """The config's section about the paper; for values that the paper does not give, the value that applies."""
    shown = table("what", "value", title="The paper, according to the config")
    parts = (recipe.script, recipe.model, recipe.training)
    values = {name: value for part in parts for name, value in vars(part).items()}
    bundled = {"model_name_or_path": "the bundled model", "dataset_name": "the bundled pairs"}
    for key, value in recipe.paper.items():
        if isinstance(value, dict):
            lines = [f"[{mark}] {source}" for mark, source in value.items()]
        else:
            lines = list(value) if isinstance(value, list) else [value]
        if key == "unknown":
            key = "unknown: ours"
            used = {name: values[name] or bundled.get(name, values[name]) for name in lines if name in values}
            lines = [f"{name}: {getattr(used[name], 'value', used[name])}" if name in used else name for name in lines]
        shown.add_row(key, Text("\n".join(map(str, lines)) or "nothing"))
    return shown


def _settings(recipe: Recipe) -> Table:
    """Every setting that differs from its default, and the main ones."""
    shown = table("option", "value", title="Settings that differ from TRL's defaults, and the main ones")
    loss = f"TRL's own {recipe.training.loss_type}" if recipe.objective is None else str(recipe.objective)
    shown.add_row("loss", loss)
    if recipe.bundled_model:
        shown.add_row("model_name_or_path", f"the bundled {HUB_ID}")
    for part in (recipe.model, recipe.script, recipe.training):
        for option in dataclasses.fields(part):
            value = getattr(part, option.name)
            # Settings that transformers derives itself are left out.
            hidden = option.name in _DERIVED or option.name.endswith("token") or value in (None, [], "")
            if option.name in _MAIN or (value != default_of(option) and not hidden):
                shown.add_row(option.name, Text(str(redacted(getattr(value, "value", value), option.name))))
    return shown


# ---- the first batch ---------------------------------------------------------------------------------------------


def _first_batch(recipe: Recipe, ready: Ready, data: Data) -> dict[str, torch.Tensor]:
    """The first rows, collated as in the trainer."""
    tokenizer = ready.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenised = tokenize_dataset(data.train.take(recipe.training.per_device_train_batch_size), tokenizer)
    collator = collator_for(recipe.objective, ready.training, tokenizer.pad_token_id)
    # A dry run does not compute the vectors of --embeddings.
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
"""Maximum tokens per character: a character has at most this many bytes."""


def _readable(tokens: list[tuple[int, bool]], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text of tokens, scored or not, one by one, or together if several make up one character."""
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


# ---- memory ------------------------------------------------------------------------------------------------------


def _memory(recipe: Recipe, ready: Ready, batch: dict[str, torch.Tensor]) -> Group:
    """The parts of `prefopt.planning.memory` for this batch, on the engine that this process was started under."""
    training, config, adapter = recipe.training, ready.config, _adapter_settings(recipe, ready)
    with torch.device("meta"):
        sizes = count(causal_model(config), adapter)
    engine, setting = _engine(training), _setting(recipe, config)
    rows = _rows(training, batch).within(training.token_budget)
    activations = kept_under(engine, config, rows, setting, adapter)
    need = estimate(sizes, activations, activations.rows.scored, setting, engine)
    labels = {
        "weights": f"weights, {sizes.total / 1e6:.0f}M",
        "gradients": f"gradients, {sizes.trainable / 1e6:.1f}M",
        "activations": f"activations of {activations.rows.tokens} tokens"
        + ("" if activations.counted else ", a rule of thumb"),
    }
    shape = f"{rows.count} x {rows.length}, {rows.scored} scored"
    title = f"Memory per process for rows like these ({shape}), {engine}"
    shown = table("part", "GB", right=("GB",))
    for part, size in need.parts.items():
        shown.add_row(labels.get(part, part), f"{size / 1e9:.2f}")
    shown.add_row("sum", f"{need.total / 1e9:.2f}", style="bold")
    return Group(Text(title, style="bold"), shown)


def _setting(recipe: Recipe, config: Any) -> Setting:
    training, model, objective = recipe.training, recipe.model, recipe.objective
    named = config.dtype if model.dtype == "auto" else model.dtype
    needs = Need.REFERENCE if objective is None else objective.needs
    quantized = FOUR_BIT if model.use_bnb_nested_quant else FOUR_BIT_PLAIN
    return Setting(
        dtype=named if isinstance(named, torch.dtype) else getattr(torch, str(named or "float32")),
        half=bool(training.bf16 or training.fp16),
        checkpointed=bool(training.gradient_checkpointing),
        accumulates=training.gradient_accumulation_steps > 1,
        reference=needs.frozen and not training.precompute_ref_log_probs,
        quantized=quantized if model.load_in_4bit else None,
        processes=PartialState().num_processes,
        device="cpu" if not torch.accelerator.is_available() or training.use_cpu else "accelerator",
        **of_terms(objective),
    )


def _rows(training: PreferenceConfig, batch: dict[str, torch.Tensor]) -> Rows:
    """The batch's rows, as trees unless the padded layout is requested."""
    count, length = batch["input_ids"].shape
    trees = None if training.layout == "padded" else tuple(RowBatch.of(batch).trees)
    return Rows(trees or None, count, length, int(batch["completion_mask"].sum()))


def _engine(training: PreferenceConfig) -> str:
    """The engine that `accelerate launch` set up, by its name in `prefopt.planning.engines.ENGINES`."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true" or training.deepspeed:
        plugin = training.deepspeed_plugin
        stage = 2 if plugin is None else plugin.zero_stage
        offloads = plugin is not None and str(plugin.offload_param_device) == "cpu"
        name = f"zero{stage}" + ("_offload" if offloads else "")
        return name if name in ENGINES else "ddp"
    # On a CPU accelerate uses DDP instead of FSDP.
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and torch.accelerator.is_available()
    return "fsdp2" if sharded else "ddp"


def _adapter_settings(recipe: Recipe, ready: Ready) -> Any:
    """The adapter that will be trained: the saved one, a new one, or None for all weights."""
    if ready.adapter_of is None:
        return get_peft_config(recipe.model)
    settings = PeftConfig.from_pretrained(ready.model)
    settings.inference_mode = False
    return settings
