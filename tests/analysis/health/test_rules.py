"""Every rule fires on a log made for it, says why in numbers, and stays silent on healthy runs."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from prefopt.analysis import Settings, examine
from prefopt.analysis.health.finding import LEVELS
from prefopt.analysis.health.remedies import OUTERMOST
from prefopt.analysis.health.watch import RULES, report
from prefopt.losses import available, parse
from tests.analysis.health.logs import bundled, synthetic, too_hard, with_evaluations, with_measurements

SETTINGS = Settings(learning_rate=1e-4, max_steps=60, max_grad_norm=1.0, fp16=False, loss="dpo(beta=0.1)")


def clean(lines, **changes):
    return [line | {name.replace("__", "/"): value for name, value in changes.items()} for line in lines]


FAILING = {
    "not_finite": ([*synthetic(20), {"loss": math.nan, "step": 21}], "loss is NaN", "--learning_rate 1e-5"),
    "over_optimised": (too_hard(), "fell from -24 to -51 nats while the margin grew to 5.43", "--learning_rate 2e-5"),
    "chosen_falls": (
        synthetic(ratios__chosen=lambda done: -40 * done), "lost 20 nats (rejected: -3)", "--learning_rate 5e-5",
    ),
    "margin_is_length": (
        synthetic(
            ratios__chosen=lambda done: -4 * done, ratios__rejected=lambda done: -20 * done,
            lengths__chosen=lambda _: 20.0, lengths__rejected=lambda _: 100.0,
        ),
        "moved by -0.0", "similar lengths",
    ),
    "below_chance": (
        synthetic(
            rewards__accuracies=lambda done: 0.42 - 0.05 * math.sin(50 * done),
            rewards__margins=lambda done: -0.3 * done,
        ),
        "the rejected answers win: accuracy 0.4", "swapped",
    ),
    "learns_nothing": (
        synthetic(ratios__chosen=lambda done: 0.01 * done, ratios__rejected=lambda done: -0.02 * done),
        "after 33% of the run", "--learning_rate 0.001",
    ),
    "loss_rises": (
        synthetic(loss=lambda done: 0.693 + 2 * done), "rose from 0.7608 to 1.168", "--learning_rate 2e-5",
    ),
    "evaluation_diverges": (
        with_evaluations(synthetic(), [0.68, 0.66, 0.70, 0.72, 0.75]),
        "rose from 0.66 at step 24 to", "--max_steps 24",
    ),
    "entropy_collapses": (
        synthetic(entropy=lambda done: 1.8 * (1 - done)), "from 1.74 to 0.3", "--learning_rate 2e-5",
    ),
    "gradient_spikes": (
        synthetic(grad_norm=lambda done: 80.0 if round(done * 59) % 10 == 9 else 2.0), "3 of the last", "larger batch",
    ),
    "entangled": (
        with_measurements(synthetic(), chosen_rises=0.125, rejected_falls=1.0, cosine=0.8, inner_below_chosen=0.1),
        "lowers the chosen answer too in 88% of them. The gradients of the two answers have a mean cosine of 0.80",
        '--loss "dpo(beta=0.1) + 0.2*sft"; or --loss "pair_normalized(dpo(beta=0.1))"',
    ),
    "saturated": (
        synthetic(loss=lambda done: 0.693 * math.exp(-12 * done), rewards__accuracies=lambda done: 1.0),
        "nothing left to learn: since step", "--max_steps",
    ),
    "always_clipped": (synthetic(grad_norm=lambda done: 50 - done), "clipped to 1 from 49.5", "--max_grad_norm 50"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "remedies"),
    [
        ("ipo", ["ipo + 0.2*sft", "pair_normalized(ipo)"]),
        ("dpo + sft", ["pair_normalized(dpo + sft)"]),
        ("kto", ["kto + 0.2*sft"]),
        ("pair_normalized(dpo)", []),
        ("conflict_free(dpo + ipo)", []),
        ("mine(beta=1)", ["mine(beta=1) + 0.2*sft"]),  # a loss from a file
    ],
)
def test_remedies_of_entanglement_are_losses_that_can_be_copied(loss, remedies):
    (finding,) = examine(FAILING["entangled"][0], replace(SETTINGS, loss=loss))
    *found, _ = re.findall(r'--loss "([^"]*)"', finding.remedy)
    assert found == remedies
    assert all(str(parse(text)) for text in found if "mine" not in text)


def test_there_is_a_failing_run_for_every_rule():
    assert set(FAILING) == set(RULES)


@pytest.mark.parametrize("rule", FAILING)
def test_a_rule_fires_on_the_run_made_for_it(rule):
    lines, evidence, remedy = FAILING[rule]
    findings = {finding.rule: finding for finding in examine(lines, SETTINGS)}
    assert rule in findings, list(findings)
    assert evidence in findings[rule].text
    assert remedy in findings[rule].remedy
    assert findings[rule].level in LEVELS
    # Nothing else is wrong with these runs, except what follows from it.
    assert len(findings) == 1, [str(finding) for finding in findings.values()]


HEALTHY = {
    "the bundled job": bundled(),
    "dpo": synthetic(),
    "dpo, log lines of trl.DPOTrainer": synthetic(without=("ratios", "lengths")),
    "simpo": synthetic(without=("ratios",), rewards__accuracies=lambda done: 0.45 + 0.25 * done),
    "sft": synthetic(
        without=("ratios", "rewards", "logps/rejected", "lengths/rejected"), loss=lambda d: 2.1 - 0.4 * d
    ),
    "npo": synthetic(
        without=("ratios/chosen", "rewards", "logps/chosen", "lengths/chosen"), loss=lambda d: 14 - 5 * d
    ),
    "measured": with_measurements(
        synthetic(), chosen_rises=0.5, rejected_falls=1.0, cosine=0.6, inner_below_chosen=0.6
    ),
    "evaluated": with_evaluations(synthetic(), [0.68, 0.66, 0.665, 0.67]),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_rules_are_silent_on_healthy_runs(name):
    assert [str(finding) for finding in examine(HEALTHY[name], SETTINGS)] == []


@pytest.mark.parametrize("without", [(), ("ratios",), ("ratios", "lengths")])
def test_no_false_alarm_in_a_hundred_runs_of_noise(without):
    alarms = [
        f"{seed}: {finding}" for seed in range(100) for finding in examine(synthetic(60, seed, without), SETTINGS)
    ]
    assert alarms == []


def test_the_run_that_is_trained_too_hard_is_called_so_before_its_tenth_step():
    (finding,) = examine(too_hard(), Settings(max_steps=24, loss="dpo(beta=0.1)"))
    assert (finding.rule, finding.level) == ("over_optimised", "serious")
    assert finding.step < 10
    assert '--loss "dpo(beta=0.1) + 0.2*sft"' in finding.remedy
    assert "--learning_rate 0.0001" in finding.remedy  # a fifth of the 5e-4 in its log


def test_it_is_called_so_from_the_log_of_trl_too():
    lines = [{name: line[name] for name in line if not name.startswith(("ratios", "lengths"))} for line in too_hard()]
    assert [finding.rule for finding in examine(lines, Settings(beta=0.1))] == ["over_optimised"]


def test_without_beta_a_fall_of_the_log_probabilities_must_exceed_their_noise():
    still = synthetic(without=("ratios",))
    fallen = synthetic(without=("ratios",), logps__chosen=lambda done: -250 - 150 * done)
    assert examine(still) == []
    (finding,) = examine(fallen)
    assert finding.rule == "chosen_falls"


def test_another_reference_than_the_initial_model_is_no_displacement():
    lines = synthetic(ratios__chosen=lambda done: -40 + done, ratios__rejected=lambda done: -38 - 4 * done)
    assert examine(lines, SETTINGS) == []


def test_a_held_out_fall_counts_where_the_training_rows_do_not_show_it():
    after = {"eval_loss": 0.5, "eval_ratios/chosen": -60.0, "eval_logps/chosen": -310.0, "step": 60}
    (finding,) = examine([*synthetic(), after], SETTINGS)
    assert finding.rule == "chosen_falls"
    assert "the held-out chosen answers lost 60 nats" in finding.text


def test_a_run_that_warms_up_is_not_said_to_learn_nothing():
    still = {"ratios__chosen": lambda done: 0.0, "ratios__rejected": lambda done: 0.0}
    warming = synthetic(learning_rate=lambda done: 1e-4 * done, **still)
    assert examine(warming[:59], SETTINGS) == []
    assert [finding.rule for finding in examine(synthetic(**still), SETTINGS)] == ["learns_nothing"]


def test_a_run_without_a_known_length_is_not_judged_by_its_part():
    still = synthetic(ratios__chosen=lambda done: 0.0, ratios__rejected=lambda done: 0.0)
    assert examine(still) == []


@pytest.mark.parametrize(("fp16", "overflows", "fires"), [
    (True, 2, False), (True, 3, True), (None, 2, False), (False, 1, True),
])  # fmt: skip
def test_overflows_of_a_loss_scale_are_normal_until_there_are_many_in_a_row(fp16, overflows, fires):
    lines = synthetic(20)
    for line in lines[5 : 5 + overflows]:
        line["grad_norm"] = math.inf
    assert bool(examine(lines, Settings(fp16=fp16))) is fires


def test_logits_of_masked_tokens_may_be_infinite():
    assert examine(clean(synthetic(20), logits__chosen=-math.inf)) == []


def test_a_gradient_that_shrinks_with_the_loss_has_no_spikes():
    assert examine(synthetic(grad_norm=lambda done: 10 * math.exp(-6 * done)), SETTINGS) == []


def test_the_report_is_a_few_lines_with_the_serious_ones_first():
    (serious,), (note,) = examine(FAILING["not_finite"][0], SETTINGS), examine(FAILING["always_clipped"][0], SETTINGS)
    assert report([], 20) == ["Health: nothing unusual in the logged numbers"]
    assert report([], 1) == [
        "Health: 1 log line of training, too few to judge (5 are enough; --logging_steps 1 logs each step)"
    ]
    assert report([serious], 20, {"not_finite"}) == ["Health: serious (not_finite, step 21), told above"]
    lines = report([serious, *[note] * 9], 20)
    assert lines[0].startswith("Health: serious (not_finite, step 21): loss is NaN")
    assert lines[-1] == "Health: and 5 more"
    assert len(lines) == 6


def test_the_losses_to_which_no_term_is_added_are_those_that_must_be_outermost():
    assert set(OUTERMOST) == {name for name, cls in available().items() if cls.outermost}
