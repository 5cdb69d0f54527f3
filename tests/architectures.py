"""Every causal language model that transformers knows, made tiny from its own configuration.

Sizes are cut by the names that configurations give them; what decides how tokens see one another (layer kinds,
windows, chunks) stays, with windows small enough for short rows to pass.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefopt.scoring import score_rows
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.layout import Layout
from prefopt.scoring.rows import RowBatch

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WINDOW = 16
VOCABULARY = 400
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embedding_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim",
                     "d_ff", "n_inner", "dim_ff", "moe_intermediate_size", "shared_expert_intermediate_size",
                     "intermediate_size_mlp", "shared_intermediate_size", "decoder_ffn_dim",
                     "moe_shared_expert_intermediate_size", "dense_intermediate_size", "mlp_hidden_size",
                     "block_ff_dim", "feed_forward_size", "prefix_dense_intermediate_size"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "attention_heads", "num_decoder_attention_heads",
                     "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "global_head_dim",
                     "swa_head_dim", "swa_v_head_dim", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
                     "context_length"), 512),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "attention_window_size",
                     "sliding_window_size", "local_attention", "index_topk", "block_size", "max_window_size"), WINDOW),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "state_size", "ssm_state_size",
                     "mamba_dt_rank", "time_step_rank", "linear_key_head_dim", "linear_value_head_dim",
                     "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts_per_token",), 2), **dict.fromkeys(("num_expert_group",), 1), "qk_head_dim": 16,
    **dict.fromkeys(("linear_num_heads",), 4), **dict.fromkeys(("linear_head_dim",), 8),
    "mamba_d_ssm": 64, "lru_width": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "conv_dim": 32, "num_kv_shared_layers": 0, "query_pre_attn_scalar": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY, "type_vocab_size": 2,
    "use_mamba_kernels": False, "output_router_logits": False, "num_layers": 4, "num_hidden_layers": 4,
    "n_layer": 4, "n_layers": 4, "decoder_layers": 4, "encoder_layers": 1, "is_decoder": True,
}  # fmt: skip
SIZES |= {
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "full_attention_interval", "layer_group_size",
                     "sliding_window_pattern", "global_attn_every_n_layers", "no_rope_layer_interval",
                     "max_window_layers"), 2),
    **dict.fromkeys(("attn_layer_offset", "moe_layer_freq", "first_k_dense_replace", "interleave_moe_layer_step",
                     "moe_layer_start_index"), 1),
    "expert_layer_offset": 0, "use_sliding_window": True, "rotary_dim": 4, "moe_expert_capacity": 8,
}  # fmt: skip
ALTERNATING = ["conv", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"full_attn_idxs": [1, 3], "layer_types": ALTERNATING},
    "lfm2_moe": {"layer_types": ALTERNATING, "num_dense_layers": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0},
    "bamba": {"attn_layer_indices": [1, 3]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_head": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba2": {"hybrid_layer_ids": [1, 3], "num_mem_blocks": 1, "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16, "attention_hidden_size": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
}
"""What the shared names do not say."""


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of an architecture with small sizes and one or two layers of each kind."""
    given = AutoConfig.for_model(name)
    return type(given)(**{**_shrunk(given), **SPECIAL.get(name, {})})


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    whole = config.to_dict()
    layers = next((whole[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if whole.get(n)), None)
    lists = [v for k, v in whole.items() if isinstance(v, list) and layers and len(v) == layers and "idx" not in k]
    # Layers so that every combination of kinds is there, at least four in all.
    kinds: dict[Any, int] = {}
    for i in range(layers or 0):
        kinds.setdefault(str([v[i] for v in lists]), i)
    some = sorted(kinds.values())
    some = (some + [i for i in range(layers or 0) if i not in some])[: max(len(some), 4)]
    made: dict[str, Any] = {}
    for key, value in whole.items():
        part = getattr(config, key, None) if isinstance(value, dict) else None
        if isinstance(part, PreTrainedConfig):
            made[key] = type(part)(**_shrunk(part)).to_dict()
        elif key == "per_layer_config" and value:
            mine = {new: value.get(old, value.get(str(old))) for new, old in enumerate(some)}
            made[key] = {new: {k: SIZES.get(k, v) for k, v in own.items()} for new, own in mine.items() if own}
        elif isinstance(value, list) and layers and len(value) == layers:
            made[key] = [value[i] for i in some]
        elif key in SIZES and not isinstance(value, (list, dict)) and (value is not None or "sliding" in key):
            made[key] = len(some) if SIZES[key] == 4 and "layer" in key and layers else SIZES[key]
        elif key not in ("model_type", "transformers_version", "architectures", "_name_or_path"):
            made[key] = value
    if whole.get("kv_lora_rank"):
        made["num_key_value_heads"] = made["num_attention_heads"]  # of latent attention
    return made


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of an architecture; weights large enough that what tokens see makes a difference."""
    config = tiny_config(name)
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval()


# ---- how each is scored ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """How an architecture was scored, and how far its trees were from rows of their own.

    Attributes:
        name: of the architecture.
        layout: "trees"; "trees, padded" where rows of some length are padded; "padded"; "not tried".
        exact: largest difference of a completion's log-probability that was scored in trees, in float32.
        half: the same in bfloat16.
        reason: why not in trees, or not tried.
    """

    name: str
    layout: str
    exact: float | None = None
    half: float | None = None
    reason: str = ""


def pairs(*lengths: int, seed: int = 0) -> RowBatch:
    """A batch of one pair for each length: half prompt, half completion."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(5, 300) for _ in range(count)]

    examples = [
        {"prompt_ids": ids(n // 2), "chosen_ids": ids(n - n // 2), "rejected_ids": ids(n - n // 2 - 1)}
        for n in lengths
    ]
    return RowBatch.of(PreferenceCollator(pad_token_id=0)(examples))


SHORT_THEN_LONG = [pairs(6, 8, 7), pairs(100, 90, seed=1), pairs(7, 9, seed=2)]
"""Rows within the windows of tiny models, rows that pass them, and rows within them once more."""


def follow(model: Any, layout: Layout, batches: list[RowBatch]) -> list[tuple[bool, float]]:
    """Of each batch in turn: whether it was scored in trees, and the largest difference from padded rows."""
    seen = []
    for batch in batches:
        in_trees = layout.in_trees(model, batch)
        scores, _ = layout.score(model, batch)
        layout.release(model)
        expected, _ = score_rows(model, batch.model_inputs, batch.completion)
        seen.append((in_trees, float((scores.logps - expected.logps).sum(-1).abs().max())))
    return seen


def examine(name: str) -> Finding:
    """Score short and long rows with a tiny model of an architecture, in both precisions."""
    gaps: dict[torch.dtype, float | None] = {}
    taken: list[bool] = []
    reason, long = "", SHORT_THEN_LONG[1]
    for dtype in (torch.float32, torch.bfloat16):
        try:
            model = tiny_model(name, dtype)
            layout = Layout("auto", half=dtype == torch.bfloat16)
            with torch.no_grad():
                score_rows(model, {"input_ids": long.ids}, long.completion)
                seen = follow(model, layout, SHORT_THEN_LONG)
        except Exception as error:  # whatever transformers raises of a configuration that does not suit it
            text = " ".join((str(error) or type(error).__name__).split())[:110]
            return Finding(name, "not tried", reason=text)
        gaps[dtype] = max((gap for in_trees, gap in seen if in_trees), default=None)
        taken += [in_trees for in_trees, _ in seen]
        reason = reason or layout.reason
    kind = "trees" if all(taken) else "trees, padded" if any(taken) else "padded"
    return Finding(name, kind, gaps[torch.float32], gaps[torch.bfloat16], reason)
