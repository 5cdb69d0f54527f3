"""What a trainer leaves in its folder and on the Hub: the model card, no secrets, nothing that others should not see.

Overrides `save_model`, `create_model_card`, `init_hf_repo` and `push_to_hub` of transformers' trainer, and
`_push_from_checkpoint`, which has no public counterpart: it would push pickled arguments and rows of the data.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from prefopt.card import CardFacts, Split, is_hub_id, render
from prefopt.data.fingerprint import fingerprint
from prefopt.losses import Loss
from prefopt.redaction import redact, redacted, remember

logger = logging.getLogger(__name__)

CARD = "README.md"

NOT_PUBLISHED = ("_*", ".*", "checkpoint-*", "training_args.bin", "dropped_*.jsonl", "*.unfinished", "wandb/*")
"""Files of an output folder that are never pushed: pickles, rows of the data, what is not finished."""

ONLY_TO_RESUME = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "latest", "zero_to_fp32.py", "pytorch_model*",
    "objective.safetensors",
)  # fmt: skip
"""Files of a checkpoint that a model's users have no need of."""


class PushError(RuntimeError):
    """The Hub did not take what was to be pushed; says which repository, why, and what to do."""


@dataclass
class RunNotes:
    """What the one who makes a trainer knows about a run and the trainer does not; a model card says it.

    Attributes:
        base_model: where training starts from: a Hub id or a path. If "", what the model's configuration says.
        sources: of the data, by the names that the run was given.
        splits: of training and held-out data.
        expression: the loss as it was written.
        command: the command line, without secrets.
        settings: those that differ from their defaults, beside the training arguments.
    """

    base_model: str = ""
    sources: tuple[str, ...] = ()
    splits: tuple[str, str] = ("", "")
    expression: str = ""
    command: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class PublishingMixin:
    """Writes the model card into every folder that is saved, and pushes only what is meant for others.

    Attributes:
        notes: for the card; may be set at any time.
    """

    objective: Loss | None
    args: Any
    model: Any
    state: Any
    accelerator: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    callback_handler: Any
    control: Any
    hub_model_id: str | None
    push_in_progress: Any
    _tag_names: list[str]

    notes: RunNotes = RunNotes()
    _before: Mapping[str, float] | None = None
    _after: Mapping[str, float] | None = None
    _splits: list[Split] | None = None

    # ---- what the card says ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]
        found = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if found and self.state.global_step == 0:
            self._before = {**(self._before or {}), **found}
        elif found:
            self._after = {**(self._after or {}), **found}

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **others: Any
    ) -> None:
        """Write the card into `args.output_dir`; takes what TRL's method takes."""
        if self.objective is None:
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)  # type: ignore[misc]
        elif self.is_world_process_zero():  # type: ignore[attr-defined]
            self._write_card(Path(self.args.output_dir), model_name, dataset_name, tags)

    def _write_card(self, folder: Path, name: str | None = None, dataset: str | None = None, tags: Any = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{CARD}.unfinished"
        facts = self.card_facts(name, dataset, [tags] if isinstance(tags, str) else list(tags or ()))
        unfinished.write_text(str(render(facts)), encoding="utf-8")
        unfinished.replace(folder / CARD)

    def card_facts(self, name: str | None = None, dataset: str | None = None, tags: Any = ()) -> CardFacts:
        """What the card says of the run as it is now."""
        assert self.objective is not None
        notes, repository = self.notes, getattr(self, "hub_model_id", None) or self.args.hub_model_id
        folder = Path(self.args.output_dir).absolute().name
        adapter = None
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model):
            adapter = str(getattr(model.peft_config[model.active_adapter].peft_type, "value", "adapter"))
        base = _hub_name(notes.base_model or str(_base_of(model) or "")) or None
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        logged = [entry for entry in self.state.log_history if "loss" in entry]
        without = {"step", "epoch", "grad_norm", "learning_rate"}
        return CardFacts(
            name=name or (repository or folder).split("/")[-1],
            load_from=repository or folder,
            objective=self.objective,
            expression=notes.expression or str(getattr(self.args, "loss", None) or ""),
            base_model=base,
            adapter=adapter,
            license=_license(notes.base_model or str(_base_of(model) or "")),
            chat=bool(getattr(tokenizer, "chat_template", None)),
            data=self._described_data((dataset,) if dataset else notes.sources),
            before=self._before or {},
            after=self._after or {},
            train={name: value for name, value in logged[-1].items() if name not in without} if logged else {},
            settings={**redacted(notes.settings), **self._main_settings(), **changed_settings(self.args)},
            versions=versions(),
            command=notes.command,
            links=_tracker_pages(),
            tags=[*self._tag_names, *tags, *(getattr(self.model, "model_tags", None) or ())],
        )

    def _described_data(self, sources: tuple[str, ...]) -> list[Split]:
        if self._splits is None:
            heldout = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            parts = [("training", self.train_dataset, self.notes.splits[0])]
            parts += [(f"held-out {name}".strip(), rows, self.notes.splits[1]) for name, rows in heldout.items()]
            self._splits = []
            for role, rows, split in parts:
                if rows is not None:
                    known = isinstance(rows, Dataset)
                    columns = self.objective.columns if self.objective is not None else ()
                    mark = fingerprint(rows, columns) if known else None
                    self._splits.append(Split(role, len(rows) if known else None, mark, split=split))
        return [dataclasses.replace(part, sources=sources) for part in self._splits]

    def _main_settings(self) -> dict[str, Any]:
        args, world = self.args, self.accelerator.num_processes
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        return {
            "steps": self.state.global_step,
            "examples a step": f"{batch} ({args.per_device_train_batch_size} a process x "
            f"{args.gradient_accumulation_steps} accumulated x {world} processes)",
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            "optim": getattr(args.optim, "value", args.optim),
            "max_length": args.max_length,
            "seed": args.seed,
            "weights in": str(self.model.dtype).removeprefix("torch."),
        }

    # ---- saving and pushing ---------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and card; pushes them too under `push_to_hub`, as transformers' trainer does."""
        with _without_secrets(self.args):
            super().save_model(output_dir, _internal_call=True)  # type: ignore[misc]
        if self.objective is not None and self.args.should_save:
            # An adapter's folder comes with a card of PEFT's own, which says nothing.
            self._write_card(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=getattr(self.args, "hub_revision", None))

    def init_hf_repo(self, *arguments: Any, **keywords: Any) -> None:
        """Make the repository, or find it.

        Raises:
            PushError: if the Hub does not let us.
        """
        remember(self.args.hub_token)
        try:
            super().init_hf_repo(*arguments, **keywords)  # type: ignore[misc]
        except Exception as error:  # of whichever library the Hub's client speaks HTTP with
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            raise PushError(
                f"push_to_hub: the repository {name!r} could not be made or found: {_one_line(error)}. Log in with "
                "`hf auth login` or give hub_token a token that may write, see that hub_model_id is OWNER/NAME of "
                "yours, or leave push_to_hub out and push the saved folder later"
            ) from None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save and push the output folder, without what is in `NOT_PUBLISHED`; takes what transformers' method takes.

        Raises:
            PushError: if the Hub does not take it. The folder is whole all the same.
        """
        self._announce_push()
        remember(token)
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token=token, **({} if private is None else {"private": private}))
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return None
        assert self.hub_model_id is not None
        self.create_model_card(card.pop("model_name", None) or self.hub_model_id.split("/")[-1], **card)
        self._finish_current_push()  # type: ignore[attr-defined]
        self._report_failed_pushes()
        for left in Path(self.args.output_dir).glob("_push-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            return self._upload(
                Path(self.args.output_dir), str(commit_message), NOT_PUBLISHED, token=token, revision=revision,
                run_as_future=not blocking,
            )  # fmt: skip
        except Exception as error:  # of whichever library the Hub's client speaks HTTP with
            raise PushError(
                f"the push to {self.hub_model_id} failed: {_one_line(error)}. Nothing is lost: the model is whole in "
                f"{self.args.output_dir}. To push it later: {upload_command(self.hub_model_id, self.args.output_dir)}"
            ) from None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint's model, and under the checkpoint strategies all of it, while training goes on."""
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy is HubStrategy.END:  # type: ignore[attr-defined]
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self._announce_push()
        folder = _linked(Path(checkpoint_folder), Path(self.args.output_dir) / f"_push-{self.state.global_step}")
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(folder, message, (*NOT_PUBLISHED, *ONLY_TO_RESUME), run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy is HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            whole = self._upload(
                folder, f"{message}, checkpoint", NOT_PUBLISHED, path_in_repo=place, run_as_future=True
            )
            jobs.append(whole)

        def clear(_: Any) -> None:
            if all(job.done() for job in jobs):
                shutil.rmtree(folder, ignore_errors=True)

        for job in jobs:
            job.add_done_callback(clear)
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self._report_failed_pushes()
            self.push_in_progress = PushInProgress(jobs)

    def _upload(self, folder: Path, message: str, ignore: tuple[str, ...], **options: Any) -> Any:
        options["token"] = options.get("token") or self.args.hub_token
        options["revision"] = options.get("revision") or getattr(self.args, "hub_revision", None)
        return HfApi(library_name="prefopt", library_version=metadata.version("prefopt")).upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            ignore_patterns=list(ignore),
            **options,
        )

    def _announce_push(self) -> None:
        """Callbacks may publish on their own here, as trackio's does; that must not stop the model's push."""
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except Exception as error:
            logger.warning("a callback failed before the push: %s", _one_line(error))

    def _report_failed_pushes(self) -> None:
        """Say which pushes beside training failed; they stopped nothing."""
        jobs = getattr(self.push_in_progress, "jobs", ())
        failed = [error for job in jobs if job.done() and (error := job.exception()) is not None]
        if failed:
            logger.warning(
                "%d of %d pushes during training failed, the last with: %s",
                len(failed),
                len(jobs),
                _one_line(failed[-1]),
            )
        self.push_in_progress = None


