"""States against the model's own numbers, and trials on made states where it is known what can be learned."""

from __future__ import annotations

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model

from prefopt.analysis.kernel_choice import trial as trials
from prefopt.analysis.kernel_choice.measures import Triplets
from prefopt.analysis.kernel_choice.states import PROMPT_TOKENS, Narrow, Side, States, states_of
from prefopt.analysis.kernel_choice.trial import PAIRS, Change, Outcome, Trial, batch_of, expression, ranked, run_trial
from prefopt.losses import parse
from tests.tiny import make_model


def rows(count=6, seed=0, vocabulary=60):
    generator = torch.Generator().manual_seed(seed)

    def ids(least):
        length = int(torch.randint(least, least + 7, (1,), generator=generator))
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [{"prompt_ids": ids(3), "chosen_ids": ids(1), "rejected_ids": ids(1)} for _ in range(count)]


def made_states(pairs=40, width=24, words=12, seed=0, signal=True):
    """Chosen and rejected completions of one token each, which their states tell apart, or do not."""
    generator = torch.Generator().manual_seed(seed)
    head = Narrow(torch.randn(words, width, generator=generator))
    mask = torch.ones(pairs, 1, dtype=torch.bool)

    def side(token):
        hidden = torch.randn(pairs, 1, width, generator=generator)
        hidden[..., 0] = 3.0  # as in real states, something that all share
        labels = torch.full((pairs, 1), token) if signal else torch.randint(words, (pairs, 1), generator=generator)
        return Side(hidden, mask, labels, head.log_probs(hidden))

    return States(torch.randn(pairs, width, generator=generator), side(1), side(2), head, 0.0)


