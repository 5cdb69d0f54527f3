"""Mean hidden states of prompts and completions: what the model's own output holds, in every layout, with gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefopt.losses import Divergence, KernelDPO, Need, Scores
from prefopt.losses.scores import EMBEDDINGS
from prefopt.scoring import Extras, TokenScores, assemble_batch, extras_for, score_rows
from prefopt.scoring.call import Call
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.measure import BARE
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.tree import score_trees
from tests.scoring.test_tree import ARCHITECTURES, EXAMPLES, MASKS, close, collate, model_inputs
from tests.tiny import make_model

HIDDEN = Extras(Need.HIDDEN)
LAYOUTS: dict[str, Any] = {
    "padded": (score_rows, {}),
    "padded, whole head": (score_rows, {"call": Call(chunked_head=False)}),
    "trees": (score_trees, {}),
    "trees, whole head": (score_trees, {"call": Call(chunked_head=False)}),
    "trees, made again": (score_trees, {"call": Call(recompute=True)}),
    "packed": (score_trees, {"masks": "packed"}),
    "packed, one by one": (score_trees, {"masks": "packed", "tokens": 1}),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def score(model: nn.Module, batch: dict[str, Any], layout: str, extras: Extras = HIDDEN):
    function, options = LAYOUTS[layout]
    inner: Any = model
    inner.set_attn_implementation("tree_sdpa" if options.get("masks") == "packed" else "sdpa")
    return function(model, model_inputs(batch), batch["completion_mask"], extras=extras, **options)[0]


def by_hand(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, H) means over the last hidden states, row by row, of rows with a prompt."""
    hidden, prompts = [], []
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        start = max(int(batch["completion_mask"][row].nonzero()[0]), 1)
        ids = batch["input_ids"][row : row + 1, :length]
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        hidden.append(states[start - 1 : length - 1].mean(0))
        prompts.append(states[:start].mean(0))
    return torch.stack(hidden), torch.stack(prompts)


def weighed(scores: TokenScores) -> torch.Tensor:
    return weighed_vectors(scores.quantities["hidden"], scores.quantities["prompt_hidden"])


def weighed_vectors(hidden: torch.Tensor, prompt_hidden: torch.Tensor) -> torch.Tensor:
    ramp = torch.linspace(-0.5, 1.5, hidden.numel()).reshape(hidden.shape)
    return (hidden * ramp).sum() + (prompt_hidden.square() * ramp).sum()


def gradient(model: nn.Module, total: torch.Tensor) -> torch.Tensor:
    leaves = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None])


@every_layout
def test_equals_the_model_s_own_output(layout):
    model, batch = make_model().eval(), collate()
    scores = score(model, batch, layout)
    mine = gradient(model, weighed(scores))
    model.set_attn_implementation("sdpa")
    hidden, prompt_hidden = by_hand(model, batch)
    torch.testing.assert_close(scores.quantities["hidden"], hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.quantities["prompt_hidden"], prompt_hidden, rtol=1e-5, atol=1e-5)
    assert close(mine, gradient(model, weighed_vectors(hidden, prompt_hidden)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", MASKS)
def test_layouts_agree_on_every_architecture(architecture, attention):
    model, batch = make_model(architecture).eval(), collate(mismatched=True)
    model.set_attn_implementation(attention)
    options = {"output_router_logits": False} if architecture == "moe" else {}
    inputs, mask = model_inputs(batch), batch["completion_mask"]
    padded, _ = score_rows(model, {**inputs, **options}, mask, extras=HIDDEN)
    trees, _ = score_trees(model, inputs, mask, extras=HIDDEN, masks=MASKS[attention], model_options=options)
    torch.testing.assert_close(trees.logps, padded.logps, rtol=1e-4, atol=2e-5)
    for name in ("hidden", "prompt_hidden"):
        mine, theirs = trees.quantities[name], padded.quantities[name]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5, msg=name)
    one, two = (gradient(model, weighed(s) + s.logps.sum()) for s in (trees, padded))
    assert close(one, two)


@every_layout
def test_adapters(layout):
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model(), config)
    scores = score(model, collate(), layout)
    plain = score(model, collate(), "padded")
    one, two = (gradient(model, weighed(s)) for s in (scores, plain))
    assert close(one, two)


