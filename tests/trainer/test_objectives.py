"""What the trainer adds to TRL: any loss, unpaired data, weights, per-term metrics, the step-0 check, the mixin."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from prefopt import LossMixin, PreferenceConfig, PreferenceTrainer
from prefopt.losses import DPO, SFT, GroupLoss, Need, PairLoss, available, presets
from prefopt.losses.wrappers import Wrapper
from prefopt.scoring.collate import number_problem
from prefopt.trainer import checks
from prefopt.trainer.checks import _first_number_problem
from prefopt.trainer.saving.checkpoints import CheckpointError
from tests.tiny import THINKING, make_model, make_tokenizer
from tests.trainer.runs import make_groups, make_labelled, make_pairs, make_trainer, save_model, settings, train


@pytest.mark.parametrize("loss", ["simpo", "dpo + 0.5*sft", "sft(nll='sum')", "kto", "kto + 0.1*sft"])
def test_every_kind_of_loss_trains_on_pairs(tmp_path, loss):
    log = train(tmp_path, loss=loss, max_steps=20, learning_rate=3e-3, train_dataset=make_pairs(8))
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_loss_object_serves_as_well_as_its_text(tmp_path):
    objective = DPO(beta=0.2) + 0.5 * SFT()
    spoken = train(tmp_path, loss=str(objective), max_steps=3)
    built = train(tmp_path, trainer_options={"loss": objective}, max_steps=3)
    assert [e["loss"] for e in spoken] == [e["loss"] for e in built]


def test_unpaired_feedback_trains_with_kto(tmp_path):
    log = train(tmp_path, loss="kto(beta=0.5)", train_dataset=make_labelled(12), max_steps=30, learning_rate=3e-3)
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert log[-1]["loss"] < 0.45
    assert log[-1]["rewards/margins"] > 0
    assert {"mismatched_ratios", "rewards/chosen", "rewards/rejected", "logps/chosen"} <= set(log[-1])


def test_kto_on_unpaired_feedback_equals_trls_own_trainer(tmp_path):
    """TRL's KTOTrainer is the oracle, over steps at which the baseline is no longer 0."""
    trl = pytest.importorskip("trl")
    if not hasattr(trl, "KTOTrainer"):
        pytest.skip("this TRL keeps its KTO trainer elsewhere")
    data = make_labelled(24)
    options = {"max_steps": 6, "train_sampling_strategy": "sequential", "learning_rate": 1e-2}
    theirs = train(tmp_path, trainer=trl.KTOTrainer, config=trl.KTOConfig, train_dataset=data, beta=0.5, **options)
    ours = train(tmp_path, loss="kto(beta=0.5)", train_dataset=data, **options)
    assert any(entry["mismatched_ratios"] > 1 for entry in ours)
    assert any(entry["mismatched_ratios"] < 0 for entry in ours)  # where both take 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


def test_a_pair_loss_refuses_unpaired_data(tmp_path):
    with pytest.raises(ValueError, match=r"the train set holds single labelled completions .* as kto"):
        make_trainer(tmp_path, loss="dpo", train_dataset=make_labelled())


