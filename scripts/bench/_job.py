"""One measurement of scripts/bench/speed.py: a trainer runs the steps of a job in a process of its own.

    python scripts/bench/_job.py {trl,prefopt} JOB FOLDER    # JOB: the fields of `Job` as JSON; speed.py starts this

Writes FOLDER/run.json and FOLDER/gradient.pt. The pairs are the same for both trainers and come in the order of the
data; so are model, LoRA and its initial weights. A prompt's pairs are adjacent, so that a batch holds all of them.
`_session.py` measures many in one process, where memory is counted by the device.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _count import Weights, digest, matmul_operations, matmul_rate, real_tokens, sizes
from _made_up import DATA, MODEL, lengths_of, longest_row, pairs_of, random_model, word_tokenizer
from _made_up import config_of as random_config

ROLES = ("trl", "prefopt")


@dataclass(frozen=True)
class Job:
    """What is trained on, and how.

    Attributes:
        model: folder or Hub name, or "random:" and a shape (`_made_up.SHAPES`).
        data: file of pairs, or "lengths:" and a name of `_made_up.lengths_of`; if None, made-up pairs of `prompt` and
            `completion` tokens, the end token included.
        completions: completions per made-up prompt; the first is chosen over each of the others.
        pairs: pairs a step, `completions - 1` from each prompt.
        max_length: longest row of real pairs; made-up ones are never cut.
    """

    model: str
    dtype: str
    threads: int
    data: str | None = None
    prompt: int = 256
    completion: int = 64
    completions: int = 2
    pairs: int = 4
    steps: int = 4
    max_length: int = 512
    full: bool = False
    cached_reference: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("completion", 2), ("completions", 2), ("pairs", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pairs % (self.completions - 1):
            raise ValueError(
                f"with {self.completions} completions a prompt gives {self.completions - 1} pairs, so pairs must be "
                f"a multiple of that, got {self.pairs}"
            )
        if self.data is None:
            object.__setattr__(self, "max_length", max(self.max_length, self.prompt + self.completion))
        elif self.data.startswith(DATA):
            object.__setattr__(self, "max_length", longest_row(self.data.removeprefix(DATA)))
        if self.model.startswith(MODEL):
            random_config(self.model.removeprefix(MODEL))

    @property
    def settings(self) -> dict[str, Any]:
        """The fields by which a result is found again; folders and files by their names."""
        values = dataclasses.asdict(self)
        values["model"] = Path(self.model).name if Path(self.model).is_dir() else self.model
        values["data"] = None if self.data is None else Path(self.data).name
        if self.data is not None:
            values["prompt"] = values["completion"] = None
        return values


# ---- the data -------------------------------------------------------------------------------------------------------


def vocabulary(tokenizer: Any) -> list[str]:
    """Words that stay one token each wherever they stand: a space and letters."""
    words = (tokenizer.decode([i]) for i in range(len(tokenizer)))
    plain = (word for word in words if word[:1] == " " and word[1:].isascii() and word[1:].isalpha())
    more = len(tokenizer("")["input_ids"])
    return [word for word in plain if len(tokenizer(word)["input_ids"]) == 1 + more]


def made_up_pairs(job: Job, tokenizer: Any) -> list[dict[str, str]]:
    """Random words. Both trainers end a completion with the end token, which is counted in its length."""
    rng = random.Random(0)
    words = vocabulary(tokenizer)
    before = len(tokenizer("")["input_ids"])  # what the tokenizer puts before every text
    if len(words) < 10:
        raise ValueError(f"{job.model}: the tokenizer has no words of one token to make pairs of; give --data")

    def text(tokens: int) -> str:
        return "".join(rng.choices(words, k=tokens))

    rows = []
    for _ in range(job.pairs * job.steps // (job.completions - 1)):
        prompt = text(job.prompt - before)
        chosen, *others = (text(job.completion - 1) for _ in range(job.completions))
        rows += [{"prompt": prompt, "chosen": chosen, "rejected": other} for other in others]
    return rows


def load_pairs(job: Job, tokenizer: Any) -> Any:
    """The pairs of all steps, in the order in which they are trained on."""
    from datasets import Dataset

    if job.data is None:
        return Dataset.from_list(made_up_pairs(job, tokenizer))
    if job.data.startswith(DATA):
        return Dataset.from_list(pairs_of(job.data.removeprefix(DATA), job.pairs * job.steps, len(tokenizer)))
    from prefopt.data import clean, load_preferences, normalise, validate

    rows = normalise(load_preferences(job.data))
    report = validate(rows, tokenizer=tokenizer, max_length=job.max_length)
    with tempfile.TemporaryDirectory() as folder:
        rows = clean(rows, report, "drop", Path(folder) / "dropped.jsonl")
    count = job.pairs * job.steps
    if len(rows) < count:
        raise ValueError(f"{job.data} has {len(rows)} usable pairs, but {count} are asked for; lower --steps")
    return rows.shuffle(seed=0).select(range(count))


@contextlib.contextmanager
def float64_throughout(dtype: str) -> Iterator[None]:
    """In a float64 job, make what asks for float32 get float64.

    The norms of transformers and TRL's head compute in float32 whatever the model's type is, which would hide in
    rounding what a float64 comparison of gradients is to show.
    """
    import torch

    if dtype != "float64":
        yield
        return
    single, to_single = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # type: ignore[misc,method-assign]
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = single, to_single  # type: ignore[misc,method-assign]


def load_model(job: Job, attention: str = "sdpa") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job.dtype)
    if job.model.startswith(MODEL):
        return random_model(job.model.removeprefix(MODEL), dtype, device(), attention)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation=attention)
    most = getattr(model.config, "max_position_embeddings", None)
    if job.data is None and most is not None and job.prompt + job.completion > most:
        raise ValueError(f"rows of {job.prompt} + {job.completion} tokens exceed the model's {most} positions")
    return model


def load_tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    if job.model.startswith(MODEL):
        return word_tokenizer(random_config(job.model.removeprefix(MODEL)).vocab_size)
    return AutoTokenizer.from_pretrained(job.model)


def device() -> str:
    import torch

    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def make_trainer(role: str, job: Job, model: Any, folder: str, rows: Any = None, **more: Any) -> Any:
    import torch
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

    from prefopt import PreferenceConfig, PreferenceTrainer

    tokenizer = load_tokenizer(job)
    options: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": job.pairs, "max_steps": job.steps, "logging_steps": 1,
        "max_length": job.max_length, "learning_rate": 1e-5, "report_to": "none", "save_strategy": "no",
        "use_cpu": not torch.accelerator.is_available(), "bf16": job.dtype == "bfloat16", "disable_tqdm": True,
        "seed": 0, "max_grad_norm": 1e9, "precompute_ref_log_probs": job.cached_reference,
        "gradient_checkpointing": job.gradient_checkpointing, "train_sampling_strategy": "sequential", **more,
    }  # fmt: skip
    lora = ModelConfig(use_peft=True, lora_r=16, lora_alpha=32, lora_dropout=0.0, lora_target_modules=["all-linear"])
    config, trainer = (DPOConfig, DPOTrainer) if role == "trl" else (PreferenceConfig, PreferenceTrainer)
    set_seed(0)
    made = trainer(
        model,
        # Trainers load a reference from where the model came from, and random weights came from nowhere.
        ref_model=copy.deepcopy(model) if job.full and job.model.startswith(MODEL) else None,
        args=config(**options),
        train_dataset=load_pairs(job, tokenizer) if rows is None else rows,
        processing_class=tokenizer,
        peft_config=None if job.full else get_peft_config(lora),
    )
    # Adapters start at zero output; random ones make the gradient of every weight something to compare.
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            # Drawn in one type, so that jobs that differ in theirs start alike.
            drawn = torch.empty(parameter.shape, dtype=torch.float).normal_(std=0.01)
            parameter.data.copy_(drawn)
    made.args.step0_check = "off"
    return made


# ---- the measurement ------------------------------------------------------------------------------------------------


SAMPLED = 2**24
"""How many weights' gradients are compared, evenly spaced, where a device computes them and there are more."""


