"""Whole runs of rounds on a tiny model: files, policies, what is refused, what is continued."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.online import loop, start
from prefopt.online.folders import Manifest
from prefopt.online.run import main
from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import read_jsonl
from prefopt.trainer.first_batch import FirstBatch
from tests.online.rounds import files, same_weights, vowels, weights, words, write_prompts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A finished run of two rounds, and its folder."""
    folder = tmp_path_factory.mktemp("rounds")
    return folder, main(argv=words(folder))


def test_each_round_has_its_files_and_numbers(first):
    folder, summaries = first
    assert [summary["round"] for summary in summaries] == [0, 1, 2]
    for number in (1, 2):
        path = folder / "out" / f"round-{number}"
        samples, pairs = list(read_jsonl(path / "samples.jsonl")), list(read_jsonl(path / "pairs.jsonl"))
        assert (len(samples), {row["round"] for row in samples}) == (24, {number})
        assert summaries[number]["pairs"]["pairs"] == summaries[number]["training"]["rows"] == len(pairs) > 0
        assert all(row["margin"] > 0 for row in pairs)
        assert json.loads((path / "summary.json").read_text()) == summaries[number]
        assert summaries[number]["heldout"]["scored"] == 3
    assert not same_weights(weights(folder / "out", 1), weights(folder / "out", 2))
    assert summaries[2]["policy"] == {
        "loss": "irpo(beta=0.1)", "samples from": "round-1/model", "starts from": "round-1/model",
        "reference": "round-1/model (previous)", "optimizer": "new", "prompts": "6",
    }  # fmt: skip


def test_each_round_is_compared_with_the_start_and_the_round_before(first):
    folder, summaries = first
    run = folder / "out"
    assert summaries[0].keys() == {"round", "heldout"}
    for summary in summaries[1:]:
        assert {"distinct_2", "repetition", "mean_tokens"} <= summary["samples"].keys() & summary["heldout"].keys()
        assert summary["judges"][0]["judge"] == "vowels"
        assert summary["heldout"]["against_start"]["prompts"] == 3
        scored = list(read_jsonl(run / f"round-{summary['round']}" / "heldout_kl.jsonl"))
        differences = [row["logp"] - row["ref_logp"] for row in scored]
        assert summary["kl"]["mean"] == pytest.approx(sum(differences) / 3)
        drawn = list(read_jsonl(run / f"round-{summary['round']}" / "heldout_kl_samples.jsonl"))
        assert [row["sampling"]["temperature"] for row in drawn] == [1.0] * 3
        assert {row["model"] for row in drawn} == {
            row["model"] for row in read_jsonl(run / f"round-{summary['round']}" / "heldout_samples.jsonl")
        }
    first_round, second = (summary["heldout"] for summary in summaries[1:])
    assert first_round["against_previous"] == first_round["against_start"]
    scores = [
        [row["score"] for row in read_jsonl(run / f"round-{number}" / "heldout_judgements.jsonl")] for number in (1, 2)
    ]
    wins = [(new > old) + 0.5 * (new == old) for old, new in zip(*scores, strict=True)]
    assert second["against_previous"]["win_rate"]["value"] == pytest.approx(sum(wins) / 3)


def test_the_best_round_is_named_in_the_run_s_summary_and_the_last_card(first):
    folder, summaries = first
    stored = json.loads((folder / "out" / "summary.json").read_text())
    scores = [summary["heldout"]["mean_score"] for summary in summaries]
    best = scores.index(max(scores))
    assert (stored["best_round"]["round"], stored["best_round"]["value"]) == (best, scores[best])
    assert [one["heldout"] for one in stored["rounds"]] == [summary["heldout"] for summary in summaries]
    cards = [(folder / "out" / f"round-{number}" / "model" / "README.md").read_text() for number in (1, 2)]
    assert ["## Rounds" in card for card in cards] == [False, True]
    assert "The best by held-out `mean_score` is that of" in cards[1]


