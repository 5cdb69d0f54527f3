"""Models that have learned a set: the one that is to forget, and the gold model, which never saw the forget set.

A learned model is stored under a name made of everything that it depends on, where the next run that needs it finds
it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import PreTrainedTokenizerBase

from prefopt.report.folder import BESIDE_THE_MODEL
from prefopt.safety.files import write_text
from prefopt.trainer import PreferenceConfig, PreferenceTrainer
from prefopt.unlearning.data import Question, learn_rows

COMPLETE = "learned.json"
"""Written last into the folder of a learned model: what it was made from."""

_SETTINGS = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1",
    "adam_beta2", "adam_epsilon", "seed", "data_seed", "max_length", "truncation_mode", "bf16", "fp16",
)  # fmt: skip
"""Training arguments that the learned weights depend on."""

OBJECTIVE = "sft(nll='token')"

_OF_A_RUN = ("results.json", "unlearning.json", "audit.json", *BESIDE_THE_MODEL)
"""Files beside a run's model that say nothing about its weights."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Lesson:
    """What a model learns, and how.

    Attributes:
        name: of the model, for its folder and for messages: `learned` or `gold`.
        base: the model to start from, a folder or a Hub name.
        options: of `from_pretrained`.
        args: training arguments; the objective, the folder and what belongs to forgetting are replaced.
        questions: what is learned, by likelihood of the answers.
    """

    name: str
    base: str
    options: dict[str, Any]
    args: PreferenceConfig
    questions: Sequence[Question]

    def key(self) -> str:
        """12 hex digits that differ if the model, the questions, their order or a setting differs."""
        settings = {name: str(getattr(self.args, name, None)) for name in _SETTINGS}
        facts = {
            "base": model_key(self.base),
            "options": {name: str(value) for name, value in sorted(self.options.items())},
            "settings": settings,
            "processes": PartialState().num_processes,
            "questions": [asdict(question) for question in self.questions],
        }
        return digest(facts)


def learn(
    lesson: Lesson,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    watch: Callable[[PreferenceTrainer], object],
) -> Path:
    """The folder of the learned model, trained only if it does not exist yet.

    A run that was stopped continues from its last checkpoint, if `lesson.args` save any, and else starts again: both
    end with the same weights.

    Args:
        lesson: what to learn.
        folder: of all learned models.
        tokenizer: of the model.
        say: prints a line.
        watch: called with the trainer before it trains, to show its progress.
    """
    target = folder / f"{lesson.name}-{lesson.key()}"
    if (target / COMPLETE).is_file():
        say(f"The {lesson.name} model is there already: {target}")
        return target
    say(f"Making the {lesson.name} model: {lesson.base} learns {len(lesson.questions)} answers")
    args = _arguments(lesson, target)
    trainer = PreferenceTrainer(
        lesson.base,
        args=args,
        train_dataset=learn_rows(lesson.questions, tokenizer, args.max_length),
        processing_class=tokenizer,
    )
    watch(trainer)
    trainer.train(resume_from_checkpoint=trainer.checkpoint_to_resume("auto"))
    trainer.save_model(_internal_call=True)
    if trainer.is_world_process_zero():
        facts = {"base": lesson.base, "answers": len(lesson.questions), "steps": trainer.state.global_step}
        write_text(target / COMPLETE, json.dumps(facts, indent=2))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled:
        # Accelerate refuses a second trainer's DeepSpeed plugin while the first one's is set.
        AcceleratorState._reset_state()
    return target


def model_key(name: str) -> str:
    """What tells two models of one name apart: sizes and times of a folder's files; a Hub name as it is."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".json") and path.name not in _OF_A_RUN
    )
    return digest([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def digest(facts: Any) -> str:
    """12 hex digits of facts that JSON can write, whatever the order of their names."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _arguments(lesson: Lesson, target: Path) -> PreferenceConfig:
    args = copy.copy(lesson.args)
    args.output_dir = str(target)
    args.loss = OBJECTIVE
    args.paired_retain = False
    args.model_init_kwargs = dict(lesson.options)
    args.eval_strategy = type(args.eval_strategy)("no")
    args.load_best_model_at_end = False
    args.metric_for_best_model = None
    args.push_to_hub = False
    args.precompute_ref_log_probs = args.sync_ref_model = False
    args.reference_cache = "off"
    return args
