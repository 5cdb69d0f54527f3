"""`prefopt rounds run` and `recipes/irpo.py`: from a command line to a run of rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.data.encodings import Encodings
from prefopt.evaluation.judges.build import parse_judge
from prefopt.generation.prompts import prompt_ids
from prefopt.generation.samples import SamplingSettings
from prefopt.generation.stage import read_prompts
from prefopt.losses import parse
from prefopt.online.builders import PairBuilder
from prefopt.online.engines import is_sharded
from prefopt.online.generators import check_generator, generators_of
from prefopt.online.judging import judges_of
from prefopt.online.loop import Prompts, Rounds
from prefopt.online.options import RoundsArguments, options_of, pairing_of, sampling_of
from prefopt.online.pairing import check_gold
from prefopt.online.policy import RoundPlan, loss_of, plan_round, prompts_of
from prefopt.online.tasks import TASKS
from prefopt.recipe import Recipe, parse_arguments, preflight
from prefopt.recipe.ready import Ready
from prefopt.safety.errors import UsageError
from prefopt.scoring.model import positions_in

LOSS = "irpo(beta=0.1, alpha=1.0)"


def load_prompts(recipe: Recipe) -> Prompts:
    """The prompts of a run, checked.

    Raises:
        UsageError: if a file holds no prompts, or a held-out prompt is among those to train on.
    """
    script = options_of(recipe)
    if recipe.bundled_data:
        task = TASKS[script.task]
        recipe.console.print(f"Bundled task {script.task}: {task.words}", soft_wrap=True)
        return Prompts(task.prompts("train"), task.prompts("heldout"))
    train, repeated = read_prompts(Path(str(script.prompts)))
    heldout: list[Any] = []
    if script.heldout_prompts is not None:
        heldout, more = read_prompts(Path(script.heldout_prompts))
        repeated += more
    if repeated:
        recipe.console.print(f"{repeated} prompts that are repeated in a file are used once.", soft_wrap=True)
    shared = {row.id for row in train} & {row.id for row in heldout}
    if shared:
        raise UsageError(
            f"{len(shared)} prompts of --heldout_prompts are in --prompts too, the first {sorted(shared)[0]}: take "
            "them out of one of the files"
        )
    return Prompts(train, heldout)


def check_rounds(recipe: Recipe, ready: Ready, prompts: Prompts) -> None:
    """Refuse what cannot work in some round, before any model is loaded.

    Raises:
        UsageError: naming the option.
    """
    script, loss = options_of(recipe), recipe.training.loss
    if loss is None:
        raise UsageError("rounds need a loss expression, such as --loss irpo")
    for name in ("temperature", "round_losses"):
        if (given := len(getattr(script, name) or ())) > script.rounds:
            last = f"The last {given - script.rounds} of --{name} wait for more --rounds"
            recipe.console.print(f"{last}: {given} are given, one a round, and --rounds is {script.rounds}.")
    check_generator(recipe, ready, heldout=bool(prompts.heldout))
    pairing = pairing_of(script, None, recipe.training.seed)
    builder = pairing.builder
    check_gold(pairing, prompts.train, "--gold")
    for text in (*(script.judges or ()), *(script.heldout_judges or ())):
        parse_judge(text)
    if builder.needs_scores and not script.judges:
        raise UsageError(f"pairs {builder} needs scores: name a judge with --judges")
    _check_lengths(recipe, ready, prompts)
    for number in range(1, script.rounds + 1):
        _refuse_single_samples(script, builder, sampling_of(script, number, recipe.training.seed), number)
        _refuse_other_rows(builder, loss_of(script, loss, number), number)
        plan = plan_round(script, Path(recipe.training.output_dir), ready.model, loss, number)
        if is_sharded(recipe.training):
            _refuse_sharded(plan, script)
        prompts_of(script, prompts.train, number, recipe.training.seed)


def _check_lengths(recipe: Recipe, ready: Ready, prompts: Prompts) -> None:
    """Refuse, before anything is sampled, prompts that a later round could not continue, or not train on."""
    script, longest = options_of(recipe), recipe.training.max_length
    encodings = Encodings(ready.tokenizer)
    rows = [*prompts.train, *prompts.heldout]
    lengths = {row.id: len(prompt_ids(row, ready.tokenizer, encodings)) for row in rows}
    positions = positions_in(ready.config)
    assert script.max_new_tokens is not None
    over = [name for name, length in lengths.items() if positions and length + script.max_new_tokens > positions]
    if over and script.generator == "transformers":
        raise UsageError(
            f"{len(over)} of {len(rows)} prompts have more tokens with max_new_tokens={script.max_new_tokens} than "
            f"the model's {positions} positions, the first {over[0]} with {lengths[over[0]]}: shorten them, leave "
            "them out, or lower max_new_tokens"
        )
    full = [row.id for row in prompts.train if longest is not None and lengths[row.id] >= longest]
    if full and len(full) == len(prompts.train):
        raise UsageError(f"every prompt has {longest} tokens or more, so none can be trained on: raise --max_length")
    if full:
        recipe.console.print(
            f"{len(full)} of {len(prompts.train)} prompts, the first {full[0]}, have --max_length {longest} tokens or "
            "more: their pairs cannot be trained on",
            soft_wrap=True,
        )


def _refuse_other_rows(builder: PairBuilder, loss: str, number: int) -> None:
    """Refuse, before anything is sampled, a loss that reads other rows than the builder makes."""
    objective, made = parse(loss), f"round {number}: pairs {builder} makes {builder.rows}"
    if objective.grouped and not builder.grouped:
        other = "sft" if builder.supervised else "dpo"
        raise UsageError(
            f"{made}, and {loss} compares the completions of a group: take --pairs groups, or a loss on "
            f"{builder.rows}, as {other}"
        )
    if builder.grouped and not objective.grouped:
        raise UsageError(
            f"{made}, rows with all completions of a prompt, and {loss} compares no groups: take a loss that does, as "
            "gvpo or plackett_luce, or make pairs, as with --pairs best_worst"
        )
    if builder.grouped and (others := {"chosen", "rejected"} & set(objective.roles)):
        raise UsageError(
            f"{made}, and a part of {loss} needs {' and '.join(sorted(others))} completions, which groups do not "
            "have: leave that part out"
        )
    if builder.supervised and "rejected" in objective.roles:
        raise UsageError(f"{made} without a rejected completion, and {loss} needs pairs: take --pairs best_worst")


def _refuse_single_samples(
    script: RoundsArguments, builder: PairBuilder, sampling: SamplingSettings, number: int
) -> None:
    """Refuse, before anything is sampled, one completion of a prompt where a pair needs two different ones."""
    greedy = sampling.temperature == 0 and script.generator != "file"
    alone = sampling.samples == 1 or greedy
    if not alone or builder.supervised or (builder.uses_gold and script.gold is not None):
        return
    why = "--samples 1" if sampling.samples == 1 else "--temperature 0 draws the same one again"
    raise UsageError(
        f"round {number} has one completion of each prompt ({why}), and pairs {builder} need two different ones: draw "
        "more samples at a temperature above 0"
    )


def _refuse_sharded(plan: RoundPlan, script: RoundsArguments) -> None:
    """Refuse, before anything is sampled, what a later round cannot train under DeepSpeed or FSDP."""
    if script.round_optimizer == "keep":
        raise UsageError("round_optimizer keep does not work with DeepSpeed or FSDP: use round_optimizer new")
    if plan.previous is not None:
        raise UsageError(
            f"from round {plan.number} on, {plan.loss} compares with the previous iterate too, whose model is not "
            "sharded, so it does not work with DeepSpeed or FSDP: leave them out (accelerate launch --multi_gpu)"
        )


def dry_run(recipe: Recipe, ready: Ready, prompts: Prompts) -> None:
    """Print what each round would do; nothing is sampled or trained."""
    script, run = options_of(recipe), Path(recipe.training.output_dir)
    for number in range(1, script.rounds + 1):
        plan = plan_round(script, run, ready.model, str(recipe.training.loss), number)
        sampling = sampling_of(script, number, recipe.training.seed)
        count = len(prompts_of(script, prompts.train, number, recipe.training.seed))
        drawn = f"{sampling.samples} samples of each of {count} prompts at temperature {sampling.temperature:g}"
        words = ", ".join(f"{name} {text}" for name, text in plan.words.items())
        recipe.console.print(f"Round {number}: {drawn}, pairs {script.pairs}; {words}", soft_wrap=True, markup=False)
    recipe.console.print(f"Held-out prompts: {len(prompts.heldout)}. Dry run: nothing was trained.", soft_wrap=True)


def main(loss: str = LOSS, argv: Sequence[str] | None = None) -> list[dict[str, Any]] | None:
    """Run rounds; `recipes/irpo.py` writes out the same steps.

    Args:
        loss: the loss expression, unless the command line or a config has another.
        argv: the command line's words; default: those of this process.

    Returns:
        The summaries of the initial model and of the rounds; None after a dry run.
    """
    recipe = parse_arguments(loss, argv, RoundsArguments)
    ready = preflight(recipe)
    prompts = load_prompts(recipe)
    check_rounds(recipe, ready, prompts)
    if recipe.script.dry_run:
        dry_run(recipe, ready, prompts)
        return None
    script = options_of(recipe)
    judges = judges_of(script.judges or [])
    heldout_judges = judges_of(script.heldout_judges or []) or judges
    return Rounds(recipe, ready, prompts, judges, generators_of(recipe, ready), heldout_judges).run()
