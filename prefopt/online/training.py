"""The training of a round: a recipe on the round's pairs, from the round's models, resumed where it was killed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import TrainerCallback, set_seed

from prefopt.generation.memory import free_memory
from prefopt.models.load import load_model, load_tokenizer
from prefopt.online.engines import whole_models
from prefopt.online.folders import RoundFolder
from prefopt.online.policy import RoundPlan
from prefopt.online.start import check_models
from prefopt.recipe import Recipe, RecipeArguments, load_data, make_trainer, preflight
from prefopt.recipe.pages import write_page
from prefopt.recipe.ready import Ready
from prefopt.recipe.run import begin, train
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_whole


@dataclass(frozen=True)
class Trained:
    """What the training of a round leaves for its summary.

    Attributes:
        rows: that were trained on.
        rows_left_out: that could not be trained on (too long, ...); they are in a file of the model's folder.
        steps: of the optimizer.
        log: the last logged values of each name.
    """

    rows: int
    rows_left_out: int
    steps: int
    log: dict[str, float]


def train_round(
    recipe: Recipe,
    plan: RoundPlan,
    folder: RoundFolder,
    rows: int,
    keep_optimizer: bool,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> Trained:
    """Train on the round's pairs, and save the model.

    Args:
        recipe: of the whole run.
        plan: the round.
        folder: of the round.
        rows: in the file of pairs.
        keep_optimizer: whether the next round continues with the optimizer's state.
        digests: of the weights of models, by name; where the reference is not the start, both are checked.
    """
    own = round_recipe(recipe, plan, folder)
    ready = preflight(own)
    data = load_data(own, ready)
    set_seed(own.training.seed)  # a new adapter's weights are drawn: the same ones after a kill
    trainer = make_trainer(own, ready, data)
    check_models(trainer, plan, digests)
    if plan.optimizer is not None or keep_optimizer:
        _refuse_sharded(trainer)
        trainer.add_callback(_KeptOptimizer(plan.optimizer, folder.optimizer if keep_optimizer else None))
    train(own, trainer, begin(own, trainer))
    write_page(own, trainer, say=False)
    trained = Trained(len(data.train), rows - len(data.train), trainer.state.global_step, _last_values(trainer))
    if trainer.is_world_process_zero():
        trainer.create_model_card()
    if trainer.is_deepspeed_enabled:
        # Accelerate refuses a second trainer's DeepSpeed plugin while the first one's is set.
        AcceleratorState._reset_state()
    del trainer
    free_memory()
    return trained


def round_recipe(recipe: Recipe, plan: RoundPlan, folder: RoundFolder) -> Recipe:
    """The recipe of one round: the options of the run, with the round's models, loss, pairs and folder."""
    training = copy.copy(recipe.training)
    for name in ("deepspeed_plugin", "hf_deepspeed_config"):  # a trainer writes into them
        setattr(training, name, copy.deepcopy(getattr(training, name, None)))
    training.output_dir, training.loss = str(folder.model), plan.loss
    training.seed = recipe.training.seed + plan.number - 1
    training.resume_from_checkpoint = "auto"
    training.push_to_hub = False
    model = copy.copy(recipe.model)
    model.model_name_or_path = plan.start
    script = RecipeArguments(
        dataset_name=str(folder.pairs),
        eval_rows=0,
        on_bad_rows="drop",  # they are counted, and stored beside the model
        ref_model_name_or_path=plan.reference,
        previous_model_name_or_path=plan.previous,
        chat_template=recipe.script.chat_template,
        loss_file=recipe.script.loss_file,
    )
    return Recipe(script, training, model, recipe.console, recipe.paper, recipe.command, output_named=True)


def remove_checkpoints(folder: RoundFolder) -> None:
    """Delete the checkpoints of a round that is trained: its model is saved."""
    if PartialState().is_main_process:
        for checkpoint in folder.model.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    PartialState().wait_for_everyone()


def average_models(old: str, new: str, decay: float, folder: Path, ready: Ready) -> None:
    """Store `decay` of the old model plus the rest of the new one, weight by weight, with the tokenizer.

    Raises:
        UsageError: for adapters, whose average is not the average of the models.
    """
    target = folder / "model.safetensors"
    if PartialState().is_main_process and not target.exists():
        options = {name: value for name, value in ready.options.items() if name not in ("revision", "device_map")}
        with whole_models(ready.training):
            averaged, other = load_model(old, options), load_model(new, options)
        if hasattr(averaged, "peft_config") or hasattr(other, "peft_config"):
            raise UsageError("round_reference moving_average needs whole models: leave use_peft out")
        weights = dict(other.named_parameters())
        with torch.no_grad():
            for name, value in averaged.named_parameters():
                value.lerp_(weights[name], 1 - decay)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        averaged.save_pretrained(unfinished)
        load_tokenizer(new).save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    PartialState().wait_for_everyone()


class _KeptOptimizer(TrainerCallback):  # type: ignore[misc]
    """Starts with the optimizer's state of an earlier round, and stores it for the next one.

    Args:
        start: the file with the state to start from, or None.
        end: the file to write, or None.
    """

    def __init__(self, start: Path | None, end: Path | None):
        self._start, self._end = start, end

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self._start is None or state.global_step > 0:  # a resumed run has the state of its checkpoint
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(torch.load(self._start, map_location=args.device, weights_only=True))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the schedule is the new round's

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self._end is not None and state.is_world_process_zero:
            end = self._end
            write_whole(end, lambda unfinished: torch.save(optimizer.state_dict(), unfinished))


def _refuse_sharded(trainer: Any) -> None:
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UsageError("round_optimizer keep does not work with DeepSpeed or FSDP: use round_optimizer new")


def _last_values(trainer: Any) -> dict[str, float]:
    values: dict[str, float] = {}
    for entry in trainer.state.log_history:
        values |= {name: value for name, value in entry.items() if isinstance(value, (int, float))}
    # Times, and what transformers sums over this process's own steps, differ where a run was resumed.
    own = ("runtime", "per_second", "train_loss", "total_flos")
    return {name: values[name] for name in sorted(values) if not any(word in name for word in own)}