def triplets(pairs=40, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Triplets(*(torch.randn(pairs, width, generator=generator) for _ in range(3)))


class TestStates:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
    def test_narrowed_distributions_are_the_models_own(self, architecture):
        model = make_model(architecture).eval()
        given = rows()
        states = states_of(model, given)
        for number, row in enumerate(given):
            for role in ("chosen", "rejected"):
                ids = torch.tensor([row["prompt_ids"] + row[f"{role}_ids"]])
                start = len(row["prompt_ids"])
                with torch.no_grad():
                    whole = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
                side = getattr(states, role)
                mask = side.mask[number]
                assert int(mask.sum()) == len(row[f"{role}_ids"])
                narrowed = side.ref_log_probs[number, mask]
                # Where everything is kept the two are the same; here nothing but a constant may lie between them.
                truth = whole.gather(-1, ids[0, start:, None])
                ours = narrowed.gather(-1, side.labels[number, mask, None])
                gaps = truth - ours
                assert bool((gaps <= 1e-5).all())
                assert float(gaps.exp().mean()) > 1 - states.left_out - 0.2

    def test_a_vocabulary_that_holds_every_token_leaves_nothing_out(self):
        model = make_model("llama").eval()
        states = states_of(model, rows())
        assert states.head.weight.shape[0] == model.config.vocab_size
        assert states.left_out == pytest.approx(0.0, abs=1e-5)

    def test_prompts_and_completions_are_means_over_their_own_positions(self):
        model = make_model("llama").eval()
        given = rows()
        states = states_of(model, given)
        row = given[2]
        with torch.no_grad():
            ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
            hidden = model.model(ids).last_hidden_state[0]
        start = len(row["prompt_ids"])
        torch.testing.assert_close(states.prompt[2], hidden[:start].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states.chosen.pooled[2], hidden[start - 1 : -1].mean(0), rtol=1e-4, atol=1e-5)

    def test_of_a_long_prompt_the_end_is_read(self):
        model = make_model("llama").eval()
        given = rows(1)
        longer = [{**given[0], "prompt_ids": [5] * 30 + list(range(3, 3 + PROMPT_TOKENS))}]
        shorter = [{**given[0], "prompt_ids": list(range(3, 3 + PROMPT_TOKENS))}]
        assert torch.equal(states_of(model, longer).prompt, states_of(model, shorter).prompt)

    def test_a_row_without_a_completion_is_named(self):
        with pytest.raises(ValueError, match="row 1 has no rejected tokens"):
            states_of(make_model("llama"), [*rows(1), {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": []}])

    def test_an_adapter_that_puts_tokens_before_every_row_is_refused(self):
        settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
        with pytest.raises(ValueError, match="adds 4 tokens of its own before every row"):
            states_of(get_peft_model(make_model("llama"), settings), rows(2))

    def test_a_head_that_is_no_plain_layer_is_refused(self):
        model = make_model("llama")
        model.config.logit_scale = 2.0
        with pytest.raises(ValueError, match="head is a plain linear layer"):
            states_of(model, rows(1))


class TestBatch:
    @pytest.mark.parametrize("embeddings", ["hidden", "given"])
    @pytest.mark.parametrize("pair", PAIRS)
    def test_before_a_step_policy_and_reference_are_one(self, pair, embeddings):
        states = made_states()
        loss = parse(expression(*pair, embeddings))
        policy = Change(24, torch.Generator().manual_seed(0))
        batch = batch_of(states, triplets() if embeddings == "given" else None, loss, policy, torch.arange(8))
        assert batch.chosen.ratios.tolist() == pytest.approx([0.0] * 8, abs=1e-5)
        assert batch.chosen.token_divergences.abs().max() < 1e-5
        output = loss(batch)
        output.loss.backward()
        assert policy.up.grad.abs().max() > 0

    def test_positions_without_a_token_count_for_nothing(self):
        states = made_states(pairs=4)
        wider = states.chosen
        mask = torch.cat([wider.mask, torch.zeros(4, 2, dtype=torch.bool)], 1)
        hidden = torch.cat([wider.hidden, torch.full((4, 2, 24), 9.0)], 1)
        labels = torch.cat([wider.labels, torch.zeros(4, 2, dtype=torch.long)], 1)
        padded = Side(hidden, mask, labels, states.head.log_probs(hidden))
        torch.testing.assert_close(padded.pooled, wider.pooled)
        policy = Change(24, torch.Generator().manual_seed(0))
        policy.up.data.normal_()
        loss = parse(expression("rbf", "kl", "hidden"))
        values = [
            loss(
                batch_of(
                    States(states.prompt, side, states.rejected, states.head, 0.0), None, loss, policy, torch.arange(4)
                )
            ).loss
            for side in (wider, padded)
        ]
        torch.testing.assert_close(*values)


class TestTrial:
    def test_what_can_be_learned_is_learned_and_what_cannot_is_not(self):
        for signal, least, most in ((True, 0.9, 1.0), (False, 0.0, 0.8)):
            states = made_states(pairs=80, signal=signal)
            (dpo,) = run_trial(states, pairs=[], seeds=2)
            assert least <= dpo.accuracy <= most
            if signal:
                assert dpo.loss < 0.69

    def test_a_pair_with_no_kernel_and_no_divergence_is_the_baseline(self, monkeypatch):
        bare = "kernel_dpo(beta=0.1, gamma=0.0, alpha=0.0)"
        monkeypatch.setattr(trials, "expression", lambda kernel, *_: "dpo(beta=0.1)" if kernel == "dpo" else bare)
        dpo, pair = run_trial(made_states(), pairs=[("rbf", "kl")], seeds=2, steps=5)
        assert pair.losses == dpo.losses

    def test_the_same_again(self):
        made = [list(run_trial(made_states(), triplets(), pairs=PAIRS[:2], seeds=2, steps=3)) for _ in range(2)]
        assert made[0] == made[1]

    def test_all_pairs_in_order(self):
        states = made_states()
        found = ranked(run_trial(states, triplets(), seeds=1, steps=2), states)
        assert {(one.kernel, one.divergence) for one in found.outcomes} == set(PAIRS)
        assert [one.loss for one in found.outcomes] == sorted(one.loss for one in found.outcomes)
        assert (found.trained_on, found.held_out) == (30, 10)
        assert found.baseline.kernel == "dpo"

    def test_ranks_and_gaps(self):
        best, tied, last = (
            Outcome("rbf", "kl", (0.5, 0.6), (0.8, 0.6), (0.0, 0.0)),
            Outcome("rbf", "js", (0.6, 0.7), (0.6, 0.8), (0.0, 0.0)),
            Outcome("rbf", "f", (0.6, 0.9), (0.5, 0.5), (0.0, 0.0)),
        )
        trial = Trial((best, tied, last), Outcome("dpo", "", (0.5, 0.6), (0.5, 0.5), (0.0, 0.0)), 30, 10)
        assert [trial.rank(one) for one in trial.outcomes] == [1, 2, 3]
        assert [trial.accuracy_rank(one) for one in trial.outcomes] == [1, 1, 3]
        assert trial.gap(tied, best) == pytest.approx((0.1, 0.0), abs=1e-7)
        # Differences 0.1 and 0.3: deviation 0.1 sqrt(2), times the root of 1/2 + 10/30.
        assert trial.gap(last, best) == pytest.approx((0.2, 0.1 * (2 * 5 / 6) ** 0.5), abs=1e-7)
        assert trial.find("rbf", "f") is last

    def test_four_draws_of_nothing_are_seldom_told_from_nothing(self):
        # Each pair's loss over 40 rows is the mean of a rows' noise; four draws hold out ten of them.
        generator, told = torch.Generator().manual_seed(0), 0
        for _ in range(400):
            noise = torch.randn(40, generator=generator)
            draws = [float(noise[torch.randperm(40, generator=generator)[:10]].mean()) for _ in range(4)]
            one, other = (Outcome("rbf", "kl", losses, (), ()) for losses in (tuple(draws), (0.0,) * 4))
            told += Trial((one, other), other, 30, 10).tells(one, other)
        assert told <= 0.06 * 400

    def test_embeddings_of_another_set_are_refused(self):
        with pytest.raises(ValueError, match="7 rows of embeddings for 40 rows of states"):
            list(run_trial(made_states(), triplets(7)))