def watch(seconds: list[float], cpu_seconds: list[float], keep: Callable[[Any], None]) -> Any:
    """A callback that times every step and hands the first step's gradient to `keep`.

    A precomputed reference is not part of it: both trainers compute that before the first step.
    """
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            if not seconds:
                grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                every = 1 + sum(map(len, grads)) // SAMPLED if torch.accelerator.is_available() else 1
                grads = [grad[::every].cpu() for grad in grads]
                keep(torch.cat([g if g.dtype == torch.float64 else g.float() for g in grads]))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - self.began)
            cpu_seconds.append(time.process_time() - self.cpu_began)

    return Watch()


def check_lengths(job: Job, trees: Sequence[tuple[int, Sequence[int]]], number: int = 0) -> None:
    """That the pairs of a batch have the lengths asked for, none cut and none equal by chance."""
    if job.data is None:
        expected = [(job.prompt, [job.completion] * job.completions)] * (job.pairs // (job.completions - 1))
    elif job.data.startswith(DATA):
        lengths = lengths_of(job.data.removeprefix(DATA), job.pairs * job.steps)
        expected = [(p, sorted(own)) for p, *own in lengths[number * job.pairs : (number + 1) * job.pairs]]
    else:
        return
    if [(prompt, list(own)) for prompt, own in trees] != expected:
        raise ValueError(f"a batch should hold {expected} (prompt and completion tokens), but holds {list(trees)}")


def measure(role: str, job: Job, folder: Path, attention: str = "sdpa", **options: Any) -> dict[str, Any]:
    """Time the steps of one trainer, and keep the gradient of its first step in `folder`.

    Args:
        role: one of `ROLES`.
        job: what is trained on, and how.
        folder: for the gradient.
        attention: implementation that the model is loaded with.
        options: further arguments of the trainer's configuration.
    """
    import torch

    torch.set_num_threads(job.threads)
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    model = load_model(job, attention)
    with tempfile.TemporaryDirectory() as output, float64_throughout(job.dtype):
        trainer = make_trainer(role, job, model, output, **options)
        # Written at once: a full gradient that stayed in memory would count as the trainer's.
        keep = watch(seconds, cpu_seconds, lambda gradient: torch.save(gradient, folder / "gradient.pt"))
        trainer.add_callback(keep)
        batches = [batch for _, batch in zip(range(job.steps), trainer.get_train_dataloader(), strict=False)]
        trees = [sizes(batch) for batch in batches]
        for number, batch in enumerate(trees):
            check_lengths(job, batch, number)
        trainer.train()
    peak = peak_memory()
    counted = {"full": job.full, "cached_reference": job.cached_reference}
    weights, rate = Weights.of(trainer.model), matmul_rate(getattr(torch, job.dtype))
    operations = statistics.fmean(matmul_operations(weights, batch, **counted) for batch in trees)
    return {
        "role": role,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens": statistics.fmean(real_tokens(batch) for batch in trees),
        "operations": operations,
        "limit": operations / rate,
        "digest": digest(batches),
        "machine": machine(job),
    }


def peak_memory() -> int:
    """Bytes: of the device where there is one, else the largest resident size of this process."""
    import torch

    if torch.accelerator.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would start at what the process that started this one had.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(job: Job) -> dict[str, Any]:
    import torch
    import transformers
    import trl

    import prefopt

    gpu = torch.cuda.is_available()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, prefopt)}
    device = torch.cuda.get_device_name() if gpu else f"CPU, {job.threads} threads"
    return {"device": device, "dtype": job.dtype, "python": platform.python_version(), **versions}


def main() -> None:
    role, text, folder = sys.argv[1:]
    # If memory runs out, the kernel is to end this process and not the sweep, or anything else.
    score = Path("/proc/self/oom_score_adj")
    if score.exists() and os.access(score, os.W_OK):
        score.write_text("1000")
    result = measure(role, Job(**json.loads(text)), Path(folder))
    (Path(folder) / "run.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
