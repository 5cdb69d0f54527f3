"""A second run overwrites nothing in silence: the default's folder is moved aside, a named one refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.recipe import main, parse_arguments
from tests.recipe.test_recipe import arguments, loaded, pairs_file


def words(folder: Path, *more: str, output: str | None = None) -> list[str]:
    made = arguments(folder, pairs_file(folder), "--evaluate_first", "false", "--max_steps", "1", *more)
    for option in ("--output_dir", "--overwrite_output_dir"):
        at = made.index(option)
        del made[at : at + 2]
    return made + (["--output_dir", output] if output else [])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_folder_of_the_default_is_moved_aside(tmp_path, capsys):
    first = main("ipo", words(tmp_path))
    main("hinge", words(tmp_path))
    main("simpo", words(tmp_path))
    assert "The earlier run in runs/latest is now runs/latest-2." in capsys.readouterr().out
    names = [f"runs/{name}/results.json" for name in ("latest-1", "latest-2", "latest")]
    assert [("ipo", "hinge", "simpo")[i] in Path(name).read_text() for i, name in enumerate(names)] == [True] * 3
    assert str(first["loss"]).startswith("ipo")


def test_a_named_folder_is_refused_before_the_data_are_read(tmp_path):
    main("ipo", words(tmp_path, output="mine"))
    before = sorted(Path("mine").iterdir())
    with pytest.raises(ValueError, match=r"mine holds an earlier run .*results.json.*--overwrite_output_dir"):
        loaded(parse_arguments("hinge", words(tmp_path, output="mine")))
    assert sorted(Path("mine").iterdir()) == before


def test_a_named_folder_is_overwritten_where_that_is_asked_for(tmp_path, capsys):
    main("ipo", words(tmp_path, output="mine"))
    main("hinge", [*words(tmp_path, output="mine"), "--overwrite_output_dir"])
    assert "Overwriting the earlier run in mine" in capsys.readouterr().out
    assert "hinge" in Path("mine/results.json").read_text()
    assert not Path("mine-1").exists()


def test_resuming_overwrites_nothing(tmp_path):
    saves = ["--save_strategy", "steps", "--save_steps", "1"]
    main("ipo", words(tmp_path, *saves, output="mine"))
    resumed = words(tmp_path, *saves, "--max_steps", "2", "--resume_from_checkpoint", "auto", output="mine")
    assert main("ipo", resumed) is not None


def test_a_dry_run_moves_nothing(tmp_path):
    main("ipo", words(tmp_path))
    main("ipo", [*words(tmp_path), "--dry_run"])
    assert not Path("runs/latest-1").exists()
    main("ipo", [*words(tmp_path, output="runs/latest"), "--dry_run"])


def test_a_run_that_is_refused_moves_nothing(tmp_path):
    main("ipo", words(tmp_path))
    with pytest.raises(ValueError, match="margin"):
        main("margin_dpo", words(tmp_path))
    assert not Path("runs/latest-1").exists()
