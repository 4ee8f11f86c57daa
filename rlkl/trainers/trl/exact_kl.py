"""What the exact token KL changes in TRL's RLOO and GRPO trainers alike."""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.integrations import WandbCallback
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig, RLOOConfig
from trl.data_utils import is_conversational
from trl.trainer.utils import disable_dropout_in_model

from reward_models import RewardModel
from rlkl.kl import TokenStats, fused_token_stats, future_kl
from rlkl.models import (
    frozen_copy,
    keep_adapter,
    output_head,
    reference_model,
    response_hidden,
)
from rlkl.rl import leave_one_out_mean
from rlkl.rollout import (
    Responses,
    Rollout,
    TokenRecord,
    encode_prompts,
    response_texts,
    scatter_tokens,
    score_texts,
    summarise,
    token_statistics,
)
from rlkl.trainers.finite import check_finite
from rlkl.trainers.metrics import MetricsFile
from rlkl.trainers.ppo_data import check_models
from rlkl.trainers.progress import closing_callbacks
from rlkl.trainers.resume import last_checkpoint, saved_state
from rlkl.trainers.tracking import WandbMirror, wandb_run
from rlkl.trainers.trl.checks import check_deterministic, check_settings
from rlkl.trainers.trl.rewards import as_reward_function


def future_kl_above_group(kl: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Σ_{s>t} D_s less its mean over the group's other responses that reach t. [B, T], nats.

    The baseline does not depend on the response, so that E[Σ_t ∇log π(y_t) c_t] is the future part
    of ∇D_KL(policy ‖ ref) with it as without.

    Args:
        kl: [B, T] the exact token KL.
        mask: [B, T] True at real tokens.
        group_size: responses to each prompt, which follow upon each other.

    Example:
        >>> kl, mask = torch.tensor([[9.0, 3.0], [9.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
        >>> future_kl_above_group(kl, mask, group_size=2)
        tensor([[ 2.,  0.],
                [-2.,  0.]])
    """
    future = future_kl(kl, mask, own_token=False)
    groups = zip(future.split(group_size), mask.split(group_size), strict=True)
    return future - torch.cat([leave_one_out_mean(*group) for group in groups])


class ExactTokenKL(Trainer, ABC):
    """The layer between TRL's trainer and one of ours. `kl_coef` is TRL's beta.

    TRL's own KL is switched off (its beta is 0 to its own methods). A rollout is measured once, by
    policy and reference together: log-probabilities, exact KL, entropy, the reference's hidden
    states. The loss of an update measures the policy anew, with its graph, beside these states.
    What TRL asks for in between, log-probabilities and entropies of the tokens at hand, it gets
    from there: with positions that count real tokens only, in float32, without dropout.
    """

    # TRL's, which has no types for them
    model: PreTrainedModel | PeftModel
    temperature: float
    num_generations: int
    num_generations_eval: int
    reward_weights: Tensor
    eos_token_ids: list[int]
    aux_loss_enabled: bool
    processing_class: PreTrainedTokenizerBase
    _metrics: dict[str, dict[str, list[float]]]
    _tag_names: list[str]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any,
        args: RLOOConfig | GRPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        ref_model: nn.Module | None = None,
        judges: Mapping[str, RewardModel] | None = None,
    ) -> None:
        check_settings(args)
        without_kl = copy.copy(args)
        without_kl.beta = 0.0
        rewards = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        of_trl: dict[str, Any] = {
            "model": model,
            "reward_funcs": [as_reward_function(reward) for reward in rewards],
            "args": without_kl,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "reward_processing_classes": reward_processing_classes,
            "callbacks": [*(callbacks or []), MetricsFile()],
            "optimizers": optimizers,
            "quantization_config": quantization_config,
            "peft_config": peft_config,
        }
        super().__init__(**of_trl)
        self.kl_coef = without_kl.beta = args.beta  # the settings again as they were given
        if not isinstance(self.processing_class, PreTrainedTokenizerBase):
            raise ValueError(
                "processing_class is no tokenizer: the exact KL is that of text models"
            )
        if self.aux_loss_enabled:
            raise ValueError(
                "the load-balancing loss of a mixture of experts is none of the exact KL's passes: "
                "set router_aux_loss_coef to 0"
            )
        policy = self.accelerator.unwrap_model(self.model)
        if ref_model is None and not isinstance(policy, PeftModel):
            ref_model = frozen_copy(policy)
            vars(ref_model).pop("forward", None)  # TRL's, which would run the policy
        came_with = isinstance(policy, PeftModel) and peft_config is None
        if came_with and ref_model is None and "ref" not in policy.peft_config:
            keep_adapter(policy)  # GRPO does so only with a beta of its own
        disable_dropout_in_model(policy)
        check_deterministic(policy)
        check_models(policy, ref_model, self.processing_class, args)
        self.ref_model = None if ref_model is None else ref_model.to(self.args.device).eval()
        self.judges = dict(judges or {})
        if self.pop_callback(WandbCallback) is not None:
            self.add_callback(WandbMirror)
        self._joint: TokenRecord | TokenStats | None = None
        self._scored: tuple[list[Any], Tensor] = [], torch.zeros(0)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trainer.train, in a W&B run where ``report_to`` names wandb: offline without a key.

        Args:
            resume_from_checkpoint: its folder, or True for the last one in ``output_dir``. TRL's
                random numbers go on from there, and its order of prompts after the first epoch
                does not.
            kwargs: those of Trainer.train.

        Raises:
            ValueError: True, and ``output_dir`` holds no whole checkpoint.
            FloatingPointError: training has diverged.
        """
        folder = Path(str(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"{folder} holds no whole checkpoint to go on from")
        if resume_from_checkpoint and self.args.max_steps > 0:
            state = saved_state(resume_from_checkpoint)
            if state.global_step >= self.args.max_steps:  # the Trainer would take another step
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        tags = [*self._tag_names, "rb", "both"]
        resumed = bool(resume_from_checkpoint)
        with (
            wandb_run(self.args, self.args.to_dict(), "-".join(tags[-3:]), tags, resumed),
            closing_callbacks(self),
        ):
            return super().train(resume_from_checkpoint, **kwargs)

    def create_model_card(self, *given: Any, **named: Any) -> None:
        """None: TRL's names TRL's method, which this is not."""

    # ---- a rollout -------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        """As everywhere here, texts are opened by the tokenizer's bos token if it has one."""
        if is_conversational({"prompt": prompts[0]}):
            return super()._tokenize_prompts(prompts)  # pyright: ignore[reportAttributeAccessIssue]
        ids, mask = encode_prompts(self.processing_class, prompts)
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)], None, {}

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        """TRL's, of texts as they read after their prompts; kept for the rollout's summary."""
        if not is_conversational({"prompt": prompts[0]}):
            prompt_ids, _, _ = self._tokenize_prompts(prompts)
            completions = response_texts(self.processing_class, prompt_ids, completion_ids_list)
        rewards: Tensor = super()._calculate_rewards(  # pyright: ignore[reportAttributeAccessIssue]
            inputs, prompts, completions, completion_ids_list
        )
        self._scored = completions, (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch without its KL, with `measured`."""
        self._joint = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # pyright: ignore[reportAttributeAccessIssue]
        if self._joint is None:  # GRPO asks for log-probabilities of older rollouts only
            self._joint = self._measure(*_inputs(batch))
        tokens = self._joint
        assert isinstance(tokens, TokenRecord)
        remedy = "a lower learning_rate or a larger beta"
        folder = Path(str(self.args.output_dir))
        check_finite("the policy's log π(y_t|h_t)", tokens.policy_logp, self.state, folder, remedy)
        self._report([row["prompt"] for row in inputs], batch, tokens)
        return self.with_kl(batch, tokens)

    @abstractmethod
    def with_kl(self, batch: dict[str, Any], tokens: TokenRecord) -> dict[str, Any]:
        """A rollout's batch, with what the KL's part of the loss needs of it."""

    def future_cost(self, tokens: TokenRecord, mask: Tensor) -> Tensor:
        """[B, T] nats: see `future_kl_above_group`."""
        group = self.num_generations if self.model.training else self.num_generations_eval
        return future_kl_above_group(tokens.kl, mask, group)

    def _measure(
        self, input_ids: Tensor, attention_mask: Tensor, length: int, batch_size: int | None = None
    ) -> TokenRecord:
        """What policy and reference say of the last `length` tokens, in passes of batch_size."""
        return token_statistics(
            self.accelerator.unwrap_model(self.model),
            self.ref_model,
            _responses(input_ids, attention_mask, length),
            temperature=self.temperature,
            batch_size=batch_size or self.args.train_batch_size,
            autocast=self.accelerator.autocast,  # pyright: ignore[reportArgumentType] (its None)
            gemm_dtype=self._gemm_dtype,
        )

    def _report(self, prompts: Sequence[Any], batch: dict[str, Any], tokens: TokenRecord) -> None:
        """Notes what PPO's vocabulary has of a rollout, for TRL's next log."""
        texts, scores = self._scored
        written = [p if isinstance(p, str) else json.dumps(p, default=str) for p in prompts]
        responses = _responses(*_inputs(batch))
        last = responses.tokens.gather(1, responses.mask.sum(1, keepdim=True) - 1)[:, 0]
        ended = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))
        plain = [t if isinstance(t, str) else str(t[-1]["content"]) for t in texts]
        rollout = Rollout(
            responses=replace(responses, prompts=written, texts=plain, ended=ended),
            scores=scores,
            tokens=tokens,
            other_scores={
                name: score_texts(judge, written, plain, f"the judge {name!r}").to(last.device)
                for name, judge in self.judges.items()
            },
        )
        measured = summarise(rollout)
        measured |= {"kl": measured["kl/rb_per_token"], "objective/kl": measured["kl/rb"]}
        noted = self._metrics["train" if self.model.training else "eval"]
        for name, value in (measured | {"kl_coef": self.kl_coef}).items():
            noted.setdefault(name, []).append(value)

    # ---- an update -------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Those of the tokens at hand; the first to ask for a rollout's has them measured."""
        if self._joint is None:
            self._joint = self._measure(input_ids, attention_mask, logits_to_keep, batch_size)
        return self._joint.policy_logp, self._joint.entropy, None

    def differentiable(self, batch: dict[str, Any]) -> TokenStats:
        """[B, T] statistics of a batch's tokens, 0 where masked.

        Differentiable in the policy, but for the reference's.
        """
        input_ids, attention_mask, length = _inputs(batch)
        mask, policy = batch["completion_mask"].bool(), self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            hidden = response_hidden(policy, input_ids, attention_mask, length)[mask]
        with reference_model(policy, self.ref_model) as ref:
            ref_head = output_head(ref)
        stats = fused_token_stats(
            hidden,
            output_head(policy),
            batch["ref_hidden"][mask],
            ref_head,
            batch["completion_ids"][mask],
            temperature=self.temperature,
            whole_rows=True,
            gemm_dtype=self._gemm_dtype,
        )
        return TokenStats(*(scatter_tokens(x, mask) for x in stats))

    @property
    def _gemm_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.args.bf16 and self.args.device.type == "cpu" else None


def _inputs(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Token ids and mask [B, P + T] of TRL's batch, and T."""
    parts = ("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask")
    ids, mask = (torch.cat([batch[name] for name in names], 1) for names in parts)
    return ids, mask, batch["completion_ids"].shape[1]


def _responses(input_ids: Tensor, attention_mask: Tensor, length: int) -> Responses:
    """The record of tokens whose texts nobody reads."""
    mask, none = attention_mask.bool(), [""] * len(input_ids)
    return Responses(
        prompts=none,
        texts=none,
        prompt_ids=input_ids[:, :-length],
        prompt_mask=mask[:, :-length],
        tokens=input_ids[:, -length:],
        mask=mask[:, -length:],
        ended=mask.new_zeros(len(mask)),
    )
