"""Model cards, and pushes to the Hub without secrets or private files.

A push by transformers itself would include pickled arguments and rows of the data.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from prefopt.report.card import render
from prefopt.report.folder import BESIDE_THE_MODEL
from prefopt.report.versions import version_of
from prefopt.safety.errors import PrefoptError
from prefopt.safety.files import write_text
from prefopt.safety.folders import REFERENCE_ADAPTER
from prefopt.safety.redaction import redact, redacted, remember
from prefopt.trainer.facts import CARD

logger = logging.getLogger(__name__)

NOT_PUBLISHED = (
    "_*",
    ".*",
    "checkpoint-*",
    "training_args.bin",
    "dropped_*.jsonl",
    *BESIDE_THE_MODEL,
    "unlearning.json",
    "audit/*",
    "loss_file*.py",
    "*.unfinished",
    f"{REFERENCE_ADAPTER}/*",
    "wandb/*",
)
"""Files of an output folder that are never pushed: pickles, rows of the data, unfinished files, logs, names of folders
on this machine, a copy of the user's own code, and one of the adapter that training started from, which is made again
on resuming."""

ONLY_TO_RESUME = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "latest", "zero_to_fp32.py", "pytorch_model*",
    "objective*.safetensors", "reference.safetensors", "complete.json", "prefopt.json",
)  # fmt: skip
"""Files of a checkpoint that users of the model do not need."""


class PushError(PrefoptError, RuntimeError):
    """A push to the Hub failed; the message names the repository, the reason and what to do."""


class Publisher:
    """Writes a trainer's model card into every saved folder, and pushes only files meant for others.

    Args:
        trainer: what is trained; its `card_facts` are what the card says.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def write_card(self, folder: Path, name: str | None = None, dataset: str | None = None, tags: Any = None) -> None:
        """Write the card; the arguments are those of `create_model_card`."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            facts = self._trainer.card_facts(name, dataset, [tags] if isinstance(tags, str) else list(tags or ()))
            write_text(folder / CARD, str(render(facts)))
        except Exception as error:  # a missing card must not cost the checkpoint
            logger.warning("the model card of %s could not be written: %s", folder, _one_line(error))

    def push(
        self, message: str, blocking: bool, token: str | None, revision: str | None, private: bool | None,
        card: dict[str, Any],
    ) -> Any:  # fmt: skip
        """Save and push the output folder; takes what transformers' `push_to_hub` takes.

        Raises:
            PushError: if the Hub refuses it. The folder is complete anyway.
        """
        trainer = self._trainer
        self._announce()
        remember(token)
        if getattr(trainer, "hub_model_id", None) is None:
            trainer.init_hf_repo(token=token, **({} if private is None else {"private": private}))
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        repository, folder = str(trainer.hub_model_id), Path(trainer.args.output_dir)
        trainer.create_model_card(card.pop("model_name", None) or repository.split("/")[-1], **card)
        trainer._finish_current_push()
        self._report_failures()
        for left in folder.glob("_push-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            return self._upload(
                folder, message, NOT_PUBLISHED, token=token, revision=revision, run_as_future=not blocking
            )
        except Exception as error:  # of whichever library the Hub's client speaks HTTP with
            raise PushError(
                f"the push to {repository} failed: {_one_line(error)}. Nothing is lost: the complete model is in "
                f"{trainer.args.output_dir}. To push it later: {upload_command(repository, trainer.args.output_dir)}"
            ) from None

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Push a checkpoint's model, or with a checkpoint strategy all of it, while training continues."""
        trainer, step = self._trainer, self._trainer.state.global_step
        strategy = HubStrategy(trainer.args.hub_strategy)
        if not trainer.is_world_process_zero() or strategy is HubStrategy.END:
            return
        busy = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
        if busy and not trainer.args.hub_always_push:
            return
        self._announce()
        folder = _linked(checkpoint, Path(trainer.args.output_dir) / f"_push-{step}")
        message = f"Training in progress, step {step}"
        jobs = [self._upload(folder, message, (*NOT_PUBLISHED, *ONLY_TO_RESUME), run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy is HubStrategy.CHECKPOINT else checkpoint.name
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
            trainer.push_in_progress.jobs.extend(jobs)
        else:
            self._report_failures()
            trainer.push_in_progress = PushInProgress(jobs)

    def _upload(self, folder: Path, message: str, ignore: tuple[str, ...], **options: Any) -> Any:
        args = self._trainer.args
        options["token"] = options.get("token") or args.hub_token
        options["revision"] = options.get("revision") or getattr(args, "hub_revision", None)
        return HfApi(library_name="prefopt", library_version=version_of("prefopt")).upload_folder(
            repo_id=str(self._trainer.hub_model_id),
            folder_path=folder,
            commit_message=message,
            ignore_patterns=list(ignore),
            **options,
        )

    def _announce(self) -> None:
        """Callbacks may publish here themselves, as trackio's does; their errors must not stop the model's push."""
        trainer = self._trainer
        try:
            trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        except Exception as error:
            logger.warning("a callback failed before the push: %s", _one_line(error))

    def _report_failures(self) -> None:
        """Warn about pushes during training that failed; they did not stop the run."""
        jobs = getattr(self._trainer.push_in_progress, "jobs", ())
        failed = [error for job in jobs if job.done() and (error := job.exception()) is not None]
        if failed:
            logger.warning(
                "%d of %d pushes during training failed, the last with: %s",
                *(len(failed), len(jobs), _one_line(failed[-1])),
            )
        self._trainer.push_in_progress = None


@contextmanager
def repository_errors(args: Any) -> Iterator[None]:
    """Context in which a repository is created or found on the Hub.

    Raises:
        PushError: if the Hub refuses.
    """
    remember(args.hub_token)
    try:
        yield
    except Exception as error:  # of whichever library the Hub's client speaks HTTP with
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        raise PushError(
            f"push_to_hub: the repository {name!r} could not be created or found: {_one_line(error)}. Log in with "
            "`hf auth login` or give hub_token a token with write access, check that hub_model_id is OWNER/NAME with "
            "an OWNER that you can write to, or leave push_to_hub out and push the saved folder later"
        ) from None


def _linked(folder: Path, target: Path) -> Path:
    """The files of a checkpoint under another name, so that rotation does not delete them during the push."""
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
def without_secrets(args: Any) -> Iterator[None]:
    """Remove secrets from the arguments while transformers pickles them into `training_args.bin`."""
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