def _linked(folder: Path, target: Path) -> Path:
    """The files of a checkpoint under another name, where its rotation does not delete them while they are pushed."""
    for file in filter(Path.is_file, folder.rglob("*")):
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:  # a file system without hard links
            shutil.copy2(file, place)
    return target


def upload_command(repository: str, folder: str) -> str:
    """The command that pushes a saved folder by hand."""
    excluded = " ".join(f"--exclude '{pattern}'" for pattern in NOT_PUBLISHED)
    return f"hf upload {repository} {folder} . {excluded}"


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", redact(f"{type(error).__name__}: {error}")).strip().rstrip(".")


@contextmanager
def _without_secrets(args: Any) -> Iterator[None]:
    """Hold the arguments' secrets back while transformers pickles them into `training_args.bin`."""
    held = {}
    for option in dataclasses.fields(args):
        value = getattr(args, option.name, None)
        if isinstance(value, (str, dict)) and (clean := redacted(value, option.name)) != value:
            held[option.name] = value
            setattr(args, option.name, None if isinstance(value, str) and option.name.endswith("token") else clean)
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(args, name, value)


# ---- facts -------------------------------------------------------------------------------------------------------

_OF_NO_INTEREST = re.compile(
    r"^(output_dir|loss|run_name|project|report_to|push_to_hub|hub_.*|trackio_.*|logging_.*|log_.*|disable_tqdm|do_.*"
    r"|save_.*|eval_strategy|eval_steps|eval_on_start|overwrite_.*|dataloader_.*|accelerator_config|use_cpu"
    r"|resume_from_checkpoint|model_init_kwargs|.*_token|fsdp|deepspeed_plugin|activation_checkpointing|demo|dry_run"
    r"|per_device_.*|gradient_accumulation_steps|model_name_or_path|dataset_(name|train_split|test_split)|columns"
    r"|on_bad_rows|evaluate_first)$"
)
"""Settings that decide nothing about the weights, stand elsewhere in the card, or are derived by transformers."""

