"""From a file of pairs to the first batch: prefopt's recipe and `trl.DPOTrainer`, by turns, each in its own process.

    python scripts/bench/data.py --json data.json                  # 20,000 made-up pairs: conversations, then texts
    python scripts/bench/data.py --json data.json --rows 2000 --processes 1 2
    python scripts/bench/data.py --json data.json --only prefopt --rows 1000000 --forms talks    # needs 12 GB of disk

Measured from the start of a process, imports included, until `get_train_dataloader()` has returned: seconds, processor
seconds of the process and its workers, and the peak of the memory that is theirs alone (pages of files are not
counted, pages that a fork shares are counted once; Linux). Every contestant begins with an empty cache; its second
start finds its own. prefopt checks every row and reads its tokens back; TRL tokenizes. The model is a tiny one with
random weights, the tokenizer SmolLM2's. What a contestant needs is imported by its own process alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from prefopt.safety.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
FORMS = ("talks", "texts")
CONTESTANTS = ("prefopt", "trl")
POLL_S = 0.1
MAX_LENGTH = 32768
"""Tokens; no pair of a million is longer."""
POOL_WORDS = 1 << 20
"""Words of the random text that the texts are windows of."""


# ---- pairs -------------------------------------------------------------------------------------------------------


def write_pairs(path: Path, rows: int, form: str) -> None:
    """Pairs of the words of the bundled ones, in conversations of one to five questions, or as plain text.

    Lengths are log-normal; 20,000 pairs take about 60 MB. A text is a window of one long random text: a million rows
    take a minute, and no two rows are equal.
    """
    from prefopt.demo.data import load_demo

    rng = random.Random(0)
    words = [word for row in load_demo("train") for message in row["chosen"] for word in message["content"].split()]
    spaces = rng.choices((" ", "\n", "\n\n"), (98, 1, 1), k=POOL_WORDS)
    pieces = [word + space for word, space in zip(rng.choices(words, k=POOL_WORDS), spaces, strict=True)]
    pool, starts = "".join(pieces), [0, *accumulate(map(len, pieces))]

    def text(median: float) -> str:
        count = min(max(3, int(median * rng.lognormvariate(0.0, 0.8))), POOL_WORDS // 2)
        first = int(rng.random() * (POOL_WORDS - count))
        return pool[starts[first] : starts[first + count]]

    def pair() -> dict[str, Any]:
        prompt = []
        for turn in range(turns := rng.choices((1, 2, 3, 5), (5, 3, 2, 1))[0]):
            prompt.append({"role": "user", "content": text(33).strip()})
            if turn < turns - 1:
                prompt.append({"role": "assistant", "content": text(72).strip()})
        sides = {side: [{"role": "assistant", "content": text(108).strip()}] for side in ("chosen", "rejected")}
        return {"prompt": prompt, **sides}

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            row = pair()
            if form == "texts":
                row = {name: "\n\n".join(message["content"] for message in row[name]) for name in row}
                row["prompt"] += "\n\n"
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> None:
    """A Llama of a few thousand weights, with SmolLM2's tokenizer and vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prefopt.models.bundled import resolve_demo_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_demo_model())
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- contestants: each in a process of its own --------------------------------------------------------------------


def start_prefopt(data: Path, model: Path, out: Path, processes: int | None) -> int:
    from prefopt.recipe import load_data, make_trainer, parse_arguments, preflight

    words = ["--dataset_name", data, "--model_name_or_path", model, "--output_dir", out, "--max_length", MAX_LENGTH]
    words += ["--eval_rows", 0, "--report_to", "none", "--use_cpu", "true"]
    words += [] if processes is None else ["--dataset_num_proc", processes]
    sys.argv = ["dpo.py", *map(str, words)]
    recipe = parse_arguments("dpo(beta=0.1)")
    ready = preflight(recipe)
    trainer = make_trainer(recipe, ready, load_data(recipe, ready))
    trainer.get_train_dataloader()
    return len(trainer.train_dataset)


