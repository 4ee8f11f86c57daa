"""Token statistics against float64 logits of unpadded sequences; summaries against formulas."""

import dataclasses
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from reward_models import LexiconReward
from rlkl.kl import fused_token_loss, head_logits
from rlkl.models import Critic, at_least_float32, frozen_copy, output_head
from rlkl.rollout import (
    Responses,
    Rollout,
    TokenRecord,
    collect_rollout,
    sample_responses,
    scatter_tokens,
    score_responses,
    summarise,
    token_statistics,
)
from rlkl.rollout.collect import policy_pass
from rlkl.rollout.scoring import FunctionReward, SumOfRewards
from rlkl.trainers.metrics import described

PROMPTS = ["the film", "it", "I found this plot and the end", "a plot", "on", "so it is"]


@pytest.fixture
def responses(lm, tokenizer) -> Responses:
    generator = torch.Generator().manual_seed(15)
    sampled = sample_responses(lm, tokenizer, PROMPTS, 7, temperature=2.0, generator=generator)
    lengths = sampled.mask.sum(1).tolist()
    assert len(set(lengths)) > 1, "the fixture should hold responses of several lengths"
    return sampled


@pytest.fixture
def ref(make_lm):
    return make_lm(seed=1)


@torch.no_grad()
def naive(policy, ref, responses: Responses, temperature: float) -> list[dict[str, torch.Tensor]]:
    """The definitions, one unpadded response at a time, in float64, from all the logits."""
    policy, ref = policy.double(), ref.double()
    results = []
    for i in range(len(responses)):
        prompt = responses.prompt_ids[i][responses.prompt_mask[i]]
        tokens = responses.tokens[i][responses.mask[i]]
        ids = torch.cat([prompt, tokens])[None]
        p, q = (
            (model(ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            for model in (policy, ref)
        )
        results.append(
            {
                "policy_logp": p.gather(1, tokens[:, None]).squeeze(1),
                "ref_logp": q.gather(1, tokens[:, None]).squeeze(1),
                "kl": (p.exp() * (p - q)).sum(1),
                "entropy": -(p.exp() * p).sum(1),
            }
        )
    policy.float(), ref.float()
    return results


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [256, 2])
def test_statistics_equal_the_definitions_on_unpadded_sequences(
    lm, ref, responses, temperature, batch_size
):
    record = token_statistics(lm, ref, responses, temperature=temperature, batch_size=batch_size)
    for i, expected in enumerate(naive(lm, ref, responses, temperature)):
        for name, values in expected.items():
            ours = getattr(record, name)[i][responses.mask[i]].double()
            torch.testing.assert_close(ours, values, atol=1e-5, rtol=1e-5)


def test_statistics_are_zero_where_masked(lm, ref, responses):
    record = token_statistics(lm, ref, responses, critic=Critic(32))
    for values in (record.policy_logp, record.ref_logp, record.kl, record.entropy, record.values):
        assert values.shape == responses.mask.shape
        assert values.dtype == torch.float32
        assert not values[~responses.mask].any()
    assert (record.entropy[responses.mask] > 0).all()


def test_a_response_is_measured_the_same_in_any_company(lm, ref, responses):
    whole = token_statistics(lm, ref, responses)
    for i in range(len(responses)):
        alone = responses.rows(torch.tensor([i]))
        record, length = token_statistics(lm, ref, alone), int(alone.mask.sum())
        for name in ("policy_logp", "ref_logp", "kl", "entropy"):
            ours, theirs = getattr(whole, name)[i, :length], getattr(record, name)[0]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_identical_models_have_kl_zero_and_equal_log_probs_to_the_last_bit(lm, make_lm, responses):
    record = token_statistics(lm, make_lm(), responses)
    assert not record.kl.any()
    assert torch.equal(record.policy_logp, record.ref_logp)


def test_the_adapters_reference_is_the_base_model(lm, make_lm, responses):
    adapted = get_peft_model(
        make_lm(),
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    ).eval()
    untouched = token_statistics(adapted, None, responses)
    assert not untouched.kl.any()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    record = token_statistics(adapted, None, responses)
    torch.testing.assert_close(record.ref_logp, untouched.policy_logp, atol=1e-5, rtol=0)
    assert record.kl[responses.mask].min() > 0
    explicit = token_statistics(adapted, make_lm(), responses)
    torch.testing.assert_close(record.kl, explicit.kl)


def test_reference_hidden_states_give_back_the_references_logits(lm, ref, responses):
    record = token_statistics(lm, ref, responses)
    logits = record.ref_hidden @ output_head(ref).weight.T
    logp = logits.log_softmax(-1).gather(2, responses.tokens[..., None]).squeeze(2)
    real = responses.mask
    torch.testing.assert_close(logp[real], record.ref_logp[real], atol=1e-5, rtol=1e-5)


def test_bfloat16_models_that_are_equal_have_kl_and_gradient_zero_in_the_first_update_too(
    lm, make_lm, responses
):
    policy, ref = lm.bfloat16(), make_lm().bfloat16()
    record = token_statistics(policy, ref, responses)
    assert record.ref_hidden.dtype == torch.bfloat16
    assert not record.kl.any()
    real = responses.mask
    hidden = policy_pass(policy, None, responses).hidden.detach().requires_grad_()
    loss, stats = fused_token_loss(
        lambda stats: stats.kl.sum(),
        hidden,
        output_head(policy),
        record.ref_hidden[real],
        output_head(ref),
        responses.tokens[real],
        ref_logp=record.ref_logp[real],
    )
    assert torch.equal(stats.policy_logp, record.policy_logp[real])
    assert not stats.kl.any()
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_statistics_need_no_graph_and_leave_none(lm, ref, responses):
    record = token_statistics(lm, ref, responses, critic=Critic(32))
    assert not record.policy_logp.requires_grad
    assert not record.values.requires_grad


# --- scores -------------------------------------------------------------------------------------


def test_the_reward_model_reads_prompts_and_texts(responses):
    scores = score_responses(LexiconReward(), responses)
    assert torch.equal(scores, LexiconReward()(responses.prompts, responses.texts))


def test_several_rewards_are_added_and_judges_are_kept_apart(lm, ref, responses):
    def length(prompts, texts):
        return torch.tensor([float(len(text)) for text in texts])

    rewards = SumOfRewards([LexiconReward(), length])
    record = token_statistics(lm, ref, responses)
    rollout = collect_rollout(responses, rewards, record, {"length": length})
    expected = score_responses(LexiconReward(), responses) + score_responses(length, responses)
    assert torch.equal(rollout.scores, expected)
    assert torch.equal(rollout.other_scores["length"], score_responses(length, responses))


def test_a_function_is_given_the_tokens_without_padding(responses):
    def length(completions, completion_ids):
        return [len(ids) for ids in completion_ids]

    reward = FunctionReward(length, frozenset({"completions", "completion_ids"}), frozenset())
    scores = score_responses(reward, responses)
    assert torch.equal(scores, responses.mask.sum(1).float())
    assert scores.unique().numel() > 1


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        (torch.zeros(6, 2), r"gave scores of shape \(6, 2\) for 6 responses; one score each"),
        (torch.zeros(5), r"gave scores of shape \(5,\) for 6 responses"),
        (torch.tensor([0, 0, math.nan, 0, 0, 0]), "gave nan for .* must be finite"),
        (torch.tensor([0, math.inf, 0, 0, 0, 0]), "gave inf for .* must be finite"),
        (None, "gave None, which are no numbers; one score .* of the 6 responses"),
        ([None] * 6, r"gave \[None, None, .*no numbers"),
    ],
)
def test_scores_that_are_not_one_finite_number_each_are_refused(
    lm, ref, responses, scores, complaint
):
    def bad(prompts, texts):
        return scores

    with pytest.raises(ValueError, match=f"the reward model {complaint}"):
        score_responses(bad, responses)
    rewards = SumOfRewards([LexiconReward(), bad])
    with pytest.raises(ValueError, match=f"reward model 2 of 2 {complaint}"):
        score_responses(rewards, responses)
    record = token_statistics(lm, ref, responses)
    with pytest.raises(ValueError, match=f"the judge 'held_out' {complaint}"):
        collect_rollout(responses, LexiconReward(), record, {"held_out": bad})


