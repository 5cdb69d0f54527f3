"""`prefopt unlearn audit` on the run of a tiny model: what it finds by itself, stores, skips and refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefopt import PreferenceConfig
from prefopt.cli import app
from prefopt.recipe.unlearning import audit as auditing
from prefopt.recipe.unlearning import main
from prefopt.recipe.unlearning.audit import ATTACKS, AuditOptions
from prefopt.safety.errors import UsageError
from tests.recipe.test_unlearning import NAMES, rows, words, write

pytest.importorskip("rouge_score")

QUICK = {"samples": 4, "relearn_steps": 2, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run with learning is in `out`."""
    folder = tmp_path_factory.mktemp("audit")
    main(argv=words(folder, "--learn", "true", epochs="1"))
    return folder


@pytest.fixture(scope="module")
def audited(folder) -> dict:
    return auditing.main(AuditOptions(str(folder / "out"), **QUICK))


def test_a_run_is_audited_without_any_other_option(folder, audited):
    assert json.loads((folder / "out" / "audit.json").read_text()) == audited
    assert set(audited["models"]) == {"before", "unlearned", "gold"}
    assert list(audited["attacks"]) == list(ATTACKS)
    assert not audited["skipped"]
    assert set(audited["numbers"]) == {"forget quality (p)", "model utility"}
    results = json.loads((folder / "out" / "results.json").read_text())
    assert audited["numbers"]["forget quality (p)"]["unlearned"] == pytest.approx(results["after"]["forget_quality"])
    assert audited["numbers"]["model utility"]["gold"] == pytest.approx(results["gold"]["model_utility"])
    for section in (audited["plain"], *audited["attacks"].values()):
        for row in section["rows"]:
            assert all(row[role]["low"] <= row[role]["value"] <= row[role]["high"] for role in ("unlearned", "gold"))
            difference = row["unlearned"]["value"] - row["gold"]["value"]
            assert row["difference"]["value"] == pytest.approx(difference)
    relearned = audited["attacks"]["relearning"]
    assert relearned["title"] == "Relearning 1 of 4 rows"
    assert audited["settings"]["relearning"]["learning_rate"] == 5e-3  # as the run learned
    best = {row["what"]: row["unlearned"]["value"] for row in audited["attacks"]["sampling"]["rows"]}
    assert list(best) == ["one answer", "best of 2", "best of 4"]
    assert best["one answer"] <= best["best of 2"] <= best["best of 4"]
    probability, rouge = audited["plain"]["rows"]
    assert probability["unlearned"]["value"] == pytest.approx(results["after"]["forget_probability"])
    assert rouge["before"]["value"] == pytest.approx(results["before"]["forget_rouge"])


def test_a_second_call_reads_the_numbers(folder, audited, monkeypatch):
    monkeypatch.setattr(auditing, "load_model", None)
    assert auditing.main(AuditOptions(str(folder / "out"), **QUICK)) == audited


class _Killed(BaseException):
    pass


def test_a_call_that_is_stopped_goes_on_with_the_next_attack(folder, audited, monkeypatch):
    options = AuditOptions(str(folder / "out"), **{**QUICK, "samples": 3})
    with monkeypatch.context() as patch:

        def killed(*_):
            raise _Killed

        patch.setattr("prefopt.unlearning.audit.Sampling.__call__", killed)
        (folder / "out" / "audit.json").unlink()
        with pytest.raises(_Killed):
            auditing.main(options)
    assert not (folder / "out" / "audit.json").exists()
    asked = []
    load = auditing.load_model
    monkeypatch.setattr(auditing, "load_model", lambda name, *rest: asked.append(name) or load(name, *rest))
    results = auditing.main(options)
    assert len(asked) == 2  # sampling, from the unlearned and the gold model
    assert results["attacks"]["wording"] == audited["attacks"]["wording"]


def test_another_model_is_attacked_again(folder, audited, tmp_path):
    copied = tmp_path / "out"
    shutil.copytree(folder / "out", copied)
    shutil.copy(folder / "models" / Path(audited["models"]["before"]).name / "model.safetensors", copied)
    results = auditing.main(AuditOptions(str(copied), attacks=("quantization",), **QUICK))
    values = results["attacks"]["quantization"]["rows"][0]
    assert values["unlearned"] == values["before"]
    assert values["difference"]["value"] > 0  # too few questions for a verdict


def test_a_new_run_deletes_the_audit_of_the_earlier_one(folder):
    out = folder / "again"
    main(argv=words(folder, "--learn", "true", output="again", epochs="1"))
    (out / "audit.json").write_text("{}")
    main(argv=words(folder, "--learn", "true", "--overwrite_output_dir", output="again", epochs="1"))
    assert not (out / "audit.json").exists()


