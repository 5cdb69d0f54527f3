"""Pairs a second, memory and gradient of `PreferenceTrainer` against `trl.DPOTrainer`, on the same pairs and model.

    python scripts/bench/speed.py --data pairs.jsonl                       # the job of docs/performance.md
    python scripts/bench/speed.py --prompt 1024 --completion 64            # made-up pairs of these lengths
    python scripts/bench/speed.py --data pairs.jsonl --cached_reference --json speed.json

Every measurement is a process of its own, so that peak memory is its own; the two trainers take turns. Both get the
same pairs in the same order, the same LoRA with the same initial weights, no dropout, float32 on a CPU. The share of
the matmul limit is the time that the matrix products of the job need (each prompt once, completions only, forward,
backward through frozen weights, reference) at the rate that this machine reaches in the same process, over the time
taken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROLES = ("trl", "prefopt")


# ---- the job --------------------------------------------------------------------------------------------------------


def load_pairs(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The pairs that every measurement trains on, cut to --max_length."""
    from datasets import Dataset

    count = args.pairs * args.steps
    if args.data is None:
        rng = random.Random(0)
        words = [tokenizer.decode([i]) for i in range(1000, 9000)]
        words = [word for word in words if word.startswith(" ") and len(tokenizer(word)["input_ids"]) == 1]

        def text(tokens: int) -> str:
            return "".join(rng.choice(words) for _ in range(tokens)).strip()

        rows = [
            {
                "prompt": text(args.prompt),
                "chosen": " " + text(args.completion),
                "rejected": " " + text(args.completion),
            }
            for _ in range(count)
        ]
        return Dataset.from_list(rows)
    from prefopt.data import clean, load_preferences, normalise, validate

    rows = normalise(load_preferences(args.data))
    report = validate(rows, tokenizer=tokenizer, max_length=args.max_length)
    with tempfile.TemporaryDirectory() as folder:
        rows = clean(rows, report, "drop", Path(folder) / "dropped.jsonl")
    return rows.shuffle(seed=0).select(range(count))


def make_trainer(role: str, args: argparse.Namespace, folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

    from prefopt import PreferenceConfig, PreferenceTrainer
    from prefopt.demo.model import resolve_demo_model

    path = args.model or str(resolve_demo_model(say=print))
    tokenizer = AutoTokenizer.from_pretrained(path)
    on_cpu = not torch.accelerator.is_available()
    options: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": args.pairs, "max_steps": args.steps, "logging_steps": 1,
        "max_length": args.max_length, "learning_rate": 1e-5, "report_to": "none", "save_strategy": "no",
        "use_cpu": on_cpu, "bf16": not on_cpu, "disable_tqdm": True, "seed": 0, "max_grad_norm": 1e9,
        "precompute_ref_log_probs": args.cached_reference, "gradient_checkpointing": args.gradient_checkpointing,
    }  # fmt: skip
    lora = ModelConfig(use_peft=True, lora_r=16, lora_alpha=32, lora_dropout=0.0, lora_target_modules=["all-linear"])
    config, trainer = (DPOConfig, DPOTrainer) if role == "trl" else (PreferenceConfig, PreferenceTrainer)
    set_seed(0)
    made = trainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32 if on_cpu else torch.bfloat16),
        args=config(**options),
        train_dataset=load_pairs(args, tokenizer),
        processing_class=tokenizer,
        peft_config=None if args.full else get_peft_config(lora),
    )
    # Adapters start at zero output; random ones make the gradient of every weight something to compare.
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    made.args.step0_check = "off"
    return made


# ---- one measurement ------------------------------------------------------------------------------------------------


