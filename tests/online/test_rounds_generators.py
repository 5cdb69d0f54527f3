"""Rounds whose samples come from a server, from vLLM, or from a file."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from prefopt.online.run import main
from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import read_jsonl
from tests.generation import stand_in_vllm
from tests.generation.stand_in import running
from tests.online.rounds import files, same_weights, weights, words

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

LORA = ("--use_peft", "--lora_target_modules", "q_proj")
RUBRIC = "Rate the answer to: {prompt}\n\nAnswer: {completion}\n\nWrite: Score: N"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server():
    with running() as stand_in:
        stand_in.complete = reply
        yield stand_in


def reply(body):
    """An answer that depends on the seed; a judge's score that depends on the answer it is shown."""
    prompt = body.get("prompt") or body["messages"][-1]["content"]
    if str(prompt).startswith("Rate the answer"):
        answer = prompt.split("Answer: ")[1]
        return f"Score: {sum(letter in 'aeiou' for letter in answer)}"
    vowels = "".join("aeiou"[int(digit) % 5] for digit in str(body["seed"])[: 3 + body["seed"] % 4])
    return f"good {vowels}"


def asked(server, path, since=0):
    return [body for where, body in server.requests[since:] if where == path]


def of_server(server, **options):
    return {"generator": "server", "server_url": server.url, "served_as": "tiny", **options}


def models_of(run, number, name="samples"):
    return {row["model"] for row in read_jsonl(run / f"round-{number}" / f"{name}.jsonl")}


def test_each_round_samples_from_its_adapter_behind_the_endpoint_where_the_judge_is_too(server, tmp_path):
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    judge = f"llm:{tmp_path / 'rubric.txt'},model=grader,url={server.url}"
    argv = words(tmp_path, *LORA, judges=judge, **of_server(server))
    summaries = main(argv=argv)
    run = tmp_path / "out"
    assert models_of(run, 1) == models_of(run, 0, "heldout_samples") == {"tiny"}
    (second,), (third,) = models_of(run, 2), models_of(run, 2, "heldout_samples")
    assert second.startswith("round-1-")
    assert third.startswith("round-2-")
    loads = asked(server, "/v1/load_lora_adapter")
    assert loads == [
        {"lora_name": second, "lora_path": str((run / "round-1" / "model").resolve())},
        {"lora_name": third, "lora_path": str((run / "round-2" / "model").resolve())},
    ]
    assert server.adapters == {third: loads[1]["lora_path"]}  # the earlier one was unloaded
    by_model = [body["model"] for body in asked(server, "/v1/chat/completions")]
    # 3 held-out answers of each model, 24 samples of the first two, 3 for KL of the others; each text is judged once.
    assert {name: by_model.count(name) for name in ("tiny", second, third)} == {"tiny": 27, second: 30, third: 6}
    assert by_model.count("grader") == len(set(judged_texts(run)))
    assert all(summary["pairs"]["pairs"] > 0 for summary in summaries[1:])
    assert all(row["margin"] > 0 for row in read_jsonl(run / "round-1" / "pairs.jsonl"))


def test_the_policy_rewards_itself(server, tmp_path, monkeypatch):
    """configs/rounds/self_rewarding.yaml: each round's samples are scored by the model that drew them."""
    monkeypatch.chdir(Path(__file__).parents[2])  # where the config names its rubric
    small = words(tmp_path, **of_server(server))
    drop = ("--loss", "--judges", "--samples", "--learning_rate")
    argv = [word for at in range(0, len(small), 2) if small[at] not in drop for word in small[at : at + 2]]
    server.complete = lambda body: reply(body) if "Answer:" not in body["messages"][-1]["content"] else grade(body)
    summaries = main(argv=["--config", "configs/rounds/self_rewarding.yaml", *argv, *LORA])
    run = tmp_path / "out"
    for number in (1, 2):
        (name,) = models_of(run, number)
        lines = list(read_jsonl(run / f"round-{number}" / "judgements.jsonl"))
        assert all(line["raw"].count("\n---\n") == 2 for line in lines)  # asked three times
        assert {line["judge"] for line in lines} == {"policy"}
        chats = [body for body in asked(server, "/v1/chat/completions") if body["model"] == name]
        questions = {body["messages"][-1]["content"] for body in chats if "Answer:" in body["messages"][-1]["content"]}
        answers = {(row["prompt_id"], row["completion"]) for row in read_jsonl(run / f"round-{number}/samples.jsonl")}
        assert len(questions) == len(answers)
        assert summaries[number]["pairs"]["pairs"] > 0
    assert [summary["heldout"]["mean_score"] for summary in summaries] == [None] * 3  # it does not judge itself there
    assert (run / "round-1" / "heldout_judgements.jsonl").read_bytes() == b""


def grade(body):
    question = body["messages"][-1]["content"]
    answer = question.split("Answer:\n")[1].split("\n")[0]
    return f"Because.\nScore: {sum(map(ord, answer)) % 6}"


def test_the_policy_in_memory_is_asked_and_says_if_it_grades_nothing(tmp_path):
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    with pytest.raises(UsageError, match="the judges failed on everything that they were asked: 24 unparsable"):
        main(argv=words(tmp_path, judges=f"policy:{tmp_path / 'rubric.txt'},max_new_tokens=4", rounds=1))


def judged_texts(run):
    for path in {*run.rglob("*samples.jsonl")} - {*run.rglob("*_kl_samples.jsonl")}:
        for row in read_jsonl(path):
            yield row["prompt_id"], row["completion"]