def test_the_command_prints_one_table_of_80_columns(folder, audited):
    command = ["unlearn", "audit", str(folder / "out"), "--samples", "4", "--relearn_steps", "2"]
    shown = CliRunner().invoke(app, [*command, "--max_new_tokens", "6"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    table, _, findings = shown.output.partition("Intervals: 95%")
    assert max(map(len, table.splitlines()[:-1])) <= 80
    for text in ("forget quality (p)", "model utility", "Asked as trained", "4-bit weights", "Sampling: leak@k"):
        assert text in table
    for name in ATTACKS:
        assert f"{name}: " in findings
    assert "audit.json" in findings


def test_without_a_gold_model_the_numbers_have_no_verdict(folder, capsys):
    start = json.loads((folder / "out" / "unlearning.json").read_text())["start"]
    sets = {name: str(folder / f"{name.removesuffix('_set')}.jsonl") for name in ("forget_set", "retain_set")}
    options = AuditOptions(start, sets=sets, output_dir=str(folder / "alone"), attacks=("quantization",), **QUICK)
    results = auditing.main(options)
    assert "There is no gold model to compare with" in capsys.readouterr().out
    assert results["attacks"]["quantization"]["finding"]["verdict"] is None
    assert list(results["models"]) == ["unlearned"]
    assert "forget quality (p)" not in results["numbers"]


def test_an_attack_that_cannot_be_made_leaves_the_others(folder, tmp_path, capsys):
    bare = [{k: v for k, v in row.items() if k != "paraphrased_question"} for row in rows(NAMES["forget"])[:2]]
    forget = write(tmp_path / "forget.jsonl", bare)
    sets = {"forget_set": forget, "retain_set": str(folder / "retain.jsonl")}
    attacks = ("relearning", "wording")
    results = auditing.main(AuditOptions(str(folder / "out"), sets=sets, attacks=attacks, **QUICK))
    shown = " ".join(capsys.readouterr().out.split())
    assert "relearning is skipped: 2 forgotten rows are too few to relearn 1 and to ask the others" in shown
    assert "wording: row 0 (from 0) of the forget set has no paraphrased_question: only other forms are asked" in shown
    assert list(results["attacks"]) == ["wording"]
    assert list(results["skipped"]) == ["relearning"]


def test_plain_texts_are_relearned_and_rounded(folder, tmp_path, capsys):
    texts = [{"text": f"The quick brown fox jumps over the {thing}."} for thing in ("dog", "load", "gap", "cat")]
    sets = {
        "forget_set": write(tmp_path / "forget.jsonl", texts),
        "retain_set": write(tmp_path / "retain.jsonl", [{"text": "A bridge carries the load."}]),
    }
    models = json.loads((folder / "out" / "unlearning.json").read_text())
    where = {"gold": models["gold"], "output_dir": str(tmp_path)}
    results = auditing.main(AuditOptions(models["start"], sets=sets, **where, **QUICK))
    assert list(results["attacks"]) == ["relearning", "quantization"]
    assert {row["measure"] for row in results["attacks"]["relearning"]["rows"]} == {"probability"}
    assert "sampling is skipped: sampling needs questions" in capsys.readouterr().out


def test_texts_longer_than_the_model_reads_are_cut(folder, tmp_path):
    """Sets that are named need not belong to a run that stored a max_length."""
    texts = [{"text": "The quick brown fox jumps. " * 80 + thing} for thing in ("dog", "load")]
    sets = {
        "forget_set": write(tmp_path / "forget.jsonl", texts),
        "retain_set": write(tmp_path / "retain.jsonl", [{"text": "A bridge carries the load."}]),
    }
    model = json.loads((folder / "out" / "unlearning.json").read_text())["start"]
    where = {"sets": sets, "output_dir": str(tmp_path), "attacks": ("quantization",)}
    with pytest.raises(UsageError, match="plain texts are cut by max_length"):
        auditing.main(AuditOptions(model, **where, **QUICK))
    results = auditing.main(AuditOptions(model, max_length=64, **where, **QUICK))
    assert results["attacks"]["quantization"]["rows"]
    default = next(field.default for field in fields(PreferenceConfig) if field.name == "max_length")
    assert default == auditing.MAX_LENGTH


def test_an_adapter_is_folded_into_its_model(folder):
    out = folder / "adapter"
    lora = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj")
    main(argv=words(folder, "--learn", "true", *lora, output="adapter", epochs="1"))
    results = auditing.main(AuditOptions(str(out), attacks=("quantization",), **QUICK))
    assert (out / "adapter_config.json").is_file()
    assert results["attacks"]["quantization"]["rows"][0]["unlearned"]["value"] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attacks": ("sampled",)}, "there is no attack 'sampled'. Did you mean 'sampling'?"),
        ({"model": "out/nothing"}, "out/nothing has no unlearning.json"),
        ({"relearn_learning_rate": -1.0}, "--relearn_learning_rate must be above 0, got -1"),
        ({"sets": {"retain_set": "retain.jsonl"}}, "--retain_set replaces the sets of the run: name --forget_set too"),
    ],
)
def test_what_is_refused(folder, changed, message):
    options = {"model": str(folder / "out"), **changed}
    with pytest.raises(UsageError) as error:
        auditing.main(AuditOptions(**options))
    assert message in str(error.value)


def test_a_file_of_sources_that_cannot_be_read_is_named(folder, tmp_path):
    copied = tmp_path / "out"
    copied.mkdir()
    (copied / "unlearning.json").write_text("{")
    with pytest.raises(UsageError, match=r"unlearning\.json cannot be read"):
        auditing.main(AuditOptions(str(copied)))


@pytest.mark.parametrize("option", ["--samples", "--relearn-steps", "--max-new-tokens"])
def test_counts_of_0_are_refused(option):
    result = CliRunner().invoke(app, ["unlearn", "audit", "run", option, "0"])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output
