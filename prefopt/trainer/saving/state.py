"""State of a run beside the model and the optimizer, saved with every checkpoint and read back.

That is the objective's own state (such as a running mean), the token count, the means and the loss since the last log
line, and an evaluation that is still due. It also holds what identifies the run: its loss, data and batches.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import TrainerCallback

from prefopt.losses import Loss
from prefopt.safety.folders import what_is_there
from prefopt.scoring.cache import ReferenceCache
from prefopt.trainer.adapters import moves_weights
from prefopt.trainer.learned import LearnedLoss
from prefopt.trainer.saving.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

FILE = "objective.safetensors"
OPTIMIZER_FILE = "objective_optimizer.safetensors"
REFERENCE = "reference.safetensors"


class CacheWriter(TrainerCallback):
    """Writes a reference cache to disk after evaluations and epochs, and at the end.

    Checkpoints write it before they are complete, so that a resumed run finds the same entries.

    Args:
        cache: of this process.
        wait: returns once every process has called it.
    """

    def __init__(self, cache: ReferenceCache, wait: Callable[[], None]):
        self._cache = cache
        self._wait = wait

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._cache.write()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._cache.write()
        # The next epoch distributes the rows differently: a process may need what another has scored.
        self._wait()
        self._cache.read_new_files()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._cache.write()


def save_objective(objective: Loss, folder: Path, learned: LearnedLoss | None = None) -> None:
    """Write an objective's buffers and parameters into a checkpoint; a stateless objective leaves no file.

    Args:
        objective: of this run.
        folder: of the checkpoint.
        learned: the optimizer of the objective's parameters, if it has any.
    """
    optimizer = {} if learned is None else learned.state_dict()
    for file, state in ((FILE, objective.state_dict()), (OPTIMIZER_FILE, optimizer)):
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        if tensors:
            save_file(tensors, os.fspath(folder / file))


def restore(objective: Loss, folder: Path, learned: LearnedLoss | None = None) -> None:
    """Read an objective's state back from the checkpoint that a run resumes from.

    Raises:
        CheckpointError: if the objective has state and the checkpoint has none.
    """
    if not objective.state_dict():
        return
    path = folder / FILE
    if not path.exists():
        raise CheckpointError(
            f"{objective} keeps state between steps, but {path} does not exist: the checkpoint was written with "
            "another objective, or by a version that did not save this state. Start a new run from the weights in "
            "that folder (model_name_or_path), or resume with the objective that it was trained with"
        )
    objective.load_state_dict(load_file(path))
    if learned is not None:
        learned.load_state_dict(load_file(folder / OPTIMIZER_FILE))


def save_reference(model: nn.Module, folder: Path) -> None:
    """Write a reference that follows the policy (`sync_ref_model`) into a checkpoint."""
    save_model(model, os.fspath(folder / REFERENCE))


def restore_reference(model: nn.Module, folder: Path) -> None:
    """Read it back; a checkpoint of plain TRL has none, and the reference starts over at the initial policy."""
    if (folder / REFERENCE).exists():
        load_model(model, folder / REFERENCE)
    else:
        logger.warning(
            "%s does not hold the reference that sync_ref_model had updated: it starts over at the initial policy",
            folder,
        )


def leave_out_tied(load_result: Any, model: nn.Module) -> None:
    """Missing parameters, without those that share their values with a loaded one (a tied head)."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    missing = set(load_result.missing_keys)
    shared = {name for group in names.values() if group - missing for name in group}
    load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in shared]


# ---- what the run is ---------------------------------------------------------------------------------------------


def describe(objective: Loss | None, args: Any, rows: int | None, batch: int) -> dict[str, Any]:
    """Facts that a resumed run must have in common with its checkpoint, or is warned about.

    Args:
        rows: of the training data; None for a stream.
        batch: examples of one optimizer step, over all processes.
    """
    return {
        "loss": loss_of(objective, args),
        "rows": rows,
        "batch": batch,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "max_steps": args.max_steps,
        "num_train_epochs": args.num_train_epochs,
    }


def loss_of(objective: Loss | None, args: Any) -> str:
    """The objective as a checkpoint stores it: its expression, or TRL's name if TRL computes it."""
    return str(getattr(args, "loss_type", None) if objective is None else objective)


def refuse_other_loss(saved: Mapping[str, Any], loss: str, folder: Path) -> None:
    """Refuse to resume from a checkpoint of another loss.

    Args:
        saved: as `describe` made it; empty for checkpoints of plain TRL.
        loss: of this run, as `loss_of` writes it.
        folder: the checkpoint.

    Raises:
        CheckpointError: naming both losses.
    """
    if saved.get("loss", loss) != loss:
        raise CheckpointError(
            f"{folder} was trained with the loss {saved['loss']}, this run has {loss}: its optimizer and schedule "
            "belong to another objective. Resume with the same loss, or start a new run from the weights in that "
            "folder (model_name_or_path)"
        )