def test_judges_that_only_compare_give_win_rates(tmp_path, capsys):
    summaries = main(argv=words(tmp_path, judges="tests.online.rounds:longer", pairs="tournament"))
    run = tmp_path / "out"
    assert {path.name for path in run.glob("round-*/heldout_against_*")} == {
        "heldout_against_start.jsonl", "heldout_against_previous.jsonl",
    }  # fmt: skip
    assert not (run / "round-1" / "heldout_against_previous.jsonl").exists()
    answers = [
        [len(row["completion"]) for row in read_jsonl(run / f"round-{number}" / "heldout_samples.jsonl")]
        for number in range(3)
    ]

    def rate(new: int, old: int) -> float:
        return sum((a > b) + 0.5 * (a == b) for a, b in zip(answers[new], answers[old], strict=True)) / 3

    for number in (1, 2):
        numbers = summaries[number]["heldout"]
        assert numbers["mean_score"] is None
        assert numbers["against_start"]["win_rate"]["value"] == pytest.approx(rate(number, 0))
        assert numbers["against_previous"]["win_rate"]["value"] == pytest.approx(rate(number, number - 1))
        stored = {one["round"]: one for one in json.loads((run / "manifest.json").read_text())["stages"][1:]}
        assert "round-2/heldout_against_previous.jsonl" in stored[2]["files"]
    assert "Best by win_rate" in capsys.readouterr().out


def test_held_out_answers_may_have_judges_of_their_own(tmp_path):
    main(argv=words(tmp_path, rounds=1, heldout_judges="tests.online.rounds:even|tests.online.rounds:vowels,weight=3"))
    folder = tmp_path / "out" / "round-1"
    assert {row["judge"] for row in read_jsonl(folder / "judgements.jsonl")} == {"vowels"}
    judged = list(read_jsonl(folder / "heldout_judgements.jsonl"))
    assert {row["judge"] for row in judged} == {"even", "vowels"}
    weight = {"even": 0.25, "vowels": 0.75}
    mean = sum(weight[row["judge"]] * row["score"] for row in judged) / 3
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["heldout"]["mean_score"] == pytest.approx(mean)
    with pytest.raises(UsageError, match="heldout_judges"):
        main(argv=words(tmp_path, rounds=1, heldout_judges="tests.online.rounds:even"))


def test_another_choice_of_the_best_round_needs_no_other_run(first, tmp_path, capsys):
    folder, summaries = first
    shutil.copytree(folder, tmp_path / "copy")
    argv = words(tmp_path / "copy", best_round_by="win_rate", model_name_or_path=folder / "llama-0")
    assert main(argv=argv) == summaries
    rates = [0.5, *(summary["heldout"]["against_start"]["win_rate"]["value"] for summary in summaries[1:])]
    best = json.loads((tmp_path / "copy" / "out" / "summary.json").read_text())["best_round"]
    assert (best["metric"], best["round"]) == ("win_rate", rates.index(max(rates)))
    assert "Best by win_rate: " in capsys.readouterr().out


def test_several_sampled_answers_serve_for_kl_too(tmp_path):
    summaries = main(argv=words(tmp_path, rounds=1, heldout_samples=2))
    assert summaries[1]["kl"]["completions"] == 6
    assert not (tmp_path / "out" / "round-1" / "heldout_kl_samples.jsonl").exists()
    without = main(argv=words(tmp_path, output="without", rounds=1, heldout_samples=2, heldout_kl="false"))
    assert "kl" not in without[1]
    assert without[1]["heldout"] == summaries[1]["heldout"]


def test_a_metric_that_held_out_answers_do_not_have_is_refused_before_training(tmp_path):
    with pytest.raises(UsageError, match=r"best_round_by accuracy needs scores that are 0 or 1: name another"):
        main(argv=words(tmp_path, best_round_by="accuracy"))
    assert not (tmp_path / "out" / "round-1").exists()


def test_samples_of_a_round_are_of_the_model_that_the_round_before_trained(first):
    folder, _ = first
    models = [{row["model"] for row in read_jsonl(folder / "out" / f"round-{n}" / "samples.jsonl")} for n in (1, 2)]
    heldout = [
        {row["model"] for row in read_jsonl(folder / "out" / f"round-{n}" / "heldout_samples.jsonl")} for n in (0, 1)
    ]
    assert models == heldout
    assert models[0] != models[1]


