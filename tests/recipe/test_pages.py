"""What a run leaves for its page: facts, held-out pairs, the page; and that none of it can cost the run."""

from __future__ import annotations

import json

import pytest
import torch

from prefopt.models.base_sample import digest
from prefopt.recipe import main, pages
from tests.recipe.test_recipe import arguments, pairs_file
from tests.tiny import make_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = pairs_file(folder, bad_3={"chosen": None})
    results = main("dpo(beta=0.1)", arguments(folder, data, "--on_bad_rows", "drop", "--learning_rate", "1e-3"))
    return folder / "out", results


def stored(finished, name):
    return json.loads((finished[0] / name).read_text(encoding="utf-8"))


def test_the_values_of_held_out_pairs_have_the_means_that_were_logged(finished):
    pairs, after = stored(finished, "heldout.json"), finished[1]["after"]
    for name, values in pairs["values"].items():
        expected = after.get(f"eval_{name}", after["eval_ratios/chosen"] - after["eval_ratios/rejected"])
        assert sum(values) / len(values) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    accuracy = sum(value > 0 for value in pairs["values"]["rewards/margins"]) / len(pairs["texts"])
    assert accuracy == pytest.approx(after["eval_rewards/accuracies"])
    assert set(pairs["texts"][0]) == {"prompt", "chosen", "rejected"}


def test_the_facts_name_loss_data_problems_and_model(finished):
    facts = stored(finished, "run.json")
    assert facts["loss"] == "dpo(beta=0.1, label_smoothing=0.0)"
    assert facts["terms"][0]["formula"] == "-(1-e) log sigmoid(beta*d) - e log sigmoid(-beta*d)"
    held_out = next(part for part in facts["data"] if part["role"] == "held-out")
    assert held_out["fingerprint"] == stored(finished, "heldout.json")["fingerprint"]
    assert any(problem["severity"] == "error" and problem["rows"] == 1 for problem in facts["problems"])
    assert len(facts["base_digest"]) == 16


def test_the_page_is_written(finished):
    assert "<h2>Curves</h2>" in (finished[0] / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no page today")

    monkeypatch.setattr(pages, "write_run_page", fails)
    monkeypatch.setattr(pages, "save_facts", fails)
    results = main("dpo(beta=0.1)", arguments(tmp_path, pairs_file(tmp_path)))
    assert results["after"]["eval_loss"] > 0
    shown = capsys.readouterr().out
    assert shown.count("could not be written: RuntimeError: no page today. Nothing else is affected.") == 2
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_digest_is_of_the_weights_not_of_their_precision():
    model = make_model("llama").to(torch.bfloat16)
    first = digest(model)
    assert digest(model.float()) == first
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    assert digest(model) != first


def test_held_out_prompts_are_answered_at_every_evaluation(tmp_path):
    more = ["--eval_answers", "3", "--eval_strategy", "steps", "--eval_steps", "1"]
    main("dpo(beta=0.1)", arguments(tmp_path, pairs_file(tmp_path), *more))
    stored = json.loads((tmp_path / "out" / "answers.json").read_text(encoding="utf-8"))
    assert len(stored["prompts"]) == 3
    assert [one["step"] for one in stored["answers"]] == [0, 1, 2]
    assert all(len(one["texts"]) == len(one["ended"]) == 3 for one in stored["answers"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "answered greedily" in page
    assert "KL to the reference" in page


@pytest.mark.parametrize("more", [(), ("--use_peft",)])
def test_kl_is_estimated_on_answers_and_is_zero_before_training(tmp_path, more):
    words = ["--eval_answers", "3", "--eval_strategy", "steps", "--eval_steps", "1", "--learning_rate", "1e-2", *more]
    results = main("dpo(beta=0.1)", arguments(tmp_path, pairs_file(tmp_path), *words))
    assert results["before"]["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert results["after"]["eval_kl"] > 1e-4
    log = json.loads((tmp_path / "out" / "log_history.json").read_text(encoding="utf-8"))["log_history"]
    assert [line["step"] for line in log if "eval_kl" in line][-1] == 2
    assert any("loss" in line and "rewards/chosen" in line for line in log)  # no other line lost its numbers


def test_a_run_without_a_reference_says_that_it_estimates_no_kl(tmp_path, capsys):
    results = main("simpo", arguments(tmp_path, pairs_file(tmp_path), "--eval_answers", "2"))
    assert "eval_kl" not in results["after"]
    assert "No KL is estimated on answers" in capsys.readouterr().out


def test_answers_need_a_whole_model(tmp_path):
    with pytest.raises(SystemExit, match="--eval_answers must be 0 or more, got -1"):
        main("dpo", arguments(tmp_path, "pairs.jsonl", "--eval_answers", "-1"))
