"""Entanglement measured inside trainers: ours and a plain `trl.DPOTrainer`."""

from __future__ import annotations

import pytest
import trl

from prefopt.analysis import EntanglementCallback, draw_probes
from prefopt.losses import parse
from prefopt.recipe import parse_arguments
from prefopt.safety.errors import UsageError
from tests.trainer.runs import make_labelled, make_pairs, make_trainer

PLAIN = {"trainer": trl.DPOTrainer, "config": trl.DPOConfig}


def run(folder, every=None, **options):
    """The trainer after four steps, and its callback."""
    heldout = {"eval_dataset": make_pairs(6, seed=1)}
    trainer = make_trainer(folder, max_steps=4, trainer_options=heldout, **options)
    callback = None
    if every is not None:
        callback = EntanglementCallback(trainer, every=every, probes=4)
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def lines(trainer, beginning):
    return [line for line in trainer.state.log_history if any(name.startswith(beginning) for name in line)]


@pytest.mark.parametrize("options", [{"loss": "dpo(beta=0.1)"}, PLAIN], ids=["ours", "trl"])
def test_it_measures_before_the_first_step_and_changes_nothing(tmp_path, options):
    trainer, callback = run(tmp_path, 2, **options)
    measured = lines(trainer, "entanglement/")
    assert [line["step"] for line in measured] == [0, 2] == [step for step, _ in callback.measured]
    assert measured[0]["entanglement/push_chosen"] == pytest.approx(0.05)  # beta / 2 where policy = reference
    assert measured[1]["entanglement/push_chosen"] != pytest.approx(0.05, abs=1e-9)
    assert callback.measured[1][1].metrics().items() <= measured[1].items()
    alone, _ = run(tmp_path, **options)
    # TRL's running means of other metrics are not cut either.
    names = ("loss", "rewards/margins", "logps/chosen")
    pairs = zip(lines(trainer, "loss"), lines(alone, "loss"), strict=True)
    assert all(one[name] == other[name] for one, other in pairs for name in names)


def test_probes_are_the_same_for_a_seed_and_name_their_rows():
    rows = [
        {"prompt_ids": [1], "chosen_ids": [row, 2], "rejected_ids": [3], "ref_chosen_logps": 0.5} for row in range(40)
    ]
    one, two = (draw_probes(rows, parse("dpo"), 0, count=5, seed=seed) for seed in (0, 1))
    assert one.rows != two.rows
    assert one.batch["input_ids"][:5, 1].tolist() == list(one.rows)
    assert "ref_chosen_logps" in one.batch
    assert "ref_chosen_logps" not in draw_probes(rows, parse("dpo"), 0, count=5, trust_logps=False).batch


@pytest.mark.parametrize(("options", "every", "message"), [
    ({"loss": "tdpo"}, 2, "its gradient also comes from"),
    ({"loss": "dpo"}, 0, "must be 1 or more, got 0"),
    ({"loss": "kto", "train_dataset": make_labelled()}, 2, "these rows have no chosen_ids"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, options, every, message):
    trainer = make_trainer(tmp_path, **options)
    with pytest.raises(UsageError, match=message):
        EntanglementCallback(trainer, every=every)


@pytest.mark.parametrize(("words", "message"), [
    (["--entanglement_every", "0"], "must be 1 or more steps"),
    (["--entanglement_every", "5", "--loss", "tdpo"], "gradient also comes from"),
])  # fmt: skip
def test_the_option_is_checked_as_it_is_read(words, message):
    with pytest.raises((SystemExit, UsageError), match=message):
        parse_arguments("dpo", ["--output_dir", "unused", *words])
