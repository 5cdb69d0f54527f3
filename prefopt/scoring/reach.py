"""How far trees are known to give a model's own numbers: for rows of which length, in trees of which size.

What depends on lengths (windows, chunks, thresholds on positions) is found by trying, so nothing longer than what was
tried is taken for granted: it is tried when it comes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prefopt.scoring import attention
from prefopt.scoring.exact import within
from prefopt.scoring.fingerprint import is_sharded
from prefopt.scoring.model import unwrapped

TRIALS = 16
"""Most trials of one kind of model; what none of them covers is scored padded."""
AHEAD = 4096
"""Rows of up to so many tokens are tried before any are met."""


@dataclass(frozen=True)
class Reach:
    """How far something goes.

    Attributes:
        row: tokens of the longest row: prompt and completion.
        places: tokens of the longest row that goes through the model in trees.
    """

    row: int
    places: int

    def covers(self, other: Reach) -> bool:
        """Whether it goes as far as the other."""
        return self.row >= other.row and self.places >= other.places


Trial = Callable[[nn.Module, Reach], str]
"""How a model's trees of such a reach differ from its rows; "" if they do not."""


@dataclass
class Tried:
    """What is known of models of one kind.

    Attributes:
        model: one of them.
        passed: how far trees gave the model's own numbers.
        failed: how far they did not.
        reason: what was found there.
    """

    model: weakref.ReferenceType[nn.Module]
    passed: list[Reach] = field(default_factory=list)
    failed: list[Reach] = field(default_factory=list)
    reason: str = ""

    def known(self, need: Reach) -> bool | None:
        """Whether trees hold so far; None if that was not tried."""
        if any(reach.covers(need) for reach in self.passed):
            return True
        return False if any(need.covers(reach) for reach in self.failed) else None

    def note(self, reach: Reach, reason: str) -> bool:
        """Write down what a trial found; whether trees hold."""
        (self.failed if reason else self.passed).append(reach)
        self.reason = reason or self.reason
        return not reason


class Horizon:
    """What was tried of every kind of model in a run: the policy, and a reference of its own.

    Args:
        max_length: of the run's rows; None if there is no limit.
    """

    def __init__(self, max_length: int | None):
        self._max_length = max_length
        self._kinds: dict[str, Tried] = {}
        self._kind_of: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def settle(
        self, model: nn.Module, needs: Sequence[Reach], short: Reach, trial: Trial, agree: Callable[[str], str]
    ) -> str:
        """Why trees do not hold for the first model at all; "" if they do.

        Args:
            model: the first one.
            needs: what every process's first batch needs.
            short: what the shortest rows need.
            trial: how to find out.
            agree: what all processes say.
        """
        tried = Tried(weakref.ref(model))
        reaches = [short]
        if is_sharded(model):
            # All processes have to try at once, which they do not do again.
            reaches = [self._ahead(Reach(max(n.row for n in needs), max(n.places for n in needs)), tried, True)]
        for reach in reaches:
            if not tried.note(reach, agree(trial(model, reach))):
                return tried.reason
        self._kinds[self._kind(model)] = tried
        return ""

    def reason(self, model: nn.Module, need: Reach, trial: Trial) -> str:
        """Why trees that go so far are not used for this model and all that were met before; "" if they are.

        Args:
            model: which is scored.
            need: how far the batch goes.
            trial: how to find out what is not known.
        """
        self._kinds.setdefault(self._kind(model), Tried(weakref.ref(model)))
        for tried in self._kinds.values():
            if tried.known(need) is None and (one := tried.model()) is not None and not is_sharded(one):
                self._try(tried, one, need, trial)
            if not tried.known(need):
                return tried.reason or f"trees of rows of {need.row} tokens were not tried"
        return ""

    def _try(self, tried: Tried, model: nn.Module, need: Reach, trial: Trial) -> None:
        """Try further ahead than is needed, then just as far."""
        for reach in (self._ahead(need, tried, False), need):
            if tried.known(reach) is None and len(tried.passed) + len(tried.failed) < TRIALS:
                tried.note(reach, trial(model, reach))

    def _ahead(self, need: Reach, tried: Tried, sharded: bool) -> Reach:
        """How far to try where so much is needed: as long as the run's rows can be, where that is known."""
        limit, row = self._max_length, 1 << (need.row - 1).bit_length()
        if limit is not None:
            row = limit if sharded or limit <= AHEAD else min(row, limit)
        row = max(need.row, row)
        places = 1 << (need.places - 1).bit_length() if tried.failed or len(tried.passed) > 1 else need.places
        return Reach(row, max(places, need.places * row // need.row) if sharded else places)

    def _kind(self, model: nn.Module) -> str:
        """What decides how a model's tokens see one another, as far as it can be read off."""
        inner: Any = unwrapped(model)
        if inner not in self._kind_of:
            settings = inner.config.to_dict()
            settings.pop("_name_or_path", None)
            kind = getattr(inner.config, "_attn_implementation", None)
            adapters = {name: str(config) for name, config in getattr(within(model), "peft_config", {}).items()}
            kind = "sdpa" if kind == attention.NAME else kind
            self._kind_of[inner] = str((type(inner), settings, kind, adapters))
        return self._kind_of[inner]