def test_a_finished_run_is_only_reported_and_more_rounds_can_be_added(first, tmp_path):
    folder, summaries = first
    shutil.copytree(folder, tmp_path / "copy")
    before = files(tmp_path / "copy" / "out")
    assert main(argv=words(tmp_path / "copy", model_name_or_path=folder / "llama-0")) == summaries
    assert files(tmp_path / "copy" / "out") == before
    longer = main(argv=words(tmp_path / "copy", rounds=3, model_name_or_path=folder / "llama-0"))
    assert longer[:3] == summaries
    assert longer[3]["policy"]["starts from"] == "round-2/model"


def test_another_setting_or_a_changed_file_is_refused(first, tmp_path):
    folder, _ = first
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UsageError, match=r"other settings: learning_rate was 0.001, now 0.1\. Name another"):
        main(argv=words(tmp_path / "copy", learning_rate=0.1, model_name_or_path=folder / "llama-0"))
    with pytest.raises(UsageError, match="other settings: loss was"):
        main(argv=words(tmp_path / "copy", loss="dpo", model_name_or_path=folder / "llama-0"))
    pairs = tmp_path / "copy" / "out" / "round-1" / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("best", "worst"))
    with pytest.raises(UsageError, match=r"pairs.jsonl has changed since round 1 was done with it \(pair\)"):
        main(argv=words(tmp_path / "copy", model_name_or_path=folder / "llama-0"))


def test_a_deleted_file_is_made_again_and_all_that_follows(first, tmp_path):
    folder, summaries = first
    shutil.copytree(folder, tmp_path / "copy")
    run = tmp_path / "copy" / "out"
    (run / "round-2" / "pairs.jsonl").unlink()
    shutil.rmtree(run / "round-2" / "model")
    assert main(argv=words(tmp_path / "copy", model_name_or_path=folder / "llama-0")) == summaries
    assert files(run) == files(folder / "out")
    assert same_weights(weights(run, 2), weights(folder / "out", 2))


def test_two_commands_do_not_share_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "rounds.lock"), pytest.raises(UsageError, match="another command runs rounds in"):
        main(argv=words(tmp_path))


def test_one_heldout_prompt_has_a_kl_without_an_error_and_missing_scores_are_said(tmp_path, capsys):
    heldout = write_prompts(tmp_path / "one.jsonl", 1, "o")
    judge = "tests.evaluation.my_judges:fails"
    main(argv=words(tmp_path, rounds=1, max_steps=1, heldout_prompts=heldout, heldout_judges=judge))
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"KL to the initial model -?[\d.e-]+ nats; 1 without a score: raised: RuntimeError", text)


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupted(completion):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tests.online.rounds.vowels", interrupted)
        done = CliRunner().invoke(app, ["rounds", "run", *words(tmp_path, rounds=1)])
    last = done.output.strip().splitlines()[-1]
    assert last == f"Interrupted. The same command continues the run in {tmp_path / 'out'} where it stopped."
    assert done.exit_code == 130
    main(argv=words(tmp_path, rounds=1))
    assert f"Continuing the run in {tmp_path / 'out'}" not in capsys.readouterr().out  # no stage was done before
    assert len(list(read_jsonl(tmp_path / "out" / "round-1" / "judgements.jsonl"))) == 24


# ---- policies ----------------------------------------------------------------------------------------------------


def test_restarting_from_the_initial_model_with_the_last_as_reference(tmp_path):
    summaries = main(argv=words(tmp_path, round_start="initial"))
    policy = summaries[2]["policy"]
    assert (policy["samples from"], policy["starts from"]) == ("round-1/model", "the initial model")
    assert policy["reference"] == "round-1/model (previous)"


def test_the_step_0_check_holds_in_every_round_whose_reference_is_its_start(tmp_path, monkeypatch):
    compared = []
    begin = FirstBatch.__init__

    def watched(self, trainer, objective, reference_is_initial_policy):
        compared.append(reference_is_initial_policy)
        begin(self, trainer, objective, reference_is_initial_policy)

    monkeypatch.setattr(FirstBatch, "__init__", watched)
    main(argv=words(tmp_path))
    main(argv=words(tmp_path, output="initial", round_reference="initial"))
    assert compared == [True, True, True, False]


