"""What a trainer leaves in its folder and on the Hub: the model card, no secrets, nothing that others should not see.

Overrides `save_model`, `create_model_card`, `init_hf_repo` and `push_to_hub` of transformers' trainer, and
`_push_from_checkpoint`, which has no public counterpart: it would push pickled arguments and rows of the data.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from prefopt.report.card import render
from prefopt.safety.errors import PrefoptError
from prefopt.safety.files import write_whole
from prefopt.safety.folders import REFERENCE_ADAPTER
from prefopt.safety.redaction import redact, redacted, remember
from prefopt.trainer.facts import CARD, FactsMixin

logger = logging.getLogger(__name__)

NOT_PUBLISHED = (
    "_*",
    ".*",
    "checkpoint-*",
    "training_args.bin",
    "dropped_*.jsonl",
    "before.json",
    "*.unfinished",
    f"{REFERENCE_ADAPTER}/*",
    "wandb/*",
)
"""Files of an output folder that are never pushed: pickles, rows of the data, what is not finished, and a copy of the
adapter that training started from, which resuming makes again."""

ONLY_TO_RESUME = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "latest", "zero_to_fp32.py", "pytorch_model*",
    "objective*.safetensors", "reference.safetensors", "complete.json", "prefopt.json",
)  # fmt: skip
"""Files of a checkpoint that a model's users have no need of."""


class PushError(PrefoptError, RuntimeError):
    """The Hub did not take what was to be pushed; says which repository, why, and what to do."""


class PublishingMixin(FactsMixin):
    """Writes the model card into every folder that is saved, and pushes only what is meant for others."""

    callback_handler: Any
    control: Any
    hub_model_id: str | None
    push_in_progress: Any

    def started_from(self, logs: Mapping[str, float] | None) -> None:
        """What an evaluation before training found, for the card of a resumed run."""
        if logs:
            self._before = {name.removeprefix("eval_"): value for name, value in logs.items()}

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **others: Any
    ) -> None:
        """Write the card into `args.output_dir`; takes what TRL's method takes."""
        if self.objective is None:
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)  # type: ignore[misc]
        elif self.is_world_process_zero():  # type: ignore[attr-defined]
            self._write_card(Path(self.args.output_dir), model_name, dataset_name, tags)

    def _write_card(self, folder: Path, name: str | None = None, dataset: str | None = None, tags: Any = None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = str(render(self.card_facts(name, dataset, [tags] if isinstance(tags, str) else list(tags or ()))))
            write_whole(folder / CARD, lambda path: path.write_text(text, encoding="utf-8"))
        except Exception as error:  # a checkpoint is worth more than its card
            logger.warning("the model card of %s could not be written: %s", folder, _one_line(error))

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
