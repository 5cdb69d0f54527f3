"""Estimated against measured memory: the peak of a step of small random models beside `prefopt.planning.memory`.

    python scripts/bench/memory.py                 # every case, one after the other
    python scripts/bench/memory.py full lora       # those whose names contain one of the words
    python scripts/bench/memory.py --json FILE     # also write what was measured

Each case runs in a process of its own (two for DDP), on one thread. On a CPU the peak is the resident size in the
second step, less what the process held before it made the model; small blocks are mapped, so that the size falls when
memory is freed. On a GPU it is PyTorch's own count.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _made_up import pairs_of, word_tokenizer


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Attributes:
        hidden, inner, layers, heads, groups, vocabulary: of the Llama that is made.
        prompt, completion: tokens.
        pairs: in a batch.
        accumulated: batches a step.
        processes: that train together, through DDP if more than one.
    """

    name: str
    hidden: int = 384
    inner: int = 1024
    layers: int = 6
    heads: int = 6
    groups: int = 3
    vocabulary: int = 8192
    prompt: int = 256
    completion: int = 64
    pairs: int = 2
    accumulated: int = 2
    lora: bool = False
    loss: str = "dpo"
    checkpointed: bool = False
    bf16: bool = False
    dtype: str = "float32"
    layout: str = "auto"
    tied: bool = True
    token_budget: int | None = None
    processes: int = 1


# Wide enough that what a CPU's bf16 kernels keep for themselves, some 40 MB, does not hide what is compared.
WIDE: dict[str, Any] = {"hidden": 768, "inner": 2048, "layers": 8, "heads": 12}
CASES = (
    Case("full"),
    Case("full, not accumulated", accumulated=1),
    Case("full, checkpointed", checkpointed=True),
    Case("full, reference-free", loss="simpo"),
    Case("full, long rows", prompt=1024, completion=256, pairs=1),
    Case("full, padded", layout="padded"),
    Case("full, large vocabulary", vocabulary=49152, tied=False, layers=3),
    Case("full, token budget", pairs=4, token_budget=800),
    Case("full, bf16 autocast", bf16=True, **WIDE),
    Case("full, bf16 autocast, checkpointed", bf16=True, checkpointed=True, **WIDE),
    Case("full, DDP of two", processes=2),
    Case("lora", lora=True),
    Case("lora, checkpointed", lora=True, checkpointed=True),
    Case("lora, wide", lora=True, hidden=768, inner=3072, layers=3, heads=12),
    Case("lora, bf16 weights", lora=True, bf16=True, dtype="bfloat16", **WIDE),
    Case("lora, DDP of two", lora=True, processes=2),
)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def config_of(case: Case) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=case.hidden, intermediate_size=case.inner, num_hidden_layers=case.layers,
        num_attention_heads=case.heads, num_key_value_heads=case.groups, vocab_size=case.vocabulary,
        max_position_embeddings=4096, tie_word_embeddings=case.tied, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def estimated(case: Case) -> Any:
    """What `prefopt.planning.memory` says, without a weight."""
    import torch
    from peft import LoraConfig

    from prefopt.planning.activations import causal_model, made_up_rows
    from prefopt.planning.memory import estimate, kept_under
    from prefopt.planning.setting import Setting, count

    config, adapter = config_of(case), LoraConfig(**LORA) if case.lora else None
    with torch.device("meta"):
        sizes = count(causal_model(config), adapter)
    rows = made_up_rows(case.pairs, case.prompt, case.completion, 2, case.layout == "padded").within(case.token_budget)
    setting = Setting(
        dtype=getattr(torch, case.dtype), half=case.bf16, checkpointed=case.checkpointed,
        accumulates=case.accumulated > 1, reference=case.loss == "dpo", processes=case.processes, device=_device(),
    )  # fmt: skip
    return estimate(sizes, kept_under("ddp", config, rows, setting, adapter), rows.scored, setting)


# ---- the process that trains ----------------------------------------------------------------------------------------


