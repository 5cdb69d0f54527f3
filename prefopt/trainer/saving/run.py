"""How a run saves, stops and resumes: complete checkpoints only, and the same weights as without an interruption.

`checkpoints` has the files, `stops` the signals, `state` the content of a checkpoint, `whole_model` the saving of a
model outside of checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers.trainer_utils import TrainOutput

from prefopt.losses import Loss
from prefopt.safety.folders import recover
from prefopt.scoring.cache import ReferenceCache
from prefopt.trainer.learned import LearnedLoss
from prefopt.trainer.metrics import RunMetrics
from prefopt.trainer.options import with_arguments
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
from prefopt.trainer.saving.stops import AlreadyTrained, RunFlow, Stopped
from prefopt.trainer.saving.whole_model import is_of_the_disk, save_aside

logger = logging.getLogger(__name__)


class Checkpoints:
    """Saves a trainer's checkpoints and models, resumes from them, and stops on a signal.

    Args:
        trainer: the trainer; its model, arguments, state and accelerator are read.
        objective: its loss; None where TRL computes it.
        metrics: gathered for the next log line.
        learned: the optimizer of the objective's own parameters, if it has any.
        cache: of the reference's log-probabilities, if there is one.

    Attributes:
        flow: the callback that decides how a step ends, to be added after all others.
        written: the newest checkpoint of the run, or the one that it was resumed from.
    """

    def __init__(
        self,
        trainer: Any,
        objective: Loss | None,
        metrics: RunMetrics,
        learned: LearnedLoss | None = None,
        cache: ReferenceCache | None = None,
    ):
        self._trainer, self._objective, self._metrics = trainer, objective, metrics
        self._learned, self._cache = learned, cache
        self.flow = RunFlow(trainer)
        self.written: Path | None = None
        self._put_aside: dict[str, Any] | None = None  # arguments, while transformers writes a checkpoint
        self._saved_to: set[Path] = set()

    # ---- training --------------------------------------------------------------------------------------------------

    def choose(self, asked: str | bool | None) -> str | None:
        """As `LossMixin.checkpoint_to_resume`."""
        answer: list[Any] = [None, [], None]
        if self._trainer.accelerator.is_main_process:
            try:
                folder, skipped = checkpoints.choose(asked, Path(self._trainer.args.output_dir))
                answer = [None if folder is None else str(folder), skipped, None]
            except CheckpointError as error:
                answer = [None, [], str(error)]
        chosen, lines, problem = broadcast_object_list(answer)
        for line in lines:
            logger.warning(line)
        if problem is not None:
            raise CheckpointError(problem)
        folder_name: str | None = chosen
        return folder_name

    def train(self, folder: str | None, train: Callable[[str | None], Any]) -> Any:
        """A whole run, from a checkpoint or from the beginning.

        Args:
            folder: the checkpoint, as `choose` returns it.
            train: transformers' own `train`.

        Raises:
            Stopped: if a signal has ended the run.
        """
        self._prepare_disk(folder)
        self._resume(None if folder is None else Path(folder))
        self._forget_evaluation()
        flow = self.flow
        # transformers' own handling of signals is left alone if requested; without checkpoints, a signal has nothing
        # to save.
        flow.listens = self._saves and not getattr(self._trainer.args, "enable_jit_checkpoint", False)
        with flow.signals.noted() if flow.listens else contextlib.nullcontext():
            try:
                result = train(folder)
            except AlreadyTrained:
                result = self._nothing_left()
        if flow.stopped:
            raise self._stopped(flow.stopped)
        return result

    def _forget_evaluation(self) -> None:
        """Let a model that was evaluated before training be wrapped for training.

        For an evaluation, transformers has accelerate prepare it without DDP. accelerate then considers it prepared
        when training begins, and every process would train its own model.
        """
        model, accelerator = self._trainer.model, self._trainer.accelerator
        if accelerator.num_processes == 1 or self._sharded or self._trainer.model_wrapped is not model:
            return
        if getattr(model, "_is_accelerate_prepared", False):
            model._is_accelerate_prepared = False
            accelerator._models = [other for other in accelerator._models if other is not model]

    @property
    def _saves(self) -> bool:
        strategy = self._trainer.args.save_strategy
        return str(getattr(strategy, "value", strategy)) != "no"

    @property
    def _sharded(self) -> bool:
        return bool(self._trainer.is_deepspeed_enabled or self._trainer.is_fsdp_enabled)

    @property
    def _moving_reference(self) -> Any:
        """The reference if it follows the policy and is complete on every process, so that it can be saved."""
        trainer = self._trainer
        if not trainer.args.sync_ref_model or trainer.ref_model is None or self._sharded:
            return None
        return trainer.accelerator.unwrap_model(trainer.ref_model)

    def _prepare_disk(self, resumed_from: str | None) -> None:
        """Before any step: check that the folder is writable and has room; remove unfinished saves."""
        trainer = self._trainer
        if not (self._saves and trainer.args.should_save):
            return
        output_dir = Path(trainer.args.output_dir)
        disk.check_writable(output_dir)
        if recover(output_dir):
            logger.warning("the last model saved to %s was not in its place yet and has been moved there", output_dir)
        for folder in checkpoints.remove_unfinished(output_dir):
            logger.warning("%s was left unfinished by an earlier run and has been deleted", folder)
        disk.check_room(output_dir, trainer.accelerator.unwrap_model(trainer.model), trainer.args, self._sharded)
        if resumed_from is None and (earlier := checkpoints.find(output_dir)):
            logger.warning(
                "%s holds checkpoints of an earlier run (%s); this run starts from the beginning and ignores them",
                *(output_dir, ", ".join(sorted(checkpoint.folder.name for checkpoint in earlier))),
            )

    def _resume(self, folder: Path | None) -> None:
        trainer, flow = self._trainer, self.flow
        flow.stopped, flow.resumed_from, self.written = 0, folder, folder
        flow.resumed = {} if folder is None else checkpoints.read_state(folder)
        if folder is None:
            return
        compare_weights(folder, trainer.accelerator.unwrap_model(trainer.model))
        compare(flow.resumed.get("run", {}), self._description(), folder, not trainer.args.ignore_data_skip)
        if self._objective is not None:
            restore(self._objective, folder, self._learned)
        if self._moving_reference is not None:
            restore_reference(self._moving_reference, folder)
        elif trainer.args.sync_ref_model:
            logger.warning("the reference is not saved under DeepSpeed and FSDP: it starts over as the initial policy")
        first = trainer.accelerator.is_main_process
        # Sums over all processes, continued by the first one: the number of processes may have changed.
        self._metrics.tokens = flow.resumed.get("tokens", 0) if first else 0
        self._metrics.train.load(flow.resumed.get("means", {}) if first else {})

    def _description(self) -> dict[str, Any]:
        data, args = self._trainer.train_dataset, self._trainer.args
        rows = len(data) if hasattr(data, "__len__") else None
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return describe(self._objective, args, rows, batch)

    def _stopped(self, signum: int) -> Stopped:
        folder = str(self.written)
        if self._trainer.accelerator.is_main_process:
            logger.warning(
                "%s after step %d; %s is complete. To resume, run the same command with --resume_from_checkpoint auto "
                "(in Python: trainer.train(resume_from_checkpoint='auto'))",
                *(signal.Signals(signum).name, self._trainer.state.global_step, folder),
            )
        return Stopped(signum, folder)

    def _nothing_left(self) -> TrainOutput:
        """What `train` returns if the checkpoint is of the last step: transformers would train one step too many."""
        trainer = self._trainer
        logger.info("%s is of the last step: nothing is left to train", self.flow.resumed_from)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        trainer.is_in_train = False
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        return TrainOutput(trainer.state.global_step, 0.0, {})

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save(self, folder: Path, write: Callable[[], None]) -> bool:
        """Write a checkpoint; an incomplete one is never used.

        Args:
            folder: of the checkpoint.
            write: transformers' own way to write it.

        Returns:
            Whether it was written; a step's weights are written once.

        Raises:
            CheckpointError: if it cannot be written, as on a full disk: the partial checkpoint is deleted, earlier
                checkpoints stay, and the run ends, as the next would fail as well.
        """
        if self.written is not None and folder.resolve() == self.written.resolve():
            return False
        args, wait = self._trainer.args, self._trainer.accelerator.wait_for_everyone
        try:
            state = self._gathered_state()
            if self._cache is not None:
                self._cache.write()
            if args.should_save:
                checkpoints.begin(folder, state)
            wait()
            # Older checkpoints are deleted, and this one is pushed, once it is complete.
            with with_arguments(args, save_total_limit=None, push_to_hub=False) as self._put_aside:
                try:
                    write()
                finally:
                    self._put_aside = None
            if self._objective is not None and args.should_save:
                save_objective(self._objective, folder, self._learned)
            if self._moving_reference is not None and args.should_save:
                save_reference(self._moving_reference, folder)
            wait()
            if args.should_save:
                checkpoints.complete(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_of_the_disk(error):
                raise
            raise self._unwritten(folder, error) from error
        self.written = folder
        if args.should_save:
            checkpoints.rotate(folder.parent, args.save_total_limit, self._trainer.state.best_model_checkpoint)
        return True

    def _gathered_state(self) -> dict[str, Any]:
        """The state that `_resume` reads; every process must call it."""
        loss = getattr(self._trainer, "_tr_loss", None)
        own = (int(self._metrics.tokens), self._metrics.train.sums(), None if loss is None else float(loss))
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
            "logged_at": getattr(self._trainer, "_globalstep_last_logged", None),
            "evaluation_due": self.flow.evaluation_due,
        }

    def _unwritten(self, folder: Path, error: BaseException) -> CheckpointError:
        if self._trainer.args.should_save:
            with contextlib.suppress(OSError):
                checkpoints.discard(folder)
        before = next(
            (checkpoint.folder for checkpoint in checkpoints.find(folder.parent) if not checkpoint.problem), None
        )
        older = "there is none before it" if before is None else f"{before} is untouched"
        free = shutil.disk_usage(folder.parent).free / 1e9 if folder.parent.exists() else 0.0
        return CheckpointError(
            f"{folder} could not be written ({error}); the disk has {free:.3g} GB left. The partial checkpoint has "
            f"been deleted; {older}. The run stops here, as later checkpoints would fail too: free disk space, then "
            "run the same command with --resume_from_checkpoint auto"
        )

    def save_model(self, folder: Path, write: Callable[[str], None]) -> None:
        """Save the model into a folder; weights of an earlier save stay until the new ones are on the disk.

        Args:
            folder: where to.
            write: transformers' own way to save into a folder.
        """
        if self._put_aside is not None:
            # Within a checkpoint, which has its own protection. The arguments are saved with the model.
            with with_arguments(self._trainer.args, **self._put_aside):
                write(str(folder))
            return
        # A resumed run continues with the results that it had before it was stopped.
        outdates = self.flow.resumed_from is None and folder.resolve() not in self._saved_to
        save_aside(self._trainer, folder, write, outdates)
        if self._trainer.args.should_save:
            self._saved_to.add(folder.resolve())
