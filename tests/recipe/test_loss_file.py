"""A loss of one's own from a file that is named: `--loss_file mine.py`, and in a script of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.losses import LossError, parse, register_file
from prefopt.losses import from_file as loader
from prefopt.losses.registry import _LOSSES
from prefopt.recipe import main, parse_arguments
from tests.recipe.test_recipe import arguments, pairs_file
from tests.trainer.runs import save_model

ROOT = Path(__file__).parents[2]
CLASS = '''
import torch
from prefopt.losses import PreferenceBatch, ReferencePairLoss, register


@register("mine")
class Mine(ReferencePairLoss):
    """Exponential loss on the margin."""

    def per_example(self, batch: PreferenceBatch) -> torch.Tensor:
        return torch.exp(-self.scaled_margin(batch))
'''


pytestmark = pytest.mark.usefixtures("no_loss_stays")


def mine(folder: Path, text: str = CLASS, name: str = "mine.py") -> str:
    file = folder / name
    file.write_text(text)
    return str(file)


def test_a_run_with_ones_own_loss_keeps_the_file(tmp_path):
    file = mine(tmp_path)
    words = arguments(tmp_path, pairs_file(tmp_path), "--loss_file", file, "--loss", "mine(beta=0.5) + 0.1*sft")
    results = main("dpo", words)
    assert results["loss"] == "mine(beta=0.5) + 0.1*sft(nll='mean')"
    assert results["before"]["eval_mine/loss"] == pytest.approx(1.0, abs=1e-5)
    assert results["loss_file"] == "loss_file.py"
    assert (tmp_path / "out" / "loss_file.py").read_text() == CLASS
    assert "mine(beta=0.5)" in (tmp_path / "out" / "README.md").read_text()


def test_resuming_asks_for_the_file_and_says_where_it_is(tmp_path, capsys):
    data, file = pairs_file(tmp_path), mine(tmp_path)
    steps = ["--save_strategy", "steps", "--save_steps", "1", "--loss", "mine"]
    words = [*arguments(tmp_path, data), *steps]
    main("dpo", [*words, "--loss_file", file])
    for registry in (_LOSSES, loader._FILES):  # as in another process
        registry.pop("mine" if registry is _LOSSES else Path(file).resolve())
    again = [*words, "--resume_from_checkpoint", "true"]
    with pytest.raises(
        SystemExit, match=r"no loss is named 'mine'[\s\S]*had a loss file: --loss_file .*out/loss_file"
    ):
        main("dpo", again)
    copy = tmp_path / "out" / "loss_file.py"
    main("dpo", [*again, "--max_steps", "3", "--loss_file", str(copy)])
    assert "has changed" not in capsys.readouterr().out
    changed = mine(tmp_path, CLASS + "\nX = 1\n", "changed.py")
    _LOSSES.pop("mine")
    main("dpo", [*again, "--max_steps", "4", "--loss_file", changed])
    assert "changed.py has changed since this run began; as it was: " in capsys.readouterr().out.replace("\n", " ")
    assert copy.read_text().endswith("X = 1\n")
    assert [old.read_text() for old in (tmp_path / "out").glob("loss_file-*.py")] == [CLASS]


def test_a_config_names_the_file_too(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"loss_file": mine(tmp_path), "loss": "2*mine"}))
    recipe = parse_arguments("dpo", ["--config", str(config)])
    assert str(recipe.objective) == "2.0*mine(beta=0.1)"
    demo = parse_arguments("dpo", ["--config", str(config), "--demo"])
    assert str(demo.objective) == "2.0*mine(beta=0.1)"


def test_a_file_is_run_once_a_process(tmp_path):
    file = mine(tmp_path, CLASS + f"open({str(tmp_path / 'ran')!r}, 'a').write('x')\n")
    assert register_file(file) is register_file(Path(file))
    assert register_file(file).names == ("mine",)
    assert (tmp_path / "ran").read_text() == "x"
    assert parse("mine(beta=2.0)").hyperparameters() == {"beta": 2.0}


PRESET = """from prefopt.losses import DPO, SFT, Loss, preset


@preset("{name}")
def mix(w: float = 0.3) -> Loss:
    return DPO() + w * SFT()