def train(case: Case, folder: Path) -> None:
    """Two steps of a model that takes next to no memory, then two of the case's; the second's peak goes to `folder`.

    Libraries load things on first use: that is in memory after the first, and not part of the second.
    """
    import torch

    torch.set_num_threads(1)
    trainer = make_trainer(small(case), folder / "small")
    trainer.train()
    del trainer
    gc.collect()
    before = resident("VmRSS")
    trainer = make_trainer(case, folder / "model")
    batch = next(iter(trainer.get_train_dataloader()))
    check_lengths(case, batch)
    del batch
    trainer.add_callback(watch())
    trainer.train()
    rank = int(os.environ.get("RANK", 0))
    (folder / f"peak-{rank}.json").write_text(json.dumps(peak(before)), encoding="utf-8")


def small(case: Case) -> Case:
    """The same way to train, on a model and rows that take next to no memory."""
    return dataclasses.replace(
        case,
        hidden=32,
        inner=64,
        layers=2,
        heads=2,
        groups=1,
        vocabulary=64,
        prompt=8,
        completion=4,
        token_budget=None,
    )


def make_trainer(case: Case, model: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    from prefopt import PreferenceConfig, PreferenceTrainer

    count = case.pairs * case.accumulated * case.processes * 2
    return PreferenceTrainer(
        str(model),
        args=PreferenceConfig(
            output_dir=str(model.parent / "out"), loss=case.loss, per_device_train_batch_size=case.pairs, max_steps=2,
            gradient_accumulation_steps=case.accumulated, max_length=None, report_to="none", save_strategy="no",
            gradient_checkpointing=case.checkpointed, bf16=case.bf16, use_cpu=_device() == "cpu", disable_tqdm=True,
            layout=case.layout, token_budget=case.token_budget, step0_check="off", ddp_backend=_backend(case),
            model_init_kwargs={"dtype": case.dtype},
        ),
        train_dataset=Dataset.from_list(pairs_of(f"{case.prompt}+{case.completion}", count, case.vocabulary)),
        processing_class=word_tokenizer(case.vocabulary),
        peft_config=LoraConfig(**LORA) if case.lora else None,
    )  # fmt: skip


def check_lengths(case: Case, batch: Any) -> None:
    """That rows have the lengths that the estimate was made for."""
    from prefopt.scoring.tree import plant

    trees = plant(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    found = {(tree.trunk + 1, *(end - start for start, end in tree.spans())) for tree in trees}
    if found != {(case.prompt, case.completion, case.completion)}:
        raise ValueError(f"{case.name}: prompts and completions have {found} tokens")


def watch() -> Any:
    """A callback that forgets the peak of the first step, when the optimizer has no state yet."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                forget_peak()

    return Watch()


def _backend(case: Case) -> str | None:
    return "gloo" if case.processes > 1 and _device() == "cpu" else None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resident(name: str) -> int:
    """Bytes: VmRSS, the resident size now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak(before: int) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") - before


# ---- all cases ------------------------------------------------------------------------------------------------------


def measured(case: Case) -> int:
    """The largest peak of the processes of a case."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        # Freed blocks go back to the system, so that the resident size is what is in use.
        "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144",
    }  # fmt: skip
    command = [sys.executable]
    if case.processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={case.processes}", f"--master_port={port}"]
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        for name, made in (("small", small(case)), ("model", case)):
            AutoModelForCausalLM.from_config(config_of(made)).save_pretrained(f"{folder}/{name}")
        command += [__file__, "--train", json.dumps(dataclasses.asdict(case)), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = [json.loads(file.read_text()) for file in Path(folder).glob("peak-*.json")]
    if len(found) != case.processes:
        raise SystemExit(f"{case.name}: {done.stderr[-3000:]}")
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the cases whose names contain one of these")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--train", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(Case(**json.loads(options.train[0])), Path(options.train[1]))
        return
    cases = [case for case in CASES if not options.words or any(word in case.name for word in options.words)]
    if not cases:
        raise SystemExit(f"no case is named like {' or '.join(options.words)}: {', '.join(c.name for c in CASES)}")
    results = []
    print("| case | tokens | estimate, MB | measured, MB | estimate / measured |\n|---|---|---|---|---|", flush=True)
    for case in cases:
        said, found = estimated(case), measured(case)
        tokens = case.pairs * (case.prompt - 1 + 2 * case.completion)
        results.append({**dataclasses.asdict(case), "parts": said.parts, "estimate": said.total, "measured": found})
        print(
            f"| {case.name} | {tokens} | {said.total / 1e6:.0f} | {found / 1e6:.0f} | {said.total / found:.2f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
