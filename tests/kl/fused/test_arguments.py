"""What the fused functions do not take, said before memory is read or a gradient is lost."""

import pytest
import torch
from torch import nn

from rlkl.kl import (
    LowRank,
    ModuleHead,
    OutputHead,
    fused_token_logp,
    fused_token_loss,
    fused_token_stats,
    head_logits,
)
from tests.kl.fused.cases import make

CASE = make()


def test_tensors_on_another_device_are_refused_before_their_memory_is_read():
    """One thread's products go by address: weights on a GPU, or none at all, were a crash."""
    policy, head, ref, ref_head, tokens = CASE.positional
    for arguments, who in (
        ((policy, head.to("meta"), ref, ref_head, tokens), "policy"),
        ((policy, head, ref, ref_head.to("meta"), tokens), "ref"),
        ((policy, head, ref.to("meta"), ref_head, tokens), "ref"),
        ((policy, ModuleHead(nn.Linear(7, 101, device="meta"), 101), ref, ref_head, tokens), "pol"),
    ):
        with pytest.raises(ValueError, match=rf"{who}.* are on meta and tokens on cpu: bring all"):
            fused_token_stats(*arguments)
        with pytest.raises(ValueError, match=rf"{who}.* are on meta and tokens on cpu: bring all"):
            fused_token_loss(lambda stats: stats.kl.sum(), *arguments)
    with pytest.raises(ValueError, match="tensors are on meta"):
        fused_token_stats(*(x.to("meta") for x in CASE.positional))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"scale": torch.tensor(0.5, requires_grad=True)}, "policy_head.scale"),
        ({"softcap": torch.tensor(9.0, requires_grad=True)}, "policy_head.softcap"),
        (
            {
                "adapters": (
                    LowRank(
                        torch.ones(2, 7),
                        torch.ones(101, 2),
                        scale=torch.tensor(0.5, requires_grad=True),  # pyright: ignore[reportArgumentType]
                    ),
                )
            },
            "policy_head.adapters' scale",
        ),
    ],
    ids=["scale", "softcap", "adapter"],
)
def test_a_learned_factor_of_the_logits_would_get_no_gradient(changes, name):
    head = OutputHead(CASE.policy_head, **changes)
    with pytest.raises(ValueError, match=f"{name} is torch.float.* that requires a gradient: pass"):
        fused_token_logp(CASE.policy_hidden, head, CASE.tokens)


@pytest.mark.parametrize(
    "temperature", [torch.ones(29), torch.tensor(0.7, requires_grad=True), "1"], ids=repr
)
def test_the_temperature_is_one_number(temperature):
    with pytest.raises(ValueError, match=r"temperature is .*: pass a number"):
        fused_token_stats(*CASE.positional, temperature=temperature)
    constant = fused_token_stats(*CASE.positional, temperature=torch.tensor(0.7))  # pyright: ignore[reportArgumentType]
    assert torch.equal(constant.kl, fused_token_stats(*CASE.positional, temperature=0.7).kl)


def test_whole_logits_take_a_bare_weight_as_the_fused_functions_do():
    hidden, head = CASE.policy_hidden, CASE.policy_head
    assert torch.equal(head_logits(head, hidden), head_logits(OutputHead(head), hidden))
    with pytest.raises(ValueError, match="head is Linear: pass its weight"):
        head_logits(nn.Linear(7, 101), hidden)  # pyright: ignore[reportArgumentType]
