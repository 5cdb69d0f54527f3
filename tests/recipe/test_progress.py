"""The progress line at every width, and what it says of numbers from before training."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from prefopt.demo.before_after import PairMetrics, summary_panel
from prefopt.recipe.progress import RunProgress
from prefopt.recipe.run import _comparison

LOGS = {
    "loss": 0.182, "rewards/accuracies": 0.75, "rewards/margins": 3.39, "ratios/chosen": 5.5, "ratios/rejected": -28.5,
    "lengths/chosen": 20.0, "lengths/rejected": 30.0, "learning_rate": 1.7e-5,
}  # fmt: skip
BEFORE = LOGS | {
    "loss": 0.693, "rewards/accuracies": 0.25, "rewards/margins": 0.0, "ratios/chosen": 2e-6, "ratios/rejected": -1e-6,
}  # fmt: skip


def shown(width: int | None, logs: dict[str, float] = LOGS, step: int = 600) -> str:
    """What a run prints at one log line; of a terminal (`width` columns) the bar below it alone."""
    stream = io.StringIO()
    console = Console(file=stream, width=width or 80, force_terminal=width is not None, color_system=None)
    progress, state = RunProgress(console), SimpleNamespace(is_world_process_zero=True, max_steps=1200, global_step=0)
    progress.on_train_begin(None, state, None)
    state.global_step = step
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, logs=logs)
    progress.on_train_end(None, state, None)
    text = stream.getvalue()
    if width is None:
        return text
    return text.split("\r")[-1].split("\n")[-2].replace("\x1b[2K", "").replace("\x1b[?25h", "").rstrip()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_bar_step_and_time_left_come_before_numbers(width):
    line = shown(width)
    assert "600/1200" in line
    assert "━" in line
    assert "left -:--:--" in line or "left 0:" in line
    assert len(line) <= width
    assert "…" not in line


def test_as_many_whole_numbers_as_fit_the_first_ones_first():
    numbers = [
        "loss 0.182",
        "accuracy 0.75",
        "margin +3.39",
        "chosen ratio +5.5",
        "rejected ratio -28.5",
        "lr 1.7e-05",
    ]
    found = {width: [number for number in numbers if number in shown(width)] for width in (60, 80, 100, 150)}
    assert all(fitting == numbers[: len(fitting)] for fitting in found.values())
    assert [len(found[width]) for width in (80, 100)] == [2, 3]
    assert found[150] == numbers


def test_a_file_gets_every_number_and_no_bar():
    text = shown(None)
    assert "step  600/1200   0:00 loss 0.182  accuracy 0.75  margin +3.39  chosen ratio +5.5" in text
    assert "━" not in text


def test_before_training_the_accuracy_is_of_ties_and_said_to_be():
    first = shown(None, BEFORE, step=1)
    held_out = shown(None, {f"eval_{name}": value for name, value in BEFORE.items()}, step=0)
    for text in (first, held_out):
        assert "accuracy n/a (policy = reference)  margin +0.00" in text


def test_the_table_of_held_out_rows_says_so_too():
    before, after = ({f"eval_{name}": value for name, value in logs.items()} for logs in (BEFORE, LOGS))
    stream = io.StringIO()
    Console(file=stream, width=80).print(_comparison(before, after))
    assert re.search(r"rewards/accuracies +│ +0.25 \(policy = reference\) │ +0.75 ", stream.getvalue())
    old, new = PairMetrics.from_logs(before), PairMetrics.from_logs(after)
    assert (old.is_reference, new.is_reference) == (True, False)
    stream = io.StringIO()
    Console(file=stream, width=80).print(summary_panel([], [], old, new))
    assert re.search(r"reward accuracy +25% \(policy = reference\) +75% ", stream.getvalue())


@pytest.mark.parametrize(("logs", "step"), [
    (BEFORE, 2),  # trained on, if little
    (BEFORE | {"ratios/rejected": -5.0}, 1),  # another reference
    ({name: value for name, value in BEFORE.items() if not name.startswith("ratios")}, 1),  # no reference
])  # fmt: skip
def test_an_accuracy_that_means_something_is_shown(logs, step):
    assert "accuracy 0.25" in shown(None, logs, step)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_continues_a_log_line_below_its_numbers(width):
    stream = io.StringIO()
    progress = RunProgress(Console(file=stream, width=width, force_terminal=True, color_system=None))
    state = SimpleNamespace(is_world_process_zero=True, max_steps=1200, global_step=600)
    progress.on_log(None, state, None, logs=LOGS)
    lines = [
        line.split(" loss ", 1)[-1] if place == 0 else line
        for place, line in enumerate(stream.getvalue().splitlines())
    ]
    assert max(map(len, stream.getvalue().splitlines())) <= width
    indent = len(stream.getvalue().partition(" loss ")[0]) + 1
    assert all(line[:indent].isspace() and line[indent] != " " for line in lines[1:])
    numbers = "  ".join([lines[0], *(line[indent:] for line in lines[1:])])
    assert f" loss {numbers}\n" in shown(None)


def test_the_time_left_is_known_after_two_steps_however_long_they_take():
    stream, clock = io.StringIO(), [0.0]
    console = Console(file=stream, width=80, force_terminal=True, color_system=None, get_time=lambda: clock[0])
    progress, state = RunProgress(console), SimpleNamespace(is_world_process_zero=True, max_steps=10, global_step=0)
    progress.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        clock[0] += 100
        state.global_step = step
        progress.on_step_end(None, state, None)
    progress.on_train_end(None, state, None)
    assert "left 0:11:40" in stream.getvalue()
