"""The KL between two tiny models against enumeration, and what it must not depend on."""

import copy
import math
import pickle
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import t as student_t

from rlkl.evaluation import estimate_kl
from rlkl.evaluation.kl_estimate import (
    Estimand,
    KLEstimation,
    ReplayedResponses,
    SampledResponses,
    Settings,
)
from rlkl.kl import ESTIMATORS, RESPONSE_ESTIMATORS, reverse_kl
from rlkl.models import ModelPair

PROMPTS = ["red", "green blue red", "blue green", "green"]
T = 3


def estimation(policy, ref, tokenizer, limit: int, **settings) -> KLEstimation:
    pair = ModelPair.of(policy, ref, tokenizer)
    source = SampledResponses(
        pair, PROMPTS, limit=limit, max_new_tokens=T, temperature=1.0, seed=0, batch_size=64
    )
    return KLEstimation(pair, source, Settings(**settings))


# --- the draws ----------------------------------------------------------------------------------


def test_every_seed_draws_other_responses(policy, ref, colours):
    pair = ModelPair.of(policy, ref, colours)

    def drawn(seed: int) -> str:
        source = SampledResponses(
            pair, ["red"], limit=64, max_new_tokens=T, temperature=1.0, seed=seed, batch_size=64
        )
        return str([draws.responses.tokens.tolist() for draws in source.batches()])

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(0, 1024, 16)}) == 64


def test_a_prompt_that_the_list_repeats_is_one_prompt(policy, ref, colours):
    pair = ModelPair.of(policy, ref, colours)
    source = SampledResponses(
        pair, ["red", "green"] * 5, limit=20, max_new_tokens=T, temperature=1.0, seed=0,
        batch_size=8,
    )  # fmt: skip
    seen: dict[str, list[tuple[int, int]]] = {"red": [], "green": []}
    for draws in source.batches():
        pairs = zip(draws.prompt.tolist(), draws.repetition.tolist(), strict=True)
        for prompt, place in zip(draws.responses.prompts, pairs, strict=True):
            seen[prompt].append(place)
    assert source.num_prompts == 2
    assert sorted(seen.values()) == [[(number, i) for i in range(10)] for number in range(2)]


# --- the value ----------------------------------------------------------------------------------


def test_unbiased_estimators_agree_with_enumeration_and_the_biased_do_not(
    policy, ref, colours, enumerated_kl
):
    """The estimand is the mean over the four prompts. Five standard errors, 0.6 in a million."""
    report = estimate_kl(
        policy,
        ref,
        colours,
        PROMPTS,
        num_samples=4096,
        max_new_tokens=T,
        batch_size=512,
        estimand="given_prompts",
    )
    truth = enumerated_kl(policy, ref, PROMPTS, T)
    assert set(report.estimators) == set(ESTIMATORS) | set(RESPONSE_ESTIMATORS)
    for name, e in report.estimators.items():
        off = abs(e.nats_per_response - truth) / e.stderr if e.stderr > 0 else 0.0
        if e.unbiased:
            assert off < 5, name
        assert e.n == 4096
    assert abs(report.estimators["k2"].nats_per_response - truth) > (
        5 * report.estimators["k2"].stderr
    )
    assert report.best == report.estimators["rb"]
    assert report.best.stderr < report.estimators["k1"].stderr


def test_per_token_times_mean_length_is_per_response(policy, ref, colours):
    report = estimate_kl(policy, ref, colours, PROMPTS, num_samples=64, max_new_tokens=T)
    for e in report.estimators.values():
        whole = e.nats_per_token * report.tokens / report.n
        assert whole == pytest.approx(e.nats_per_response, abs=1e-12)


