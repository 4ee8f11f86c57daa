"""Replay: prompt and completion pairs that were sampled elsewhere, from a jsonl file.

One object a line:

    prompt          text, or prompt_ids: token ids, used as they are
    completion      text, or completion_ids: token ids, with the end-of-text token if it was drawn
    logprobs        optional: the sampler's log-probability of each token of the completion
    logprob         optional, instead: that of the whole completion
    finish_reason   optional: "stop" if the text ended by itself (its end-of-text token is then part
                    of the completion), anything else if it was cut

Text is tokenized here, which need not give back the tokens that were sampled; ids are exact. With
log-probs the responses are weighted to stand for the policy's (`rlkl.kl.off_policy`); without, they
are taken as sampled from the policy at the stated temperature, without top-k or top-p. Log-probs
must be those of the distribution that was sampled: after temperature and filters, not before.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from rlkl.data import check_text
from rlkl.evaluation.kl_estimate.draws import Draws, check_length, check_positive
from rlkl.models import ModelPair
from rlkl.models.tokenizers import padding_id
from rlkl.rollout import Responses, encode_prompts


@dataclass(frozen=True)
class Completion:
    """One line of the file, tokenized."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    ended: bool
    logprobs: list[float] | None
    logprob: float | None

    @property
    def log_prob_kind(self) -> Literal["token", "response", "none"]:
        """What is known of the sampler."""
        if self.logprobs is not None:
            return "token"
        return "none" if self.logprob is None else "response"