_LONGEST = 200


def changed_settings(settings: Any) -> dict[str, Any]:
    """Options of a dataclass that differ from their defaults and bear on what was trained."""
    changed = {}
    for option in dataclasses.fields(settings):
        value = getattr(settings, option.name)
        factory = option.default_factory
        default = factory() if factory is not dataclasses.MISSING else option.default
        if value != default and value not in (None, [], "", {}) and not _OF_NO_INTEREST.match(option.name):
            changed[option.name] = _shown(redacted(getattr(value, "value", value), option.name))
    return changed


def _shown(value: Any) -> Any:
    """Of a path on this machine the last part, of a long text (a chat template) the beginning."""
    if isinstance(value, str) and Path(value[:_LONGEST]).is_absolute():
        return Path(value).name
    return value[:_LONGEST] + " ..." if isinstance(value, str) and len(value) > _LONGEST else value


def versions() -> dict[str, str]:
    """Of the software that a run's numbers depend on."""
    names = ("prefopt", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {"Python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def _base_of(model: Any) -> Any:
    if is_peft_model(model):
        return model.peft_config[model.active_adapter].base_model_name_or_path
    return getattr(model.config, "_name_or_path", None)


def _hub_name(name: str) -> str:
    """The id of a repository whose snapshot in the Hub's cache this path is; other names as they are."""
    found = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]", name)
    return f"{found[1]}/{found[2]}" if found else name


def _license(base: str) -> str | None:
    """The license that the base model's own card names, where that card is on this machine."""
    path = Path(base) / CARD
    if is_hub_id(base):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, CARD)
        path = Path(cached) if isinstance(cached, str) else path
    try:
        found = ModelCard.load(path).data.license if path.is_file() else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _tracker_pages() -> dict[str, str]:
    wandb = sys.modules.get("wandb")
    url = getattr(getattr(wandb, "run", None), "url", None)
    return {"Weights & Biases": str(url)} if url else {}
