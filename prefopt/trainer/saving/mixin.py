"""How a trainer saves, stops and goes on: complete checkpoints only, the same weights as if nothing had happened.

`checkpoints` has the files themselves, `stops` the signals. Overrides `train`, `evaluate`, `save_model` and
`_save_checkpoint` of transformers' trainer, of which the last is the one private method that TRL overrides as well.
"""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers.trainer_utils import TrainOutput

from prefopt.losses import Loss
from prefopt.safety.folders import ASIDE, REFERENCE_ADAPTER, earlier_results, is_whole, move_into, recover
from prefopt.scoring.scorer import Scorer
from prefopt.trainer.learned import LearnedLoss
from prefopt.trainer.metrics import RunningMeans
from prefopt.trainer.saving import checkpoints, disk
from prefopt.trainer.saving.checkpoints import CheckpointError
from prefopt.trainer.saving.state import (
    compare,
    compare_weights,
    describe,
    restore,
    restore_reference,
    save_objective,
    save_reference,
)
from prefopt.trainer.saving.stops import AlreadyTrained, RunFlow, Stopped, StopSignals

logger = logging.getLogger(__name__)

_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream error")


class CheckpointMixin:
    """The part of `LossMixin` that saves checkpoints, resumes from them, and stops on a signal."""

    objective: Loss | None
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    state: Any
    control: Any
    train_dataset: Any
    callback_handler: Any
    _train_means: RunningMeans
    _tokens_seen: Any
    _scorer: Scorer | None
    _learned: LearnedLoss | None

    def _set_up_checkpoints(self) -> None:
        self._signals = StopSignals(says=self.accelerator.is_main_process)
        self._flow = RunFlow(self)
        self._listens = False
        self._put_aside: dict[str, Any] | None = None
        self._last_written: Path | None = None
        self._resumed: dict[str, Any] = {}
        self._resumed_from: Path | None = None
        self._saved_to: set[Path] = set()
        # Added last, as it has the last word on what a step ends with.
        self.add_callback(self._flow)  # type: ignore[attr-defined]

    # ---- training --------------------------------------------------------------------------------------------------

    def checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """The folder to resume from, the same on every process; None for a start from the beginning.

        Args:
            asked: a folder; True for the newest whole checkpoint of the output folder; "auto" for the same, or a fresh
                start where there is none.

        Raises:
            CheckpointError: if the named folder is not whole, or True finds none; it says what is missing.
        """
        answer: list[Any] = [None, [], None]
        if self.accelerator.is_main_process:
            try:
                folder, passed = checkpoints.choose(asked, Path(self.args.output_dir))
                answer = [None if folder is None else str(folder), passed, None]
            except CheckpointError as error:
                answer = [None, [], str(error)]
        answer = broadcast_object_list(answer)
        for line in answer[1]:
            logger.warning(line)
        if answer[2] is not None:
            raise CheckpointError(answer[2])
        found: str | None = answer[0]
        return found

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **keywords: Any) -> Any:
        folder = self.checkpoint_to_resume(resume_from_checkpoint)
        self._prepare_disk(folder)
        self._resume_state(None if folder is None else Path(folder))
        self._forget_evaluation()
        # transformers' own way of stopping is left alone if it was asked for; without checkpoints there is nothing
        # that a signal could have saved.
        self._listens = self._saves and not getattr(self.args, "enable_jit_checkpoint", False)
        with self._signals.noted() if self._listens else contextlib.nullcontext():
            try:
                result = super().train(folder, *arguments, **keywords)  # type: ignore[misc]
            except AlreadyTrained:
                result = self._nothing_left()
        if self._flow.stopped:
            raise self._stopped(self._flow.stopped)
        return result

    def _forget_evaluation(self) -> None:
        """Let a model that was evaluated before it is trained be wrapped for training.

        transformers has accelerate prepare it for the evaluation, without DDP; accelerate then takes it for prepared
        when training begins, and every process would train a model of its own.
        """
        model, accelerator = self.model, self.accelerator
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        if accelerator.num_processes == 1 or sharded or self.model_wrapped is not model:  # type: ignore[attr-defined]
            return
        if getattr(model, "_is_accelerate_prepared", False):
            model._is_accelerate_prepared = False
            accelerator._models = [other for other in accelerator._models if other is not model]

    @property
    def _saves(self) -> bool:
        return str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no"

    @property
    def _moving_reference(self) -> Any:
        """The reference where it follows the policy and is whole on every process, so that it can be saved."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        if not self.args.sync_ref_model or self.ref_model is None or sharded:
            return None
        return self.accelerator.unwrap_model(self.ref_model)

    def _prepare_disk(self, resumed_from: str | None) -> None:
        """Before any step: a folder that can be written to, room in it, nothing half-done in it."""
        if not (self._saves and self.args.should_save):
            return
        output_dir = Path(self.args.output_dir)
        disk.check_writable(output_dir)
        if recover(output_dir):
            logger.warning("the last model saved to %s was not in its place yet and has been put there", output_dir)
        for folder in checkpoints.remove_unfinished(output_dir):
            logger.warning("%s was not finished by an earlier run and has been deleted", folder)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        disk.check_room(output_dir, self.accelerator.unwrap_model(self.model), self.args, sharded)
        if resumed_from is None and (found := checkpoints.find(output_dir)):
            logger.warning(
                "%s holds checkpoints of an earlier run (%s), which this run, started anew, does not go on from",
                *(output_dir, ", ".join(sorted(checkpoint.folder.name for checkpoint in found))),
            )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Missing parameters that share their values with one that was loaded are not missing (a tied head)."""
        names: dict[int, set[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), set()).add(name)
        missing = set(load_result.missing_keys)
        shared = {name for group in names.values() if group - missing for name in group}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in shared]
        super()._issue_warnings_after_load(load_result)  # type: ignore[misc]

    def _resume_state(self, folder: Path | None) -> None:
        self._flow.stopped, self._last_written = 0, folder
        self._resumed_from = folder
        self._resumed = {} if folder is None else checkpoints.read_state(folder)
        if folder is None:
            return
        compare_weights(folder, self.accelerator.unwrap_model(self.model))
        compare(self._resumed.get("run", {}), self._description(), folder, not self.args.ignore_data_skip)
        if self.objective is not None:
            restore(self.objective, folder, self._learned)
        if self._moving_reference is not None:
            restore_reference(self._moving_reference, folder)
        elif self.args.sync_ref_model:
            logger.warning("the reference is not saved under DeepSpeed and FSDP: it starts over as the initial policy")
        first = self.accelerator.is_main_process
        # Sums over all processes, which the first one goes on with: others may be more or fewer by now.
        self._tokens_seen = self._resumed.get("tokens", 0) if first else 0
        self._train_means.load(self._resumed.get("means", {}) if first else {})

    def _description(self) -> dict[str, Any]:
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return describe(self.objective, args, rows, batch)

    def _stopped(self, signum: int) -> Stopped:
        folder = str(self._last_written)
        if self.accelerator.is_main_process:
            logger.warning(
                "%s after step %d; %s is complete. To go on, run the same command with --resume_from_checkpoint auto "
                "(in Python: trainer.train(resume_from_checkpoint='auto'))",
                *(signal.Signals(signum).name, self.state.global_step, folder),
            )
        return Stopped(signum, folder)

    def _nothing_left(self) -> TrainOutput:
        """What `train` returns where the checkpoint is the last: transformers would train a step too many."""
        logger.info("%s is of the last step: nothing is left to train", self._resumed_from)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()  # type: ignore[attr-defined]
        self.is_in_train = False
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, 0.0, {})

    def evaluate(self, *arguments: Any, **keywords: Any) -> Any:
        """As transformers has it, but what is trained does not depend on when or whether it is called: the random
        numbers that follow are those that would have followed without it."""
        with _same_random_numbers(self.accelerator.device):
            return super().evaluate(*arguments, **keywords)  # type: ignore[misc]

    def _evaluate_what_is_due(self) -> None:
        """The evaluation that the stopped run had no time for."""
        with _same_random_numbers(self.accelerator.device):
            # An online objective draws completions: those that it would have drawn.
            self._load_rng_state(str(self._resumed_from))  # type: ignore[attr-defined]
            metrics = self._evaluate(None, None)  # type: ignore[attr-defined]
        self._determine_best_metric(metrics=metrics, trial=None)  # type: ignore[attr-defined]

    # ---- saving ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is complete or does not count.

        Raises:
            CheckpointError: if it cannot be written, as on a full disk: what there is of it is deleted, checkpoints
                before it stay, and the run ends, as the next would fail as well.
        """
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        if self._last_written is not None and folder.resolve() == self._last_written.resolve():
            return  # a step's weights are written once
        try:
            state = self._gathered_state()
            if self._scorer is not None and self._scorer.cache is not None:
                self._scorer.cache.write()
            if self.args.should_save:
                checkpoints.begin(folder, state)
            self.accelerator.wait_for_everyone()
            with self._as_part_of_checkpoint():
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if self.objective is not None and self.args.should_save:
                save_objective(self.objective, folder, self._learned)
            if self._moving_reference is not None and self.args.should_save:
                save_reference(self._moving_reference, folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.complete(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_of_the_disk(error):
                raise
            raise self._unwritten(folder, error) from error
        self._last_written = folder
        if self.args.should_save:
            checkpoints.rotate(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))  # type: ignore[attr-defined]

    def _gathered_state(self) -> dict[str, Any]:
        """What `_resume_state` reads; every process must call it."""
        loss = getattr(self, "_tr_loss", None)
        own = (int(self._tokens_seen), self._train_means.sums(), None if loss is None else float(loss))
        everyone = gather_object([own])
        means: dict[str, list[float]] = {}
        for _, sums, _ in everyone:
            for name, (total, count) in sums.items():
                entry = means.setdefault(name, [0.0, 0.0])
                entry[0], entry[1] = entry[0] + total, entry[1] + count
        losses = [loss for _, _, loss in everyone if loss is not None]
        return {
            "run": self._description(),
            "tokens": sum(tokens for tokens, _, _ in everyone),
            "means": means,
            "loss": sum(losses) / len(losses) if losses else None,
            "logged_at": getattr(self, "_globalstep_last_logged", None),
            "evaluation_due": self._flow.evaluation_due,
        }

    @contextlib.contextmanager
    def _as_part_of_checkpoint(self) -> Iterator[None]:
        """Keep transformers from deleting older checkpoints and from pushing before the new one is complete."""
        with self._with_arguments(save_total_limit=None, push_to_hub=False) as kept:
            self._put_aside = kept
            try:
                yield
            finally:
                self._put_aside = None

    @contextlib.contextmanager
    def _with_arguments(self, **values: Any) -> Iterator[dict[str, Any]]:
        kept = {name: getattr(self.args, name) for name in values}
        for name, value in values.items():
            setattr(self.args, name, value)
        try:
            yield kept
        finally:
            for name, value in kept.items():
                setattr(self.args, name, value)

    def _unwritten(self, folder: Path, error: BaseException) -> CheckpointError:
        if self.args.should_save:
            with contextlib.suppress(OSError):
                checkpoints.discard(folder)
        before = next((found.folder for found in checkpoints.find(folder.parent) if not found.problem), None)
        older = "there is none before it" if before is None else f"{before} is untouched"
        free = shutil.disk_usage(folder.parent).free / 1e9 if folder.parent.exists() else 0.0
        return CheckpointError(
            f"{folder} could not be written ({error}); the disk has {free:.3g} GB left. What there was of it has been "
            f"deleted; {older}. The run stops here, as later checkpoints would fail too: make room, then run the same "
            "command with --resume_from_checkpoint auto"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers has it; weights of an earlier save stay until the new ones are on the disk."""
        if self._put_aside is not None:
            # Within a checkpoint, which is whole or does not count. The arguments are saved with the model.
            with self._with_arguments(**self._put_aside):
                super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        aside = folder / ASIDE
        try:
            if self.args.should_save:
                recover(folder)
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                if (folder / "README.md").exists():
                    # peft writes its own lines into a card that is there, and a bare one where there is none.
                    shutil.copyfile(folder / "README.md", aside / "README.md")
            self.accelerator.wait_for_everyone()
            self._write_model(str(aside))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._replace_model(aside, folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_of_the_disk(error):
                raise
            raise CheckpointError(_unsaved(folder, error)) from error

    def _replace_model(self, aside: Path, folder: Path) -> None:
        """The model takes the place of the one in the folder, and of what was said of that one."""
        # A resumed run goes on with what it found before it was stopped.
        first = self._resumed_from is None and folder.resolve() not in self._saved_to
        outdated = earlier_results(folder) if first else []
        move_into(aside, folder)
        for path in outdated:
            path.unlink(missing_ok=True)
        self._saved_to.add(folder.resolve())

    def _write_model(self, folder: str) -> None:
        """Write a model that loads anywhere into an empty folder, as every process must be asked to."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None  # type: ignore[attr-defined]
        # transformers would write no weights where checkpoints are sharded, which is accelerate's default for FSDP2.
        if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            weights = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(folder, state_dict=weights)  # type: ignore[attr-defined]
        super().save_model(folder, _internal_call=True)  # type: ignore[misc]
        if self.args.should_save:
            # TRL's copy of an adapter that is trained on, to compare with: no part of what was trained. Checkpoints
            # have it, as resuming loads every adapter.
            shutil.rmtree(Path(folder) / REFERENCE_ADAPTER, ignore_errors=True)


# ---- on the disk and in memory -------------------------------------------------------------------------------------


def _unsaved(folder: Path, error: BaseException) -> str:
    """What is said of a model that could not be saved; what was written of it is deleted unless it is whole."""
    if is_whole(folder / ASIDE):
        return (
            f"the model is complete in {folder / ASIDE}, but could not be put in its place in {folder} ({error}). "
            "Save again, or move its files yourself"
        )
    shutil.rmtree(folder / ASIDE, ignore_errors=True)
    return (
        f"the model could not be saved to {folder} ({error}); weights that were there before are untouched. "
        "Make room, then save again, or run the same command with --resume_from_checkpoint auto"
    )


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether an error comes of writing a file rather than of the run."""
    if isinstance(error, CheckpointError):
        return False
    # torch.save raises RuntimeError, which also stands for whatever goes wrong on a device.
    return isinstance(error, (OSError, SafetensorError)) or any(words in str(error) for words in _TORCH_SAVE)


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, what is drawn afterwards is what would have been drawn without it."""
    python, numpy = random.getstate(), np.random.get_state()
    own = device.type not in ("cpu", "mps")
    try:
        with torch.random.fork_rng(devices=[device] if own else [], device_type=device.type if own else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