@pytest.mark.parametrize("adapter", [[], ["--use_peft", "--lora_target_modules", "q_proj"]], ids=["whole", "lora"])
@pytest.mark.parametrize("policy", [{"round_reference": "initial"}, {"round_start": "initial"}], ids=str)
def test_with_another_reference_both_are_the_models_that_drew_samples(tmp_path, monkeypatch, adapter, policy):
    checked = []
    digest = start.fingerprint

    def watched(network, trained_adapter=None):
        checked.append(digest(network, trained_adapter=trained_adapter))
        return checked[-1]

    monkeypatch.setattr(start, "fingerprint", watched)
    summaries = main(argv=words(tmp_path, *adapter, **policy))
    assert summaries[2]["training"]["steps"] == 3
    drew = [next(read_jsonl(tmp_path / "out" / f"round-{n}" / "samples.jsonl"))["model"] for n in (1, 2)]
    assert checked == (drew[::-1] if "round_reference" in policy else drew)  # the policy, then the reference


@pytest.mark.parametrize(("role", "number"), [("policy", 1), ("reference", 0)])
def test_a_model_that_changed_after_sampling_is_refused_before_the_first_step(tmp_path, monkeypatch, role, number):
    train = loop.train_round
    folder = (tmp_path / "llama-0", tmp_path / "out" / "round-1" / "model")[number]

    def changed(recipe, plan, *arguments):
        if plan.number == 2:
            tensors = load_file(folder / "model.safetensors")
            save_file(
                {name: value + 0.01 for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
            )
        return train(recipe, plan, *arguments)

    monkeypatch.setattr(loop, "train_round", changed)
    with pytest.raises(UsageError, match=rf"the {role} of round 2 should be .*{folder.name}, but its weights are not"):
        main(argv=words(tmp_path, round_reference="initial"))


def test_inpo_compares_with_the_initial_model_and_the_previous_iterate(tmp_path):
    loss = "inpo(eta=0.1, tau=0.03)"
    summaries = main(argv=words(tmp_path, loss=loss, round_reference="initial", pairs="tournament"))
    assert "previous iterate" not in summaries[1]["policy"]
    assert summaries[2]["policy"]["previous iterate"] == "round-1/model"
    assert summaries[2]["policy"]["reference"] == "the initial model (initial)"
    # At the start of a round policy and previous iterate are equal, so h is a third of the reference's distance.
    assert summaries[2]["training"]["steps"] == 3


def test_a_moving_average_is_between_its_models(tmp_path):
    main(argv=words(tmp_path, rounds=3, round_reference="moving_average", average_decay=0.25))
    start = load_file(tmp_path / "llama-0" / "model.safetensors")
    average = load_file(tmp_path / "out" / "round-3" / "reference" / "model.safetensors")
    one, two = weights(tmp_path / "out", 1), weights(tmp_path / "out", 2)
    for name, value in average.items():
        expected = 0.25 * (0.25 * start[name] + 0.75 * one[name]) + 0.75 * two[name]
        assert (value - expected).abs().max() < 1e-6


def test_the_optimizer_may_keep_its_state(tmp_path):
    new = main(argv=words(tmp_path, output="new"))
    keep = main(argv=words(tmp_path, output="keep", round_optimizer="keep"))
    assert (new[2]["policy"]["optimizer"], keep[2]["policy"]["optimizer"]) == ("new", "state of round 1")
    assert same_weights(weights(tmp_path / "new", 1), weights(tmp_path / "keep", 1))
    assert not same_weights(weights(tmp_path / "new", 2), weights(tmp_path / "keep", 2))


def test_losses_temperatures_and_prompts_by_round(tmp_path):
    summaries = main(
        argv=words(
            tmp_path, loss=None, round_losses="dpo(beta=0.2)|ipo", temperature="0.5|1.5", round_prompts="disjoint",
            prompts_per_round=3,
        )
    )  # fmt: skip
    assert [summary["policy"]["loss"] for summary in summaries[1:]] == ["dpo(beta=0.2)", "ipo"]
    rows = [list(read_jsonl(tmp_path / "out" / f"round-{n}" / "samples.jsonl")) for n in (1, 2)]
    assert [{row["sampling"]["temperature"] for row in part} for part in rows] == [{0.5}, {1.5}]
    names = [{row["prompt_id"] for row in part} for part in rows]
    assert (len(names[0]), len(names[1]), names[0] & names[1]) == (3, 3, set())


def test_a_loss_beside_one_a_round_is_refused_unless_it_is_the_config_s(tmp_path, capsys):
    with pytest.raises(SystemExit, match="--loss would have no effect beside --round_losses"):
        main(argv=words(tmp_path, "--dry_run", round_losses="ipo"))
    config = tmp_path / "rounds.yaml"
    config.write_text("loss: dpo\n")
    line = ["--dry_run", "--config", str(config)]
    main(argv=words(tmp_path, *line, loss=None, round_losses="ipo|hinge|simpo|sft"))
    shown = capsys.readouterr().out
    assert "loss hinge" in shown
    assert "loss dpo" not in shown
    config.write_text("loss: dpo\nround_losses: [ipo]\n")
    with pytest.raises(SystemExit, match="--loss would have no effect beside --round_losses"):
        main(argv=words(tmp_path, *line, loss=None))


def test_numbers_for_more_rounds_than_there_are_wait_for_them(tmp_path, capsys):
    main(argv=words(tmp_path, "--dry_run", temperature="0.5|1|1.5"))
    assert "The last 1 of --temperature wait for more --rounds: 3 are given, one a round, and --rounds is 2." in (
        " ".join(capsys.readouterr().out.split())
    )


def test_supervised_rows_of_the_best_samples(tmp_path):
    summaries = main(argv=words(tmp_path, loss="superhf(kl=0.35)", pairs="top_k(k=1)", round_reference="initial"))
    rows = list(read_jsonl(tmp_path / "out" / "round-1" / "pairs.jsonl"))
    assert set(rows[0]) >= {"prompt", "completion", "score"}
    assert summaries[1]["training"]["rows"] == len(rows)


def test_rounds_train_on_groups_with_a_loss_of_each_round(tmp_path, capsys):
    argv = words(tmp_path, loss=None, pairs="groups", round_losses="gvpo(beta=0.5)|plackett_luce")
    summaries = main(argv=argv)
    for number, loss in ((1, "gvpo(beta=0.5)"), (2, "plackett_luce")):
        summary, folder = summaries[number], tmp_path / "out" / f"round-{number}"
        samples = {(row["prompt_id"], row["index"]): row["completion"] for row in read_jsonl(folder / "samples.jsonl")}
        rows = list(read_jsonl(folder / "pairs.jsonl"))
        for row in rows:
            texts = [completion[0]["content"] for completion in row["completions"]]
            assert texts == [samples[row["prompt_id"], index] for index in row["indices"]]
            assert row["scores"] == [vowels(text) for text in texts]
        assert summary["policy"]["loss"] == loss
        assert summary["pairs"]["pairs"] == summary["training"]["rows"] == len(rows) > 0
        assert (summary["training"]["steps"], summary["training"]["rows_left_out"]) == (3, 0)
        assert summary["training"]["log"]["rewards/margins"] != 0
        assert summary["heldout"]["scored"] == 3
    assert not same_weights(weights(tmp_path / "out", 1), weights(tmp_path / "out", 2))
    shown = capsys.readouterr().out
    assert "6 groups from 24 samples of 6 prompts" in shown
    assert "round groups unpaired" in shown
    assert main(argv=argv) == summaries


def test_groups_of_a_judge_that_compares_have_shares_of_wins(tmp_path):
    judge = "tests.online.rounds:longer"
    main(argv=words(tmp_path, pairs="groups", loss="lipo_lambda", judges=judge, rounds=1, max_steps=1))
    rows = list(read_jsonl(tmp_path / "out" / "round-1" / "pairs.jsonl"))
    for row in rows:
        lengths = [len(completion[0]["content"]) for completion in row["completions"]]
        assert len(lengths) == 4
        wins = [sum((a > b) + (a == b) / 2 for b in lengths) - 0.5 for a in lengths]
        assert row["scores"] == pytest.approx([won / 3 for won in wins])


def test_gold_answers_against_samples_need_no_judge(tmp_path):
    argv = words(tmp_path, pairs="against_gold", gold="gold", rounds=1)
    at = argv.index("--judges")
    summaries = main(argv=argv[:at] + argv[at + 2 :])
    rows = list(read_jsonl(tmp_path / "out" / "round-1" / "pairs.jsonl"))
    assert {row["chosen"][0]["content"] for row in rows} == {"a good day"}
    assert summaries[1]["heldout"]["mean_score"] is None


def test_a_saved_adapter_is_trained_further(tmp_path):
    summaries = main(argv=words(tmp_path, "--use_peft", lora_target_modules="q_proj"))
    assert summaries[2]["training"]["steps"] == 3
    one, two = weights(tmp_path / "out", 1), weights(tmp_path / "out", 2)
    assert one.keys() == two.keys()
    assert not same_weights(one, two)


def test_a_judge_that_fails_is_counted_and_the_round_goes_on(tmp_path):
    summaries = main(argv=words(tmp_path, judges="tests.online.rounds:broken", rounds=1, samples=6))
    assert summaries[1]["pairs"]["samples_left_out"]["no score (raised)"] > 0
    assert summaries[1]["pairs"]["pairs"] > 0


def test_a_tournament_of_a_pairwise_judge(tmp_path):
    summaries = main(argv=words(tmp_path, judges="tests.online.rounds:longer", pairs="tournament", rounds=1))
    rows = list(read_jsonl(tmp_path / "out" / "round-1" / "pairs.jsonl"))
    assert summaries[1]["pairs"]["pairs"] == len(rows) > 0
    assert all(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows)
    asked = [row["prompt_id"] for row in read_jsonl(tmp_path / "out" / "round-1" / "judgements.jsonl")]
    assert max(asked.count(name) for name in asked) <= 2 * 5  # in both orders; all pairs of 4 samples would be 2 * 6


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"pairs": "best_wurst"}, "no pair builder 'best_wurst'"),
        ({"round_reference": "none"}, "round_reference is none, but"),
        ({"pairs": "top_k(k=1)"}, "makes rows without a rejected completion"),
        (
            {"pairs": "groups"},
            "round 1: pairs groups makes .*, and irpo.beta=0.1. compares no groups: take a .* as gvpo",
        ),
        (
            {"loss": "gvpo"},
            "pairs best_worst makes pairs, and gvpo compares the .*: take --pairs groups, or .* dpo",
        ),
        (
            {"loss": "gvpo", "pairs": "top_k"},
            "pairs top_k makes rows, and gvpo .*: take --pairs groups, or a loss on rows, as sft",
        ),
        (
            {"loss": None, "round_losses": "gvpo|rebel", "pairs": "groups"},
            "round 2: pairs groups makes groups, .* rebel compares no groups",
        ),
        (
            {"loss": "gvpo + 0.1*sft", "pairs": "groups"},
            "part of gvpo . 0.1.sft needs chosen completions, which groups do not",
        ),
        ({"gold": "gold", "loss": "gvpo", "pairs": "groups"}, "--gold gold has no effect with pairs groups"),
        ({"samples": 1, "loss": "gvpo", "pairs": "groups"}, "pairs groups need two different ones"),
        ({"round_prompts": "disjoint"}, "need a number"),
        ({"round_prompts": "disjoint", "prompts_per_round": 9}, "but there are 6 prompts"),
        ({"round_optimizer": "keep", "round_start": "initial"}, "is of no use with round_start initial"),
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"samples": 1}, "round 1 has one completion of each prompt .--samples 1.*need two different ones"),
        ({"temperature": "1|0"}, "round 2 has one completion of each prompt .--temperature 0"),
        ({"gold": "gold"}, "--gold gold has no effect with pairs best_worst"),
        ({"gold": "golld", "pairs": "round_robin"}, "--gold golld: no prompt has this column. Did you mean 'gold'"),
        ({"pairs": "against_gold"}, "against_gold need gold answers: name their column of the prompts with --gold"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"metric_for_best_model": "win_rate"}, "--metric_for_best_model has no effect here: --best_round_by"),
        ({"dataset_name": "x.jsonl"}, "--dataset_name has no effect here"),
        ({"judges": "nunber"}, "no judge 'nunber'"),
        ({"judges": "nunber", "dry_run": "true"}, "no judge 'nunber'"),
        ({"judges": None, "dry_run": "true"}, "pairs best_worst needs scores: name a judge"),
        ({"max_new_tokens": 500}, "9 of 9 prompts have more tokens with max_new_tokens=500 than the model's 512"),
        ({"max_length": 8, "dry_run": "true"}, "every prompt has 8 tokens or more, so none can be trained on"),
        ({"best_round_by": "majority_vote"}, "needs several answers: set heldout_samples"),
        ({"best_round_by": "rewards"}, "invalid choice|best_round_by"),
    ],
)
def test_options_that_cannot_work_are_refused_before_a_model_is_loaded(tmp_path, options, what):
    with pytest.raises((UsageError, SystemExit), match=what):
        main(argv=words(tmp_path, **options))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_heldout_prompts_that_are_trained_on_are_refused(tmp_path):
    argv = words(tmp_path)
    with pytest.raises(UsageError, match="6 prompts of --heldout_prompts are in --prompts too"):
        main(argv=[*argv, "--heldout_prompts", str(tmp_path / "prompts.jsonl")])