_WORDS = {"rows": "training rows", "batch": "examples a step", "loss": "the loss"}
_POSITION = ("rows", "batch", "seed")
"""What the position in the data depends on when a run resumes."""


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path, skips_data: bool) -> None:
    """Compare the run that wrote a checkpoint with the one that resumes from it.

    Args:
        saved, now: as `describe` makes them; `saved` is empty for checkpoints of plain TRL.
        folder: the checkpoint.
        skips_data: whether the run resumes at its position in the data, not at its start (`ignore_data_skip`).

    Raises:
        CheckpointError: if the loss, or the position in the data, would be another.
    """
    changed = {name: (saved[name], now[name]) for name in saved if name in now and saved[name] != now[name]}
    refuse_other_loss(saved, now["loss"], folder)
    moved = [name for name in _POSITION if name in changed] if skips_data else []
    if moved:
        listed = ", ".join(f"{_WORDS.get(n, n)}: {changed[n][0]} then, {changed[n][1]} now" for n in moved)
        raise CheckpointError(
            f"cannot resume from {folder} at the same position in the data ({listed}): some rows would be seen twice "
            "and others not at all. Restore these settings (on fewer processes, raise gradient_accumulation_steps), "
            "or pass ignore_data_skip=True to start the epoch again"
        )
    optimizers = {_kind_of_optimizer(name) for name in changed.get("optim", ())}
    if len(optimizers) > 1:
        raise CheckpointError(
            f"{folder} holds the state of optim={changed['optim'][0]!r}, which {changed['optim'][1]!r} cannot go on "
            "from: resume with the same optim, or start a new run from the weights in that folder (model_name_or_path)"
        )
    for name, (before, after) in changed.items():
        logger.warning("%s: %s was %s when it was written and is %s now", folder, name, before, after)


def _kind_of_optimizer(optim: str) -> str:
    """The same for names of optimizers that can read each other's state."""
    return optim.removeprefix("paged_").removesuffix("_fused")


_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
_OF_ADAPTER = (
    "peft_type", "r", "target_modules", "modules_to_save", "task_type", "lora_alpha", "alpha_pattern", "rank_pattern",
    "use_rslora", "use_dora", "bias", "lora_bias",
)  # fmt: skip


def compare_weights(folder: Path, model: Any) -> None:
    """Compare the weights in a checkpoint with the model that they would be read into.

    Args:
        folder: the checkpoint; weights that an engine keeps in its own files are not checked.
        model: of this run, unwrapped.

    Raises:
        CheckpointError: if one is an adapter and the other is not, or they are of different shapes.
    """
    held = what_is_there(folder)
    if not held.weights and not held.adapter:
        return
    settings = getattr(model, "peft_config", {})
    there, here = ("an adapter" if adapter else "all weights of a model" for adapter in (held.adapter, settings))
    way_out = "Resume with the model and the options it was trained with, or start a new run in another folder"
    if there != here:
        raise CheckpointError(
            f"{folder} was written by a run that trained {there}; this run trains {here}. {way_out}, from the weights "
            "in that folder if you like (model_name_or_path)"
        )
    names: tuple[str, ...]
    if settings:
        now = settings[getattr(model, "active_adapter", "default")].to_dict()
        names, file = _OF_ADAPTER, "adapter_config.json"
    else:
        now, names, file = model.config.to_dict(), _SHAPE, "config.json"
    try:
        saved = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # reported when the weights are read
    differs = [
        f"{n}: {saved[n]} then, {now[n]} now" for n in names if n in saved and n in now and _other(saved[n], now[n])
    ]
    inits = [adapter.get("init_lora_weights") for adapter in (saved, now)] if settings else []
    if any(map(moves_weights, inits)) and inits[0] != inits[1]:
        differs.append(f"init_lora_weights: {inits[0]} then, {inits[1]} now")
    if differs:
        what = "another adapter" if settings else "another model"
        raise CheckpointError(f"{folder} is of {what} ({'; '.join(differs)}). {way_out}")


def _other(saved: Any, now: Any) -> bool:
    """Whether two settings differ; the order of names is ignored, and a pattern may match several names."""
    if isinstance(saved, (list, tuple, set)) and isinstance(now, (list, tuple, set)):
        return set(saved) != set(now)
    return str(getattr(now, "value", now)) != str(saved) and isinstance(saved, type(getattr(now, "value", now)))
