"""Precedence among the options of a recipe.

Weakest first: defaults, the bundled job's settings if no model is named, the `--config` file, the settings of
`--demo`, the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from trl import ModelConfig, TrlParser

from prefopt import __version__
from prefopt.losses import LossError, LossSyntaxError, UnknownLossError, register_file
from prefopt.models.bundled import HUB_ID
from prefopt.recipe.arguments.checks import refuse_steps_and_epochs, refuse_unusable, renamed
from prefopt.recipe.arguments.config_file import checked_values, read_config, set_environment
from prefopt.recipe.arguments.launched import launch_command
from prefopt.recipe.arguments.loss_options import settle
from prefopt.recipe.arguments.options import LOSS_FILE, Recipe, RecipeArguments
from prefopt.recipe.arguments.threads import use_every_core
from prefopt.safety.errors import did_you_mean, show_short_errors
from prefopt.safety.files import is_file
from prefopt.safety.noise import quiet_libraries
from prefopt.safety.redaction import guard_process, redact, remember, words_without_secrets
from prefopt.safety.shipped import SHIPPED, find_shipped, near_names
from prefopt.trainer import PreferenceConfig
from prefopt.trainer.config import TRL_LOSS_OPTIONS

DEMO_CONFIG = RecipeArguments.demo_config
"""Settings of the bundled job; they are the defaults if neither model nor data are named."""

_OBJECTIVE = {"loss", "loss_file", "embeddings", *TRL_LOSS_OPTIONS}
"""The options of a config that `--demo` does not replace."""


def parse_arguments(
    loss: str, argv: Sequence[str] | None = None, options: type[RecipeArguments] = RecipeArguments
) -> Recipe:
    """Read the command line and the `--config` YAML over the recipe's own defaults.

    Without `--model_name_or_path` the bundled model is used, with the settings of `DEMO_CONFIG` as defaults. Without
    `--dataset_name` the bundled preference pairs are used.

    Args:
        loss: the recipe's own loss expression, unless the command line or the config has another.
        argv: the words of the command line; default: those of this process.
        options: the recipe's own options.

    Raises:
        SystemExit: naming the option and what to do.
    """
    quiet_libraries()
    words = list(sys.argv[1:] if argv is None else argv)
    words_without_secrets(words)  # from now on they are removed from all output
    command = launch_command(argv)
    guard_process()
    show_short_errors()
    words, config, path = _take_config(words)
    paper = config.pop("paper", {})
    named = {word[2:].split("=", 1)[0].replace("-", "_") for word in words if word.startswith("--")}
    # No abbreviations: options are looked up by name below.
    kinds = (options, PreferenceConfig, ModelConfig)
    parser = _Parser(kinds, allow_abbrev=False)
    config = checked_values(config, parser, kinds, path)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        raise SystemExit(_no_option(unknown[0], parser))
    demo = bool(known.demo or config.get("demo"))
    _run_loss_file(known.loss_file or config.get("loss_file"))
    own_loss, words, config = _settled(loss, words, config, named, known)
    defaults, notes = _defaults(own_loss, config, named, demo, options)
    refuse_steps_and_epochs(config, named, known)
    parser.set_defaults_with_config(**defaults)
    script, training, model = _filled(parser, words)
    remember(training.hub_token)
    if training.device.type == "cpu":
        use_every_core()
    recipe = Recipe(
        script, training, model, _Console(quiet=not PartialState().is_main_process), paper, command,
        output_named="output_dir" in named or ("output_dir" in config and not demo),
    )  # fmt: skip
    from_config = () if demo else (name for name, value in config.items() if value is not None)
    refuse_unusable(recipe, named, named.union(from_config))
    if path is not None and path.is_relative_to(SHIPPED / "configs"):
        notes.insert(0, f"Config: {path.relative_to(SHIPPED / 'configs')}, which comes with prefopt {__version__}.")
    if demo:
        notes.insert(0, _swapped(config, named, recipe))
    for note in notes:
        recipe.console.print(note, soft_wrap=True, markup=False)
    return recipe


class _Console(Console):
    """Prints texts with secrets masked; tables and similar objects are masked where they are made."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(redact(part) if isinstance(part, str) else part for part in objects), **options)


def _run_loss_file(file: str | None) -> None:
    """Make the losses of the user's own file known, before an expression is read."""
    if file is None:
        return
    try:
        register_file(file)
    except LossError as error:
        raise SystemExit(f"--loss_file {error}") from None


def _filled(parser: TrlParser, argv: Sequence[str]) -> tuple[RecipeArguments, PreferenceConfig, ModelConfig]:
    """The three groups of options.

    Raises:
        SystemExit: with the message of the class that refuses its options.
    """
    try:
        script, training, model = parser.parse_args_and_config(argv)
    except UnknownLossError as error:
        raise SystemExit(f"--loss: {error}{_earlier_file(parser, argv)}") from None
    except LossSyntaxError as error:
        raise SystemExit(f"--loss: {error}") from None
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError) as error:
        raise SystemExit(f"These options cannot be used: {_short(str(error))}") from error
    if isinstance(model.lora_target_modules, str) and model.lora_target_modules.isidentifier():
        # TRL makes text of a list of one, which PEFT takes for a pattern of whole paths.
        model.lora_target_modules = [model.lora_target_modules]
    return script, training, model