def start_trl(data: Path, model: Path, out: Path, processes: int | None) -> int:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    settings = {"output_dir": str(out), "max_length": MAX_LENGTH, "report_to": "none", "use_cpu": True, "bf16": False}
    arguments = DPOConfig(**settings, dataset_num_proc=processes)
    rows = load_dataset("json", data_files=str(data), split="train")
    trainer = DPOTrainer(str(model), args=arguments, train_dataset=rows)
    trainer.get_train_dataloader()
    return len(trainer.train_dataset)


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure(contestant: str, data: Path, model: Path, folder: Path, processes: int | None) -> dict[str, Any]:
    """One start.

    Raises:
        RuntimeError: if it failed.
    """
    words = ["--start", contestant, str(data), str(model), str(folder / "out"), str(processes or 0)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "1"}
    # An installed package has its bytecode.
    for name in ("TOKENIZERS_PARALLELISM", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    before, start, peak = os.times(), time.monotonic(), 0
    with (folder / "log").open("w+") as log:
        child = subprocess.Popen([sys.executable, __file__, *words], env=environment, stdout=log, stderr=log)
        while child.poll() is None:
            peak = max(peak, own_memory(child.pid))
            time.sleep(POLL_S)
        log.seek(0)
        said = log.read()
    after = os.times()
    if child.returncode:
        raise RuntimeError(f"{contestant}: exit status {child.returncode}\n{said[-3000:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    rows = int(said.rpartition("rows ready: ")[2].split()[0])
    return {"seconds": time.monotonic() - start, "processor": used, "memory": peak, "rows": rows}


def own_memory(process: int) -> int:
    """Bytes of a process and its descendants that are no file's pages; each shared page once."""
    total, waiting = 0, [process]
    while waiting:
        one = waiting.pop()
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            waiting += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except (OSError, ValueError):  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss_Anon"))
    return total


def table(results: list[dict[str, Any]]) -> str:
    from prefopt.catalogue.markdown import table as markdown_table

    rows = []
    for one in results:
        other = next((o for o in results if o["contestant"] == "trl" and _same(o, one)), None)
        share = "" if other is None or one is other else f"{one['seconds'] / other['seconds']:.2f}"
        measured = (f"{one['seconds']:.1f}", f"{one['processor']:.1f}", f"{one['memory'] / 1e9:.2f}", share)
        rows.append(
            (
                f"{one['rows']:,} {one['form']}",
                one["contestant"],
                one["processes"] or "default",
                one["start"],
                *measured,
            )
        )
    headings = ("pairs", "", "processes", "start", "seconds", "processor seconds", "GB", "of TRL's seconds")
    return markdown_table(headings, [tuple(map(str, row)) for row in rows])


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(left[name] == right[name] for name in ("form", "processes", "start"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where results are kept")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--file", type=Path, help="a file of pairs in place of made-up ones")
    parser.add_argument("--processes", nargs="+", type=int, default=[0], help="0: each contestant's default")
    parser.add_argument("--only", choices=CONTESTANTS)
    parser.add_argument("--start", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start is not None:
        contestant, *paths, processes = options.start
        begin = {"prefopt": start_prefopt, "trl": start_trl}[contestant]
        print(f"rows ready: {begin(*map(Path, paths), int(processes) or None)}")
        return
    if options.json is None:
        parser.error("--json is needed")
    results = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder / "model")
        for form in ["file"] if options.file else options.forms:
            data = options.file or folder / f"{form}.jsonl"
            if not options.file:
                write_pairs(data, options.rows, form)
            print(f"{form}: {data.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
            for processes in options.processes:
                for start in ("first", "second"):
                    for contestant in [options.only] if options.only else CONTESTANTS:
                        own = folder / f"{contestant}-{form}-{processes}"
                        own.mkdir(exist_ok=True)
                        measured = measure(contestant, data, folder / "model", own, processes)
                        named = {"contestant": contestant, "form": form, "processes": processes, "start": start}
                        results.append({**named, **measured})
                        print(results[-1], file=sys.stderr)
                        text = json.dumps(results, indent=2) + "\n"
                        write_whole(options.json, lambda file, text=text: file.write_text(text))
    print(table(results))


if __name__ == "__main__":
    main()