def test_kto_needs_two_examples_a_batch(tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size must be at least 2"):
        make_trainer(tmp_path, loss="kto", per_device_train_batch_size=1)


def test_kto_cannot_precompute_its_reference(tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_log_probs=False"):
        make_trainer(tmp_path, loss="kto", precompute_ref_log_probs=True)


def test_metrics_of_every_term_are_logged(tmp_path):
    entry = train(tmp_path, loss="dpo(beta=0.1) + 0.2*sft + ipo", max_steps=2)[-1]
    for name in [
        "dpo/loss", "sft/loss", "ipo/loss", "dpo/rewards/margins", "ipo/rewards/margins", "rewards/chosen",
        "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
        "lengths/chosen", "ratios/chosen", "ratios/rejected", "entropy", "num_tokens",
    ]:  # fmt: skip
        assert name in entry
    total = entry["dpo/loss"] + 0.2 * entry["sft/loss"] + entry["ipo/loss"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_logged_means_are_over_examples_not_batches(tmp_path):
    """Five examples in batches of four: the lone example of the second batch counts once, not as much as four."""
    trainer = make_trainer(tmp_path, loss="sft(nll='sum')", per_device_eval_batch_size=4)
    five = make_pairs(5, seed=1)
    whole = trainer.evaluate(five)
    one_by_one = [trainer.evaluate(five.select([i]))["eval_logps/chosen"] for i in range(5)]
    assert whole["eval_logps/chosen"] == pytest.approx(sum(one_by_one) / 5, rel=1e-5)


def test_weight_column_scales_examples(tmp_path):
    plain = train(tmp_path, loss="dpo", max_steps=2, train_dataset=make_pairs(8))
    halved = train(tmp_path, loss="dpo", max_steps=2, train_dataset=make_pairs(8, weight=[0.5] * 8))
    assert halved[0]["loss"] == pytest.approx(plain[0]["loss"] / 2, rel=1e-5)
    assert halved[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"] / 2, rel=1e-4)


def test_weight_that_is_no_number_names_the_column(tmp_path):
    with pytest.raises(ValueError, match=r"bad weight: 1 row, first 1\. Column 'weight' is missing"):
        make_trainer(tmp_path, loss="dpo", train_dataset=make_pairs(4, weight=[1.0, None, 1.0, 1.0]))


@pytest.mark.parametrize("limits", [None, (0.0, 2.0)])
@pytest.mark.parametrize(
    "values",
    [
        [1, 2, None], [1, 3], [True, False, None], [None, None], ["1", "2"], [0.5, -0.5], [1.0, math.inf],
        [2**62, 1], [[1.0], [2.0]], [1.5, 2.0],
    ],
)  # fmt: skip
def test_a_column_is_checked_as_its_values_are(values, limits):
    problems = [number_problem("gap", value, limits) for value in values]
    expected = next((f"{text} in row {row} (from 0)" for row, text in enumerate(problems) if text), "")
    assert _first_number_problem(Dataset.from_dict({"gap": values}), "gap", limits) == expected


def test_the_row_of_a_bad_number_is_counted_over_chunks(monkeypatch):
    monkeypatch.setattr(checks, "_ROWS_AT_ONCE", 3)
    rows = Dataset.from_dict({"gap": [1.0] * 7 + [math.nan]}).select([7, *range(7), 7])
    assert _first_number_problem(rows.select(range(1, 9)), "gap", None).endswith("found nan in row 7 (from 0)")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [1.0, None, 1.0, 1.0],
            r"'gap' must hold a number in every row, found None in row 1 \(from 0\), in the train",
        ),
        (["a", "b", "c", "d"], "'gap' must hold a number in every row, found 'a' in row 0"),
        ([1.0, 1.0, float("nan"), 1.0], "'gap' must hold a finite number in every row, found nan in row 2"),
        ([1.0, 1.0, 1.0, 2.5], "'gap' must hold numbers from 0 to 2, found 2.5 in row 3"),
    ],
)
def test_a_column_of_the_loss_is_checked_before_training(tmp_path, values, message):
    bounded = Margin()
    bounded.limits = {"gap": (0.0, 2.0)}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, trainer_options={"loss": bounded}, train_dataset=make_pairs(4, gap=values))
    options = {"loss": bounded, "eval_dataset": make_pairs(4, gap=values)}
    with pytest.raises(ValueError, match="in the eval set"):
        make_trainer(tmp_path, trainer_options=options, train_dataset=make_pairs(4, gap=[1.0] * 4))


class Margin(PairLoss):
    """DPO with a margin column, as a project of its own would write it."""

    needs = Need.REFERENCE | Need.TOKENS
    columns = ("gap",)
    name = "margin"

    def per_example(self, batch):
        summed = (batch.chosen.token_logps * batch.chosen.token_mask).sum(-1)
        torch.testing.assert_close(summed, batch.chosen.logps)
        torch.testing.assert_close(batch.chosen.ref_token_logps.sum(-1), batch.chosen.ref_logps)
        z = 0.1 * (batch.chosen.ratios - batch.rejected.ratios) - batch.chosen.columns["gap"]
        return -torch.nn.functional.logsigmoid(z)


def test_a_users_loss_gets_its_column_and_its_tokens(tmp_path):
    log = train(
        tmp_path, trainer_options={"loss": Margin()}, train_dataset=make_pairs(8, gap=[2] * 8), max_steps=2
    )  # fmt: skip
    assert log[0]["loss"] == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(2.0))), rel=1e-5)
    with pytest.raises(ValueError, match="needs a numeric column 'gap'"):
        make_trainer(tmp_path, trainer_options={"loss": Margin()})


