"""Sums over responses and their standard errors."""

import math

import pytest
import torch

from rlkl.kl import mean_and_stderr, per_token_mean_and_stderr, sequence_kl


def random_responses(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated tokens in responses of 1 to 6 tokens; longer responses have larger tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 7, (n, 1), generator=generator)
    k = torch.rand(n, 1, generator=generator) + torch.rand(n, 6, generator=generator) * length
    return k, torch.arange(6).expand(n, 6) < length


def test_padding_of_a_sum_may_hold_anything():
    k, mask = random_responses(5)
    dirty = k.masked_fill(~mask, torch.nan).requires_grad_()
    expected = torch.stack([k[b][mask[b]].sum() for b in range(5)])
    torch.testing.assert_close(sequence_kl(dirty, mask), expected)
    (gradient,) = torch.autograd.grad(sequence_kl(dirty, mask).sum(), dirty)
    assert torch.equal(gradient, mask.double())


def test_per_token_mean_weights_every_token_alike():
    k, mask = random_responses(5)
    mean = per_token_mean_and_stderr(k.masked_fill(~mask, torch.inf), mask).mean
    torch.testing.assert_close(mean, k[mask].mean())


def test_per_token_error_is_that_of_the_responses_where_all_have_one_length():
    k = random_responses(50)[0]
    per_token = per_token_mean_and_stderr(k, torch.ones_like(k, dtype=torch.bool))
    per_response = mean_and_stderr(k.sum(1))
    torch.testing.assert_close(per_token.mean * 6, per_response.mean)
    torch.testing.assert_close(per_token.stderr * 6, per_response.stderr)


@pytest.mark.parametrize("statistic", ["per response", "per token"])
def test_standard_error_is_the_spread_of_repeated_means(statistic):
    """2000 batches of 64: the spread is known to 1/√4000 = 1.6%, so 8% is 5 standard errors."""
    k, mask = random_responses(2000 * 64)
    results = [
        mean_and_stderr(sequence_kl(*batch))
        if statistic == "per response"
        else per_token_mean_and_stderr(*batch)
        for batch in zip(k.split(64), mask.split(64), strict=True)
    ]
    spread = torch.stack([r.mean for r in results]).std()
    stated = torch.stack([r.stderr for r in results]).square().mean().sqrt()
    assert 0.92 < stated / spread < 1.08


@pytest.mark.parametrize("statistic", ["per response", "per token"])
def test_clustered_error_is_the_spread_of_means_over_prompts(statistic):
    """2000 batches of 40 prompts with 4 responses, half of whose spread is the prompt's."""
    k, mask = random_responses(2000 * 160)
    prompt = torch.arange(2000 * 40).repeat_interleave(4)
    k = k + 2 * random_responses(2000 * 40, seed=1)[0][prompt, :1]
    results, naive = [], []
    for rows in torch.arange(len(k)).split(160):
        rows = rows[torch.randperm(160, generator=torch.Generator().manual_seed(0))]
        batch, groups = (k[rows], mask[rows]), prompt[rows]
        if statistic == "per response":
            x = sequence_kl(*batch)
            results.append(mean_and_stderr(x, groups))
            naive.append(mean_and_stderr(x))
        else:
            results.append(per_token_mean_and_stderr(*batch, groups))
            naive.append(per_token_mean_and_stderr(*batch))
    spread = torch.stack([r.mean for r in results]).std()
    stated, wrong = (
        torch.stack([r.stderr for r in each]).square().mean().sqrt() for each in (results, naive)
    )
    assert 0.92 < stated / spread < 1.08
    assert wrong / spread < 0.85  # as if the 160 were independent


def test_groups_of_one_change_nothing_and_one_group_says_nothing():
    k, mask = random_responses(7)
    x, alone, together = sequence_kl(k, mask), torch.arange(7) * 3, torch.zeros(7).long()
    torch.testing.assert_close(mean_and_stderr(x, alone), mean_and_stderr(x))
    torch.testing.assert_close(
        per_token_mean_and_stderr(k, mask, alone), per_token_mean_and_stderr(k, mask)
    )
    assert mean_and_stderr(x, together).stderr == math.inf


def test_one_response_has_an_infinite_error_and_no_nan():
    k, mask = random_responses(1)
    for result in (mean_and_stderr(sequence_kl(k, mask)), per_token_mean_and_stderr(k, mask)):
        assert math.isfinite(result.mean)
        assert result.stderr == math.inf


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="x is empty"):
        mean_and_stderr(torch.zeros(0))
    with pytest.raises(ValueError, match="mask has no True"):
        per_token_mean_and_stderr(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))


def test_values_per_token_are_no_responses_and_are_refused():
    """Their mean would count padding, and their error every token as an independent draw."""
    k, mask = random_responses(5)
    with pytest.raises(ValueError, match=r"x has shape \(5, 6\): pass one value per response"):
        mean_and_stderr(k)
    with pytest.raises(ValueError, match=r"x has shape \(5,\), groups \(4,\)"):
        mean_and_stderr(sequence_kl(k, mask), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("reduce", [sequence_kl, per_token_mean_and_stderr])
def test_masks_that_would_be_broadcast_or_are_no_bools_are_refused(reduce):
    k, mask = random_responses(5)
    with pytest.raises(ValueError, match=r"k and mask have shapes \(5, 6\) and \(1, 6\); each"):
        reduce(k, mask[:1])
    with pytest.raises(ValueError, match=r"mask is torch.int64; pass a bool one"):
        reduce(k, mask.long())