@every_layout
def test_half_precision_is_averaged_in_float32(layout):
    model = make_model(dtype=torch.bfloat16).eval()
    scores = score(model, collate(), layout)
    assert scores.quantities["hidden"].dtype == torch.float32
    exact = score(make_model().eval(), collate(), "padded")
    torch.testing.assert_close(scores.quantities["hidden"], exact.quantities["hidden"], rtol=0.1, atol=0.1)


def test_nothing_is_averaged_unless_asked_for():
    scores = score(make_model().eval(), collate(), "trees", BARE)
    assert "hidden" not in scores.quantities


def test_a_model_whose_head_is_not_a_module_is_refused():
    model = make_model()
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="does not say which layer its head is"):
        score(model, collate(), "padded")


# ---- on to the loss ------------------------------------------------------------------------------------------------


def test_the_loss_gets_what_it_asks_for():
    loss = KernelDPO(divergence=Divergence("renyi", order=2.0))
    extras = extras_for(loss)
    assert extras.hidden
    assert [str(kind) for kind in extras.divergences] == ["renyi(2.0)"]
    policy, reference, batch = make_model(seed=0).eval(), make_model(seed=1).eval(), collate()
    with torch.no_grad():
        frozen, _ = score_rows(reference, model_inputs(batch), batch["completion_mask"], keep_logits=True)
    scores, _ = score_rows(policy, model_inputs(batch), batch["completion_mask"], extras=extras, reference=frozen)
    made = assemble_batch(RowBatch.of(batch), scores, loss, frozen.logps)
    assert isinstance(made.chosen, Scores)
    torch.testing.assert_close(made.chosen.hidden, scores.quantities["hidden"][:4])
    # Of the last example, which has no prompt, a completion's first token takes its place.
    torch.testing.assert_close(made.rejected.prompt_hidden[:3], made.chosen.prompt_hidden[:3])
    assert made.chosen.divergences == ("renyi(2.0)",)
    assert (made.chosen.token_divergence("renyi(2.0)")[made.chosen.token_mask] > 0).all()
    assert loss(made).loss.isfinite()


def with_vectors() -> list[dict[str, Any]]:
    return [
        {**example, **{name: [float(i), j + 0.5, 2.0] for j, name in enumerate(EMBEDDINGS)}}
        for i, example in enumerate(EXAMPLES)
    ]


def test_embeddings_of_the_data_reach_the_loss():
    loss = KernelDPO(embeddings="given", alpha=0.0)
    assert Need.HIDDEN not in loss.needs
    batch = PreferenceCollator(pad_token_id=0, embeddings=True)(with_vectors())
    some = RowBatch.of(batch).select_examples([3, 1])
    scores, _ = score_rows(make_model().eval(), some.model_inputs, some.completion)
    made = assemble_batch(some, scores, loss, scores.logps.detach())
    assert made.chosen.embedding.tolist() == [[1.0, 1.5, 2.0], [3.0, 1.5, 2.0]]
    assert made.rejected.embedding.tolist() == [[1.0, 2.5, 2.0], [3.0, 2.5, 2.0]]
    assert torch.equal(made.rejected.prompt_embedding, made.chosen.prompt_embedding)
    assert loss(made).loss.isfinite()
    missing = replace(made, chosen=replace(made.chosen, embedding=None))
    with pytest.raises(ValueError, match="needs embedding, but the chosen scores hold none"):
        loss(missing)


@pytest.mark.parametrize("vector", [None, [1.0, 2.0], [1.0, float("nan"), 2.0], "words"])
def test_a_row_without_a_vector_of_that_width_is_refused(vector):
    examples = with_vectors()
    examples[2]["chosen_embedding"] = vector
    with pytest.raises(ValueError, match="column 'chosen_embedding' must hold a list of finite numbers"):
        PreferenceCollator(pad_token_id=0, embeddings=True)(examples)
