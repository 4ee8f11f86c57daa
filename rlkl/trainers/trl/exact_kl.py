"""What the exact token KL changes in TRL's RLOO and GRPO trainers alike."""

import copy
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
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
from rlkl.models.language_model import causal_lm
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
from rlkl.trainers.guarded_trainer import GuardedTrainer
from rlkl.trainers.ppo_data import check_models
from rlkl.trainers.processes import (
    add_gradients,
    of_all,
    process_place,
    share_weights,
    whole_rollout,
)
from rlkl.trainers.tracking import wandb_run
from rlkl.trainers.trl.checks import check_deterministic, check_settings
from rlkl.trainers.trl.order import OrderOfEpoch
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


class ExactTokenKL(GuardedTrainer):
    """The layer between TRL's trainer and one of ours. `kl_coef` is TRL's beta.

    TRL's own KL is switched off (its beta is 0 to its own methods). A rollout is measured once, by
    policy and reference together: log-probabilities, exact KL, entropy, the reference's hidden
    states. The loss of an update measures the policy anew, with its graph, beside these states.
    What TRL asks for in between, log-probabilities and entropies of the tokens at hand, it gets
    from there: with positions that count real tokens only, in float32, without dropout.
    """

    if_diverged: ClassVar[str] = "a lower learning_rate or a larger beta"

    # TRL's, which has no types for them
    args: Any
    temperature: float
    num_generations: int
    num_generations_eval: int
    num_iterations: int
    current_gradient_accumulation_steps: int
    reward_weights: Tensor
    eos_token_ids: list[int]
    aux_loss_enabled: bool
    processing_class: PreTrainedTokenizerBase
    _metrics: dict[str, dict[str, list[float]]]
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
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
        assert args.generation_batch_size is not None  # TRL's settings choose it
        assert args.num_generations is not None
        needed = args.generation_batch_size // args.num_generations
        if isinstance(train_dataset, Dataset) and len(train_dataset) < needed:
            raise ValueError(  # TRL's loop would take no step
                f"{len(train_dataset)} prompts, and a rollout takes {needed}; give more prompts or "
                "a smaller batch"
            )
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
            "callbacks": callbacks,
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
        share_weights(policy, self.ref_model)
        self.judges = dict(judges or {})
        self._joint: TokenRecord | TokenStats | None = None
        self._scored: tuple[list[Any], Tensor] = [], torch.zeros(0)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a pass over the prompts, each rollout as many times as it is trained on."""
        return len(self.get_train_dataloader())

    def tracked(self, resume: bool = False) -> AbstractContextManager[None]:
        """The W&B run, of the group that method and KL name."""
        tags = [*self._tag_names, "rb", "both"]
        return wandb_run(self.args, self.args.to_dict(), "-".join(tags[-3:]), tags, resume)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """GuardedTrainer.train; the rollout of a training before this one is not trained on."""
        self._step, self._buffered_inputs = 0, None
        self._metrics["train"].clear()
        return super().train(resume_from_checkpoint, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """TRL's, its loss noted: the Trainer forgets it where a run is stopped between two logs.

        Of several processes each then has the mean of all gradients.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            add_gradients(self.model.parameters(), 1 / self.args.world_size)
        of_batch = float(loss) * self.current_gradient_accumulation_steps
        self.noted["steps"] += of_all({"loss": of_batch})
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model; in a checkpoint also what TRL has in memory alone: the rollout that is
        not used up, and metrics.
        """
        super().save_model(output_dir, _internal_call)
        if _internal_call and not self.args.save_only_model:
            updates = self.args.steps_per_generation * self.num_iterations
            state = {
                "step": self._step,
                "rollout": self._buffered_inputs if self._step % updates else None,
                "metrics": {} if self._logs_next() else dict(self._metrics["train"]),
            }
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            torch.save(state, self._rollout_file(str(output_dir)))
            of_all(None)  # the checkpoint is whole when the first process ends it

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = self._rollout_file(resume_from_checkpoint)
        if file.is_file():
            state = torch.load(file, map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = state["step"], state["rollout"]
            self._metrics["train"].update(state["metrics"])

    def _rollout_file(self, checkpoint: str) -> Path:
        """Each process has its own."""
        process = "".join(f"_{index}" for index in process_place(self.args))
        return Path(checkpoint) / f"rollout{process}.pt"

    def _get_train_sampler(self, dataset: Dataset | None = None) -> OrderOfEpoch:
        return OrderOfEpoch(super()._get_train_sampler(dataset))  # pyright: ignore[reportArgumentType]

    def create_model_card(self, *given: Any, **named: Any) -> None:
        """None: TRL's names TRL's method, which this is not."""

    # ---- a rollout -------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        """As everywhere here, texts are opened by the tokenizer's bos token if it has one."""
        if is_conversational({"prompt": prompts[0]}):
            return super()._tokenize_prompts(prompts)  # pyright: ignore[reportAttributeAccessIssue]
        ids, mask = encode_prompts(self.processing_class, prompts)
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)], None, {}

    def _generate_single_turn(self, *given: Any, **named: Any) -> Any:
        """TRL's, which would draw from logits that are no numbers until torch refuses, and with
        what the policy's own generation config asks for beside TRL's settings.
        """
        policy = self.accelerator.unwrap_model(self.model)
        head = policy.get_output_embeddings()
        watch = head.register_forward_hook(
            lambda _head, _states, logits: self.check_finite(
                "the policy's largest logit", logits[:, -1].amax(-1)
            )
        )
        try:
            with _plain_generation(policy):
                return super()._generate_single_turn(*given, **named)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            watch.remove()

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
        first = self.args.process_index * len(prompts)  # TRL's are those of all processes
        own = rewards[first : first + len(prompts)]
        self._scored = completions, (own * self.reward_weights.to(own.device)).nansum(1)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch without its KL, with `measured`."""
        self._joint = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # pyright: ignore[reportAttributeAccessIssue]
        if self._joint is None:  # GRPO asks for log-probabilities of older rollouts only
            self._joint = self._measure(*_inputs(batch))
        tokens = self._joint
        assert isinstance(tokens, TokenRecord)
        self.check_finite("the policy's log π(y_t|h_t)", tokens.policy_logp)
        rollout = self._rollout([row["prompt"] for row in inputs], batch, tokens)
        whole, first_row = whole_rollout(rollout)  # a group may be shared by processes
        self._report(whole)
        group = self.num_generations if self.model.training else self.num_generations_eval
        cost = future_kl_above_group(whole.tokens.kl, whole.responses.mask, group)
        own = cost[first_row : first_row + len(rollout), : tokens.kl.shape[1]]
        batch["ref_hidden"] = tokens.ref_hidden
        return self.with_kl(batch, own.to(tokens.kl.device))

    @abstractmethod
    def with_kl(self, batch: dict[str, Any], kl_cost: Tensor) -> dict[str, Any]:
        """A rollout's batch, with the KL [B, T] that follows each token, in nats.

        See `future_kl_above_group`.
        """

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

    def _rollout(
        self, prompts: Sequence[Any], batch: dict[str, Any], tokens: TokenRecord
    ) -> Rollout:
        """The record of TRL's batch."""
        texts, scores = self._scored
        written = [p if isinstance(p, str) else json.dumps(p, default=str) for p in prompts]
        responses = _responses(*_inputs(batch))
        last = responses.tokens.gather(1, responses.mask.sum(1, keepdim=True) - 1)[:, 0]
        ended = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))
        plain = [t if isinstance(t, str) else str(t[-1]["content"]) for t in texts]
        return Rollout(
            responses=replace(responses, prompts=written, texts=plain, ended=ended),
            scores=scores,
            tokens=tokens,
            other_scores={
                name: score_texts(judge, written, plain, f"the judge {name!r}").to(last.device)
                for name, judge in self.judges.items()
            },
        )

    def _report(self, rollout: Rollout) -> None:
        """Notes what PPO's vocabulary has of a rollout, for TRL's next log."""
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


@contextmanager
def _plain_generation(policy: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Sets the policy's own generation config aside (min_p, num_beams, suppress_tokens, ...).

    `generate` takes from there what TRL's settings leave open, and would draw from another
    distribution than the policy's, which is the one that is measured.
    """
    owners = [policy, causal_lm(policy)]  # TRL sets it on the one, PEFT on the other
    before = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config


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
