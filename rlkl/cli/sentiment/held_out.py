"""What a run is measured on: held-out prompts, with the reward, the judge and best-of-n."""

from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedTokenizerBase

from reward_models import RewardModel
from rlkl.evaluation import BestOfN, Evaluation, best_of_n, evaluate_policy


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