@pytest.mark.parametrize(
    ("large", "dtype"), [(60_000.0, torch.float16), (2048.0, torch.bfloat16), (255, torch.uint8)]
)
def test_several_rewards_are_added_in_float32(large, dtype):
    first, second = (
        lambda prompts, texts, value=value: torch.tensor([value], dtype=dtype)
        for value in (large, 1)
    )
    assert SumOfRewards([first, second]).bound_to({})(["the"], ["film"]).tolist() == [large + 1]


def test_no_reward_model_is_refused():
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        SumOfRewards([])


# --- the summary --------------------------------------------------------------------------------


@pytest.fixture
def rollout() -> Rollout:
    """Two responses of two and one tokens, with round numbers and junk in the padding's tokens."""
    mask = torch.tensor([[True, True], [True, False]])
    policy_logp, ref_logp = (
        torch.tensor([[-1.0, -2.0], [-0.5, 0]]),
        torch.tensor([[-2.0, -1.5], [-1.0, 0]]),
    )
    return Rollout(
        responses=Responses(
            prompts=["a", "b"],
            texts=["c d", "e"],
            prompt_ids=torch.ones(2, 1, dtype=torch.long),
            prompt_mask=torch.ones(2, 1, dtype=torch.bool),
            tokens=torch.tensor([[1, 2], [0, 0]]),
            mask=mask,
            ended=torch.tensor([False, True]),
        ),
        scores=torch.tensor([1.0, 4.0]),
        tokens=TokenRecord(
            policy_logp=policy_logp,
            ref_logp=ref_logp,
            kl=torch.tensor([[0.25, 0.5], [1.5, 0.0]]),
            entropy=torch.tensor([[2.0, 1.0], [3.0, 0.0]]),
            ref_hidden=torch.zeros(2, 2, 4),
        ),
        other_scores={"fluency": torch.tensor([0.0, 2.0])},
    )