@pytest.mark.parametrize("padded", ["policy", "ref_model"])
def test_rows_beyond_the_tokenizer_count_for_neither_model(padded, policy, ref, colours):
    models = {"policy": policy, "ref_model": ref}
    settings = {"num_samples": 32, "max_new_tokens": T}
    plain = estimate_kl(**models, tokenizer=colours, prompts=PROMPTS, **settings)
    wide = copy.deepcopy(models[padded])
    wide.resize_token_embeddings(9, mean_resizing=False)
    with torch.no_grad():
        wide.get_input_embeddings().weight[4:] = 2.0
    report = estimate_kl(**models | {padded: wide}, tokenizer=colours, prompts=PROMPTS, **settings)
    for name, e in report.estimators.items():
        expected = plain.estimators[name].nats_per_response
        assert e.nats_per_response == pytest.approx(expected, rel=1e-4), name
    assert "rows beyond are padding" in report.notes[0]
    assert len(wide.get_output_embeddings().weight) == 9  # the caller's model is as it was


def test_a_head_without_a_row_for_every_token_is_refused(ref, make_lm, colours):
    with pytest.raises(ValueError, match="a head has 3 rows for the 4 tokens"):
        estimate_kl(make_lm(vocab_size=3), ref, colours, PROMPTS)


def test_a_model_has_kl_exactly_zero_from_itself(policy, colours):
    report = estimate_kl(policy, policy, colours, PROMPTS, num_samples=64, max_new_tokens=T)
    for e in report.estimators.values():
        assert e.nats_per_response == 0.0
        assert e.stderr == 0.0
    assert report.top_tokens == []
    assert report.profile.kl == [0.0] * T


