"""Scaled, soft-capped, low-rank and other heads against autograd on whole logits."""

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
    get_divergence,
    head_logits,
    reverse_kl,
)
from tests.kl.fused.cases import assert_close, gradients, make, weights


def normal(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def policy_head(kind: str, case) -> OutputHead:
    adapters = (
        LowRank(normal(2, 7), normal(101, 2, seed=4), 0.5),
        LowRank(normal(3, 7, seed=5), normal(101, 3, seed=6), 2.0),
    )
    return {
        "scale": OutputHead(case.policy_head, case.policy_bias, scale=0.25),
        "softcap": OutputHead(case.policy_head, case.policy_bias, softcap=3.0),
        "both": OutputHead(case.policy_head, case.policy_bias, scale=-0.5, softcap=2.0),
        "lora": OutputHead(case.policy_head, adapters=adapters),
        "all": OutputHead(case.policy_head, case.policy_bias, 0.5, 4.0, adapters),
    }[kind]


def tensors_of(head: OutputHead) -> list[torch.Tensor]:
    parts = [head.weight, head.bias, *(x for adapter in head.adapters for x in adapter[:2])]
    return [x for x in parts if x is not None]


def with_gradients(head: OutputHead) -> OutputHead:
    def leaf(x):
        return None if x is None else x.detach().clone().requires_grad_()

    adapters = tuple(LowRank(leaf(a), leaf(b), s) for a, b, s in head.adapters)
    return head._replace(weight=leaf(head.weight), bias=leaf(head.bias), adapters=adapters)


def loss_of(stats, u, v, w):
    return (u * stats.policy_logp.exp() + v * stats.kl + w * stats.entropy).sum()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vocab_size", [None, 97])
@pytest.mark.parametrize("kind", ["scale", "softcap", "both", "lora", "all"])
def test_heads_have_the_statistics_and_gradients_of_their_logits(kind, vocab_size):
    case, w, temperature = make(), weights(29), 0.7
    vocab = vocab_size or 101
    case = case._replace(tokens=case.tokens.clamp(max=vocab - 1))
    ref = OutputHead(case.ref_head, case.ref_bias, scale=0.5, softcap=5.0)
    ref_logits = head_logits(ref, case.ref_hidden)[:, :vocab] / temperature

    head, hidden = with_gradients(policy_head(kind, case)), case.policy_hidden.requires_grad_()
    leaves = [hidden, *tensors_of(head)]
    policy_logits = head_logits(head, hidden)[:, :vocab] / temperature
    logp = policy_logits.log_softmax(-1)
    u, v, x = w
    token_logp = logp.gather(1, case.tokens[:, None])[:, 0]
    kl, entropy = reverse_kl(policy_logits, ref_logits), -(logp.exp() * logp).sum(-1)
    expected = gradients((u * token_logp.exp() + v * kl + x * entropy).sum(), leaves)

    inputs = (hidden, head, case.ref_hidden, ref, case.tokens)
    options = {"temperature": temperature, "vocab_size": vocab_size, "chunk_size": 8}
    stats = fused_token_stats(*inputs, **options)
    assert_close((stats.policy_logp, stats.kl, stats.entropy), (token_logp, kl, entropy), 1e-9, 0)
    assert_close(gradients(loss_of(stats, *w), leaves), expected, 1e-8, 1e-10)
    loss, _ = fused_token_loss(loss_of, *inputs, *w, **options)
    assert_close(gradients(loss, leaves), expected, 1e-8, 1e-10)


def test_a_capped_head_has_the_gradient_of_every_divergence():
    case = make()
    head = with_gradients(policy_head("all", case))
    leaves = tensors_of(head)
    ref = OutputHead(case.ref_head)
    for name in ("fkl", "js", "akl"):
        divergence = get_divergence(name)
        dense = divergence(head_logits(head, case.policy_hidden), head_logits(ref, case.ref_hidden))
        fused = fused_token_stats(
            case.policy_hidden, head, case.ref_hidden, ref, case.tokens, divergence=divergence
        ).kl
        torch.testing.assert_close(fused, dense)
        assert_close(gradients(fused.sum(), leaves), gradients(dense.sum(), leaves), 1e-8, 1e-10)


def test_a_frozen_weight_below_lora_gets_no_gradient_and_16_bit_factors_keep_their_type():
    case = make()
    head = policy_head("lora", case)._replace(weight=case.policy_head.to(torch.bfloat16))
    adapters = tuple(
        LowRank(a.float().requires_grad_(), b.to(torch.bfloat16).requires_grad_(), s)
        for a, b, s in head.adapters
    )
    head = head._replace(adapters=adapters)
    hidden = case.policy_hidden.to(torch.bfloat16)
    ref = case.ref_hidden.float(), case.ref_head.float()
    kl = fused_token_stats(hidden, head, *ref, case.tokens).kl
    assert kl.dtype == torch.float32
    kl.sum().backward()
    assert [x.grad.dtype for x in adapters[0][:2]] == [torch.float32, torch.bfloat16]
    assert head.weight.grad is None


class Bottleneck(nn.Module):
    """Not linear."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(7, 4), nn.Linear(4, 101)

    def forward(self, hidden):
        return self.outer(torch.tanh(self.inner(hidden)))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_any_module_can_be_a_head(softcap):
    torch.manual_seed(0)
    case, w = make(), weights(29)
    head = ModuleHead(Bottleneck(), 101, scale=3.0, softcap=softcap)
    head.module.outer.bias.requires_grad_(False)
    trained = [x for x in head.module.parameters() if x.requires_grad]
    hidden = case.policy_hidden.requires_grad_()
    leaves = [hidden, *trained]
    logits = head_logits(head, hidden)
    assert logits.shape == (29, 101)
    kl = reverse_kl(logits, case.ref_hidden @ case.ref_head.T)
    expected = gradients((w[0] * kl).sum(), leaves)
    inputs = (hidden, head, case.ref_hidden, case.ref_head, case.tokens)
    stats = fused_token_stats(*inputs, chunk_size=10)
    torch.testing.assert_close(stats.kl, kl)
    assert_close(gradients((w[0] * stats.kl).sum(), leaves), expected, 1e-8, 1e-10)
    loss, _ = fused_token_loss(lambda stats, w: (w * stats.kl).sum(), *inputs, w[0], chunk_size=10)
    assert_close(gradients(loss, leaves), expected, 1e-8, 1e-10)
    as_reference = fused_token_stats(hidden, head, hidden, head, case.tokens)
    assert (as_reference.kl == 0).all()


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_a_module_in_16_bits_takes_hidden_states_of_any_precision(hidden_dtype):
    torch.manual_seed(0)
    case, module = make(), Bottleneck().bfloat16()
    head = ModuleHead(module, 101)
    hidden = case.policy_hidden.to(torch.bfloat16)
    expected = module(hidden)
    hidden = hidden.to(hidden_dtype).requires_grad_()
    assert (head_logits(head, hidden) == expected).all()
    stats = fused_token_logp(hidden, head, case.tokens, chunk_size=10)
    assert stats.policy_logp.dtype == torch.float32
    logp = expected.float().log_softmax(-1).gather(1, case.tokens[:, None])[:, 0]
    torch.testing.assert_close(stats.policy_logp, logp)
    (gradient,) = torch.autograd.grad(stats.policy_logp.sum(), hidden)
    assert gradient.dtype == hidden_dtype
    assert (gradient != 0).any()


def test_heads_that_do_not_fit_are_refused_by_name():
    case = make()
    bad = {
        r"policy_head.scale=0": OutputHead(case.policy_head, scale=0.0),
        r"policy_head.softcap=-1": OutputHead(case.policy_head, softcap=-1.0),
        r"policy_head.adapters\[0\]": OutputHead(
            case.policy_head, adapters=(LowRank(normal(2, 8), normal(101, 2)),)
        ),
        r"policy_hidden has shape": OutputHead(case.policy_head[:, :3]),
    }
    for message, head in bad.items():
        with pytest.raises(ValueError, match=message):
            fused_token_stats(case.policy_hidden, head, case.ref_hidden, case.ref_head, case.tokens)
    with pytest.raises(ValueError, match="policy_bias is given beside"):
        fused_token_stats(
            case.policy_hidden,
            OutputHead(case.policy_head),
            case.ref_hidden,
            case.ref_head,
            case.tokens,
            policy_bias=case.policy_bias,
        )