def test_the_summary_is_the_formulas_of_the_vocabulary(rollout):
    u = [[1.0, -0.5], [0.5]]
    k3 = [[math.exp(-x) - 1 + x for x in row] for row in u]
    metrics = summarise(rollout)
    expected = {
        "kl/k1": (0.5 + 0.5) / 2,
        "kl/k1_se": 0.0,
        "kl/k3": (sum(k3[0]) + sum(k3[1])) / 2,
        "kl/k3_se": abs(sum(k3[0]) - sum(k3[1])) / 2,
        "kl/rb": (0.75 + 1.5) / 2,
        "kl/rb_se": 0.375,
        "kl/k1_per_token": 1.0 / 3,
        "kl/k3_per_token": (sum(k3[0]) + sum(k3[1])) / 3,
        "kl/rb_per_token": 2.25 / 3,
        "objective/scores": 2.5,
        "objective/scores_se": 1.5,
        "objective/scores_std": 1.5,
        "judge/fluency": 1.0,
        "judge/fluency_se": 1.0,
        "policy/entropy_per_token": 2.0,
        "objective/entropy": (3.0 + 0.5) / 2,
        "objective/entropy_se": 1.25,
        "val/num_eos_tokens": 1.0,
        "response/length": 1.5,
        "response/length_se": 0.5,
        "response/truncated_fraction": 0.5,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_every_key_of_the_summary_is_in_the_vocabulary(rollout):
    assert [key for key in summarise(rollout) if described(key) is None] == []


def test_more_padding_changes_no_number(rollout):
    def wider(x):
        return torch.cat([x, torch.zeros_like(x)], 1)

    tokens = TokenRecord(
        *(
            wider(getattr(rollout.tokens, f))
            for f in ("policy_logp", "ref_logp", "kl", "entropy", "ref_hidden")
        )
    )
    responses = dataclasses.replace(
        rollout.responses,
        tokens=wider(rollout.responses.tokens),
        mask=wider(rollout.responses.mask),
    )
    padded = dataclasses.replace(rollout, responses=responses, tokens=tokens)
    assert summarise(padded) == pytest.approx(summarise(rollout))


def test_tokens_go_back_to_their_places():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    whole = scatter_tokens(values, mask)
    assert torch.equal(whole[mask], values)
    assert not whole[~mask].any()


class TwoLayers(nn.Module):
    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4), nn.Linear(4, vocab)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(hidden)))


def test_a_model_in_16_bits_with_any_head_is_sampled_and_measured(make_lm, tokenizer):
    torch.manual_seed(0)
    model = make_lm(tie_word_embeddings=False)
    model.set_output_embeddings(TwoLayers(model.config.n_embd, model.config.vocab_size))
    model = model.bfloat16()
    generator = torch.Generator().manual_seed(0)
    responses = sample_responses(model, tokenizer, PROMPTS, 5, temperature=1.0, generator=generator)
    record = token_statistics(model, frozen_copy(model), responses)
    assert (record.kl == 0).all()
    assert (record.ref_logp == record.policy_logp).all()
    # The same pair with its head's weights in float32: what differs is the rounding of logits.
    wide = at_least_float32(output_head(model))
    assert {x.dtype for x in wide.module.parameters()} == {torch.float32}
    hidden = policy_pass(model, None, responses).hidden.float()
    logp = head_logits(wide, hidden).log_softmax(-1)
    logp = logp.gather(1, responses.tokens[responses.mask][:, None])[:, 0]
    torch.testing.assert_close(record.policy_logp[responses.mask], logp, rtol=0.05, atol=0.05)
