"""Tiny random models and tokenizers, built in memory, so that no test needs the Hub."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    Qwen3Config,
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


TEXT_SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_config(architecture: str = "llama"):
    shared = {**TEXT_SIZES, "tie_word_embeddings": True}
    if architecture == "llama":
        return LlamaConfig(**shared)
    if architecture == "qwen2":
        return Qwen2Config(**shared)
    if architecture == "qwen3":
        return Qwen3Config(**shared, head_dim=8)
    if architecture == "mistral":
        return MistralConfig(**shared, sliding_window=64)
    if architecture == "gemma2":
        return Gemma2Config(**shared, head_dim=8, query_pre_attn_scalar=8, sliding_window=64)
    if architecture == "gemma3":
        return Gemma3TextConfig(**shared, head_dim=8, query_pre_attn_scalar=8, sliding_window=64)
    if architecture == "phi":
        return PhiConfig(**shared)
    if architecture == "phi3":
        return Phi3Config(**shared, pad_token_id=0)
    if architecture == "neox":
        return GPTNeoXConfig(**shared)
    if architecture == "mamba":
        return MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
    if architecture == "jamba":
        return JambaConfig(**shared, attn_layer_period=2, attn_layer_offset=1, num_experts=2, expert_layer_period=2,
                           mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)  # fmt: skip
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


def save_encoder(path: Path, seed: int = 0) -> str:
    """A random encoder of the sentence-transformers layout, its pooling a mean; the vectors have 16 numbers."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return str(path)


# Multimodal conversations: every message's content is a list of parts. IMAGE stands for the model's placeholder.
IMAGE_CHATML = """{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{% endfor %}\
<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_vlm(architecture: str = "llava", seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tiny vision-language model and its processor; neither needs torchvision.

    "llava" reads four image tokens a picture; "gemma3" four as well, and its batches carry `token_type_ids`.
    """
    placeholder = {"llava": "<image>", "gemma3": "<start_of_image>"}[architecture]
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}
    template = IMAGE_CHATML.replace("IMAGE", placeholder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    tokenizer.chat_template = template
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in names.values()}
    text = dict(TEXT_SIZES)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    model: PreTrainedModel
    processor: ProcessorMixin
    if architecture == "llava":
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=LlamaConfig(**text),
                vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14, projection_dim=32),
                image_token_index=ids["<image>"],
            )
        )
        processor = LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    else:
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={**text, "head_dim": 8},
                vision_config={**vision, "image_size": 28, "patch_size": 14, "vision_use_head": False},
                mm_tokens_per_image=4,
                boi_token_index=ids["<start_of_image>"],
                eoi_token_index=ids["<end_of_image>"],
                image_token_index=ids["<image>"],
            )
        )
        processor = Gemma3Processor(
            Gemma3ImageProcessor(size={"height": 28, "width": 28}),
            tokenizer,
            chat_template=template,
            image_seq_length=4,
        )
    with torch.no_grad():
        for parameter in model.parameters():
            # Gemma 3 starts with a projection of zeros, through which it would not see.
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return model, processor
