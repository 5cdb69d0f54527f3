"""The policy of rounds: which models, loss and prompts each round has. One place decides, and says it in words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.generation.samples import PromptRow
from prefopt.losses import Loss, Need, parse
from prefopt.online.folders import RoundFolder
from prefopt.online.options import RoundsArguments
from prefopt.safety.errors import UsageError


@dataclass(frozen=True)
class RoundPlan:
    """One round.

    Attributes:
        number: from 1.
        loss: the expression.
        sampler: the model that draws the samples, a folder or a Hub name: the last round's.
        start: the model whose weights training starts from.
        reference: the frozen reference, if it is not `start`; None if it is, or if the loss has none.
        previous: the previous iterate, for losses that compare with one; None in the first round, where the
            reference is the previous iterate.
        optimizer: the file with the optimizer's state to continue with, or None.
        words: all of this for the screen and the summary.
    """

    number: int
    loss: str
    sampler: str
    start: str
    reference: str | None
    previous: str | None
    optimizer: Path | None
    words: dict[str, str]


def plan_round(script: RoundsArguments, run: Path, initial: str, loss: str, number: int) -> RoundPlan:
    """The models, loss and optimizer of a round.

    Args:
        script: the options.
        run: the folder of the run.
        initial: the model before the first round.
        loss: the expression, unless the options have one a round.
        number: of the round, from 1.
    """
    expression = loss_of(script, loss, number)
    objective = parse(expression)
    last = initial if number == 1 else str(RoundFolder(run, number - 1).model)
    start = initial if script.round_start == "initial" else last
    reference = _reference(script, objective, run, initial, last, number)
    previous = last if Need.PREVIOUS in objective.needs and number > 1 else None
    optimizer = None
    if script.round_optimizer == "keep" and number > 1:
        optimizer = RoundFolder(run, number - 1).optimizer
    words = {
        "loss": str(expression),
        "samples from": last,
        "starts from": start,
        "reference": "none" if reference is None else f"{reference} ({script.round_reference.replace('_', ' ')})",
        "optimizer": "new" if optimizer is None else f"state of round {number - 1}",
    }
    if previous is not None:
        words["previous iterate"] = previous
    return RoundPlan(
        number, expression, last, start, None if reference == start else reference, previous, optimizer, words
    )


def loss_of(script: RoundsArguments, loss: str, number: int) -> str:
    """The loss expression of a round."""
    if not script.round_losses:
        return loss
    return script.round_losses[min(number, len(script.round_losses)) - 1]


def _reference(
    script: RoundsArguments, objective: Loss, run: Path, initial: str, last: str, number: int
) -> str | None:
    if not objective.needs.compares:
        return None
    if script.round_reference == "none":
        raise UsageError(f"round_reference is none, but {objective} compares with a reference")
    if script.round_reference == "moving_average" and number > 1:
        return str(RoundFolder(run, number).reference)
    return last if script.round_reference == "previous" else initial


def prompts_of(script: RoundsArguments, prompts: Sequence[PromptRow], number: int, seed: int) -> list[PromptRow]:
    """The prompts of a round, in file order.

    `disjoint` deals them out in the order of a shuffle, and starts again with another shuffle when all were used.
    """
    count = script.prompts_per_round
    if script.round_prompts == "all":
        return list(prompts)
    if count > len(prompts):
        raise UsageError(f"prompts_per_round is {count}, but there are {len(prompts)} prompts")
    if script.round_prompts == "sampled":
        chosen = random.Random(f"{seed}/{number}").sample(range(len(prompts)), count)
        return [prompts[place] for place in sorted(chosen)]
    parts = len(prompts) // count
    turn, part = divmod(number - 1, parts)
    order = list(range(len(prompts)))
    random.Random(f"{seed}/shuffle/{turn}").shuffle(order)
    return [prompts[place] for place in sorted(order[part * count : (part + 1) * count])]
