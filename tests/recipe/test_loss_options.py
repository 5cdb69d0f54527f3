"""TRL's loss options on a recipe with an objective of its own: honoured or refused, never another objective."""

from __future__ import annotations

import pytest
import yaml

from prefopt.losses import parse
from prefopt.recipe import main, parse_arguments
from tests.recipe.test_recipe import arguments, pairs_file


def objective(own: str, *words: str) -> str:
    return str(parse(str(parse_arguments(own, ["--output_dir", "unused", *words]).training.loss)))


@pytest.mark.parametrize(
    ("own", "words", "trained"),
    [
        ("simpo(beta=2.0, gamma=1.0)", ["--beta", "2.5"], "simpo(beta=2.5, gamma=1.0)"),
        ("npo_rt(beta=0.1)", ["--beta=0.3"], "npo_rt(beta=0.3)"),
        ("npo_rt(0.1)", ["--beta", "0.3"], "npo_rt(beta=0.3)"),
        ("npo_rt(beta=0.3)", ["--beta", "0.1"], "npo_rt(beta=0.1)"),  # TRL's default, asked for
        ("kto", ["--beta", "0.3"], "kto(beta=0.3)"),
        ("mpo", ["--beta", "0.2"], "mpo(beta=0.2)"),
        ("rpo(beta=0.1, eta=0.5)", ["--label-smoothing", "0.1", "--beta", "0.2"],
         "dpo(beta=0.2, label_smoothing=0.1) + 0.1*sft(nll='sum')"),
        ("discopop(beta=0.05, tau=0.05)", ["--discopop_tau", "0.2"], "discopop(beta=0.05, tau=0.2)"),
        ("ld_dpo", ["--ld_alpha", "0.3"], "ld_dpo(alpha=0.3)"),
        ("f_dpo", ["--f_divergence_type", "js_divergence"], "f_dpo(divergence='js')"),
        ("wpo(dpo(beta=0.2))", ["--beta", "0.3"], "wpo(dpo(beta=0.3))"),
        ("ipo + 0.2*sft", ["--beta", "0.3"], "ipo(beta=0.3) + 0.2*sft"),
        ("dpo(beta=0.5)", ["--beta", "0.3"], "dpo(beta=0.3)"),
        ("cringe", ["--label_smoothing", "0"], "cringe"),  # asks for nothing
    ],
)  # fmt: skip
def test_an_option_sets_the_argument_of_its_name(own, words, trained):
    assert objective(own, *words) == str(parse(trained))


@pytest.mark.parametrize(
    ("own", "words", "message"),
    [
        ("cringe(k=5)", ["--beta", "0.2"], r"--beta 0.2 would have no effect: .*--loss \"cringe\(k=5\)\""),
        ("orpo", ["--label_smoothing", "0.1"], r"--label_smoothing 0.1 would have no effect"),
        ("ipo", ["--use_weighting"], r"--use_weighting True would have no effect"),
        ("kto", ["--f_divergence_type", "js_divergence"], r"--f_divergence_type js_divergence would have no effect"),
        ("simpo", ["--loss_type", "sigmoid"], r"another objective than .*simpo.*--loss \"dpo\(beta=0.1"),
        ("simpo", ["--loss_type", "ipo", "--beta", "0.4"], r"--loss_type ipo .*--loss \"ipo\(beta=0.4"),
        ("dpo + orpo", ["--beta", "0.2"], r"--beta 0.2: 2 losses .*: dpo and orpo"),
        ("simpo", ["--beta", "-1"], r"--beta -1.0: .*beta must be a positive"),
        ("npo_rt", ["--loss", "simpo(gamma=1.0)", "--beta", "3"], r"beta=3.0 would .*simpo\(gamma=1.0, beta=3"),
        ("npo_rt", ["--loss", "simpo", "--beta", "0.1"], r"beta=0.1 would have no effect"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused_by_name(own, words, message):
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        objective(own, *words)


def test_a_config_sets_it_too(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"beta": "0.3"}))
    assert objective("npo_rt(beta=0.1)", "--config", str(config)) == str(parse("npo_rt(beta=0.3)"))
    assert objective("npo_rt(beta=0.1)", "--config", str(config), "--beta", "0.4") == str(parse("npo_rt(beta=0.4)"))
    config.write_text(yaml.safe_dump({"loss_type": ["ipo"]}))
    with pytest.raises(SystemExit, match="--loss_type ipo would train another objective"):
        objective("npo_rt(beta=0.1)", "--config", str(config))


def test_the_recipe_of_trls_default_takes_trls_options():
    training = parse_arguments("dpo(beta=0.1)", ["--loss_type", "ipo", "--beta", "0.4"]).training
    assert (training.loss, training.loss_type, training.beta) == (None, ["ipo"], 0.4)


def test_the_run_trains_it(tmp_path):
    results = main("npo_rt(beta=0.1)", arguments(tmp_path, pairs_file(tmp_path), "--beta", "0.3"))
    assert results["loss"] == str(parse("npo_rt(beta=0.3)"))
