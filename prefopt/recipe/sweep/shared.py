"""Work that the trials of a sweep share: the loaded model, reference log-probabilities, the start's evaluation.

Each trial gets what a run alone would compute itself, so sharing changes costs, never results.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from trl.trainer.utils import create_model_from_path

from prefopt.recipe.arguments import Recipe
from prefopt.recipe.data import Data
from prefopt.recipe.ready import Ready
from prefopt.recipe.sweep.measures import HeldoutPairs, PairLogps
from prefopt.safety.files import write_text
from prefopt.scoring.assemble import extras_for
from prefopt.trainer import PreferenceTrainer


class SharedModel:
    """The model before training, loaded once; every trial trains a copy."""

    def __init__(self) -> None:
        self._key = ""
        self._model: Any = None
        logging.getLogger("trl.trainer.dpo_trainer").addFilter(_without_the_note_on_instances)

    @property
    def model(self) -> Any:
        """What the last copy was made of; None if it is not in memory."""
        return self._model

    def copy(self, ready: Ready, recipe: Recipe) -> Any:
        """A fresh copy; None where the trainer is to load the model itself.

        That is so for saved adapters, quantised models, models spread over devices, and where two copies do not fit
        into this machine's memory.
        """
        options = dict(ready.training.model_init_kwargs or {})
        quantized = recipe.model.load_in_4bit or recipe.model.load_in_8bit
        if ready.adapter_of is not None or quantized or options.get("device_map") is not None:
            return None
        key = json.dumps([ready.model, options], sort_keys=True, default=str)
        if key != self._key:
            self._model = None  # before another one is loaded
            options.setdefault("trust_remote_code", ready.training.trust_remote_code)
            self._model = create_model_from_path(ready.model, **options, device_map=None)
            self._key = key
        model = self._model
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        if psutil.virtual_memory().available < 1.5 * size:
            self._key, self._model = "", None
            return model
        return copy.deepcopy(model)


def _without_the_note_on_instances(record: logging.LogRecord) -> bool:
    # TRL says that it ignores model_init_kwargs; the shared model was loaded with them.
    return "model_init_kwargs" not in record.getMessage()


def share_reference(recipe: Recipe, folder: Path) -> None:
    """Have the run's reference log-probabilities read from a folder, and written there, where the loss allows it."""
    training, objective = recipe.training, recipe.objective
    if objective is None or not objective.needs.compares or extras_for(objective).beside_reference:
        return
    if not (training.sync_ref_model or training.precompute_ref_log_probs):
        training.reference_cache = str(folder)


def start_logps(
    folder: Path, trainer: PreferenceTrainer, pairs: HeldoutPairs, recipe: Recipe, ready: Ready, data: Data
) -> PairLogps:
    """The held-out pairs under the model that training starts from: evaluated once, then read from a file.

    Args:
        folder: of the sweep.
        trainer: not trained yet.
        pairs: collects the trainer's evaluations.
        recipe, ready, data: of the trainer.
    """
    file = folder / f"start-{_start_key(recipe, ready, data)}.json"
    with FileLock(f"{file}.lock"):  # other processes train other trials
        if file.exists():
            return PairLogps.of(json.loads(file.read_text(encoding="utf-8"))["pairs"])
        trainer.evaluate()
        assert pairs.last is not None
        write_text(file, json.dumps({"model": ready.model, "pairs": pairs.last.lists()}) + "\n")
        return pairs.last


def _start_key(recipe: Recipe, ready: Ready, data: Data) -> str:
    """A digest of all that the start's log-probabilities depend on: the rows, the model, how it is loaded and run."""
    training, model = ready.training, recipe.model
    settings = [
        ready.model, ready.options, model.load_in_4bit, model.load_in_8bit, training.max_length,
        training.truncation_mode, training.bf16, training.fp16, training.layout, training.chat_template_kwargs,
        getattr(ready.tokenizer, "chat_template", None),
    ]  # fmt: skip
    digest = hashlib.blake2b(json.dumps(settings, default=str).encode(), digest_size=8)
    for row in data.heldout:
        digest.update(json.dumps([row["prompt"], row["chosen"], row["rejected"]], default=str).encode())
    return digest.hexdigest()
