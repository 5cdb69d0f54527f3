"""What happens to a run whose loss or gradient becomes NaN or infinite: it stops, says where, and saves what it has.

On several processes they stop together, whichever of them saw it. Weights that are still finite are saved as of the
last completed step; for weights that are not, the last checkpoint that is good is named.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt.data.encodings import text_tokenizer
from prefopt.losses import Loss, LossOutput, PreferenceBatch
from prefopt.losses.scores import Role
from prefopt.safety.errors import PrefoptError
from prefopt.scoring.rows import RowBatch
from prefopt.trainer.metrics import SHOWN, RunMetrics, RunningMeans, describe_non_finite, shortened
from prefopt.trainer.saving.checkpoints import find
from prefopt.trainer.saving.run import Checkpoints

ADVICE = (
    "Look at those rows, lower the learning rate or warm it up for longer, and train in bfloat16 or float32 rather "
    "than float16."
)


class NonFiniteError(PrefoptError, FloatingPointError):
    """A loss, a gradient or a weight is NaN or infinite; says in which rows, and what to do."""


class StepGuard(TrainerCallback):
    """Stops the run at a loss or gradient that is not finite, and saves the state before that step.

    It remembers the state at the start of a step, and checks the gradient before the optimizer's step.

    Args:
        trainer: the trainer, for its model, optimizer and folder.
        objective: its loss.
        metrics: of the run.
        checkpoints: of the run.
    """

    def __init__(self, trainer: Any, objective: Loss, metrics: RunMetrics, checkpoints: Checkpoints):
        self._trainer, self._objective = trainer, objective
        self._metrics, self._checkpoints = metrics, checkpoints
        self._begun: tuple[dict[str, Tensor], RunningMeans, Any] | None = None
        self._training = False  # whether a training loop is under way
        self._batches: list[RowBatch] = []  # of the step under way, on this process

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._training = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._training = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        buffers = {name: buffer.clone() for name, buffer in self._objective.named_buffers()}
        self._begun = buffers, self._metrics.train.copy(), self._metrics.tokens
        self._batches.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._begun = None
        self._batches.clear()

    def check_loss(self, loss: Tensor, batch: PreferenceBatch, output: LossOutput, rows: RowBatch) -> None:
        """Stop every process if the loss of one is not finite; all of them must call this, equally often.

        Raises:
            FloatingPointError: naming the step, the examples and what was saved.
        """
        if self._trainer.model.training:
            self._batches.append(replace(rows, extra={}, embeddings={}))  # only to quote the rows
        here = not bool(torch.isfinite(loss))
        if self._on_any_process(here):
            texts = self._row_texts(rows) if here else {}
            step = self._trainer.state.global_step
            self._stop(describe_non_finite(batch, output, loss.item(), texts, step) if here else "")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The same for the gradient of a whole step, before the optimizer's step.

        DeepSpeed updates the weights within the backward pass, so they may be NaN by now: then they are not saved.
        With float16's loss scaling such gradients are normal while the scale is adjusted: their steps are skipped.
        """
        accelerator, names = self._trainer.accelerator, []
        if self._trainer.is_deepspeed_enabled:
            engine = accelerator.deepspeed_engine_wrapped.engine
            norm = None if engine.fp16_enabled() else engine.get_global_grad_norm()
            here = norm is not None and not bool(torch.isfinite(torch.as_tensor(norm)))
        elif accelerator.scaler is not None:
            return
        else:
            named = [*self._trainer.model.named_parameters(), *self._objective.named_parameters(prefix="loss")]
            gradients = {name: p.grad for name, p in named if p.grad is not None}
            here = not all_finite(gradients.values())
            names = [name for name, gradient in gradients.items() if not all_finite([gradient])] if here else []
        if not self._on_any_process(here):
            return
        rows = [
            f"{role}: {shortened(text)}"
            for batch in self._batches
            for role, texts in self._row_texts(batch).items()
            for text in texts
        ]
        of = f" of {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else ""
        more = f"\n  and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        listed = "\n  ".join(rows[:SHOWN]) + more
        self._stop(
            f"the loss is finite at step {self._trainer.state.global_step}, but its gradient{of} is not. The rows of "
            f"this step:\n  {listed}"
        )

    def _row_texts(self, rows: RowBatch) -> dict[str, list[str]]:
        """The decoded rows of each role."""
        tokenizer = text_tokenizer(self._trainer.processing_class)
        return {
            role.field: [
                tokenizer.decode(rows.ids[row][rows.attention[row].bool()]) for row in rows.rows_of(role).tolist()
            ]
            for role in (Role.CHOSEN, Role.REJECTED, Role.CANDIDATE)
        }

    def _on_any_process(self, here: bool) -> bool:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return here
        count = torch.tensor(float(here), device=accelerator.device)
        return bool(accelerator.reduce(count, reduction="sum") > 0)

    def _stop(self, message: str) -> NoReturn:
        everywhere = [f"{text}" for text in gather_object([message]) if text]
        raise NonFiniteError("\n".join(filter(None, [*dict.fromkeys(everywhere), self._rescued(), ADVICE])))

    def _rescued(self) -> str:
        """Save the state before this step; returns a sentence about it, "" outside of training.

        Every process must call it.
        """
        trainer = self._trainer
        if not self._training:
            return ""
        self._training = False
        self._put_back()
        step = trainer.state.global_step
        if step == 0:
            return "No step had been completed, so there is nothing to save."
        if self._on_any_process(not all_finite(stored(p) for p in trainer.model.parameters())):
            return f"The weights themselves are NaN or infinite and are not saved. {self._last_good()}"
        folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._checkpoints.written == folder:
            return f"The state before this step is in {folder}."
        trouble = ""
        try:
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        except Exception as error:
            # A failed save must not hide the error that stopped the run.
            trouble = f"{type(error).__name__}: {error}"
        troubles = list(filter(None, gather_object([trouble])))
        if troubles:
            return f"The state before this step could not be saved in {folder} ({troubles[0]}). {self._last_good()}"
        return f"The state after step {step}, the last good one, is saved in {folder}."

    def _put_back(self) -> None:
        """Undo changes to the objective's buffers and the means by a step that will not be completed."""
        if self._begun is None:
            return
        buffers, self._metrics.train, self._metrics.tokens = self._begun
        for name, buffer in self._objective.named_buffers():
            buffer.copy_(buffers[name])
        self._begun = None

    def _last_good(self) -> str:
        main = self._trainer.accelerator.is_main_process
        sentence: str = gather_object([last_good(Path(self._trainer.args.output_dir)) if main else ""])[0]
        return sentence


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all numbers of some tensors are finite; of sharded ones, this process's part.

    Checked by the largest magnitude, in one pass: it is not finite if any number is not, and it cannot overflow.
    """
    parts = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if tensor is not None]
    parts = [part.detach() for part in parts if part.is_floating_point() and part.numel()]
    return not parts or bool(torch.isfinite(get_total_norm(parts, norm_type=float("inf"))))


def stored(parameter: Any) -> Tensor:
    """A parameter's numbers on this process: DeepSpeed's ZeRO-3 keeps them elsewhere between its calls."""
    tensor: Tensor = getattr(parameter, "ds_tensor", parameter)
    return tensor


def last_good(folder: Path) -> str:
    """One sentence on the checkpoint from which the run can be resumed."""
    if (good := last_good_checkpoint(folder)) is not None:
        return f"The last good checkpoint: {good}."
    unseen = next(
        (
            checkpoint.folder
            for checkpoint in find(folder)
            if not checkpoint.problem and not _weights(checkpoint.folder)
        ),
        None,
    )
    if unseen is not None:
        return f"{unseen} is complete, but its weights are in the engine's own files, which were not checked."
    return "There is no earlier checkpoint with finite weights."


def last_good_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a run that is complete and whose weights are finite."""
    whole = (checkpoint.folder for checkpoint in find(folder) if not checkpoint.problem)
    return next((checkpoint for checkpoint in whole if _is_good(checkpoint)), None)


def _weights(checkpoint: Path) -> list[Path]:
    """The safetensors files of a model's weights; DeepSpeed and FSDP may write only files of their own format."""
    return [path for path in checkpoint.glob("*.safetensors") if not path.name.startswith("objective")]


def _is_good(checkpoint: Path) -> bool:
    files = _weights(checkpoint)
    try:
        for path in files:
            with safe_open(path, "pt") as weights:
                # One at a time: a model may take up most of the memory.
                if not all(all_finite([weights.get_tensor(name)]) for name in weights.keys()):  # noqa: SIM118
                    return False
    except Exception:
        return False
    return bool(files)