def test_reference_free_losses_run_no_reference(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, loss="simpo", max_steps=2)

    def refuse(*_, **__):
        raise AssertionError("the reference was scored")

    monkeypatch.setattr(trainer._scorer, "run_reference", refuse)
    trainer.train()
    assert trainer.state.global_step == 2


class TestStepZero:
    def test_passes_where_policy_is_reference(self, tmp_path):
        assert train(tmp_path, loss="dpo", max_steps=1)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)

    def spoiled(self, folder, **options):
        """An adapter that starts away from zero: the base model is not where the policy begins."""
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return make_trainer(
            folder, loss="dpo", max_steps=1, trainer_options={"peft_config": config}, **options
        )  # fmt: skip

    def test_stops_a_run_that_starts_away_from_its_reference(self, tmp_path):
        trainer = self.spoiled(tmp_path)
        with pytest.raises(ValueError, match=r"policy and reference differ before .*init_lora_weights"):
            trainer.train()

    def test_can_warn_instead(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING, logger="prefopt"):
            self.spoiled(tmp_path, step0_check="warn").train()
        assert "policy and reference differ" in caplog.text

    @pytest.mark.parametrize("options", [{"step0_check": "off"}, {"step0_tolerance": 100.0}])
    def test_can_be_put_aside(self, tmp_path, options, caplog):
        self.spoiled(tmp_path, **options).train()
        assert "policy and reference differ" not in caplog.text

    def test_leaves_a_given_reference_alone(self, tmp_path):
        log = train(tmp_path, loss="dpo", max_steps=1, trainer_options={"ref_model": make_model(seed=1)})
        assert log[0]["loss"] != pytest.approx(0.693147, abs=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_examples(tmp_path):
    trainer = make_trainer(tmp_path, loss="sft", train_dataset=make_pairs(4))
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 0(.|\n)*chosen 0: log-probability nan; text"
    ):
        trainer.train()


class TheirTrainer(DPOTrainer):
    """A third party's subclass, with an argument and a habit of its own."""

    def __init__(self, *args, shout: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.shout = shout

    def log(self, logs, start_time=None):
        logs["shouted"] = float(self.shout)
        super().log(logs, start_time)


class Mixed(LossMixin, TheirTrainer):
    pass


def test_the_mixin_gives_a_third_partys_trainer_a_loss(tmp_path):
    log = train(
        tmp_path,
        trainer=Mixed,
        config=DPOConfig,
        max_steps=2,
        trainer_options={"loss": "ipo(beta=0.2)", "shout": True},
    )
    ours = train(tmp_path, loss="ipo(beta=0.2)", max_steps=2)
    assert [e["loss"] for e in log] == [e["loss"] for e in ours]
    assert log[-1]["shouted"] == 1.0


def test_the_mixin_takes_positional_arguments(tmp_path):
    args = DPOConfig(**settings(tmp_path, max_steps=1))
    trainer = Mixed(make_model(), make_model(), args, None, make_pairs(8), None, make_tokenizer(), loss="hinge")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo", "beta": 0.3}, "beta=0.3 would have no effect beside a loss expression"),
        ({"loss": "dpo", "loss_type": "ipo"}, r"loss_type=\['ipo'\] would have no effect"),
        ({"loss": "dop"}, "did you mean 'dpop' or 'dpo'"),
        ({"loss": "__import__('os')"}, "no loss is named '__import__'"),
        ({"step0_check": "maybe"}, "step0_check must be"),
    ],
)
def test_config_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**settings(tmp_path, **options))


def test_an_objective_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the objective is given twice"):
        make_trainer(tmp_path, loss="dpo", trainer_options={"loss": "ipo"})


def test_rows_without_room_for_a_completion_are_dropped_aloud(tmp_path, caplog):
    pairs = make_pairs(6)
    long = {"role": "user", "content": "quick " * 60}
    pairs = Dataset.from_list([{**row, "prompt": [long]} if i in (1, 4) else row for i, row in enumerate(pairs)])
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        trainer = make_trainer(tmp_path, loss="dpo", train_dataset=pairs, max_length=64)
    assert len(trainer.train_dataset) == 4
    assert "dropped 2 of 6 rows of the train set" in caplog.text
    assert "rows 1, 4" in caplog.text