def _earlier_file(parser: TrlParser, argv: Sequence[str]) -> str:
    """A line about the loss file of the run in the output folder, if there is one."""
    file = Path(parser.parse_known_args(argv)[0].output_dir or "") / LOSS_FILE
    return f"\nThe earlier run in that folder had a loss file: --loss_file {file}" if is_file(file) else ""


class _Parser(TrlParser):  # type: ignore[misc]
    """Reports a wrong word without the 200 options that argparse would list before the message."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"{_short(message)}. --help lists the options")


def _no_option(word: str, parser: TrlParser) -> str:
    if not word.startswith("-"):
        return f"the word {_short(ascii(word))} belongs to no option before it. --help lists the options"
    name = word.partition("=")[0]
    if (now := renamed(name)) is not None:
        return f"the option {name} was removed: {now}"
    return (
        f"there is no option {_short(name)}.{did_you_mean(name[:80], parser._option_string_actions)} --help lists them"
    )


def _short(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]}..."


def _take_config(words: list[str]) -> tuple[list[str], dict[str, Any], Path | None]:
    """The words without `--config`, the mapping in its file (its `env` is set), and the file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", const="", default=[])
    known, others = parser.parse_known_args(words)
    if not known.config:
        return words, {}, None
    if len(known.config) > 1:
        raise SystemExit("--config is given twice: name one file")
    name = known.config[0]
    path: Path | None = Path(name)
    if not is_file(Path(name)):
        path = find_shipped(name, "configs")
    if path is None:
        raise SystemExit(
            f"--config {_short(name)}: there is no such file, and prefopt has no config of this name."
            f"{near_names(name[:80], 'configs')}"
        )
    config = read_config(path)
    set_environment(config.pop("env", {}), path)
    return others, config, path


def _settled(
    own: str, words: list[str], config: dict[str, Any], named: set[str], known: argparse.Namespace
) -> tuple[str | None, list[str], dict[str, Any]]:
    """The recipe's objective with TRL's loss options in it, and the words and the config without those options."""
    options = {name: config[name] for name in TRL_LOSS_OPTIONS if name in config}
    options |= {name: getattr(known, name) for name in TRL_LOSS_OPTIONS if name in named}
    if not options:
        return own, words, config
    written = known.loss if "loss" in named else config.get("loss")
    if written is None and "loss" in config:
        return own, words, config  # `loss: null` asks for TRL's options
    loss = settle(own, written, options)
    if loss is None or written is not None:
        return loss, words, config
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in options:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="*")
    return loss, parser.parse_known_args(words)[1], {k: value for k, value in config.items() if k not in options}


def _defaults(
    loss: str | None, config: dict[str, Any], words: set[str], demo: bool, options: type[RecipeArguments]
) -> tuple[dict[str, Any], list[str]]:
    """The value of every option that is not on the command line, and lines about them for the screen."""
    defaults: dict[str, Any] = {"report_to": "none", "output_dir": "runs/latest", "loss": loss}
    notes = []
    if not torch.accelerator.is_available():
        defaults["use_cpu"] = True
    if demo:
        config = {name: value for name, value in config.items() if name in _OBJECTIVE}
    named = words | {name for name, value in config.items() if value is not None}
    epochs_are_asked_for = "num_train_epochs" in words and "max_steps" not in words
    if demo or not named & {"model_name_or_path", *options.data_options}:
        defaults |= yaml.safe_load(options.demo_config.read_text(encoding="utf-8"))
        epochs_are_asked_for |= "num_train_epochs" in named and "max_steps" not in named
        if epochs_are_asked_for and "max_steps" in defaults:
            notes.append(f"The bundled job's {defaults['max_steps']} steps do not apply: num_train_epochs is set.")
    elif "model_name_or_path" not in named:
        notes.append(
            f"No --model_name_or_path: the bundled {HUB_ID} is trained, with the general defaults (the bundled job's "
            "settings are for its own data)."
        )
    if epochs_are_asked_for:
        if config.get("max_steps", -1) != -1:
            notes.append(f"The config's max_steps {config['max_steps']} does not apply: --num_train_epochs is set.")
        config = {**config, "max_steps": -1}
    return defaults | config, notes


def _swapped(config: dict[str, Any], words: set[str], recipe: Recipe) -> str:
    """One line that says what `--demo` replaced."""
    parts = []
    bundled = recipe.script.bundled_words
    for option, ours in (("model_name_or_path", "the bundled model"), (recipe.script.data_options[0], bundled)):
        if option not in words:
            parts.append(f"{ours} in place of {config[option]}" if option in config else ours)
    settings = "the bundled job's settings"
    parts.append(f"{settings} in place of the config's" if set(config) - _OBJECTIVE else settings)
    return f"--demo: {', '.join(parts)}; the loss stays {recipe.objective_text}."