def test_a_run_at_a_server_is_continued_with_the_adapter_of_its_round(server, tmp_path):
    argv = words(tmp_path, *LORA, **of_server(server))
    main(argv=argv)
    run = tmp_path / "out"
    before, trained = files(run), weights(run, 2)
    (name,) = models_of(run, 2)
    # As if killed in round 2 after a chunk of samples; and the server has been started again since.
    shutil.rmtree(run / "round-2" / "model")
    lines = (run / "round-2" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"] = [entry for entry in manifest["stages"] if entry["round"] < 2]
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "round-2" / "samples.jsonl").write_bytes(b"".join(lines[:9]))
    server.adapters.clear()
    since = len(server.requests)
    main(argv=argv)
    assert files(run) == before
    assert same_weights(weights(run, 2), trained)
    chats = asked(server, "/v1/chat/completions", since)
    assert [body["model"] for body in chats].count(name) == 24 - 8  # two prompts were whole


def test_whole_models_need_a_command_that_starts_the_server_again(server, tmp_path):
    options = of_server(server)
    with pytest.raises(UsageError, match=r"a running server cannot change its model\. Train an adapter"):
        main(argv=words(tmp_path, **options))
    log = tmp_path / "log"
    script = tmp_path / "restart.py"
    script.write_text(f"import sys; open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))")
    options["server_restart"] = f"{sys.executable} {script} {{model}}"
    main(argv=words(tmp_path, **options))
    run, models = tmp_path / "out", [line.split()[0] for line in log.read_text().splitlines()]
    started = [str(tmp_path / "llama-0"), *(str((run / f"round-{n}" / "model").resolve()) for n in (1, 2))]
    assert models == started
    assert {body["model"] for body in asked(server, "/v1/chat/completions")} == {"tiny"}
    (second,) = models_of(run, 2)
    assert second.startswith("round-1-")


def test_a_server_that_is_started_under_a_name_is_waited_for(server, tmp_path):
    script = tmp_path / "restart.py"
    script.write_text(f"import sys; open({str(tmp_path / 'name')!r}, 'w').write(sys.argv[1])")
    # The stand-in lists a model a moment after the command ended.
    seen = []

    class Names(list):
        def __iter__(self):
            seen.append((tmp_path / "name").read_text())
            return iter([] if len(seen) < 2 else seen[-1:])

    server.models = Names()
    options = of_server(server, rounds=1, server_restart=f"{sys.executable} {script} {{name}}")
    main(argv=words(tmp_path, **options))
    assert seen[0] == seen[1] == "tiny"
    assert seen[-1].startswith("round-1-")
    assert asked(server, "/v1/chat/completions")[-1]["model"] == seen[-1]


def test_a_restart_that_fails_stops_the_run(server, tmp_path):
    with pytest.raises(UsageError, match="--server_restart ended with status 1: false"):
        main(argv=words(tmp_path, **of_server(server, server_restart="false {model}")))
    with pytest.raises(UsageError, match="cannot be run"):
        main(argv=words(tmp_path, **of_server(server, server_restart="no-such-program")))


def test_vllm_in_the_process_gets_each_rounds_adapter(tmp_path, monkeypatch):
    engines = stand_in_vllm.install(monkeypatch)
    options = {"generator": "vllm", "generator_options": '{"gpu_memory_utilization": 0.5}'}
    main(argv=words(tmp_path, *LORA, lora_r=24, judges="tests.online.rounds:digits", **options))
    base = str(tmp_path / "llama-0")
    # Round 1's model is started twice: between its held-out answers and round 2, KL needs the memory.
    assert [engine.options["model"] for engine in engines] == [base] * 4
    assert [engine.options.get("max_lora_rank") for engine in engines] == [None, 32, 32, 32]
    adapters = [{call[2].path for call in engine.calls if call[2]} for engine in engines]
    one, two = (str(tmp_path / f"out/round-{number}/model") for number in (1, 2))
    assert adapters == [set(), {one}, {one}, {two}]
    (second,) = models_of(tmp_path / "out", 2)
    assert second.startswith("round-1-")


def test_samples_of_a_file_are_trained_on_round_by_round(tmp_path):
    argv = words(tmp_path, generator="file", samples_file=str(tmp_path / "theirs-{round}.jsonl"))
    prompts = list(read_jsonl(tmp_path / "prompts.jsonl"))
    with pytest.raises(UsageError, match=r"no samples for round 1: .*theirs-1.jsonl does not exist. Draw them from"):
        main(argv=argv)
    write(tmp_path / "theirs-1.jsonl", prompts[:4], ["a good day", "brr", "tst"])
    with pytest.raises(UsageError, match=r"no samples for round 2: .* Draw them from .*round-1/model, and start"):
        main(argv=argv)
    write(tmp_path / "theirs-2.jsonl", prompts, ["aaa", "brown", "gap", "fox", "too many"])
    summaries = main(argv=argv)
    assert [summary["samples"]["samples"] for summary in summaries[1:]] == [12, 24]
    assert models_of(tmp_path / "out", 1) == {"file:theirs-1.jsonl"}
    assert [summary["heldout"]["scored"] for summary in summaries] == [3, 3, 3]  # the model answers these


def write(path: Path, rows, completions):
    lines = ({"prompt": row["prompt"], "completion": text} for row in rows for text in completions)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"generator": "server"}, "--generator server needs --server_url"),
        ({"generator": "file"}, "--generator file needs --samples_file"),
        ({"samples_file": "x.jsonl"}, "--samples_file needs --generator file; the generator is transformers"),
        ({"generator_options": "[1]"}, "generator_options must be a mapping"),
        ({"generator_options": "{"}, "generator_options must be JSON"),
        ({"generator_options": '{"a": 1}'}, "is for the generators server and vllm"),
    ],
)
def test_options_of_generators_that_cannot_work_are_refused(tmp_path, options, what):
    with pytest.raises((UsageError, SystemExit), match=what):
        main(argv=words(tmp_path, **options))
