"""The score stands at the last real token, the KL where its estimator says, padding nowhere."""

import pytest
import torch

from rlkl.kl import kl_rewards
from rlkl.rl import penalise_missing_eos, token_rewards

MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
SCORES = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
K = torch.tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 99.0], [4.0, 99.0, torch.nan]]).double()


def test_the_score_is_at_the_last_real_token_which_is_the_end_of_text():
    rewards = token_rewards(SCORES, torch.zeros(3, 3), MASK, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 1], [0, -2, 0], [3, 0, 0]]


def test_the_score_is_at_the_last_real_token_wherever_it_is():
    """Left padding, a tool's text between two turns: their scores were at masked positions."""
    mask = torch.tensor([[False, True, True], [True, False, True], [False, True, False]])
    rewards = token_rewards(SCORES, torch.zeros(3, 3), mask, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 1], [0, 0, -2], [0, 3, 0]]


def test_a_response_without_a_token_is_refused():
    with pytest.raises(ValueError, match="response 1 has no token for its score"):
        token_rewards(SCORES, K, torch.tensor([[True], [False], [True]]).expand(3, 3), 0.1)


def test_rewards_of_a_response_sum_to_score_less_kl_of_its_real_tokens():
    rewards = token_rewards(SCORES, K, MASK, kl_coef=0.1)
    expected = SCORES - 0.1 * torch.tensor([0.875, 3.0, 4.0])
    torch.testing.assert_close(rewards.sum(1), expected)
    assert not rewards[~MASK].any()


def test_a_sampled_kl_is_charged_at_its_own_token():
    rewards = token_rewards(torch.zeros(3), kl_rewards(K, MASK, own_token=True), MASK, 1.0)
    expected = torch.tensor([[-0.5, -0.25, -0.125], [-1.0, -2.0, 0.0], [-4.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_the_exact_kl_is_charged_one_token_earlier_and_the_first_to_nobody():
    rewards = token_rewards(torch.zeros(3), kl_rewards(K, MASK, own_token=False), MASK, 1.0)
    expected = torch.tensor([[-0.25, -0.125, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_a_coefficient_of_zero_leaves_the_score():
    rewards = token_rewards(SCORES, K, MASK, kl_coef=0.0)
    assert torch.equal(rewards.sum(1), SCORES)


def test_only_responses_that_were_cut_are_penalised():
    ended = torch.tensor([True, False, True])
    assert penalise_missing_eos(SCORES, ended, 0.5).tolist() == [1, -2.5, 3]


@pytest.mark.parametrize("penalty", [None, 0.0])
def test_without_penalty_scores_stay(penalty):
    ended = torch.tensor([True, False, True])
    assert torch.equal(penalise_missing_eos(SCORES, ended, penalty), SCORES)