def measure(role: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of one trainer, with the gradient of its first step."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    seconds: list[float] = []
    first: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            if not first:
                parts = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
                first["gradient"] = torch.cat(parts)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(role, args, folder)
        trainer.add_callback(Watch())
        loader = trainer.get_train_dataloader()
        batches = [batch for _, batch in zip(range(args.steps), loader, strict=False)]
        trainer.train()
    torch.save(first["gradient"], args.gradient)
    # The first step also sets things up (and ours compares its layouts).
    return {
        "role": role,
        "seconds": seconds,
        "step": statistics.median(seconds[1:] or seconds),
        "peak_bytes": peak_memory(),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens": statistics.fmean(real_tokens(batch) for batch in batches),
        "limit": statistics.fmean(matmul_seconds(trainer.model, batch, args) for batch in batches),
    }


def peak_memory() -> int:
    import resource

    import torch

    if torch.accelerator.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sizes(batch: Any) -> list[tuple[int, int]]:
    """(prompt tokens, tokens of both completions) of each pair."""
    mask, attended = batch["completion_mask"].bool(), batch["attention_mask"].bool()
    half = mask.shape[0] // 2
    completions = mask[:half].sum(-1) + mask[half:].sum(-1)
    prompts = (attended & ~mask)[:half].sum(-1)
    return list(zip(prompts.tolist(), completions.tolist(), strict=True))


def real_tokens(batch: Any) -> int:
    return sum(prompt + completions for prompt, completions in sizes(batch))


def matmul_seconds(model: Any, batch: Any, args: argparse.Namespace) -> float:
    """What the job's matrix products need at the rate this process reaches on one of its own."""
    import torch

    rate = matmul_rate(torch.float32 if not torch.accelerator.is_available() else torch.bfloat16)
    config = model.config
    head = config.vocab_size * config.hidden_size
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    body = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n and any(part in n for part in names))
    # Forward, backward to the inputs; to the weights too where these train; the reference.
    passes = (3 if args.full else 2) + (0 if args.cached_reference else 1)
    flops = 0.0
    for prompt, completions in sizes(batch):
        flops += 2 * passes * (body * (prompt + completions) + head * completions)
        # Scores and values of causal attention, half of each square.
        width = config.num_attention_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
        flops += passes * config.num_hidden_layers * 2 * width * (prompt + completions / 2) ** 2
    return flops / rate


_RATES: dict[Any, float] = {}


def matmul_rate(dtype: Any) -> float:
    """Operations a second of this process on products of the job's shape."""
    import torch

    if dtype not in _RATES:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        a, b = torch.randn(512, 576, dtype=dtype, device=device), torch.randn(576, 1536, dtype=dtype, device=device)
        best = 0.0
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(40):
                a @ b
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            best = max(best, 40 * 2 * 512 * 576 * 1536 / (time.perf_counter() - began))
        _RATES[dtype] = best
    return _RATES[dtype]


# ---- all of them ----------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    runs: dict[str, list[dict[str, Any]]] = {role: [] for role in ROLES}
    gradients = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeats):
            for role in ROLES:
                out, gradient = Path(folder) / "run.json", Path(folder) / f"{role}.pt"
                command = [sys.executable, __file__, *sys.argv[1:], "--role", role]
                subprocess.run([*command, "--out", str(out), "--gradient", str(gradient)], check=True)
                runs[role].append(json.loads(out.read_text()))
                gradients[role] = torch.load(gradient, weights_only=True)
    theirs, ours = (min(runs[role], key=lambda run: run["step"]) for role in ROLES)
    result = {
        "job": {
            key: str(value) for key, value in vars(args).items() if key not in ("role", "out", "gradient", "json")
        },
        "trl": theirs,
        "prefopt": ours,
        "speedup": theirs["step"] / ours["step"],
        "memory": ours["peak_bytes"] / theirs["peak_bytes"],
        "share_of_limit": ours["limit"] / ours["step"],
        "gradient": float((gradients["prefopt"] - gradients["trl"]).norm() / gradients["trl"].norm()),
    }
    for role in ROLES:
        run = result[role]
        print(
            f"{role}: {run['step']:.2f} s a step of {args.pairs} pairs, {args.pairs / run['step']:.3f} pairs/s, "
            f"{run['tokens'] / run['step']:.0f} real tokens/s, {run['peak_bytes'] / 2**30:.1f} GiB, "
            f"{100 * run['limit'] / run['step']:.0f}% of the matmul limit"
        )
    print(
        f"speed {result['speedup']:.2f}x, memory {result['memory']:.2f}x, gradient differs by {result['gradient']:.1e}"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="pairs to train on; made-up ones of --prompt and --completion tokens without")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1, help="turns of the two trainers; the fastest counts")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--model", help="a model folder or Hub name; the bundled one without")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--cached_reference", action="store_true", help="precompute_ref_log_probs in both")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both (TRL's default is on)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        args.out.write_text(json.dumps(measure(args.role, args)))
        return
    result = compare(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
