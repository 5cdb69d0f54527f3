"""What a recipe checks before it loads a model, on a dry run as on a real one: what is missing or contradicts itself.

Nothing here loads a model or writes a file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from prefopt.data import parse_sources
from prefopt.data.embed import EncoderError
from prefopt.losses import Need
from prefopt.losses.scores import EMBEDDINGS
from prefopt.models.bundled import HUB_ID, HUB_TIMEOUT_S
from prefopt.models.load import Limits, adapter_base, limits_of, load_tokenizer
from prefopt.recipe.announce import steps_of
from prefopt.recipe.rehearsal import rehearse
from prefopt.safety.errors import PrefoptError, UsageError
from prefopt.trainer.checks import RunPlan, check_run
from prefopt.trainer.config import resolve_objective
from prefopt.trainer.publishing import PushError
from prefopt.trainer.saving import checkpoints
from prefopt.trainer.saving.state import loss_of, refuse_other_loss

if TYPE_CHECKING:
    from prefopt.recipe.arguments import Recipe

T = TypeVar("T")


# ---- options and data --------------------------------------------------------------------------------------------


def check_recipe(recipe: Recipe, train: Any, heldout: Any) -> None:
    """Refuse what the run would refuse once its model is loaded.

    Raises:
        UsageError: naming the option that has no effect, or that lacks something.
        ValueError: of `check_run`.
        CheckpointError: where the checkpoint to resume from is not there, not whole, or of another loss.
    """
    script, training = recipe.script, recipe.training
    objective = resolve_objective(None, training)
    if heldout is None and training.eval_strategy.value != "no":
        raise UsageError(
            f"--eval_strategy {training.eval_strategy.value} needs held-out rows, but there are none: name a test "
            "split with --dataset_test_split, set --eval_rows, or use --eval_strategy no"
        )
    if script.ref_model_name_or_path is not None and objective is not None and not objective.needs.compares:
        raise UsageError(f"--ref_model_name_or_path has no effect: {training.loss} compares with no reference")
    if script.previous_model_name_or_path is not None and (objective is None or Need.PREVIOUS not in objective.needs):
        raise UsageError(
            f"--previous_model_name_or_path has no effect: {training.loss or training.loss_type} does not compare "
            "with a previous iterate"
        )
    folder, _ = checkpoints.choose(training.resume_from_checkpoint, Path(training.output_dir))
    if folder is not None:
        refuse_other_loss(checkpoints.read_state(folder).get("run", {}), loss_of(objective, training), folder)
    references = (script.ref_model_name_or_path is not None, script.previous_model_name_or_path is not None)
    made = EMBEDDINGS if script.embeddings is not None else ()
    adapter = recipe.model.use_peft or adapter_base(str(recipe.model.model_name_or_path)) is not None
    try:
        check_run(RunPlan(objective, training, train, heldout, *references, adapter, made))
    except PushError as error:
        raise UsageError(f"{error}. Nothing was trained") from None
    rehearse(recipe, steps_of(training, train))


# ---- what is not there -------------------------------------------------------------------------------------------


def named(recipe: Recipe) -> list[str]:
    """The model and the data sources that the run names; bundled ones have no name."""
    data = recipe.script.dataset_name
    model = None if recipe.bundled_model else recipe.model.model_name_or_path
    names = [model, *(source for source, _ in (parse_sources(data) if data else ()))]
    return [name for name in names if name is not None]


def to_be_made(recipe: Recipe) -> str | None:
    """The sentence about models and data that are not there and that a paper's config puts under runs/ or data/."""
    wanted = [name for name in named(recipe) if name.startswith(("runs/", "data/")) and not Path(name).exists()]
    if not (recipe.paper and wanted):
        return None
    return f"{' and '.join(wanted)} must be made first; the paper's 'differs' says how"


def with_the_hub(recipe: Recipe, load: Callable[[Recipe], T]) -> T:
    """What `load` gives; where the Hub does not answer, of what is in its cache, at once.

    One short question comes first: a download retries for half a minute on a machine that has no way out.

    Raises:
        HubUnreachable: where something is neither on this machine nor in the Hub's cache.
    """
    if not constants.HF_HUB_OFFLINE and not _on_this_machine(recipe) and not _hub_answers():
        recipe.console.print("The Hub does not answer: its cache on this machine is used.")
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return load(recipe)
    except (OSError, ValueError) as error:
        if isinstance(error, EncoderError) or not _is_unreachable(error):
            raise
        raise HubUnreachable(
            f"{' or '.join(_missing(recipe))} is not on this machine and the Hub cannot be reached"
        ) from error


class HubUnreachable(PrefoptError, ConnectionError):
    """Something is not on this machine, and the Hub cannot be asked for it."""


def _on_this_machine(recipe: Recipe) -> bool:
    return all(Path(name).expanduser().exists() for name in named(recipe))


def _missing(recipe: Recipe) -> list[str]:
    return [name for name in named(recipe) if not Path(name).expanduser().exists()] or named(recipe)


def _hub_answers() -> bool:
    try:
        HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        return True  # if not the answer wished for: loading will say what is wrong
    except Exception:
        return False
    return True


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an error comes of the Hub being out of reach rather than of what was asked of it."""
    while error is not None:
        if isinstance(error, (ConnectionError, LocalEntryNotFoundError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def keep_to_positions(recipe: Recipe, end: int | None) -> None:
    """Cut rows where the model's learned positions end: beyond it would fail at the first row that is so long."""
    training = recipe.training
    if end is not None and (training.max_length is None or training.max_length > end):
        recipe.console.print(
            f"max_length is {end} in place of {training.max_length}: {recipe.model.model_name_or_path} has learned no "
            "more positions.",
            soft_wrap=True,
        )
        training.max_length = end


def model_limits(recipe: Recipe) -> Limits:
    model = recipe.model
    return limits_of(
        str(model.model_name_or_path),
        revision=model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
    )


def tokenizer_of(recipe: Recipe) -> Any:
    arguments = recipe.training.chat_template_kwargs
    return load_tokenizer(
        str(recipe.model.model_name_or_path),
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
        chat_template=recipe.script.chat_template,
        chat_template_kwargs=arguments if isinstance(arguments, dict) else None,
    )
