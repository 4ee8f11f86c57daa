"""Responses follow the policy's distribution; the mask alone says what is real."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rlkl.rollout import encode_prompts, sample_responses
from rlkl.rollout.sampling import _DRAW_BLOCK, _draw, response_texts

PROMPTS = ["the film", "it", "I found this plot and the end", "a plot"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def next_logp(model, tokens: list[int], temperature: float) -> torch.Tensor:
    """Next-token log-probabilities of one unpadded sequence, float64, without a cache."""
    logits = model(torch.tensor([tokens])).logits[0, -1].double()
    return (logits / temperature).log_softmax(-1)


# --- the distribution ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_responses_follow_the_policy_at_its_temperature(make_lm, make_tokenizer, temperature):
    """χ² of all responses of up to two tokens, to a prompt that is left-padded in its batch.

    The bound is the 1 − 1e-6 quantile: with a fixed seed the test is certain, and a new seed would
    fail once in a million times.
    """
    tokenizer = make_tokenizer(["red", "green", "blue"])
    model, count = make_lm(vocab_size=4, seed=3), 1500
    prompts = ["red", "green green blue red"] * count
    responses = sample_responses(
        model,
        tokenizer,
        prompts,
        2,
        temperature=temperature,
        generator=generator(),
        batch_size=1000,
    )
    first = next_logp(model, [0, 1], temperature)
    expected = {(0,): first[0].exp()}
    for a, b in itertools.product(range(1, 4), range(4)):
        expected[a, b] = (first[a] + next_logp(model, [0, 1, a], temperature)[b]).exp()
    seen = dict.fromkeys(expected, 0)
    for row, real in zip(responses.tokens[::2], responses.mask[::2], strict=True):
        seen[tuple(row[real].tolist())] += 1
    statistic = sum((seen[y] - count * p) ** 2 / (count * p) for y, p in expected.items())
    assert sum(seen.values()) == count
    assert float(statistic) < chi2.isf(1e-6, len(expected) - 1)


def test_another_temperature_would_be_noticed(make_lm, make_tokenizer):
    tokenizer, model = make_tokenizer(["red", "green", "blue"]), make_lm(vocab_size=4, seed=3)
    responses = sample_responses(
        model, tokenizer, ["red"] * 4000, 1, temperature=0.5, generator=generator()
    )
    expected = 4000 * next_logp(model, [0, 1], 1.0).exp()
    seen = torch.bincount(responses.tokens[:, 0], minlength=4)
    assert float(((seen - expected).square() / expected).sum()) > chi2.isf(1e-6, 3)


def test_near_temperature_zero_sampling_is_greedy_decoding_without_cache_or_padding(lm, tokenizer):
    responses = sample_responses(
        lm, tokenizer, PROMPTS, 8, temperature=1e-5, generator=generator(), batch_size=3
    )
    for i, prompt in enumerate(PROMPTS):
        sequence = [0, *tokenizer(prompt)["input_ids"]]
        for token in responses.tokens[i][responses.mask[i]].tolist():
            assert token == int(next_logp(lm, sequence, 1.0).argmax())
            sequence.append(token)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(5000, 5)
    assert set(_draw(logits, generator()).tolist()) == {1, 3}


def test_draws_over_several_blocks_of_the_vocabulary_follow_the_softmax():
    vocab, count = 3 * _DRAW_BLOCK + 7, 100_000
    logits = torch.randn(vocab, generator=generator())
    logits[_DRAW_BLOCK : 2 * _DRAW_BLOCK] = -torch.inf  # a block that is never drawn
    logits[-5:] = -torch.inf
    expected = count * logits.double().softmax(-1)
    drawn = _draw(logits.expand(count, vocab), generator())
    seen, possible = torch.bincount(drawn, minlength=vocab), expected > 0
    assert (seen[~possible] == 0).all()
    statistic = ((seen - expected).square() / expected)[possible].sum()
    assert float(statistic) < chi2.isf(1e-6, int(possible.sum()) - 1)


def test_a_draw_inverts_the_distribution_function():
    logits = 3 * torch.randn(50, 500, generator=generator(3))
    uniform = torch.rand(50, 1, generator=generator(4), dtype=torch.double)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform).squeeze(1)
    assert (_draw(logits, generator(4)) == expected).all()


def test_the_generator_is_the_only_source_of_randomness(lm, tokenizer):
    def tokens(seed: int) -> list[list[int]]:
        torch.manual_seed(seed + 100)
        sampled = sample_responses(lm, tokenizer, PROMPTS, 6, generator=generator(seed))
        return sampled.tokens.tolist()

    first = tokens(0)
    torch.manual_seed(5)
    assert (
        sample_responses(lm, tokenizer, PROMPTS, 6, generator=generator(0)).tokens.tolist() == first
    )
    assert tokens(1) != first


# --- the record ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_the_end_of_text_is_real_and_nothing_after_it_is(make_lm, make_tokenizer, pad_is_eos):
    tokenizer = make_tokenizer(["red", "green", "blue"], pad_is_eos=pad_is_eos)
    model = make_lm(vocab_size=len(tokenizer))
    r = sample_responses(model, tokenizer, ["red", "blue red"] * 50, 6, generator=generator())
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert r.ended.any()
    assert not r.ended.all()
    for tokens, mask, ended in zip(r.tokens, r.mask, r.ended, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert (tokens[length:] == pad).all()
        assert eos not in tokens[: length - 1]
        assert (tokens[length - 1] == eos) == ended
        assert ended or length == 6


def test_several_ends_of_text_of_a_chat_model_all_end_a_response(lm, tokenizer):
    lm.generation_config.eos_token_id = [0, 7, 8, 9]
    r = sample_responses(lm, tokenizer, PROMPTS * 25, 6, generator=generator())
    last = r.tokens.gather(1, r.mask.sum(1, keepdim=True) - 1).squeeze(1)
    ends = torch.tensor([0, 7, 8, 9])
    assert set(last[r.ended].tolist()) == {0, 7, 8, 9}
    assert not torch.isin(last[~r.ended], ends).any()


def test_the_record_is_in_the_order_of_the_prompts(lm, tokenizer):
    counts = []
    r = sample_responses(
        lm, tokenizer, PROMPTS, 6, generator=generator(), batch_size=3, on_batch=counts.append
    )
    assert r.prompts == PROMPTS
    assert counts == [3, 1]
    for i, prompt in enumerate(PROMPTS):
        expected = [0, *tokenizer(prompt)["input_ids"]]
        assert r.prompt_ids[i][r.prompt_mask[i]].tolist() == expected
        alone = tokenizer.decode(r.tokens[i][r.mask[i]].tolist(), skip_special_tokens=True)
        assert r.texts[i] == f" {alone}" * bool(alone)
        assert "<eos>" not in r.texts[i]


def test_a_response_reads_as_it_stands_after_its_prompt(make_lm):
    """Llama's decoder drops the space that a text begins with, and a response begins with one."""
    words = ["<unk>", "<eos>", "▁the", "▁film", "▁is", "▁good", "s", "▁"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    strip = decoders.Strip(content=" ", left=1)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), strip])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>"
    )
    prompts = ["the film is", "good"] * 20
    r = sample_responses(make_lm(vocab_size=8), tokenizer, prompts, 3, generator=generator())
    assert any(text.startswith(" ") for text in r.texts)
    assert any(text.startswith("s") for text in r.texts)
    for i, (prompt, text) in enumerate(zip(prompts, r.texts, strict=True)):
        ids = r.input_ids[i][r.attention_mask[i]].tolist()
        assert prompt + text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_response_that_changes_how_its_prompt_reads_is_decoded_alone(make_tokenizer):
    """A prompt that ends with the bytes of é, and a response that begins with half of one."""
    tokenizer = make_tokenizer(["<0xC3>", "<0xA9>", "b"])
    bytes_of = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.backend_tokenizer.decoder = bytes_of
    assert response_texts(tokenizer, [[1, 2], [1, 2]], [[1, 3], [1, 2, 3]]) == ["\ufffdb", "éb"]