class ReplayedResponses:
    """The pairs of a file in their order; the whole file is checked before anything is scored.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: a line that is no pair, says which and why; a file without lines, or some lines
            with log-probs and some without.
    """

    def __init__(self, pair: ModelPair, path: str | Path, *, batch_size: int) -> None:
        check_positive(batch_size=batch_size)
        self.pair, self.path, self.batch_size = pair, Path(path), batch_size
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file of completions: {path}")
        self._pad = padding_id(pair.tokenizer)
        self._numbers: dict[bytes, int] = {}
        self.limit = self.max_tokens = longest = unknown = 0
        kinds: dict[str, int] = {}
        for line, completion in enumerate(self._completions(), 1):
            self._numbers.setdefault(_key(completion), len(self._numbers))
            self.limit += 1
            self.max_tokens = max(self.max_tokens, len(completion.ids))
            longest = max(longest, len(completion.prompt_ids) + len(completion.ids))
            unknown += not completion.ended
            kinds.setdefault(completion.log_prob_kind, line)
        if self.limit == 0:
            raise ValueError(f"{path} holds no completions")
        if len(kinds) > 1:
            raise ValueError(
                f"{path} mixes kinds of log-probs ({', '.join(kinds)}; first seen on rows "
                f"{', '.join(map(str, kinds.values()))}): every row needs the same"
            )
        check_length(pair, longest, f"the longest pair of {path}")
        self.num_prompts, self.log_prob_kind = len(self._numbers), next(iter(kinds))
        self.notes = self._notes(unknown)

    def _notes(self, unknown: int) -> tuple[str, ...]:
        assumed = {
            "none": "No log-probs were given: the completions are taken as sampled from the "
            "policy at this temperature, without top-k or top-p. If another model or setting "
            "sampled them, these numbers are not the KL.",
            "token": "Completions are weighted by policy over sampler, token by token, from the "
            "log-probs given.",
            "response": "Completions are weighted by policy over sampler as a whole: log-probs per "
            "token would give less noise.",
        }[self.log_prob_kind]
        notes = [assumed]
        if unknown:
            notes.append(
                f"{unknown} of {self.limit} completions do not end in an end-of-text token: they "
                "are taken as cut, and the KL of stopping there is not counted."
            )
        return tuple(notes)

    def batches(self) -> Iterator[Draws]:
        """The file again, `batch_size` pairs at a time."""
        seen = [0] * self.num_prompts
        rows: list[Completion] = []
        for completion in self._completions():
            rows.append(completion)
            if len(rows) == self.batch_size:
                yield self._draws(rows, seen)
                rows = []
        if rows:
            yield self._draws(rows, seen)

    def _draws(self, rows: list[Completion], seen: list[int]) -> Draws:
        numbers = [self._numbers[_key(row)] for row in rows]
        repetitions = []
        for number in numbers:
            repetitions.append(seen[number])
            seen[number] += 1
        device = next(self.pair.policy.model.parameters()).device
        prompt_ids, prompt_mask = _padded([row.prompt_ids for row in rows], self._pad, left=True)
        tokens, mask = _padded([row.ids for row in rows], self._pad, left=False)
        kind = rows[0].log_prob_kind
        token_logp = torch.zeros(mask.shape, dtype=torch.float64)
        if kind == "token":
            token_logp[mask] = torch.tensor(
                [x for row in rows for x in row.logprobs or []], dtype=torch.float64
            )
        responses = Responses(
            prompts=[row.prompt for row in rows],
            texts=self.pair.tokenizer.batch_decode(
                [row.ids for row in rows], skip_special_tokens=True
            ),
            prompt_ids=prompt_ids.to(device),
            prompt_mask=prompt_mask.to(device),
            tokens=tokens.to(device),
            mask=mask.to(device),
            ended=torch.tensor([row.ended for row in rows], device=device),
        )
        return Draws(
            responses,
            torch.tensor(numbers),
            torch.tensor(repetitions),
            sampler_logp=token_logp if kind == "token" else None,
            sampler_response_logp=torch.tensor([row.logprob for row in rows], dtype=torch.float64)
            if kind == "response"
            else None,
        )

    def _completions(self) -> Iterator[Completion]:
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        try:
                            yield self._read(line)
                        except ValueError as error:
                            raise ValueError(f"{self.path}, line {number}: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not text in UTF-8 ({error}): convert it") from error

    @lru_cache(maxsize=4096)  # noqa: B019 (a source lives as long as its run)
    def _encoded(self, prompt: str) -> list[int]:
        return encode_prompts(self.pair.tokenizer, [prompt])[0][0].tolist()

    def _read(self, line: str) -> Completion:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}; give one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"no JSON object but {line.strip():.40}; give one object a line")
        if row.get("logprobs") is not None and row.get("logprob") is not None:
            raise ValueError("has logprobs and logprob: give one of them")
        tokenizer, vocab = self.pair.tokenizer, len(self.pair.tokenizer)
        if "prompt_ids" in row:
            prompt_ids = _ids(row, "prompt_ids", vocab)
            prompt = str(tokenizer.decode(prompt_ids, skip_special_tokens=True))
        else:
            prompt = _text(row, "prompt")
            prompt_ids = self._encoded(prompt)
        if not prompt_ids:
            raise ValueError("the prompt is empty; it needs at least one token")
        eos = tokenizer.eos_token_id
        stopped = row.get("finish_reason") == "stop"
        if "completion_ids" in row:
            ids = _ids(row, "completion_ids", vocab)
        else:
            ids = tokenizer(_text(row, "completion"), add_special_tokens=False)["input_ids"]
            if stopped and ids[-1:] != [eos]:
                ids = [*ids, eos]
        if not ids:
            raise ValueError("the completion is empty; it needs at least one token")
        return Completion(
            prompt=prompt,
            prompt_ids=prompt_ids,
            ids=ids,
            ended=stopped or ids[-1] == eos,
            logprobs=_logprobs(row, len(ids)),
            logprob=_number(row["logprob"], "logprob") if row.get("logprob") is not None else None,
        )


def _key(completion: Completion) -> bytes:
    """Tells prompts apart in 16 bytes."""
    return hashlib.blake2b(str(completion.prompt_ids).encode(), digest_size=16).digest()


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"has {', '.join(row) or 'nothing'}, but neither {name} nor {name}_ids")
    check_text(row[name], name)
    return row[name]


def _ids(row: dict[str, Any], name: str, vocab: int) -> list[int]:
    ids = row[name]
    if not isinstance(ids, list) or not all(type(x) is int and 0 <= x < vocab for x in ids):
        raise ValueError(f"{name} must be a list of token ids from 0 to {vocab - 1}")
    return ids


def _logprobs(row: dict[str, Any], length: int) -> list[float] | None:
    values = row.get("logprobs")
    if values is None:
        return None
    if not isinstance(values, list):
        raise ValueError("logprobs must be a list, one number per token of the completion")
    if len(values) != length:
        raise ValueError(
            f"logprobs has {len(values)} numbers for {length} tokens; give completion_ids, since "
            "tokenizing a text need not give back the tokens that were sampled"
        )
    return [_number(x, "logprobs") for x in values]


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value > 1e-6:
        raise ValueError(f"{name} holds {value!r}; log-probabilities are finite and at most 0")
    return float(value)


def _padded(rows: list[list[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = True
    return ids, mask
