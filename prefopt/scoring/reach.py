"""How far trees are known to give a model's own numbers: for rows of which length, in trees of which size.

Effects of length (windows, chunks, thresholds on positions) are found only by trying, so rows longer than any tried
before are tried when they come.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prefopt.scoring import attention
from prefopt.scoring.fingerprint import is_sharded, of_the_network
from prefopt.scoring.model import peeled, unwrapped

TRIALS = 32
"""Maximum trials per kind of model; rows that none of them covers are scored padded."""


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

    def half_and_half(self) -> Reach:
        """With places for two branches that are half of a row each, where most goes wrong that can."""
        return Reach(self.row, max(self.places, self.row + self.row // 2))


Trial = Callable[[nn.Module, Reach, bool], str]
"""(model, reach, whether it is sharded) -> how its trees differ from its rows; "" if they do not."""


@dataclass
class Tried:
    """What is known of models of one kind.

    Attributes:
        model: one of them.
        sharded: whether its weights are spread over processes, so that all of them have to try at once.
        passed: how far trees gave the model's own numbers.
        failed: how far they did not.
        reason: what was found there.
    """

    model: weakref.ReferenceType[nn.Module]
    sharded: bool
    passed: list[Reach] = field(default_factory=list)
    failed: list[Reach] = field(default_factory=list)
    reason: str = ""

    @property
    def reaches(self) -> list[Reach]:
        """All that was tried."""
        return self.passed + self.failed

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
        gather: what every process found.
    """

    def __init__(self, max_length: int | None, gather: Callable[[Any], Sequence[Any]]):
        self._max_length = max_length
        self._gather = gather
        self._kinds: dict[str, Tried] = {}
        self._kind_of: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def settle(self, model: nn.Module, need: Reach, short: Reach, trial: Trial) -> str:
        """Why trees do not hold for a model at all; "" if they do. All processes ask at once, and agree.

        Args:
            model: met for the first time.
            need: how far its first batch goes.
            short: how far the shortest rows go; tried where more does not hold.
            trial: how to find out.
        """
        needs = self._gather(need)
        need = Reach(max(n.row for n in needs), max(n.places for n in needs))
        tried = self._meet(model)
        for reach in (self._ahead(need, tried.sharded), short.half_and_half()):
            reasons = self._gather(trial(model, reach, tried.sharded))
            if tried.note(reach, next((reason for reason in reasons if reason), "")):
                return ""
            if tried.sharded:
                break
        return tried.reason

    def forget(self) -> None:
        """What was tried in one way says nothing of another."""
        self._kinds.clear()

    def knows(self, model: nn.Module) -> bool:
        """Whether a model of this kind was met."""
        return self._kind_of.get(unwrapped(model)) in self._kinds

    def reason(self, model: nn.Module, need: Reach, trial: Trial) -> str:
        """Why trees that go so far are not used for this model and all that were met before; "" if they are.

        Args:
            model: which is scored.
            need: how far the batch goes.
            trial: how to find out what is not known.
        """
        if not self._meet(model).reaches and self._meet(model).sharded:
            self.settle(model, need, need, trial)
        for tried in self._kinds.values():
            if tried.known(need) is None and (one := tried.model()) is not None and not tried.sharded:
                self._try(tried, one, need, trial)
            if not tried.known(need):
                return tried.reason or f"trees of rows of {need.row} tokens were not tried"
        return ""

    def _try(self, tried: Tried, model: nn.Module, need: Reach, trial: Trial) -> None:
        """Try further ahead than is needed, then just as far."""
        for reach in (self._ahead(need, sharded=False), need.half_and_half()):
            if tried.known(reach) is None and len(tried.reaches) < TRIALS:
                tried.note(reach, trial(model, reach, tried.sharded))

    def _ahead(self, need: Reach, sharded: bool) -> Reach:
        """How far to try where so much is needed; as far as the run's rows can go if it is the only trial."""
        limit = self._max_length
        row = limit if sharded and limit is not None else _rounded(need.row)
        row = max(need.row, row if limit is None else min(row, limit))
        places = need.places * row // need.row if sharded else _rounded(need.places)
        return Reach(row, max(need.places, places)).half_and_half()

    def _meet(self, model: nn.Module) -> Tried:
        """What is known of models like this one."""
        inner = unwrapped(model)
        if inner not in self._kind_of:
            self._kind_of[inner] = _kind(model)
        kind = self._kind_of[inner]
        if kind not in self._kinds:
            self._kinds[kind] = Tried(weakref.ref(model), is_sharded(model))
        return self._kinds[kind]


def _rounded(count: int) -> int:
    """A little more, so that few batches after this one need a trial of their own."""
    step = max(1 << (count.bit_length() - 2), 1)
    return -(-count // step) * step


def _kind(model: nn.Module) -> str:
    """What decides how a model's tokens see one another, as far as it can be read off."""
    inner: Any = unwrapped(model)
    settings = of_the_network(inner.config)
    kind = getattr(inner.config, "_attn_implementation", None)
    adapters = {name: str(config) for name, config in getattr(peeled(model), "peft_config", {}).items()}
    return str((type(inner), settings, "sdpa" if kind == attention.NAME else kind, adapters))
