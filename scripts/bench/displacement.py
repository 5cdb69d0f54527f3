"""Does CHES predict which chosen answers lose likelihood when a pair is trained on?

    python scripts/bench/displacement.py                                   # bundled pairs
    python scripts/bench/displacement.py --data pairs.jsonl --pairs 40

For each pair the score of `prefopt check --displacement`, and by how much a small step on a margin loss (`cpo`) on the
pair alone changes its chosen log-probability: the product of gradients <g_w, g_w - g_l> over all weights. Printed are
the rank correlation of the score and of simpler ones with the fall, and the chance that of two pairs, of which one
falls and one rises, the falling one has the higher score (0.5: no information).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def chance(score: Tensor, falls: Tensor) -> float:
    """The area under the ROC curve; NaN where all fall or none does."""
    high, low = score[falls], score[~falls]
    difference = high[:, None] - low[None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="pairs; the bundled ones without")
    parser.add_argument("--pairs", type=int, default=40, help="how many, drawn at random (40)")
    parser.add_argument("--model", help="the bundled one without")
    parser.add_argument("--max_tokens", type=int, default=256, help="longest prompt and completion (256)")
    args = parser.parse_args()
    from prefopt.analysis import ches, entanglement
    from prefopt.data import read_preferences, tokenize_dataset
    from prefopt.demo.data import load_demo
    from prefopt.losses import parse
    from prefopt.models.bundled import resolve_demo_model
    from prefopt.models.load import load_model, load_tokenizer
    from prefopt.scoring import PreferenceCollator

    torch.set_num_threads(1)
    name = args.model or str(resolve_demo_model(say=print))
    tokenizer, model = load_tokenizer(name), load_model(name, {"dtype": torch.float32})
    rows = load_demo("train") if args.data is None else read_preferences(args.data, split="train")
    tokenized = tokenize_dataset(rows.shuffle(seed=0).select(range(min(len(rows), 6 * args.pairs))), tokenizer)
    pairs = [
        {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for row in tokenized
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= args.max_tokens
    ][: args.pairs]
    scores = ches(model, pairs)
    collate = PreferenceCollator.for_loss(parse("cpo"), pad_token_id=tokenizer.pad_token_id or 0)
    changes = []
    for number, pair in enumerate(pairs):
        found = entanglement(model, collate([pair]), "cpo")
        changes.append(torch.stack([found.chosen_norm**2 - found.inner, found.rejected_norm**2 - found.inner])[:, 0])
        print(f"pair {number + 1} of {len(pairs)}: chosen {changes[-1][0]:+.4g}", flush=True)
    chosen = torch.stack(changes)[:, 0]
    falls = chosen < 0
    lengths = {
        side: torch.tensor([len(pair[f"{side}_ids"]) for pair in pairs]).double() for side in ("chosen", "rejected")
    }
    print(f"{int(falls.sum())} of {len(pairs)} chosen answers fall")
    print("| score | rank correlation with the fall | chance of ranking a falling pair above a rising one |")
    print("|---|---|---|")
    for label, score in (
        ("CHES, averaged", scores.averaged),
        ("CHES, summed", scores.summed),
        ("length of rejected less chosen", lengths["rejected"] - lengths["chosen"]),
    ):
        print(f"| {label} | {correlation(score, -chosen):+.2f} | {chance(score, falls):.2f} |")


if __name__ == "__main__":
    main()
