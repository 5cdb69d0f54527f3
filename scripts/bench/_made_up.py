"""Models, tokenizers and pairs that need no download: random weights of a known shape, pairs of given lengths.

`scripts/bench/speed.py` takes them as `--model random:llama-8b` and `--data lengths:hh`.
"""

from __future__ import annotations

import random
from typing import Any

MODEL, DATA = "random:", "lengths:"
"""How names of made-up models and data begin."""

SHAPES = {"llama-1b": "1B", "llama-8b": "8B"}
"""Shapes of `prefopt plan` by the names they have here; "tiny" is there for rehearsals."""

Lengths = tuple[int, int, int]
"""Tokens of a prompt, of its chosen and of its rejected completion, their ends included."""

HH: tuple[Lengths, ...] = (
    (44, 10, 3), (42, 8, 13), (40, 12, 19), (37, 31, 10), (42, 7, 33), (55, 25, 6), (41, 9, 41), (69, 19, 8),
    (61, 14, 25), (40, 25, 39), (42, 23, 43), (39, 49, 24), (46, 58, 11), (41, 11, 67), (38, 43, 42), (40, 38, 51),
    (98, 11, 23), (70, 25, 42), (55, 22, 64), (49, 39, 56), (41, 19, 88), (48, 68, 35), (137, 8, 10), (98, 32, 31),
    (112, 35, 17), (116, 7, 47), (45, 12, 117), (163, 4, 12), (126, 28, 29), (74, 63, 53), (168, 13, 12),
    (112, 18, 66), (46, 5, 149), (136, 45, 22), (139, 53, 16), (47, 82, 87), (51, 84, 85), (138, 71, 16),
    (43, 23, 164), (69, 134, 32), (175, 29, 35), (94, 86, 64), (91, 122, 39), (172, 14, 69), (90, 51, 122),
    (219, 25, 27), (200, 28, 50), (191, 13, 83), (222, 30, 40), (132, 36, 140), (220, 53, 43), (117, 155, 54),
    (234, 56, 45), (238, 39, 68), (290, 25, 38), (303, 42, 21), (167, 156, 56), (329, 42, 24), (369, 15, 26),
    (306, 63, 62), (305, 59, 90), (359, 66, 59), (420, 77, 11), (356, 153, 43),
)  # fmt: skip
"""Measured: 64 pairs, evenly spaced in order of total length, of the 1112 of the first half of hh-rlhf's
harmless-base/test.jsonl.gz that fit in 512 tokens, with SmolLM2's tokenizer and chat template. The means of all of
them are 133, 40 and 49 tokens, of these 133, 42 and 47."""


def ultrafeedback_lengths(count: int, longest: int = 1024) -> list[Lengths]:
    """Drawn, not measured: log-normal lengths that agree with what is known of UltraFeedback Binarized.

    Prompts have a median of 90 tokens and a mean of 165, completions 230 and 290; half of the variance of completions
    is their prompt's. HuggingFaceH4/ultrafeedback_binarized holds 405,688,662 bytes in 61,135 rows of train_prefs
    (its card), which is 6.6 kB a row: four copies of the prompt, two of the chosen and one of the rejected completion,
    so 4 * 165 + 3 * 290 tokens at 4.3 bytes. Rows are cut to `longest`.
    """
    rng = random.Random(0)
    lengths = []
    for _ in range(count):
        prompt = min(int(90 * rng.lognormvariate(0.0, 1.1)) + 8, longest // 2)
        shared = rng.gauss(0.0, 0.5)
        own = (int(230 * rng.lognormvariate(shared, 0.5)) + 2 for _ in range(2))
        chosen, rejected = (min(length, longest - prompt) for length in own)
        lengths.append((prompt, chosen, rejected))
    return lengths


def lengths_of(name: str, count: int) -> list[Lengths]:
    """Lengths of `count` pairs, in random order that is the same each time.

    Args:
        name: "hh", "ultrafeedback", "tiny", or PROMPT+COMPLETION such as "1024+64", which all pairs then have.
        count: of pairs.

    Raises:
        ValueError: for any other name.
    """
    if name == "hh":
        rng = random.Random(0)
        return [rng.choice(HH) for _ in range(count)]
    if name == "ultrafeedback":
        return ultrafeedback_lengths(count)
    if name == "tiny":
        rng = random.Random(0)
        return [(rng.randint(8, 24), rng.randint(3, 12), rng.randint(3, 12)) for _ in range(count)]
    prompt, _, completion = name.partition("+")
    if not (prompt.isdigit() and completion.isdigit() and int(prompt) >= 1 and int(completion) >= 2):
        raise ValueError(f"there are no lengths {name!r}: hh, ultrafeedback, tiny, or PROMPT+COMPLETION as in 1024+64")
    return [(int(prompt), int(completion), int(completion))] * count


def longest_row(name: str) -> int:
    """Tokens of the longest row that such pairs can have."""
    fixed = {"hh": 512, "ultrafeedback": 1024, "tiny": 64}
    return fixed.get(name) or sum(lengths_of(name, 1)[0][:2])


def config_of(name: str) -> Any:
    """The configuration of a random model.

    Args:
        name: after "random:".

    Raises:
        ValueError: for a shape that is not built in.
    """
    from transformers import LlamaConfig

    from prefopt.planning.plan import model_config

    if name in SHAPES:
        config = model_config(SHAPES[name])[1]
    elif name == "tiny":
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, max_position_embeddings=4096, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    else:
        raise ValueError(f"there is no random model {name!r}: {', '.join((*SHAPES, 'tiny'))}")
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 1
    return config


def random_model(name: str, dtype: Any, device: str, attention: str = "sdpa") -> Any:
    """A model with random weights, made on its device and in its type, so that nothing larger is ever held.

    Args:
        name: after "random:".
        dtype: of the weights.
        device: to make it on.
        attention: implementation that transformers is asked for.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype, attn_implementation=attention)
    return model


def word_tokenizer(vocabulary: int) -> Any:
    """One word, one token: w3, w4, ... up to the size of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "<end>": 1, "<unknown>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    words = Tokenizer(models.WordLevel(known, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")


def pairs_of(name: str, count: int, vocabulary: int) -> list[dict[str, str]]:
    """Pairs of random words with such lengths; a completion's includes the end token that trainers add."""
    rng = random.Random(1)

    def text(tokens: int) -> str:
        return " ".join(f"w{rng.randrange(3, vocabulary)}" for _ in range(tokens))

    # A space, since prompt and completion are tokenised joined.
    return [
        {"prompt": text(prompt), "chosen": f" {text(chosen - 1)}", "rejected": f" {text(rejected - 1)}"}
        for prompt, chosen, rejected in lengths_of(name, count)
    ]