def test_a_tiny_kl_keeps_three_digits_in_float32(make_lm, tokenizer):
    """About 1e-6 nats per response, against the same responses in float64."""
    policy, other = make_lm(seed=3), make_lm(seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        other.transformer.ln_f.bias += 4.5e-4 * torch.randn(32, generator=generator)
    words = ["the film", "it was", "a plot and"]
    report = estimate_kl(policy, other, tokenizer, words, num_samples=48, max_new_tokens=8)

    pair = ModelPair.of(policy, other, tokenizer)
    source = SampledResponses(
        pair, words, limit=48, max_new_tokens=8, temperature=1.0, seed=0, batch_size=64
    )
    responses = next(source.batches()).responses
    p, q = (
        model.double()(
            responses.input_ids,
            attention_mask=responses.attention_mask.long(),
            position_ids=(responses.attention_mask.long().cumsum(1) - 1).clamp(min=0),
        ).logits[:, responses.prompt_ids.shape[1] - 1 : -1]
        for model in (policy, other)
    )
    truth = float((reverse_kl(p, q).detach() * responses.mask).sum() / 48)
    assert 3e-7 < truth < 3e-6
    assert report.best.nats_per_response == pytest.approx(truth, rel=5e-4)


# --- errors -------------------------------------------------------------------------------------


def test_more_responses_to_the_same_prompts_do_not_shrink_the_error_over_prompts(
    policy, ref, colours
):
    """At temperature 0 all responses to a prompt are one: four times as many tell nothing new."""
    settings = {"max_new_tokens": T, "temperature": 1e-4}
    once = estimate_kl(policy, ref, colours, PROMPTS, num_samples=4, **settings)
    often = estimate_kl(policy, ref, colours, PROMPTS, num_samples=16, **settings)
    given = estimate_kl(
        policy, ref, colours, PROMPTS, num_samples=16, estimand="given_prompts", **settings
    )
    assert often.estimators["k1"].stderr == pytest.approx(once.estimators["k1"].stderr)
    assert often.estimators["k1"].stderr > 0
    assert given.estimators["k1"].stderr == pytest.approx(0, abs=1e-9)


def test_sampling_goes_on_until_the_error_is_small_enough_or_the_limit_is_reached(
    policy, ref, colours
):
    settings = {"max_new_tokens": T, "estimand": "given_prompts", "num_samples": 64}
    first = estimate_kl(policy, ref, colours, PROMPTS, **settings)
    wanted = first.estimators["rb"].stderr / 2
    reached = estimate_kl(policy, ref, colours, PROMPTS, target_stderr=wanted, **settings)
    assert reached.estimators["rb"].stderr <= wanted
    assert 64 < reached.n < 64 * 16
    assert not any("not yet" in note for note in reached.notes)
    stopped = estimate_kl(
        policy, ref, colours, PROMPTS, target_stderr=wanted / 1e6, max_samples=128, **settings
    )
    assert stopped.n == 128
    settings["num_samples"] = 256
    at_once = estimate_kl(
        policy, ref, colours, PROMPTS, target_stderr=wanted / 1e6, max_samples=100, **settings
    )
    assert at_once.n == 100
    assert any("not yet" in note for note in stopped.notes)


@torch.no_grad()
def context_free(model, logits: list[float]) -> None:
    """Gives every prefix these logits."""
    model.transformer.ln_f.weight.zero_()
    model.transformer.ln_f.bias.copy_(torch.eye(32)[0])
    model.lm_head.weight[:, 0] = torch.tensor(logits)


def test_a_policy_that_never_draws_what_the_reference_says_is_warned_of(policy, ref, colours):
    """All weights q/π are equally near 0, so that their effective sample size sees nothing."""
    settings = {"num_samples": 128, "max_new_tokens": T}
    fine = estimate_kl(policy, ref, colours, PROMPTS, **settings)
    assert not any("1 in the mean" in note for note in fine.notes)
    context_free(policy, [0.0, 20.0, 0.0, 0.0])
    context_free(ref, [0.0, -3.0, 0.0, 0.0])
    report = estimate_kl(policy, ref, colours, PROMPTS, **settings)
    assert report.ess_ref == pytest.approx(128)
    for name, note in (("cv", "cv and cv_fitted rest on"), ("k3", "k3 rests on")):
        off = report.estimators[name].nats_per_response - report.best.nats_per_response
        assert off < -0.9
        (warning,) = (n for n in report.notes if n.startswith(note))
        assert f"miss that by {off:.3g}" in warning


# --- what it does not depend on -----------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_samples(policy, ref, colours):
    run = estimation(policy, ref, colours, limit=64 * 20)
    sizes = []
    while not run.done:
        run.step()
        sizes.append(len(pickle.dumps((run.accumulator, run.vocabulary.contribution))))
    assert len(sizes) == 20
    assert len(run.samples) == 8
    assert len(run.vocabulary.contexts) <= 10
    assert max(sizes[1:]) - min(sizes[1:]) < 64  # counts of more digits


def test_a_report_can_be_had_at_any_time(policy, ref, colours):
    run = estimation(policy, ref, colours, limit=128)
    with pytest.raises(ValueError, match="no response yet"):
        run.report()
    run.step()
    assert run.report(interrupted=True).n == 64
    assert run.report(interrupted=True).interrupted
    run.step()
    assert run.done
    assert run.report().n == 128


def test_an_adapter_switched_off_is_the_base(policy, colours, make_lm):
    adapted = get_peft_model(
        policy,
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    settings = {"num_samples": 64, "max_new_tokens": T}
    switched = estimate_kl(adapted, None, colours, PROMPTS, **settings)
    base = make_lm(vocab_size=4, seed=3)
    assert switched.best.nats_per_response > 0
    merged = adapted.merge_and_unload()
    apart = estimate_kl(merged, base, colours, PROMPTS, **settings)
    assert apart.best.nats_per_response == pytest.approx(switched.best.nats_per_response, rel=1e-4)


def test_the_models_are_left_in_the_mode_they_were_in(policy, ref, colours):
    policy.train()
    estimate_kl(policy, ref, colours, PROMPTS, num_samples=4, max_new_tokens=T)
    assert policy.training
    assert not ref.training

    def stop(estimation: KLEstimation) -> None:
        assert not policy.training
        raise InterruptedError

    with pytest.raises(InterruptedError):
        estimate_kl(policy, ref, colours, PROMPTS, num_samples=4, max_new_tokens=T, on_batch=stop)
    assert policy.training


# --- where it comes from ------------------------------------------------------------------------


def test_the_profile_adds_up_to_the_kl(policy, ref, colours):
    report = estimate_kl(policy, ref, colours, PROMPTS, num_samples=256, max_new_tokens=T)
    profile = report.profile
    whole = sum(k * share for k, share in zip(profile.kl, profile.responses, strict=True))
    assert whole == pytest.approx(report.best.nats_per_response)
    assert profile.responses[0] == 1.0


def test_tokens_shares_are_the_whole_kl_and_never_negative(policy, ref, colours):
    report = estimate_kl(policy, ref, colours, PROMPTS, num_samples=256, max_new_tokens=T)
    assert sum(token.share for token in report.top_tokens) == pytest.approx(1.0)
    assert sum(token.policy for token in report.top_tokens) == pytest.approx(1.0)
    assert min(token.share for token in report.top_tokens) >= 0


def test_contexts_are_the_prefixes_with_the_largest_kl(policy, ref, colours, enumerated_kl):
    report = estimate_kl(policy, ref, colours, PROMPTS, num_samples=256, max_new_tokens=T)
    values = [context.kl for context in report.contexts]
    assert values == sorted(values, reverse=True)
    there = enumerated_kl(policy, ref, [report.contexts[0].text], 1)
    assert values[0] == pytest.approx(there, rel=1e-4)
    assert len({context.text for context in report.contexts}) == len(values)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_samples": 0}, "num_samples=0: must be at least 1"),
        ({"max_samples": -5}, "max_samples=-5: must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"target_stderr": -1.0}, "target_stderr=-1.0"),
        ({"headline": "k9"}, "headline='k9': use one of k1"),
        ({"max_new_tokens": 100}, "the models take 64 and one"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": "red"}, "prompts is one text, 'red': give a list"),
        ({"prompts": ["red", ""]}, "prompt 1 is empty"),
        ({"prompts": ["red", None]}, "prompt 1 is no text but None"),
        ({"estimand": "everything"}, "everything"),
    ],
)
def test_what_cannot_be_sampled_is_refused(policy, ref, colours, settings, complaint):
    given = {"prompts": PROMPTS, "max_new_tokens": T} | settings
    with pytest.raises(ValueError, match=complaint):
        estimate_kl(policy, ref, colours, **given)


@pytest.mark.parametrize(("new_tokens", "fits"), [(63, True), (64, False)])
def test_the_last_token_needs_no_position(policy, ref, colours, new_tokens, fits):
    """64 positions, and a prompt of two tokens: the end of text that opens it, and its own."""
    settings = {"num_samples": 2, "max_new_tokens": new_tokens}
    if fits:
        assert estimate_kl(policy, ref, colours, ["red"], **settings).n == 2
        return
    with pytest.raises(ValueError, match="makes 66 tokens, but the models take 64 and one to end"):
        estimate_kl(policy, ref, colours, ["red"], **settings)


def test_a_tokenizer_without_pad_token_is_refused_with_the_remedy(policy, ref, colours, tmp_path):
    colours.pad_token = None
    complaint = r"^the tokenizer has no pad token: tokenizer.pad_token = "
    with pytest.raises(ValueError, match=complaint):
        estimate_kl(policy, ref, colours, ["red"], num_samples=2)
    file = tmp_path / "c.jsonl"
    file.write_text('{"prompt_ids": [1], "completion_ids": [2]}')
    with pytest.raises(ValueError, match=complaint):
        ReplayedResponses(ModelPair.of(policy, ref, colours), file, batch_size=1)


def test_a_policy_without_reference_needs_an_adapter(policy, colours):
    with pytest.raises(ValueError, match="needs a ref_model"):
        estimate_kl(policy, None, colours, PROMPTS)


def test_the_estimand_is_named(policy, ref, colours):
    report = estimate_kl(policy, ref, colours, PROMPTS, num_samples=8, max_new_tokens=T)
    assert report.estimand is Estimand.POPULATION
    assert report.units == len(PROMPTS)


def test_intervals_on_heavy_weights_have_as_few_degrees_of_freedom_as_weights_that_count(
    policy, ref, colours
):
    prompts = [" ".join(words) for words in product(["red", "green", "blue"], repeat=4)]
    report = estimate_kl(policy, ref, colours, prompts, num_samples=80, max_new_tokens=T)
    assert report.ess_ref < 79
    for name, freedom in (("rb", 79), ("k1", 79), ("cv", report.ess_ref - 1)):
        estimate = report.estimators[name]
        half = (estimate.ci95[1] - estimate.ci95[0]) / 2
        assert half / estimate.stderr == pytest.approx(student_t.ppf(0.975, freedom), rel=1e-6)
