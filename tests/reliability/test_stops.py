"""Signals: a checkpoint at the end of the step, 128 + the signal, nothing that looks finished; and their handlers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from prefopt.recipe import main
from prefopt.trainer.saving import checkpoints, stops
from prefopt.trainer.saving.stops import Stopped, StopSignals
from tests.reliability.faults import TIMINGS, Fault, forked
from tests.trainer.runs import make_pairs, make_trainer, save_model

SAVED = {"save_strategy": "steps", "save_steps": 100, "max_steps": 6, "loss": "dpo"}


@pytest.fixture(autouse=True)
def _usual_handlers():
    """As in a terminal: a shell starts what runs in the background with Ctrl-C ignored."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class Sends(TrainerCallback):
    """Signals to this process when a step begins, by a clock of its own: real seconds are longer on a busy machine."""

    def __init__(self, step: int, *signums: int, pause: float = 0.0):
        self.step, self.signums, self.pause = step, signums, pause
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stops, "time", SimpleNamespace(monotonic=lambda: self.seconds))
                for signum in self.signums:
                    # Unlike os.kill, it has run the handler when it returns.
                    signal.raise_signal(signum)
                    self.seconds += self.pause


@pytest.mark.parametrize(
    ("signum", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["INT", "TERM"]
)
def test_a_signal_where_nothing_is_saved_is_said(tmp_path, capsys, monkeypatch, signum, ends):
    monkeypatch.setattr("prefopt.recipe.progress.RunProgress.on_log", lambda *_, **__: signal.raise_signal(signum))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ends) as stop:
        main("ipo", [*arguments(tmp_path), "--evaluate_first", "false", "--save_strategy", "no"])
    assert ends is KeyboardInterrupt or stop.value.code == 128 + signum
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Interrupted after step 1: nothing was saved. With --save_strategy" in capsys.readouterr().out


def test_ctrl_c_ends_a_program_without_a_traceback():
    code = "from prefopt.safety.errors import show_short_errors as show; show(); raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stderr.strip() == "Stopped by Ctrl-C."


def make(tmp_path: Path, callback: TrainerCallback, **options):
    trainer = make_trainer(tmp_path, **{"train_dataset": make_pairs(16), **SAVED, **options})
    trainer.add_callback(callback)
    return trainer


def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_with_a_checkpoint(tmp_path, signum, caplog, capfd):
    before = handlers()
    trainer = make(tmp_path, Sends(2, signum))
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert handlers() == before
    folder = tmp_path / "run" / "checkpoint-3"
    assert stopped.value.code == 128 + signum
    assert stopped.value.checkpoint == str(folder)
    assert checkpoints.problem(folder) == ""
    name = signal.Signals(signum).name
    assert f"{name} after step 3; {folder} is complete. To resume, run the same command" in caplog.text
    assert f"{name}: saving a checkpoint at the end of this step" in capfd.readouterr().err
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("signums", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_a_signal_that_is_passed_on_twice_is_one(tmp_path, signums):
    # A terminal or srun reaches every process, and torchrun passes on what it got.
    with pytest.raises(Stopped):
        make(tmp_path, Sends(2, *signums)).train()
    assert checkpoints.problem(tmp_path / "run" / "checkpoint-3") == ""


def test_a_second_ctrl_c_quits_at_once(tmp_path):
    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Sends(2, signal.SIGINT, signal.SIGINT, pause=stops.AGAIN_AFTER_S + 0.1)).train()
    assert handlers() == before
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_without_checkpoints_signals_keep_their_meaning(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Sends(2, signal.SIGINT), save_strategy="no").train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_transformers_own_way_is_left_alone(tmp_path):
    own = signal.getsignal(signal.SIGTERM)
    try:
        trainer = make(tmp_path, TrainerCallback(), enable_jit_checkpoint=True, max_steps=1)
        theirs = signal.getsignal(signal.SIGTERM)
        seen = []
        trainer._checkpoints.flow.signals._note = lambda *_: seen.append(1)
        trainer.train()
        assert theirs != own
        assert not seen
        assert not trainer._checkpoints.flow.listens
    finally:
        signal.signal(signal.SIGTERM, own)


def test_training_in_a_thread_sets_no_handlers(tmp_path):
    before, during, failed = handlers(), [], []

    class Looks(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            during.append(handlers())

    def work():
        try:
            make(tmp_path, Looks(), max_steps=1).train()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []
    assert during == [before]


def test_an_evaluation_that_is_running_is_finished_and_then_saved(tmp_path):
    class Evaluating(TrainerCallback):
        def on_prediction_step(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make(
        tmp_path, Evaluating(), eval_strategy="steps", eval_steps=2, trainer_options={"eval_dataset": make_pairs(4)}
    )
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.checkpoint.endswith("checkpoint-2")
    state = json.loads((Path(stopped.value.checkpoint) / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2]


def test_a_handler_that_was_there_is_put_back():
    def mine(*_):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        signals = StopSignals(says=False)
        with signals.noted():
            assert signal.getsignal(signal.SIGTERM) == signals._note
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- recipes -----------------------------------------------------------------------------------------------------


def arguments(folder: Path, *more: str) -> list[str]:
    rows = "\n".join(json.dumps(row) for row in make_pairs(30))
    (folder / "pairs.jsonl").write_text(rows)
    return [
        "--model_name_or_path", save_model(folder), "--dataset_name", str(folder / "pairs.jsonl"),
        "--output_dir", str(folder / "out"), "--max_steps", "4", "--per_device_train_batch_size", "4",
        "--logging_steps", "1", "--save_steps", "1", "--gradient_checkpointing", "false", "--resume_from_checkpoint",
        "auto", *more,
    ]  # fmt: skip


def without_timings(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not any(word in name for word in TIMINGS)}


def test_a_recipe_that_is_stopped_has_not_finished_and_goes_on(tmp_path):
    words, output, out = arguments(tmp_path), tmp_path / "output.txt", tmp_path / "out"
    code = forked(lambda: main("dpo", words), Fault("within a step", 3, signal.SIGTERM), output)
    said = output.read_text()
    assert code == 143, said
    assert "No checkpoint yet: starting from step 0" in said
    assert "SIGTERM: saving a checkpoint at the end of this step" in said
    assert not (out / "results.json").exists()
    assert not (out / "model.safetensors").exists()
    assert forked(lambda: main("dpo", words), None, output) == 0, output.read_text()
    assert "Resuming from" in output.read_text()
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert results["after"]["eval_loss"] != results["before"]["eval_loss"]
    # What has been trained to the end is evaluated and saved again, nothing more.
    assert forked(lambda: main("dpo", words), None, output) == 0, output.read_text()
    again = json.loads((out / "results.json").read_text())
    assert without_timings(again["after"]) == without_timings(results["after"])
    assert again["before"] == results["before"]


@pytest.mark.parametrize("word", ["true", "True"])
def test_a_recipe_takes_true_for_the_newest_checkpoint(tmp_path, word):
    words = arguments(tmp_path)
    words[words.index("auto")] = word
    with pytest.raises(checkpoints.CheckpointError, match="holds no checkpoint to resume from"):
        main("dpo", words)
    assert main("dpo", [*words[:-2], "--eval_rows", "0"])["after"] is None
    assert main("dpo", [*words, "--eval_rows", "0"])["after"] is None