def test_the_generation_prompt_stays_in_the_context(tmp_path):
    """TRL leaves the template's empty thought out of the context; the policy meets it at inference."""
    tokenizer = make_tokenizer(THINKING)
    trainer = PreferenceTrainer(
        make_model(), make_model(), PreferenceConfig(**settings(tmp_path)), None, make_pairs(2), None, tokenizer
    )
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["prompt_ids"]).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(row["chosen_ids"]) == row["chosen"][0]["content"] + "<|im_end|>\n"


def test_the_seed_decides_a_new_adapters_weights(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    weights = []
    for _ in range(2):
        torch.rand(7)  # whatever ran before must not matter
        args = PreferenceConfig(**settings(tmp_path, seed=5))
        trainer = PreferenceTrainer(make_model(), args=args, train_dataset=make_pairs(4), peft_config=config,
                                    processing_class=make_tokenizer())  # fmt: skip
        weights.append(next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).detach().clone())
    assert torch.equal(*weights)


class RunningMean(PairLoss):
    """A loss with state: DPO around a running mean of the margins, counted in training only."""

    needs = Need.REFERENCE
    name = "running_mean"

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def per_example(self, batch):
        if self.training:
            self.seen.add_(len(batch.chosen))
        return -torch.nn.functional.logsigmoid(batch.chosen.ratios - batch.rejected.ratios)


