"""What a run is measured on: held-out prompts, with the reward, the judge and best-of-n."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedTokenizerBase

from reward_models import RewardModel
from rlkl.evaluation import BestOfN, Evaluation, best_of_n, evaluate_policy
from rlkl.models.language_model import check_positions
from rlkl.rollout import encode_prompts

_ROWS = 256  # tokenised together


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts, and how policies answer them and are scored."""

    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    reward: RewardModel
    judge: RewardModel
    response_length: int
    max_prompt_length: int | None
    temperature: float
    seed: int

    def check_lengths(self, prompts: list[str], which: str, models: Sequence[nn.Module]) -> None:
        """Refuses prompts that would leave no room for a response.

        Raises:
            ValueError: prompt and response can be longer than a model's positions.
        """
        for begin in range(0, len(prompts), _ROWS):
            rows = prompts[begin : begin + _ROWS]
            _, mask = encode_prompts(self.tokenizer, rows, self.max_prompt_length)
            try:
                for model in models:  # the last token of a response is not read
                    check_positions(model, int(mask.sum(1).max()) + self.response_length - 1)
            except ValueError as error:
                raise ValueError(f"{which}, {begin} to {begin + len(rows) - 1}: {error}") from error

    def evaluate(self, policy: nn.Module, ref_model: nn.Module | None) -> Evaluation:
        """One response to each prompt; the same draws for every policy."""
        return evaluate_policy(
            policy,
            ref_model,
            self.tokenizer,
            self.prompts,
            self.reward,
            self.response_length,
            judges={"held_out": self.judge},
            temperature=self.temperature,
            max_prompt_length=self.max_prompt_length,
            seed=self.seed + 1_000_003,
        )

    def best_of(self, n: int, reference: nn.Module, console: Console) -> BestOfN:
        """Best-of-n of the reference, with a progress bar."""
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task(f"best of {n}", total=len(self.prompts) * n)
            return best_of_n(
                reference,
                self.tokenizer,
                self.prompts,
                self.reward,
                n,
                self.response_length,
                temperature=self.temperature,
                max_prompt_length=self.max_prompt_length,
                seed=self.seed,
                on_batch=lambda done: progress.advance(bar, done),
            )
