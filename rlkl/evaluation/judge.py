"""Quality and diversity of responses by a judge model behind an OpenAI-compatible endpoint."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from openai import APIConnectionError, OpenAI, OpenAIError

from rlkl.kl import MeanStderr, mean_and_stderr

JUDGE_PROMPT = Path(__file__).parent / "assets" / "judge_prompt.txt"
"""The shipped prompt; ``{prompt}`` and ``{response}`` are filled in, nothing else is."""

_FIELDS = ("quality", "diversity")


@dataclass(frozen=True)
class Verdict:
    """What a judge said of one response."""

    key: str
    """Digest of model, template, prompt and response: what the verdict is of."""
    quality: int
    """1 to 10."""
    diversity: int
    """1 to 10."""


@dataclass(frozen=True)
class Judgement:
    """The verdicts on a set of responses; None where the judge gave no valid answer."""

    verdicts: list[Verdict | None]

    @property
    def failed(self) -> int:
        """Responses without a valid verdict: left out of the means, so report their number."""
        return sum(verdict is None for verdict in self.verdicts)

    def mean(self, name: str) -> MeanStderr:
        """Mean of "quality" or "diversity" over the valid verdicts, with its standard error.

        Raises:
            ValueError: no verdict is valid.
        """
        scores = [float(getattr(v, name)) for v in self.verdicts if v is not None]
        if not scores:
            raise ValueError(f"the judge gave no valid answer to {len(self.verdicts)} responses")
        return mean_and_stderr(torch.tensor(scores, dtype=torch.float64))


@dataclass
class Judge:
    """Asks a model for the quality and diversity of responses, each from 1 to 10.

    The answer must be one JSON object with exactly the two integers and nothing around it (a code
    fence is allowed); anything else is asked again, `attempts` times in all, and then counts as
    failed. Errors of the connection and of a busy server are retried by the client with a growing
    pause. Every valid verdict is appended to `cache` at once: an interrupted run asks only for what
    is missing when it is started again.

    Raises:
        ValueError: a url of another kind, a template without ``{prompt}`` or ``{response}``, no
            attempts, a cache that holds something else.

    Example:
        judge = Judge("http://localhost:8000/v1", model="my-judge", cache=Path("verdicts.jsonl"))
        judgement = judge(prompts, responses)
        print(judgement.mean("quality"), judgement.failed)
    """

    url: str
    """The endpoint up to and including ``/v1``."""
    model: str
    """The name by which the endpoint knows the judge."""
    api_key: str = field(default="none", repr=False)
    """Local servers ask for none."""
    template: str = field(default_factory=JUDGE_PROMPT.read_text, repr=False)
    """Text with ``{prompt}`` and ``{response}``."""
    cache: Path | None = None
    """A jsonl file of verdicts to go on from."""
    attempts: int = 3
    """Questions for one verdict, while answers do not parse."""
    max_tokens: int = 64
    """Longest answer."""
    timeout: float = 60.0
    """Seconds to wait for one answer."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the judge's url is {self.url!r}: it begins with http:// or https://")
        for name in ("{prompt}", "{response}"):
            if name not in self.template:
                raise ValueError(f"the judge's template lacks {name}")
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; give at least 1")
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
        self._known = self._read_cache()
        self.client = OpenAI(
            base_url=self.url, api_key=self.api_key, timeout=self.timeout, max_retries=4
        )

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        on_verdict: Callable[[int], None] | None = None,
    ) -> Judgement:
        """Verdicts on the responses, in their order.

        Args:
            prompts: what was asked, one for each response.
            responses: what is judged.
            on_verdict: called with 1 after each response, for a progress bar.

        Raises:
            ValueError: prompts and responses do not pair, or the endpoint cannot be reached,
                refuses the request or does not speak the protocol.
        """
        known = self._known
        verdicts: list[Verdict | None] = []
        for prompt, response in zip(prompts, responses, strict=True):
            key = self.key(prompt, response)
            if key not in known:
                verdict = self._ask(key, prompt, response)
                if verdict is not None:
                    known[key] = verdict
                    self._append(verdict)
            verdicts.append(known.get(key))
            if on_verdict is not None:
                on_verdict(1)
        return Judgement(verdicts)

    def key(self, prompt: str, response: str) -> str:
        """Digest of all that a verdict depends on."""
        parts = json.dumps([self.model, self.template, prompt, response])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def _ask(self, key: str, prompt: str, response: str) -> Verdict | None:
        # One pass over the template, so that braces in a response mean nothing.
        values = {"{prompt}": prompt, "{response}": response}
        question = re.sub(r"\{prompt\}|\{response\}", lambda m: values[m[0]], self.template)
        for attempt in range(self.attempts):
            try:
                answer = self.client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": question}],
                    temperature=0.0 if attempt == 0 else 1.0,  # the same answer would not parse
                    max_tokens=self.max_tokens,
                )
                content = answer.choices[0].message.content
            except APIConnectionError as error:
                raise ValueError(f"no judge answers at {self.url}: {error}") from error
            except OpenAIError as error:
                raise ValueError(f"the judge at {self.url} refused: {error}") from error
            except IndexError:  # no choice: nothing was said, as where a filter holds it back
                content = None
            except (AttributeError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{self.url} does not answer as an OpenAI-compatible endpoint ({error}): give "
                    "the URL up to and including /v1"
                ) from error
            scores = parse_verdict(content or "")
            if scores is not None:
                return Verdict(key, **scores)
        return None

    def _read_cache(self) -> dict[str, Verdict]:
        if self.cache is None or not self.cache.is_file():
            return {}
        lines = self.cache.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # a killed run cut its last line
            del lines[-1]
            self.cache.write_text("".join(lines))
        known = {}
        for number, line in enumerate(lines, start=1):
            try:
                verdict = Verdict(**json.loads(line))
            except (ValueError, TypeError) as error:  # no JSON, or other fields
                raise ValueError(
                    f"{self.cache}, line {number} is no verdict: {error}; remove the line, or name "
                    "another cache"
                ) from error
            known[verdict.key] = verdict
        return known

    def _append(self, verdict: Verdict) -> None:
        if self.cache is not None:
            with self.cache.open("a") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")


def parse_verdict(answer: str) -> dict[str, int] | None:
    """The two scores of an answer, or None unless it is exactly what was asked for.

    >>> parse_verdict('{"quality": 7, "diversity": 4}')
    {'quality': 7, 'diversity': 4}
    >>> parse_verdict('I would say {"quality": 7, "diversity": 4}') is None
    True
    >>> parse_verdict('{"quality": 11, "diversity": 4}') is None
    True
    """
    text = re.sub(r"\A```(?:json)?\s*(.*?)\s*```\Z", r"\1", answer.strip(), flags=re.DOTALL)
    try:
        scores: Any = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(scores, dict) or set(scores) != set(_FIELDS):
        return None
    if not all(type(scores[name]) is int and 1 <= scores[name] <= 10 for name in _FIELDS):
        return None
    return {name: scores[name] for name in _FIELDS}