def test_an_objectives_state_is_saved_restored_and_left_alone_by_evaluation(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "train_dataset": make_pairs(16)}
    trainer = make_trainer(tmp_path, trainer_options={"loss": RunningMean()}, **options)
    trainer.train()
    assert trainer.objective.seen == 16
    trainer.evaluate(make_pairs(8, seed=2))
    assert trainer.objective.seen == 16
    resumed = make_trainer(tmp_path, trainer_options={"loss": RunningMean()}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.objective.seen == 16
    other = make_trainer(tmp_path, loss="dpo", **options)
    with pytest.raises(CheckpointError, match=r"trained with the loss running_mean\(\), this run has dpo\(beta=0.1"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_precomputed_references_belong_to_their_truncation(tmp_path):
    """The cache of reference log-probabilities must not serve a run that cuts rows elsewhere."""
    data = make_pairs(8)
    path = tmp_path / "pairs.parquet"
    data.to_parquet(path)
    for limit in (22, 200):
        loaded = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        trainer = make_trainer(
            tmp_path, loss="dpo", precompute_ref_log_probs=True, max_length=limit, max_steps=1, train_dataset=loaded
        )
        trainer.train()  # the step-0 check compares them with the policy's
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_reference_columns_are_read_only_when_asked_for(tmp_path):
    stale = make_pairs(8, ref_chosen_logps=[-1.0] * 8, ref_rejected_logps=[-2.0] * 8)
    assert train(tmp_path, loss="dpo", max_steps=1, train_dataset=stale)[0]["loss"] == pytest.approx(
        0.693147, abs=1e-4
    )


class KeptPrevious(PairLoss):
    """Learns, compares with the previous iterate alone, and notes what that was."""

    needs = Need.PREVIOUS
    name = "kept_previous"

    def per_example(self, batch):
        self.seen = [*getattr(self, "seen", []), sorted(batch.chosen.prev_logps.tolist())]
        return -torch.nn.functional.logsigmoid(batch.chosen.logps - batch.rejected.logps)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_first_previous_iterate_is_where_training_began(tmp_path, ahead):
    """Of a full fine-tuning too, in which the policy moves away from it."""
    loss = KeptPrevious()
    options = {"max_steps": 3, "learning_rate": 1e-2, "precompute_ref_log_probs": ahead}
    train(tmp_path, trainer_options={"loss": loss}, train_dataset=make_pairs(4), **options)
    assert len(loss.seen) == 3
    for later in loss.seen[1:]:
        assert later == pytest.approx(loss.seen[0], rel=1e-5)


def test_no_reference_model_is_kept_for_a_reference_free_loss(tmp_path):
    assert make_trainer(tmp_path, loss="simpo").ref_model is None
    assert make_trainer(tmp_path, loss="dpo").ref_model is not None


class OddlyNamed(DPOTrainer):
    """A subclass that calls its configuration something else and takes no collator."""

    def __init__(self, model, config, data, processing_class):
        super().__init__(model, args=config, train_dataset=data, processing_class=processing_class)


def test_the_mixin_finds_a_configuration_by_another_name(tmp_path):
    class Odd(LossMixin, OddlyNamed):
        pass

    config = DPOConfig(**settings(tmp_path, max_steps=1, beta=0.5, max_length=30, loss_type="ipo"))
    trainer = Odd(save_model(tmp_path), config, make_pairs(8), make_tokenizer())
    assert str(trainer.objective) == "ipo(beta=0.5, average=True)"
    assert trainer.data_collator.max_length == 30
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1.0)  # 1 / (4 beta^2)


def test_kto_counts_only_what_was_given(tmp_path):
    paired, moved = (train(tmp_path, loss=loss, max_steps=1)[0] for loss in ("dpo", "kto"))
    assert moved["entropy"] == pytest.approx(paired["entropy"], rel=1e-6)
    assert moved["num_tokens"] == paired["num_tokens"]


def test_evaluating_kto_one_example_at_a_time_is_refused(tmp_path):
    with pytest.raises(ValueError, match="per_device_eval_batch_size must be at least 2"):
        make_trainer(tmp_path, loss="kto", per_device_eval_batch_size=1)


def test_a_class_is_no_loss(tmp_path):
    with pytest.raises(TypeError, match="loss must be a Loss or a loss expression"):
        make_trainer(tmp_path, trainer_options={"loss": DPO})


# ---- needs beyond sums and a reference -----------------------------------------------------------------------------


AT_REST = {"kl_online", "kl_retain", "kl_prior", "rmu_retain"}
"""Objectives that a policy equal to its reference already minimises; tests of their own give them another one."""
MOVING = {"hypo", "beta_dpo", "bco", "alpha_dpo", "kto_forget", "kto_forget_rt", "wga", "sat_imp", "undial", "dual",
          "pdu"}  # fmt: skip
"""Objectives whose value is no measure of progress: draws, running statistics or weights move along with the policy.
undial starts so near its minimum that six large steps overshoot it; it is tested with a reference of its own below."""


FOR_TWO_LAYERS = {
    "rmu": "rmu(layer=0)",
    "rmu_retain": "rmu_retain(layer=0)",
    "rmu_paper": "rmu_paper(layer=0, retain=1.0)",
}


@pytest.mark.parametrize("expression", [*sorted(available()), *sorted(presets())])
def test_every_registered_objective_trains(tmp_path, expression):
    """Ten pairs, eight steps: it runs, stays finite, and moves the policy."""
    wrapped = expression in available() and issubclass(available()[expression], Wrapper)
    loss = f"{expression}(dpo + 0.1*sft(nll='mean'))" if wrapped else FOR_TWO_LAYERS.get(expression, expression)
    numbers = {"margin": 0.5, "chosen_score": 0.9, "rejected_score": 0.2, "chosen_from_reference": 0.0}
    pairs = make_pairs(8, **{name: [value] * 8 for name, value in numbers.items()}, forget=[0, 1] * 4)
    if expression in available() and issubclass(available()[expression], GroupLoss):
        pairs = make_groups(8)
    options = {"max_steps": 6, "learning_rate": 2e-3, "sample_max_new_tokens": 6, "per_device_train_batch_size": 8}
    trainer = make_trainer(tmp_path, loss=loss, train_dataset=pairs, **options)
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in log)
    if expression in AT_REST:
        return
    assert not torch.equal(before, trainer.model.get_input_embeddings().weight)
    if expression not in MOVING:
        assert log[-1]["loss"] < log[0]["loss"]


def test_kl_terms_pull_the_policy_back_to_a_given_reference(tmp_path):
    """From a policy that differs from its reference, so that there is something to pull."""
    reference = make_model("llama", 1)
    losses = ["kl_retain(reduction='mean')", "kl_prior", "kl_retain(direction='reverse')", "undial"]
    for loss in (*losses, "rmu_retain(layer=0)"):
        trainer_options = {"ref_model": reference}
        log = train(tmp_path, loss=loss, max_steps=8, learning_rate=3e-3, train_dataset=make_pairs(8),
                    trainer_options=trainer_options)  # fmt: skip
        assert log[0]["loss"] > 0.01
        assert log[-1]["loss"] < (0.999 if loss == "undial" else 0.7) * log[0]["loss"]


