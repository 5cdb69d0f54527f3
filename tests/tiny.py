"""Tiny random models and tokenizers, built in memory, so that no test needs the Hub."""

from __future__ import annotations

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

CHATML = """{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] if message['content'] is string else '' }}\
{%- if message.get('tool_calls') %}{{ message['tool_calls'] | tojson }}{% endif %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# The reasoning-model habit: the prompt alone ends in an empty thought that the finished conversation lacks.
THINKING = CHATML.replace(
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{%- if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
)

_TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "How does a bridge work? A bridge carries loads across a gap.",
    "What is the capital of France? It is Paris.",
    "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nGood day to you<|im_end|>",
]


@functools.lru_cache(maxsize=1)
def _trained_bpe() -> str:
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT, trainer)
    return bpe.to_str()


def make_tokenizer(chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of under 400 tokens with a ChatML template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_config(architecture: str = "llama"):
    shared = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    if architecture == "llama":
        return LlamaConfig(**shared)
    if architecture == "qwen2":
        return Qwen2Config(**shared)
    if architecture == "moe":
        return Qwen3MoeConfig(
            **shared,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            output_router_logits=True,
        )
    if architecture == "gpt2":
        return GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    raise ValueError(f"no tiny model named {architecture!r}")


def make_model(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer random model; weights large enough that log-probs differ between texts."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(architecture), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model