def test_a_round_without_a_pair_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.online.rounds.vowels", lambda completion: 1.0)
    with pytest.raises(UsageError, match=r"round 1 has no pairs to train on; .*pair_counts.json says why"):
        main(argv=words(tmp_path))
    counts = json.loads((tmp_path / "out" / "round-1" / "pair_counts.json").read_text())
    assert counts["prompts_without_pair"] == {"all scores are equal": 6}


def test_a_judge_that_failed_on_everything_is_asked_again_by_the_same_command(tmp_path, monkeypatch):
    def down(completion: str) -> float:
        raise ConnectionError("refused")

    monkeypatch.setattr("tests.online.rounds.vowels", down)
    argv = words(tmp_path, rounds=1, max_steps=1, heldout_prompts=None)
    with pytest.raises(UsageError, match="failed on everything that they were asked: 24 raised: ConnectionError"):
        main(argv=argv)
    samples = tmp_path / "out" / "round-1" / "samples.jsonl"
    drawn = samples.stat().st_mtime_ns
    monkeypatch.undo()
    assert main(argv=argv)[1]["samples"]["scored"] == 24
    assert samples.stat().st_mtime_ns == drawn


def test_a_dry_run_shows_each_round_and_writes_nothing(tmp_path, capsys):
    assert main(argv=words(tmp_path, "--dry_run", temperature="0.8|1.3")) is None
    shown = capsys.readouterr().out
    assert "Round 1: 4 samples of each of 6 prompts at temperature 0.8, pairs best_worst" in shown
    assert "temperature 1.3" in shown
    assert not list((tmp_path / "out").glob("round-*"))
    assert main(argv=words(tmp_path, "--dry_run", pairs="groups(equal=False)", loss="gvpo")) is None
    shown = " ".join(capsys.readouterr().out.split())
    assert "Round 2: 4 samples of each of 6 prompts at temperature 1, pairs groups(equal=False); loss gvpo" in shown


