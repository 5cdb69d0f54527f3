"""Configs and chat templates that come with the package, named in a folder that has none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import prefopt
from prefopt.models.load import load_tokenizer
from prefopt.recipe import parse_arguments
from tests.tiny import make_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["configs/papers/simpo.yaml", "papers/simpo.yaml", "papers/simpo", "simpo"])
def test_a_config_is_found_by_its_name(name, capsys):
    recipe = parse_arguments("dpo", ["--config", name])
    assert recipe.training.loss == "simpo(beta=2.0, gamma=1.6)"
    assert f"Config: papers/simpo.yaml, which comes with prefopt {prefopt.__version__}." in capsys.readouterr().out


def test_a_file_of_that_name_comes_first(tmp_path, capsys):
    (tmp_path / "simpo").write_text("loss: ipo\n")
    assert parse_arguments("dpo", ["--config", "simpo"]).training.loss == "ipo"
    assert "Config:" not in capsys.readouterr().out


def test_an_unknown_name_is_refused_with_what_looks_like_it():
    with pytest.raises(SystemExit, match=r"there is no such file, and prefopt has no config .* mean 'simpo_gemma2'"):
        parse_arguments("dpo", ["--config", "papers/simpo_gema2.yaml"])


def test_a_template_is_found_by_the_name_that_configs_use(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"), chat_template="configs/papers/hh.jinja")
    assert tokenizer.chat_template == (ROOT / "configs" / "papers" / "hh.jinja").read_text(encoding="utf-8")
