"""Chunked divergences against the same formulas on the whole logits."""

import pytest
import torch
from torch import Tensor

from rlkl.kl import DIVERGENCES, ModuleHead, OutputHead, head_tail_gaps
from rlkl.kl.chunked import divergence_stats

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


def positional(given: dict[str, Tensor]) -> list:
    parts = []
    for model in ("student", "teacher"):
        parts += [given[f"{model}_hidden"]]
        parts += [OutputHead(given[f"{model}_head"], given[f"{model}_bias"])]
    return [*parts, given["tokens"]]


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_every_divergence_is_measured_on_the_same_positions(chunk_size):
    given = inputs()
    student, teacher = whole_logits(given, "student"), whole_logits(given, "teacher")
    stats = divergence_stats(*positional(given), chunk_size=chunk_size, head_mass=0.7)
    assert list(stats.divergences) == list(DIVERGENCES)
    for name, divergence in DIVERGENCES.items():
        if name.startswith("akl"):
            divergence = divergence.with_settings(head_mass=0.7)
        torch.testing.assert_close(stats.divergences[name], divergence(student, teacher))
    expected = head_tail_gaps(student, teacher, head_mass=0.7)
    torch.testing.assert_close(stats.gaps, expected)
    tokens = given["tokens"][:, None]
    expected = teacher.log_softmax(-1).gather(1, tokens)[:, 0]
    torch.testing.assert_close(stats.teacher_logp, expected)
    entropy = torch.distributions.Categorical(logits=student).entropy()
    torch.testing.assert_close(stats.student_entropy, entropy)


def test_no_tokens_have_empty_divergences_and_a_chunk_of_none_is_refused():
    given = inputs()
    for name in ("student_hidden", "teacher_hidden", "tokens"):
        given[name] = given[name][:0]
    stats = divergence_stats(*positional(given))
    assert list(stats.divergences) == list(DIVERGENCES)
    assert all(x.shape == (0,) for x in [*stats.divergences.values(), *stats.gaps, *stats[2:]])
    with pytest.raises(ValueError, match="chunk_size=0"):
        divergence_stats(*positional(inputs()), chunk_size=0)


@pytest.mark.parametrize("padding", [(3, 0), (0, 2), (3, 3)])
def test_rows_that_pad_the_vocabulary_do_not_count(padding):
    plain, padded = inputs(), inputs(padding)
    for model in ("student", "teacher"):  # the same real rows, and others after them
        for part in ("head", "bias"):
            padded[f"{model}_{part}"][:V] = plain[f"{model}_{part}"]
            padded[f"{model}_hidden"], padded["tokens"] = plain[f"{model}_hidden"], plain["tokens"]
    expected = divergence_stats(*positional(plain))
    found = divergence_stats(*positional(padded), vocab_size=V)
    torch.testing.assert_close(found, expected)


def test_padded_vocabularies_are_refused_by_name_and_too_large_ones_too():
    given = inputs((3, 0))
    with pytest.raises(ValueError, match="student_head has 14 rows, teacher_head 11: pass vocab"):
        divergence_stats(*positional(given))
    with pytest.raises(ValueError, match="vocab_size=12: the smaller head has 11 rows"):
        divergence_stats(*positional(given), vocab_size=12)


def test_heads_in_bfloat16_give_float32_logits_and_any_module_is_a_head():
    given = inputs()
    arguments = positional(given)
    half = [
        x._replace(weight=x.weight.bfloat16(), bias=None)
        if isinstance(x, OutputHead)
        else x.to(torch.float32 if x.is_floating_point() else x.dtype)
        for x in arguments
    ]
    stats = divergence_stats(*half)
    rounded = [given[f"{m}_head"].bfloat16().double() for m in ("student", "teacher")]
    hidden = [given[f"{m}_hidden"].float() for m in ("student", "teacher")]
    logits = [h @ w.float().T for h, w in zip(hidden, rounded, strict=True)]
    torch.testing.assert_close(
        stats.divergences["rkl"], DIVERGENCES["rkl"](*logits).float(), rtol=1e-4, atol=1e-6
    )
    linear = torch.nn.Linear(H, V)
    with torch.no_grad():
        linear.weight.copy_(given["student_head"])
        linear.bias.copy_(given["student_bias"])
    arguments[1] = ModuleHead(linear, V)
    expected = divergence_stats(*positional(given))
    torch.testing.assert_close(divergence_stats(*arguments), expected)
