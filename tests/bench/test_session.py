"""speed.py --device: made-up models and lengths, the order of the measurements, and what a failed one leaves."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "bench"
sys.path.insert(0, str(FOLDER))

import _job  # noqa: E402
import _made_up  # noqa: E402
import _session  # noqa: E402
import speed  # noqa: E402

COMMON = {"dtype": "float32", "threads": 1, "steps": 2}


def job(data: str = "lengths:tiny", **options) -> _job.Job:
    return _job.Job(**{"model": "random:tiny", "data": data, "pairs": 4, **COMMON, **options})


def turn(seconds: float = 2.0, **more):
    fixed = {"loss": [0.7], "tokens": 10.0, "digest": "d", "limit": 1.0, "operations": 1e12, "peak_bytes": 2**30}
    return {"seconds": [9.0, seconds], "cpu_seconds": [9.0, seconds], "machine": {"device": "CPU"}, **fixed, **more}


# ---- what is made up ------------------------------------------------------------------------------------------------


def test_lengths_are_the_same_each_time_and_fit_their_rows():
    for name in ("hh", "ultrafeedback", "tiny", "40+6"):
        lengths = _made_up.lengths_of(name, 300)
        assert lengths == _made_up.lengths_of(name, 300)
        assert max(prompt + max(own) for prompt, *own in lengths) <= _made_up.longest_row(name)
        assert min(min(own) for _, *own in lengths) >= 2
    with pytest.raises(ValueError, match="there are no lengths 'hhh'"):
        _made_up.lengths_of("hhh", 1)


def test_ultrafeedback_lengths_agree_with_the_bytes_of_its_rows():
    lengths = _made_up.ultrafeedback_lengths(4000)
    size = statistics.fmean(4 * prompt + 2 * chosen + rejected for prompt, chosen, rejected in lengths)
    assert 4.3 * size == pytest.approx(405_688_662 / 61_135, rel=0.1)


def test_pairs_have_their_lengths():
    tokenizer = _made_up.word_tokenizer(512)
    rows = _made_up.pairs_of("tiny", 5, 512)
    for row, (prompt, chosen, rejected) in zip(rows, _made_up.lengths_of("tiny", 5), strict=True):
        tokens = [len(tokenizer(row[name])["input_ids"]) for name in ("prompt", "chosen", "rejected")]
        assert tokens == [prompt, chosen - 1, rejected - 1]


def test_a_random_model_is_made_in_its_own_type():
    model = _made_up.random_model("tiny", torch.bfloat16, "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert _made_up.config_of("llama-8b").hidden_size == 4096
    with pytest.raises(ValueError, match="there is no random model 'llama-9b'"):
        job(model="random:llama-9b")


# ---- what is measured, in which order -------------------------------------------------------------------------------


def test_the_ratios_of_every_job_come_before_other_variants():
    order = _session.schedule(2, ["trl", "prefopt", "prefopt/padded"], 2)
    assert order == [
        (0, "trl", 0), (0, "prefopt", 0), (1, "trl", 0), (1, "prefopt", 0),
        (0, "trl", 1), (0, "prefopt", 1), (1, "trl", 1), (1, "prefopt", 1),
        (0, "prefopt/padded", 0), (1, "prefopt/padded", 0),
    ]  # fmt: skip


def session(monkeypatch, path, measured, jobs=None, variants=("trl", "prefopt"), seconds=None):
    def fake(variant, of, folder, say):
        made = measured(variant, of)
        place = folder / variant.replace("/", "-")
        place.mkdir(exist_ok=True)
        torch.save(torch.ones(3), place / "gradient.pt")
        return made

    monkeypatch.setattr(_session, "_measured", fake)
    return _session.run(jobs or [job()], variants, 1, path, seconds, lambda line: None)


def test_an_interrupted_session_continues_and_a_measurement_that_died_is_not_tried_again(tmp_path, monkeypatch):
    seen = []

    def measured(variant, of):
        seen.append(variant)
        if variant == "prefopt":
            raise KeyboardInterrupt
        return turn()

    path = tmp_path / "speed.json"
    variants = ("trl", "prefopt", "prefopt/padded")
    with pytest.raises(KeyboardInterrupt):
        session(monkeypatch, path, measured, variants=variants)
    (entry,) = session(monkeypatch, path, measured, variants=variants)
    assert seen == ["trl", "prefopt", "prefopt/padded"]
    assert entry["failed"] == {"prefopt": "the process died"}
    assert set(entry["turns"]) == {"trl", "prefopt/padded"}
    with pytest.raises(ValueError, match="holds other jobs"):
        session(monkeypatch, path, measured, [job(full=True)])


def test_where_memory_runs_out_both_are_measured_with_half_the_pairs(tmp_path, monkeypatch):
    seen = []

    def measured(variant, of):
        seen.append((variant, of.pairs))
        return "out of memory" if variant == "trl" and of.pairs > 1 else turn()

    path = tmp_path / "speed.json"
    (entry,) = session(monkeypatch, path, measured)
    assert seen == [("trl", 4), ("trl", 2), ("trl", 1), ("prefopt", 1)]
    assert entry["job"]["pairs"] == 1
    assert not entry["failed"]
    # The file is found again by the jobs that were asked for.
    session(monkeypatch, path, measured)
    assert len(seen) == 4


def test_nothing_is_begun_that_would_end_too_late(tmp_path, monkeypatch):
    (entry,) = session(monkeypatch, tmp_path / "speed.json", lambda *_: turn(), seconds=-1.0)
    assert not entry["turns"]


def test_rows_of_the_table(tmp_path, monkeypatch):
    def measured(variant, of):
        if variant == "prefopt/padded":
            return "ValueError: no"
        device = {"machine": {"device": "NVIDIA H100 80GB HBM3"}}
        return turn(4.0, peak_bytes=2**32, **device) if variant == "trl" else turn(2.0, **device)

    entries = session(monkeypatch, None, measured, variants=("trl", "prefopt", "prefopt/padded"))
    lines = _session.markdown(entries).splitlines()
    assert lines[2:] == [
        "| tiny, lengths:tiny, up to 64 tokens, 4 | trl | 4 | 1 | 4.0 |  |  | 0% | 25% |  |",
        "| tiny, lengths:tiny, up to 64 tokens, 4 | prefopt | 2 | 2 | 1.0 | 2.00 | 0.25 | 0% | 50% | 0.0e+00 |",
        "| tiny, lengths:tiny, up to 64 tokens, 4 | prefopt/padded | ValueError: no | | | | | | | |",
    ]
    assert _session.rows(entries)[1]["mfu"] == pytest.approx(1e12 / 2.0 / 989e12)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sweep gpu", "--sweep gpu needs --device"),
        ("--variants trl", "--variants is for --device"),
        ("--device cpu --verbose", "--verbose has no effect with --device"),
        ("--device cpu --variants trl,prefopt/tre", "there is no variant prefopt/tre"),
        ("--device cpu --sweep full --json a.json", "the sweep is --sweep gpu"),
    ],
)
def test_an_option_without_effect_is_an_error(line, message, capsys):
    with pytest.raises(SystemExit):
        speed.parse(line.split())
    assert message in " ".join(capsys.readouterr().err.split())


def test_both_trainers_and_another_layout_on_a_random_model(tmp_path):
    """A real session: the same tokens, the same gradient."""
    variants = ("trl", "prefopt", "prefopt/tree/sdpa")
    (entry,) = _session.run([job(pairs=2)], variants, 1, tmp_path / "speed.json", None, print)
    assert not entry["failed"]
    assert max(entry["gradient"].values()) < 1e-5
    assert {row["same_tokens"] for row in _session.rows([entry])} == {True}
    assert {row["tokens"] for row in _session.rows([entry])} == {entry["turns"]["trl"][0]["tokens"]}
