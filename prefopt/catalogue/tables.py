"""What the registry knows about every objective, by family, and as Markdown for the README and the docs.

Imports `prefopt.losses` and `prefopt.catalogue.markdown` alone.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

from prefopt.catalogue.markdown import table
from prefopt.losses import DPO, SFT, Loss, Need, available, presets
from prefopt.losses.registry import describe_arguments
from prefopt.losses.wrappers import Wrapper

FAMILIES = (
    "direct", "scored", "listwise", "penalised", "shapes", "discovered", "batchwise", "pointwise", "binary",
    "tokenwise", "reference-free", "cringe", "likelihood", "online", "unlearning", "kernel", "logic", "wrappers",
    "conflict",
)  # fmt: skip
"""Families in reading order; those of other packages follow."""


@dataclass(frozen=True)
class Family:
    """The losses of one module, and of those whose names continue its name (`unlearning`, `unlearning_tokens`).

    Attributes:
        name: the module's.
        about: the first line of its docstring.
        losses: in alphabetical order.
    """

    name: str
    about: str
    losses: list[type[Loss]]


def families() -> list[Family]:
    """The registered losses by family."""
    modules = {cls.__module__ for cls in available().values()}
    by_module: dict[str, list[type[Loss]]] = {}
    for cls in available().values():
        first = min((name for name in modules if cls.__module__.startswith(f"{name}_")), default=cls.__module__)
        by_module.setdefault(first, []).append(cls)
    groups = []
    for module, members in by_module.items():
        about = (inspect.getdoc(sys.modules.get(module)) or "").partition("\n")[0]
        groups.append(Family(module.rpartition(".")[2].replace("_", "-"), about, members))
    return sorted(groups, key=lambda family: (*FAMILIES, family.name).index(family.name))


@dataclass(frozen=True)
class Facts:
    """The facts about a loss in the tables, in words."""

    formula: str
    data: str
    reference: str
    needs: str
    trl_name: str
    paper: str


def facts(cls: type[Loss]) -> Facts:
    """The facts about a loss with its default arguments."""
    if issubclass(cls, Wrapper):
        inner = DPO() + SFT()  # every wrapper accepts it
        own = cls(inner).needs & ~inner.needs
        return Facts(cls.formula, "as its loss", "as its loss", own.words if own else "", cls.trl_name, cls.paper)
    try:
        # Some declare their needs only in the constructor.
        loss: Loss | type[Loss] = cls()
    except TypeError:
        loss = cls
    others = [str(need.name).lower() for need in Need if need in loss.needs and need != Need.REFERENCE]
    needs = ", ".join([*others, *(f"column {name}" for name in loss.columns)])
    return Facts(cls.formula, data_of(loss), reference_of(loss), needs, cls.trl_name, cls.paper)


def data_of(loss: Loss | type[Loss]) -> str:
    """What data an objective takes, in words."""
    if loss.grouped:
        return "groups with scores" if loss.reads_scores else "groups"
    return "pairs" if loss.paired else " and ".join(loss.roles)


def reference_of(loss: Loss | type[Loss]) -> str:
    """Whether an objective runs the reference model."""
    return "yes" if loss.needs.compares else "no"


# ---- as Markdown -------------------------------------------------------------------------------------------------


def families_line() -> str:
    """The families with their numbers of objectives, for the README."""
    counts = [(family.name, len(family.losses)) for family in families()] + [("presets", len(presets()))]
    return " · ".join(f"[{name}](docs/objectives.md#{name}) {count}" for name, count in counts)


def losses_table() -> str:
    """The families and the names of their objectives, for the top of docs/objectives.md."""
    rows = []
    for family in families():
        names = []
        for cls in family.losses:
            fact = facts(cls)
            marks = "ᵀ" * bool(fact.trl_name) + "°" * (fact.reference == "no")
            names.append(_link(f"`{cls.name}`", fact.paper) + marks)
        rows.append((f"[{family.name}](#{family.name})", family.about, ", ".join(names)))
    named = ", ".join(_link(f"`{preset.name}`", preset.paper) for preset in presets().values())
    rows.append(("[presets](#presets)", "Sums of the above that papers train with.", named))
    return table(("family", "what it holds", "objectives"), rows)


def objectives_table(members: list[type[Loss]]) -> str:
    """Everything the registry knows about some objectives, for docs/objectives.md."""
    rows = []
    for cls in members:
        fact = facts(cls)
        title = f"`{cls.name}({describe_arguments(cls)})`"
        trl = fact.trl_name and f"`{fact.trl_name}`"
        rows.append((title, f"`{fact.formula}`", fact.data, fact.reference, fact.needs, trl, _link(fact.paper)))
    return table(("objective", "formula", "data", "reference", "also needs", "in TRL", "paper"), rows)


def presets_table() -> str:
    """The presets and what they expand to, for docs/objectives.md."""
    rows = [
        (f"`{preset.name}({describe_arguments(preset.build)})`", f"`{preset.build()}`", _link(preset.paper))
        for preset in presets().values()
    ]
    return table(("preset", "with its defaults", "paper"), rows)


def _link(text: str, paper: str | None = None) -> str:
    paper = text if paper is None else paper
    return f"[{text}](https://arxiv.org/abs/{paper})" if paper else text
