"""Chunked divergences against the same formulas on the whole logits."""

import pytest
import torch
from torch import Tensor

from rlkl.kl import DIVERGENCES, head_tail_gaps
from rlkl.kl.chunked import chunked_token_loss, divergence_stats

N, H, G, V = 7, 5, 4, 11


def inputs(padding: tuple[int, int] = (0, 0)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads = {
        "student_hidden": draw(N, H),
        "student_head": draw(V, H),
        "student_bias": draw(V),
        "teacher_hidden": draw(N, G),
        "teacher_head": draw(V, G),
        "teacher_bias": draw(V),
    }
    for name, extra in zip(("student", "teacher"), padding, strict=True):
        width = heads[f"{name}_head"].shape[1]
        heads[f"{name}_head"] = torch.cat([heads[f"{name}_head"], 9 + draw(extra, width)])
        heads[f"{name}_bias"] = torch.cat([heads[f"{name}_bias"], 9 + draw(extra)])
    return heads | {"tokens": torch.randint(V, (N,), generator=generator)}


def whole_logits(given: dict[str, Tensor], model: str) -> Tensor:
    return given[f"{model}_hidden"] @ given[f"{model}_head"][:V].T + given[f"{model}_bias"][:V]


def positional(given: dict[str, Tensor]) -> list[Tensor]:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "tokens")
    return [given[name] for name in names]


def biases(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name] for name in ("student_bias", "teacher_bias")}


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_loss_and_gradients_are_those_of_the_whole_logits(name, chunk_size):
    given, weight, divergence = inputs(), torch.rand(N), DIVERGENCES[name]
    student = [x.requires_grad_() for n, x in given.items() if n.startswith("student")]

    def loss_fn(stats, weight):
        return (weight * (0.7 * 4 * stats.kl - 0.3 * stats.policy_logp)).sum()

    logits = whole_logits(given, "student") / 2, whole_logits(given, "teacher") / 2
    cross_entropy = torch.nn.functional.cross_entropy(logits[0], given["tokens"], reduction="none")
    expected = (weight * (0.7 * 4 * divergence(*logits) + 0.3 * cross_entropy)).sum()
    loss, stats = chunked_token_loss(
        loss_fn,
        *positional(given),
        weight,
        divergence=divergence,
        temperature=2.0,
        chunk_size=chunk_size,
        **biases(given),
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats.kl, divergence(*logits).detach())
    torch.testing.assert_close(
        torch.autograd.grad(3 * loss, student), torch.autograd.grad(3 * expected, student)
    )
    assert not any(x.requires_grad for x in stats)


def test_without_gradient_only_the_value_is_computed():
    given = inputs()
    given["student_head"].requires_grad_()
    arguments = [lambda stats: stats.kl.sum(), *positional(given)]
    with torch.no_grad():
        value, _ = chunked_token_loss(*arguments, divergence=DIVERGENCES["akl"], **biases(given))
    loss, _ = chunked_token_loss(*arguments, divergence=DIVERGENCES["akl"], **biases(given))
    assert loss.requires_grad
    assert not value.requires_grad
    torch.testing.assert_close(value, loss)


def test_every_divergence_is_measured_on_the_same_positions():
    given = inputs()
    student, teacher = whole_logits(given, "student"), whole_logits(given, "teacher")
    stats = divergence_stats(
        *positional(given), DIVERGENCES, chunk_size=3, head_mass=0.7, **biases(given)
    )
    assert list(stats.divergences) == list(DIVERGENCES)
    for name, divergence in DIVERGENCES.items():
        torch.testing.assert_close(stats.divergences[name], divergence(student, teacher))
    expected = head_tail_gaps(student, teacher, head_mass=0.7)
    torch.testing.assert_close(stats.gaps, expected)
    tokens = given["tokens"][:, None]
    expected = teacher.log_softmax(-1).gather(1, tokens)[:, 0]
    torch.testing.assert_close(stats.teacher_logp, expected)
    entropy = torch.distributions.Categorical(logits=student).entropy()
    torch.testing.assert_close(stats.student_entropy, entropy)


@pytest.mark.parametrize("padding", [(3, 0), (0, 2), (3, 3)])
def test_rows_that_pad_the_vocabulary_do_not_count(padding):
    plain, padded = inputs(), inputs(padding)
    for model in ("student", "teacher"):  # the same real rows, and others after them
        for part in ("head", "bias"):
            padded[f"{model}_{part}"][:V] = plain[f"{model}_{part}"]
            padded[f"{model}_hidden"], padded["tokens"] = plain[f"{model}_hidden"], plain["tokens"]
    expected = divergence_stats(*positional(plain), DIVERGENCES, **biases(plain))
    found = divergence_stats(*positional(padded), DIVERGENCES, vocab_size=V, **biases(padded))
    torch.testing.assert_close(found, expected)


def test_padded_vocabularies_are_refused_by_name_and_too_large_ones_too():
    given = inputs((3, 0))
    with pytest.raises(ValueError, match="student_head has 14 rows, teacher_head 11: pass vocab"):
        divergence_stats(*positional(given), DIVERGENCES)
    with pytest.raises(ValueError, match="vocab_size=12: the smaller head has 11 rows"):
        divergence_stats(*positional(given), DIVERGENCES, vocab_size=12)


def test_a_loss_that_is_no_sum_is_refused():
    given = inputs()
    with pytest.raises(ValueError, match=r"loss_fn returned shape \(7,\)"):
        chunked_token_loss(
            lambda stats: stats.kl, *positional(given), divergence=DIVERGENCES["fkl"]
        )