"""


def test_a_preset_may_come_from_a_file(tmp_path):
    register_file(mine(tmp_path, PRESET.format(name="mix")))
    assert str(parse("mix(w=0.5)")).endswith("+ 0.5*sft(nll='mean')")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("x = 1\n", r"registers no loss: write @register\(\"name\"\)"),
        ("import torch\n\ndef f(:\n", r"mine\.py, line 3: SyntaxError: invalid syntax$"),
        ("def f():\n    return 1 / 0\n\n\nf()\n", r"mine\.py, line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('no')\n", r"mine\.py, line 2: SystemExit: no"),
        ("import nothing_of_this_name\n", r"mine\.py, line 1: ModuleNotFoundError: No module named 'nothing_of"),
        (
            CLASS.replace('"mine"', '"dpo"'),
            r"mine\.py, line \d+: the loss name 'dpo' already belongs to .*direct\.DPO",
        ),
        (CLASS.replace('"mine"', '"irpo"'), r"line \d+: the loss name 'irpo' already belongs to a preset"),
        (PRESET.format(name="dpo"), r"line \d+: the name 'dpo' already belongs to a loss"),
        (PRESET.format(name="irpo"), r"line \d+: the name 'irpo' already belongs to the preset .*presets\.irpo"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line(tmp_path, text, message):
    file = str(tmp_path / "mine.py") if text is None else mine(tmp_path, text)
    with pytest.raises(LossError, match=message):
        register_file(file)
    with pytest.raises(SystemExit, match=rf"--loss_file .*{message}"):
        parse_arguments("dpo", ["--loss_file", file, "--loss", "mine"])


def test_other_things_than_python_files_are_refused(tmp_path):
    with pytest.raises(LossError, match="is a folder: name a file in it"):
        register_file(tmp_path)
    with pytest.raises(LossError, match=r"whose name ends in \.py"):
        register_file(mine(tmp_path, name="mine.txt"))


def test_a_file_without_effect_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r'would have no effect: the loss is dpo.*\(mine\), as in --loss "mine"'):
        parse_arguments("dpo", ["--loss_file", mine(tmp_path)])


def test_commands_that_take_a_loss_take_the_file(tmp_path):
    shown = CliRunner().invoke(app, ["losses", "--loss_file", mine(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "mine(beta=0.1)" in shown.output
    assert "Exponential loss on the margin." in shown.output
    planned = CliRunner().invoke(
        app, ["plan", "--model", "1B", "--method", "lora", "--loss", "mine", "--loss_file", mine(tmp_path)]
    )
    assert planned.exit_code == 0, planned.output
    command = " ".join(planned.output.replace("\\\n", " ").split())  # it takes several lines
    assert "--loss mine --loss_file" in command


def test_a_script_with_its_own_loss_runs_and_its_card_has_the_command(tmp_path):
    """Also under accelerate: a class of the script, and a file, which every process reads."""
    script = (
        CLASS.replace('"mine"', '"of_script"') + "\nfrom prefopt.recipe import main\n\nmain('of_script(beta=0.2)')\n"
    )
    mine(tmp_path, script, "job.py")
    mine(tmp_path)
    save_model(tmp_path)
    pairs_file(tmp_path)
    common = ["--model_name_or_path", "llama-0", "--dataset_name", "pairs.jsonl", "--max_steps", "1",
              "--save_strategy", "no", "--gradient_checkpointing", "false", "--evaluate_first", "false"]  # fmt: skip
    runs = {
        "alone": ["job.py", *common],
        "launched": ["-m", "accelerate.commands.launch", "--cpu", "job.py", *common, "--loss_file", "mine.py",
                     "--loss", "of_script + mine"],
    }  # fmt: skip
    for name, words in runs.items():
        done = subprocess.run(
            [sys.executable, *words, "--output_dir", name], cwd=tmp_path, capture_output=True, text=True, timeout=900,
            check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert results["loss"] == "of_script(beta=0.2)"
    assert "\npython job.py --model_name_or_path llama-0" in (tmp_path / "alone" / "README.md").read_text()
    card = (tmp_path / "launched" / "README.md").read_text()
    assert "\naccelerate launch job.py --model_name_or_path llama-0" in card
    assert "--loss_file mine.py --loss 'of_script + mine'" in card
    assert (tmp_path / "launched" / "loss_file.py").read_text() == CLASS