def test_a_manifest_of_another_version_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema": "prefopt.rounds/9", "settings": {}, "stages": []}')
    with pytest.raises(UsageError, match=r"this version reads prefopt.rounds/1"):
        Manifest(tmp_path, {})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        Manifest(tmp_path, {})


def test_the_generator_is_gone_before_training(tmp_path, monkeypatch):
    seen = []
    train = loop.train_round

    def watched(*arguments):
        import gc

        from prefopt.generation.transformers import TransformersGenerator

        seen.append(sum(isinstance(one, TransformersGenerator) and one._model is not None for one in gc.get_objects()))
        return train(*arguments)

    monkeypatch.setattr(loop, "train_round", watched)
    main(argv=words(tmp_path, rounds=1))
    assert seen == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_optimizer": "keep"}, "round_optimizer keep does not work with DeepSpeed or FSDP"),
        ({"loss": "inpo", "round_reference": "initial"}, "from round 2 on, inpo compares with the previous iterate"),
    ],
)
def test_what_an_engine_cannot_train_is_refused_before_the_first_round(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("prefopt.online.run.is_sharded", lambda training: True)
    with pytest.raises(UsageError, match=message):
        main(argv=words(tmp_path, **options))
    assert not list((tmp_path / "out").glob("round-*"))


def test_stop_on_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"use prefopt train --dataset_name RUN/round-1/pairs.jsonl --stop_on"):
        main(argv=words(tmp_path, stop_on="nan"))
