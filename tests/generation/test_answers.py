"""Greedy answers near the end of a model's positions."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefopt.generation.answers import continued
from prefopt.safety.errors import UsageError
from tests.tiny import make_tokenizer


def test_answers_end_with_the_model_s_positions():
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model, tokenizer = GPT2LMHeadModel(GPT2Config(n_positions=32, **sizes)).eval(), make_tokenizer()
    prompts = [[5] * 30, [7, 8, 9], [5] * 20, [6] * 4]
    answers = continued(model, tokenizer, prompts, 16)
    # Those with room are as long as they are alone.
    assert answers == [continued(model, tokenizer, [prompt], 16)[0] for prompt in prompts]
    assert answers[0] == continued(model, tokenizer, prompts[:1], 2)[0]
    with pytest.raises(UsageError, match="a prompt has 32 tokens, and the model 32 positions"):
        continued(model, tokenizer, [[5] * 32], 16)
