"""docs/numbers.md names every number that a run logs, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prefopt.analysis import EntanglementCallback
from prefopt.recipe.eval_answers import KL
from tests.trainer.runs import make_groups, make_labelled, make_pairs, make_trainer, save_model

PAGE = (Path(__file__).parents[2] / "docs" / "numbers.md").read_text(encoding="utf-8")
OF_TRANSFORMERS = re.compile(r"(train|eval)_(runtime|\w+_per_second|loss)|total_flos|step")
"""What the last line of a training and of an evaluation says about time."""
RUNS: tuple[dict[str, Any], ...] = (
    {"loss": "dpo(beta=0.1) + 0.2*sft"},
    {"loss": "kto", "train_dataset": make_labelled(8)},
    {"loss": "gvpo", "train_dataset": make_groups(8)},
    {"loss": "kl_online", "sample_max_new_tokens": 2},
    {"loss": "kernel_dpo(kernel='rbf', divergence='kl', gamma=1.0)"},
    {"loss": "hmk(divergence='kl')"},
    {"loss": "conflict_free(dpo + sft)"},
    {"loss": "dpo", "architecture": "moe", "router_aux_loss_coef": 0.5},
)


def documented() -> list[re.Pattern[str]]:
    """The names of the first columns of the two tables of names, with `<...>` and `...` for any word."""
    section = PAGE.partition("## Every number")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) > 25
    words = [re.sub(r"<\w+>|\.\.\.", r"\\w+", name) for name in names]
    # A parameter with several values has one name a value.
    return [re.compile(word + r"(/\w+)?" * word.startswith("learned")) for word in words]


def logged(folder: Path) -> set[str]:
    names: set[str] = set()
    for run in RUNS:
        options = dict(run)
        rows = options.pop("train_dataset", make_pairs(8))
        trainer = make_trainer(
            folder, model=save_model(folder, options.pop("architecture", "llama")), train_dataset=rows, max_steps=1,
            trainer_options={"eval_dataset": rows}, **options,
        )  # fmt: skip
        if run is RUNS[0]:
            trainer.add_callback(EntanglementCallback(trainer, every=1, probes=2))
        trainer.train()
        trainer.evaluate()
        names |= {name for entry in trainer.state.log_history for name in entry}
    return {name for name in names if not OF_TRANSFORMERS.fullmatch(name)}


def test_every_number_of_a_run_is_explained_and_every_explained_number_exists(tmp_path):
    names = {name.removeprefix("eval_") for name in logged(tmp_path) | {KL}}  # KL: of recipes
    patterns = documented()
    unexplained = [name for name in sorted(names) if not any(pattern.fullmatch(name) for pattern in patterns)]
    assert not unexplained
    unknown = [pattern.pattern for pattern in patterns if not any(pattern.fullmatch(name) for name in names)]
    assert not unknown
