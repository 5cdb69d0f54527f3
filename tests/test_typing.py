"""What type checkers and editors see of the package: typed calls, arguments by name, no errors in a user's file."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trl import DPOTrainer

from prefopt import PreferenceTrainer

ROOT = Path(__file__).parents[1]
OWN_LOSS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)[4]

LOSSES = f"""{OWN_LOSS}

from prefopt.losses import DPO, SFT, Loss, Need, PairLoss, Scores, paired_roles, parse


class Own(PairLoss):
    needs = Need.REFERENCE

    def reward(self, scores: Scores) -> torch.Tensor:
        return scores.ratios

    def per_example(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected = paired_roles(batch)
        return torch.exp(rejected.ratios - chosen.ratios)


def value(batch: PreferenceBatch, loss: Loss) -> float:
    total = loss + Own() * 0.2 - parse("sft")
    reveal_type(total(batch))
    reveal_type(Exponential(beta=0.3)(batch).mean_metrics())
    return float(total(batch).loss)


DPO(betta=0.1)
SFT()(3)
"""

TRAINERS = """
from typing import Any

from prefopt import LossMixin, PreferenceConfig, PreferenceTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer


class MyDPOTrainer(DPOTrainer):
    def rate(self) -> float:
        return float(self.args.learning_rate)


class MyTrainer(LossMixin, MyDPOTrainer):
    def name(self) -> str:
        return str(self.objective)


def train(pairs: Any) -> None:
    print(parse("dpo") + 0.2 * SFT())
    PreferenceTrainer("model", args=PreferenceConfig("out", loss="ipo"), train_dataset=pairs).train()
    trainer = MyTrainer("model", args=DPOConfig("out"), train_dataset=pairs, loss="dpo(beta=0.1) + 0.2*sft")
    trainer.train()
    print(trainer.rate(), trainer.name())


PreferenceTrainer("model", args=3)
PreferenceTrainer("model", train_datasett=None)
"""


def checked(folder: Path, text: str, *options: str) -> list[str]:
    """The lines of `mypy --strict` about a user's file, in a folder of its own."""
    return [line for line in lines_of(folder, {"script": text}, *options) if "defined in" not in line]


def lines_of(folder: Path, scripts: dict[str, str], *options: str) -> list[str]:
    """What `mypy --strict` says of files, whose texts are given by name."""
    pytest.importorskip("mypy")
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    files = [f"{name}.py" for name in scripts]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary",
         "--cache-dir", str(folder.parent / "mypy-cache"), *options, *files],
        cwd=folder, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not run.stderr, run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith(tuple(files))]


def line_of(text: str, code: str) -> int:
    return text.splitlines().index(code) + 1


def expected_of_losses(lines: list[str]) -> None:
    at = {code: line_of(LOSSES, code) for code in ("    reveal_type(total(batch))", "DPO(betta=0.1)", "SFT()(3)")}
    first, betta, three = at.values()
    assert len(lines) == 4, lines
    assert re.match(rf'script.py:{first}: note: Revealed type is "prefopt.losses.base.LossOutput"', lines[0])
    assert re.search(r"dict\[(builtins\.)?str, (builtins\.)?float\]", lines[1])
    assert re.match(rf'script.py:{betta}: error: Unexpected keyword argument "betta" for "DPO"', lines[2])
    assert re.match(rf"script.py:{three}: error: .* incompatible type \"int\"; expected \"PreferenceBatch\"", lines[3])


def test_losses_are_typed_without_torchs_own_types(tmp_path):
    """Quick: torch is left unread, so that what is found comes of this package alone."""
    expected_of_losses(checked(tmp_path, LOSSES, "--no-site-packages", "--ignore-missing-imports",
                               "--allow-subclassing-any", "--allow-untyped-decorators"))  # fmt: skip


@pytest.mark.slow
def test_a_users_file_has_the_errors_that_it_should_have_and_no_others(tmp_path):
    lines = checked(tmp_path, LOSSES + TRAINERS)
    expected_of_losses([line for line in lines if int(line.split(":")[1]) <= LOSSES.count("\n")])
    wrong, typo = lines[-2:]
    assert len(lines) == 6, lines
    assert 'Argument "args" to "PreferenceTrainer" has incompatible type "int"' in wrong
    assert 'Unexpected keyword argument "train_datasett" for "PreferenceTrainer"' in typo


PREAMBLE = """from typing import Any

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

model: Any
tokenizer: Any
pairs: Any


class MyDPOTrainer(DPOTrainer): ...


"""


@pytest.mark.slow
def test_the_pages_snippets_and_the_examples_pass_a_strict_type_checker(tmp_path):
    """Only gaps in the types of other libraries are allowed for."""
    scripts = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        if page.stem == "own-loss":  # one script in pieces
            snippets = ["\n".join(snippets)]
        for number, snippet in enumerate(snippets, start=1):
            scripts[f"{page.stem.replace('-', '_')}_{number}"] = PREAMBLE + snippet
    assert len(scripts) >= 10
    for example in (ROOT / "examples").glob("*.py"):
        if example.stem != "lightning_module":  # a library that need not be there
            scripts[example.stem] = example.read_text(encoding="utf-8")
    gaps = ('untyped function "backward"', 'Module "trl" does not explicitly export attribute "DPOTrainer"')
    lines = lines_of(tmp_path, scripts, "--disable-error-code=import-untyped")
    assert [line for line in lines if not any(gap in line for gap in gaps)] == []


def test_the_trainer_takes_trls_arguments_by_trls_names_and_two_more():
    theirs, ours = (dict(inspect.signature(cls).parameters) for cls in (DPOTrainer, PreferenceTrainer))
    assert [*theirs, "loss", "previous_model"] == list(ours)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