def test_input_ids_join_prompt_and_response(lm, tokenizer):
    r = sample_responses(lm, tokenizer, PROMPTS, 6, generator=generator())
    width = r.prompt_ids.shape[1]
    assert torch.equal(r.input_ids[:, :width], r.prompt_ids)
    assert torch.equal(r.input_ids[:, width:], r.tokens)
    assert torch.equal(r.attention_mask[:, width:], r.mask)


def test_rows_keep_every_real_token_and_drop_columns_of_padding(make_lm, make_tokenizer):
    tokenizer = make_tokenizer(["red", "green", "blue"])
    prompts = ["red green blue red", "red", "blue"]
    r = sample_responses(make_lm(vocab_size=4), tokenizer, prompts, 6, generator=generator(4))
    short = r.rows(torch.tensor([2, 1]))
    assert short.prompts == ["blue", "red"]
    assert short.prompt_ids.tolist() == [[0, 3], [0, 1]]
    assert short.mask.any(0).all()
    for ours, row in enumerate([2, 1]):
        assert torch.equal(short.tokens[ours][short.mask[ours]], r.tokens[row][r.mask[row]])
        assert short.ended[ours] == r.ended[row]


def test_a_policy_with_an_adapter_is_sampled_with_it_on(make_lm, tokenizer):
    adapted = get_peft_model(
        make_lm(),
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=generator())
    greedy = {"temperature": 1e-5, "generator": generator()}
    ours = sample_responses(adapted, tokenizer, PROMPTS, 6, **greedy).tokens
    merged = adapted.merge_and_unload()
    assert torch.equal(ours, sample_responses(merged, tokenizer, PROMPTS, 6, **greedy).tokens)
    base = sample_responses(make_lm(), tokenizer, PROMPTS, 6, **greedy).tokens
    assert ours.tolist() != base.tolist()


# --- prompts ------------------------------------------------------------------------------------


def test_prompts_are_opened_by_bos_once_and_padded_on_the_left(tokenizer):
    ids, mask = encode_prompts(tokenizer, ["the film", "<eos>it"])
    the, film, it = tokenizer("the film it")["input_ids"]
    assert ids.tolist() == [[0, the, film], [0, 0, it]]
    assert mask.tolist() == [[True, True, True], [False, True, True]]


def test_a_long_prompt_loses_its_beginning(tokenizer):
    ids, mask = encode_prompts(tokenizer, ["the film was good"], max_length=2)
    assert ids.tolist() == [tokenizer("was good")["input_ids"]]
    assert mask.all()


@pytest.mark.parametrize(
    ("prompts", "complaint"),
    [
        ([], "no prompts"),
        (["the film", ""], "prompt 1 is empty"),
        (["the film", None], "prompt 1 is no text but None"),
        ([[{"role": "user", "content": "hi"}]], "prompt 0 is no text but .*apply_chat_template"),
        ([["the", "film"]], "prompt 0 is no text but"),
    ],
)
def test_nothing_to_go_on_is_refused(tokenizer, prompts, complaint):
    with pytest.raises(ValueError, match=complaint):
        encode_prompts(tokenizer, prompts)