@pytest.mark.parametrize("loss", ["wga", "sat_imp(beta1=0.5)", "ga", "simnpo(beta=0.5)"])
def test_forgetting_lowers_what_is_to_be_forgotten(tmp_path, loss):
    options = {"max_steps": 8, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    log = train(tmp_path, loss=loss, train_dataset=make_pairs(8), **options)
    assert log[-1]["logps/rejected"] < log[0]["logps/rejected"] - 1


def test_online_kl_is_logged_and_falls(tmp_path):
    log = train(tmp_path, loss="kl_online", max_steps=30, learning_rate=1e-2, train_dataset=make_pairs(8),
                sample_max_new_tokens=4, per_device_train_batch_size=8,
                trainer_options={"ref_model": make_model("llama", 1)})  # fmt: skip
    first, last = (
        sum(e["kl_online/loss"] if "kl_online/loss" in e else e["loss"] for e in part) for part in (log[:6], log[-6:])
    )
    assert last < first
    assert "ratios/sampled" in log[0]


def test_a_previous_model_is_what_inpo_compares_with(tmp_path):
    first = train(tmp_path, loss="inpo(eta=0.5, tau=0.1)", max_steps=1)[0]
    later = train(tmp_path, loss="inpo(eta=0.5, tau=0.1)", max_steps=1,
                  trainer_options={"previous_model": make_model("llama", 3)})[0]  # fmt: skip
    # In the first iteration policy, reference and previous iterate are one: (0 - 1 / (2 eta))^2.
    assert first["loss"] == pytest.approx(1.0, abs=1e-4)
    assert later["loss"] != pytest.approx(1.0, abs=1e-2)


def test_a_previous_model_that_nothing_compares_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match="previous_model would have no effect"):
        make_trainer(tmp_path, loss="dpo", trainer_options={"previous_model": make_model()})


@pytest.mark.parametrize("loss", ["tdpo", "ld_dpo", "hypo", "kto"])
def test_what_no_reference_can_compute_ahead_is_refused(tmp_path, loss):
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        make_trainer(tmp_path, loss=loss, precompute_ref_log_probs=True)


def test_a_missing_margin_column_is_named(tmp_path):
    with pytest.raises(ValueError, match="needs a numeric column 'margin'"):
        make_trainer(tmp_path, loss="margin_dpo")


def test_evaluation_scores_every_role(tmp_path):
    trainer = make_trainer(tmp_path, loss="sft", max_steps=1, trainer_options={"eval_dataset": make_pairs(8)})
    trainer.train()
    assert "logps/rejected" not in trainer.state.log_history[0]
    assert "eval_logps/rejected" in trainer.evaluate()


@pytest.mark.parametrize("loss", ["bco", "beta_dpo", "alpha_dpo", "cringe(k=3)", "surrogate_ensemble"])
def test_a_resumed_run_goes_on_with_the_objectives_state(tmp_path, loss):
    options = {"loss": loss, "save_strategy": "steps", "save_steps": 2, "train_dataset": make_pairs(16)}
    whole = make_trainer(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    for name, value in whole.objective.state_dict().items():
        torch.testing.assert_close(resumed.objective.state_dict()[name], value, rtol=0, atol=0)


# ---- layouts and the reference cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo + 0.1*sft", "kto", "tdpo", "wpo(dpo)", "cringe(k=3)", "npo + kl_retain"])
def test_layouts_train_alike(tmp_path, loss):
    options = {"loss": loss, "max_steps": 5, "train_dataset": make_pairs(16)}
    trees, padded = (train(tmp_path, layout=layout, **options) for layout in ("tree", "padded"))
    for mine, theirs in zip(trees, padded, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("peft", [False, True])
def test_a_cached_reference_trains_alike_and_is_computed_once(tmp_path, peft):
    adapter = {"peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")} if peft else {}
    options = {"loss": "ld_dpo + 0.1*dpo", "max_steps": 8, "train_dataset": make_pairs(8)}
    plain = train(tmp_path, trainer_options=dict(adapter), **options)
    for misses in (16, 0):
        trainer = make_trainer(
            tmp_path, reference_cache=str(tmp_path / "cache"), trainer_options=dict(adapter), **options
        )
        trainer.train()
        cached = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert trainer._scorer.cache.misses == misses
        for mine, theirs in zip(cached, plain, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("simpo", {}, "needs no reference"),
        ("tdpo", {}, "needs more of the reference than log-probabilities"),
        ("dpo", {"precompute_ref_log_probs": True}, "cannot be used with precompute_ref_log_probs=True"),
    ],
)
def test_a_cache_that_would_not_serve_is_refused(tmp_path, loss, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, loss=loss, reference_cache=str(tmp_path / "cache"), **options)
