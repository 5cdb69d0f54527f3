"""Make the demo's preference pairs from SmolLM2-135M-Instruct's own samples and the rule in `prefopt.demo.rule`.

Chosen: the first sentence of a sampled answer, where it follows the rule. Rejected: the whole of that answer, where it
ended by itself, since an answer cut off without its end token teaches the model to stop at once. Samples and pairs
share a system message that asks for short answers: the answers are the model's own under that prompt (on-policy), most
of them end within the token limit, and preference training shows what "short" means. The same seed on the same machine
gives the same files, in half an hour on one core:

    python scripts/make_demo_data.py --out prefopt/demo/data
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.demo.rule import MAX_WORDS, RULE, follows_rule, sentences
from prefopt.models.bundled import GGUF_SHA256, HUB_ID, resolve_demo_model

DATA = Path(__file__).resolve().parents[1] / "prefopt" / "demo" / "data"
SYSTEM = "You are a helpful assistant. Answer in two or three short sentences."
MIN_CHOSEN_WORDS = 5
MIN_DISTINCT_WORDS = 0.75  # share; a lower one is a small model going round in circles
MIN_REJECTED_WORDS = 25


STOP_WORDS = set(re.findall("[a-z]+", "what which does should there from with have work good make people best"))


@dataclass(frozen=True)
class Sample:
    """One sampled answer; `ended` says whether the model closed it with its end token."""

    question: str
    text: str
    ended: bool
    tokens: int


@dataclass(frozen=True)
class Pair:
    question: str
    chosen: str
    rejected: str


def read_questions(file: Path) -> dict[str, list[str]]:
    """Questions by split. Lines `# split: topic` open a topic; a topic belongs to one split only."""
    splits: dict[str, list[str]] = {"train": [], "heldout": []}
    current = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            current = line[1:].split(":")[0].strip()
        elif line.strip():
            splits[current].append(line.strip())
    return splits


class Sampler:
    """Draws answers in batches, each batch under its own seed, so that a run repeats exactly."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder = resolve_demo_model(args.model)
        self.args = args
        self.batches = 0
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def batch(self, questions: list[str]) -> list[Sample]:
        torch.manual_seed(self.args.seed * 100_003 + self.batches)
        self.batches += 1
        system = {"role": "system", "content": SYSTEM}
        chats = [[system, {"role": "user", "content": question}] for question in questions]
        inputs = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = self.model.generate(
            **inputs,
            max_new_tokens=self.args.max_new_tokens,
            do_sample=True,
            temperature=self.args.temperature,
            top_k=self.args.top_k,
        )
        samples = []
        for question, row in zip(questions, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ended = self.tokenizer.eos_token_id in row
            answer = row[: row.index(self.tokenizer.eos_token_id)] if ended else row
            text = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
            samples.append(Sample(question, text, ended, len(answer)))
        return samples


def sample_until_paired(sampler: Sampler, questions: list[str], rounds: int, split: str) -> list[Sample]:
    """Sample in rounds; later rounds ask only the questions that still lack a candidate for either side."""
    samples: list[Sample] = []
    open_questions = list(questions)
    for number in range(1, rounds + 1):
        started = time.monotonic()
        size = sampler.args.batch_size
        for at in range(0, len(open_questions), size):
            samples += sampler.batch(open_questions[at : at + size])
        asked = len(open_questions)
        open_questions = [question for question in open_questions if not all(candidates(question, samples))]
        seconds = time.monotonic() - started
        print(f"{split} round {number}: {asked} asked, {len(open_questions)} still open, {seconds:.0f} s", flush=True)
        if not open_questions:
            break
    return samples


def content_stems(text: str) -> set[str]:
    """The first five letters of each longer word: enough to tell whether an answer is about its question."""
    return {word[:5] for word in re.findall(r"[a-z]{4,}", text.lower()) if word not in STOP_WORDS}


def is_chosen_material(question: str, sentence: str) -> bool:
    """A sentence that follows the rule and is about the question, as far as words can tell."""
    words = sentence.split()
    return (
        follows_rule(sentence)
        and len(words) >= MIN_CHOSEN_WORDS
        and sentence[0].isupper()
        and sentence.endswith(".")
        and not re.search(r"[:*#\"\u201c]|\bI\b|\bI'm\b|\bI'd\b", sentence)
        and bool(content_stems(question) & content_stems(sentence))
    )


def reads_well(sentence: str) -> bool:
    """Neither cut at a decimal point nor going round in circles."""
    words = sentence.lower().split()
    return not re.search(r"\d\.$", sentence) and len(set(words)) >= MIN_DISTINCT_WORDS * len(words)


def candidates(question: str, samples: list[Sample]) -> tuple[list[str], list[Sample]]:
    """What a question's samples offer as chosen sentences and as rejected answers."""
    own = [sample for sample in samples if sample.question == question]
    firsts = [found[0] for sample in own if (found := sentences(sample.text))]
    chosen = [first for first in firsts if is_chosen_material(question, first)]
    whole = [sample for sample in own if sample.ended and len(sample.text.split()) >= MIN_REJECTED_WORDS]
    return chosen, [sample for sample in whole if len(sentences(sample.text)) > 1 and not follows_rule(sample.text)]


def make_pair(question: str, samples: list[Sample]) -> Pair | None:
    """The question's shortest finished answer and its own first sentence, or None.

    Both come from one sample: up to the first full stop the two are the same text, so training moves the choice
    between stopping and going on, and leaves alone what the answer says.
    """
    pairs = []
    for sample in samples:
        chosen, rejected = candidates(question, [sample])
        if chosen and rejected and reads_well(chosen[0]):
            pairs.append((sample.tokens, Pair(question, chosen[0], sample.text)))
    return min(pairs, key=lambda found: (found[0], found[1].rejected))[1] if pairs else None


def collect(args: argparse.Namespace, questions: dict[str, list[str]]) -> dict[str, list[Sample]]:
    """Sample, or read the samples of an earlier run."""
    if args.samples and args.samples.exists():
        stored = json.loads(args.samples.read_text(encoding="utf-8"))
        return {split: [Sample(**row) for row in rows] for split, rows in stored.items()}
    sampler = Sampler(args)
    rounds = {"train": args.train_rounds, "heldout": args.heldout_rounds}
    samples = {split: sample_until_paired(sampler, questions[split], rounds[split], split) for split in questions}
    if args.samples:
        rows = {split: [asdict(sample) for sample in drawn] for split, drawn in samples.items()}
        args.samples.write_text(json.dumps(rows, indent=0), encoding="utf-8")
    return samples


def write_split(file: Path, pairs: list[Pair]) -> dict[str, Any]:
    rows = [
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": pair.question}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    file.write_bytes(data)
    return {"pairs": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=DATA, help="folder for train.jsonl, heldout.jsonl and metadata.json"
    )
    parser.add_argument("--questions", type=Path, default=DATA / "questions.txt")
    parser.add_argument("--model", help="a folder with the model; default: found as the demo finds it")
    parser.add_argument("--samples", type=Path, help="keep the samples here, or read them if the file exists")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--train-rounds", type=int, default=2)
    parser.add_argument("--heldout-rounds", type=int, default=4)
    parser.add_argument("--max-heldout", type=int, default=48)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # Sums over another number of threads round differently, and a different last digit is a different sample.
    torch.set_num_threads(1)
    questions = read_questions(args.questions)
    samples = collect(args, questions)
    files = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for split, asked in questions.items():
        pairs = [pair for question in asked if (pair := make_pair(question, samples[split])) is not None]
        if split == "heldout":
            pairs = pairs[: args.max_heldout]
        files[f"{split}.jsonl"] = write_split(args.out / f"{split}.jsonl", pairs)
        print(f"{split}: {len(pairs)} pairs from {len(asked)} questions and {len(samples[split])} samples")
    metadata = {
        "made_by": "scripts/make_demo_data.py",
        "model": HUB_ID,
        "model_gguf_sha256": GGUF_SHA256,
        "rule": RULE,
        "max_words": MAX_WORDS,
        "system_message": SYSTEM,
        "seed": args.seed,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "rounds": {"train": args.train_rounds, "heldout": args.heldout_rounds},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "files": files,
    }
    (args.out / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
