"""KL-penalised PPO on transformers.Trainer: one training step is one whole PPO update."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from reward_models import RewardModel
from rlkl.data import repeated
from rlkl.kl import (
    KLPlacement,
    RaoBlackwellEstimator,
    SampledEstimator,
    check_placement,
    get_estimator,
    prefix_weights,
    response_weights,
)
from rlkl.models import (
    Critic,
    enable_checkpointing,
    frozen_copy,
    hidden_size,
    model_and_tokenizer,
    recomputing,
)
from rlkl.rl import clipped_value_loss
from rlkl.rollout import (
    PolicyPass,
    Responses,
    Rollout,
    TokenRecord,
    collect_rollout,
    policy_pass,
    sample_responses,
    scatter_tokens,
    token_statistics,
)
from rlkl.rollout.randomness import generator_of
from rlkl.rollout.summary import summarise
from rlkl.trainers.advantages import Advantages, rollout_advantages
from rlkl.trainers.config import PPOConfig
from rlkl.trainers.policy_loss import PolicyLoss
from rlkl.trainers.ppo_data import (
    as_reward_model,
    check_models,
    check_prompt_data,
    check_reference_stays,
)
from rlkl.trainers.processes import (
    add_gradients,
    own_share,
    process_place,
    share_weights,
    total,
    whole_rollout,
    whole_updates,
)
from rlkl.trainers.step import StepClock, Update, responses_after, update_metrics
from rlkl.trainers.text_trainer import TextTrainer, named_sets
from rlkl.trainers.tracking import log_completions, wandb_run


class PPOTrainer(TextTrainer):
    """Proximal policy optimisation of a language model under a KL penalty.

    Maximises E[score] − β D_KL(policy ‖ ref) over responses sampled from the policy. Which estimate
    of the KL is penalised and where it enters are `args.kl_estimator` and `args.kl_placement`; this
    class takes the sampled k1 in the reward, :class:`RaoBlackwellPPOTrainer` the exact KL. Whatever
    is penalised, every step measures k1, k3 and the exact KL on its own responses, with standard
    errors.

    A loss is the mean over its minibatch's tokens. Their number is random where responses end by
    themselves, and the direction that of the sequence KL up to O(1 / responses of a minibatch).

    A step: prompts -> responses -> scores -> token statistics of policy and reference -> rewards ->
    advantages -> clipped losses over several epochs. The loop around it, checkpoints and schedules
    are those of transformers.Trainer.

    Reference: Fine-Tuning Language Models from Human Preferences (Ziegler et al., 2019),
    https://arxiv.org/abs/1909.08593; Proximal Policy Optimization Algorithms (Schulman et al.,
    2017), https://arxiv.org/abs/1707.06347.

    Args:
        model: the policy, a causal LM, its name, or one with a PEFT adapter. No dropout.
        reward_funcs: a reward model (see `reward_models`), TRL's kind of function, which may read
            further columns of the data by their names, or several whose scores are added.
        args: settings.
        train_dataset: prompts, in a column ``prompt``.
        eval_dataset: prompts for `evaluate`, or several sets of them by name.
        processing_class: the policy's tokenizer; None loads it by the policy's name.
        ref_model: the reference; None takes a frozen copy of the policy as it is now, or, with an
            adapter, the policy with the adapter off, which needs no second copy.
        peft_config: puts this adapter on the policy.
        judges: reward models that are reported beside the score and never trained on, by name.
        callbacks: further transformers callbacks.

    Raises:
        ValueError: an estimator in a placement where its gradient is not that of the sequence KL
            (unless ``allow_biased_kl``), or one that is for measuring alone; `peft_config` for a
            model that has an adapter; models that `check_models` refuses (not causal, other
            vocabularies, dtypes that bf16 cannot be mixed with, a reference that would move with
            the policy: trained weights or an adapter that both have, base weights or biases trained
            beside an adapter); data that `check_prompt_data` refuses (no column ``prompt``, fewer
            prompts than a step needs, an empty one, one too long for a model); no reward model;
            DeepSpeed or FSDP. `train` refuses the reference once more, as weights are then.
        FloatingPointError: in `train` and `evaluate`: log-probabilities, values, a gradient or
            weights are no longer finite.
    """

    default_estimator: ClassVar[str] = "k1"
    default_placement: ClassVar[str] = "reward"
    if_diverged: ClassVar[str] = "a lower learning_rate or a larger kl_coef"

    args: PPOConfig
    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardModel | Sequence[RewardModel],
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ref_model: nn.Module | None = None,
        peft_config: PeftConfig | None = None,
        judges: Mapping[str, RewardModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.estimator = get_estimator(args.kl_estimator or self.default_estimator)
        self.placement = KLPlacement(args.kl_placement or self.default_placement)
        check_placement(self.estimator, self.placement, args.allow_biased_kl)
        if not isinstance(self.estimator, SampledEstimator | RaoBlackwellEstimator):
            raise ValueError(
                f"kl_estimator is {self.estimator.name}, which is for measuring: train with rb, "
                "exact and no dearer, or with a sampled estimator"
            )
        model, processing_class = model_and_tokenizer(model, processing_class)
        if peft_config is not None and isinstance(model, PeftModel):
            raise ValueError("the model has an adapter already: leave peft_config out")
        if peft_config is not None:
            set_seed(args.seed)  # the adapter's start, as the Trainer does for what is made later
            model = get_peft_model(model, peft_config)  # pyright: ignore[reportArgumentType]
        check_models(model, ref_model, processing_class, args)
        if ref_model is None and not isinstance(model, PeftModel):
            ref_model = frozen_copy(model)
        self.ref_model = ref_model
        self.reward = as_reward_model(reward_funcs)
        self.judges = {
            name: as_reward_model(each, "judges") for name, each in (judges or {}).items()
        }
        self._check_data = partial(
            check_prompt_data,
            tokenizer=processing_class,
            models=[model] if ref_model is None else [model, ref_model],
            rewards=[self.reward, *self.judges.values()],
            args=args,
        )
        a_step = args.per_device_train_batch_size * args.world_size
        self._check_data(train_dataset, "train_dataset", at_least=a_step)
        for name, data in named_sets(eval_dataset).items():
            self._check_data(data, name)
        own_trunk = frozen_copy(model).requires_grad_(True) if args.separate_value_model else None
        if own_trunk is not None and args.activation_checkpointing:
            enable_checkpointing(own_trunk, "the value model")
        self.critic = Critic(hidden_size(model), own_trunk)
        self.kl_coefficient = args.kl_coefficient()
        super().__init__(model, args, train_dataset, processing_class, eval_dataset, callbacks)
        self.critic.to(args.device)
        if self.ref_model is not None:
            self.ref_model.to(args.device).eval()
        share_weights(self.model, self.ref_model, self.critic)
        self.policy_loss = PolicyLoss(
            self.model, self.ref_model, self.estimator, self.placement, args
        )

    # ---- one step --------------------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One PPO update: rollout, advantages, epochs. The Trainer applies the last gradient."""
        self.model.eval()  # dropout off: π_old, π and the reference must be the same functions
        clock = StepClock()
        with clock("step"):
            responses = self.sample(inputs["columns"], self._generator("sampling"), clock)
            with clock("statistics"):
                first_pass = self.first_pass(responses)
            rollout = self.measure(responses, clock, first_pass)
            whole, first_row = whole_rollout(rollout)
            metrics = summarise(whole)
            advantages = self.advantages(whole, metrics).of(rollout, first_row)
            with clock("optimisation"):
                loss = self.optimise(rollout, advantages, metrics, first_pass)
            self.kl_coefficient.update(metrics["objective/kl"], len(whole))
        prompts = len(cast(Dataset, self.train_dataset))
        done = self.state.global_step + 1
        metrics["episode"] = responses_after(done, self.batches_per_epoch, prompts, self.args)
        metrics["eps"] = len(whole) / clock.seconds["time/step"]
        self.noted["steps"].append(metrics | clock.seconds | {"loss": float(loss)})
        log_completions(whole, done, self.args)
        return loss

    def sample(
        self, data: Mapping[str, Sequence[Any]], generator: torch.Generator, clock: StepClock
    ) -> Responses:
        """Prompts (and further columns) -> `num_generations` responses to each."""
        args = self.args
        columns = repeated(data, args.num_generations)
        with clock("generation"), self.accelerator.autocast():
            responses = sample_responses(
                self.model,
                self.tokenizer,
                columns["prompt"],
                args.response_length,
                temperature=args.temperature,
                generator=generator,
                batch_size=args.local_rollout_forward_batch_size,
                max_prompt_length=args.max_prompt_length,
            )
        return replace(responses, columns=columns)

    def first_pass(self, responses: Responses) -> PolicyPass | None:
        """The policy's pass over the first minibatch, with its graph.

        It measures the rollout and is differentiated in the first update: both are the same
        function of the same rows, since no update lies between them. With microbatches, whose
        graphs are to be in memory one at a time, each makes its own pass: None.
        """
        if self.args.micro_batch_size is not None:
            return None
        first = torch.arange(len(responses)).split(self.args.mini_batch_size)[0]
        return self.policy_pass(responses.rows(first))

    def policy_pass(self, batch: Responses) -> PolicyPass:
        """Hidden states and values of a batch's tokens, with their graph."""
        with recomputing(self.model, self.critic):
            return policy_pass(self.model, self.critic, batch, self.accelerator.autocast)  # pyright: ignore[reportArgumentType] (its None)

    @torch.no_grad()
    def measure(
        self, responses: Responses, clock: StepClock, first_pass: PolicyPass | None = None
    ) -> Rollout:
        """Responses -> their scores, and what policy, reference and critic say of them."""
        with clock("statistics"):
            tokens = self.token_statistics(responses, first_pass)
        values = cast(Tensor, tokens.values)  # the trainer always passes its critic
        self.check_finite("the policy's log π(y_t|h_t)", tokens.policy_logp[responses.mask])
        self.check_finite("the critic's V(h_t)", values[responses.mask])
        with clock("scoring"):
            return collect_rollout(responses, self.reward, tokens, self.judges)

    def token_statistics(
        self, responses: Responses, first_pass: PolicyPass | None = None
    ) -> TokenRecord:
        """Log-probabilities, exact KL, entropy and values of the responses' tokens."""
        return token_statistics(
            self.model,
            self.ref_model,
            responses,
            critic=self.critic,
            temperature=self.args.temperature,
            batch_size=self.args.micro_batch_size or self.args.mini_batch_size,
            autocast=self.accelerator.autocast,  # pyright: ignore[reportArgumentType] (its None)
            gemm_dtype=self.args.gemm_dtype,
            first_pass=first_pass,
        )

    def advantages(self, rollout: Rollout, metrics: dict[str, float]) -> Advantages:
        """Advantages and returns of the score and of the KL that is in the reward."""
        advantages, measured = rollout_advantages(
            rollout, self.estimator, self.placement, self.kl_coefficient.value, self.args
        )
        metrics |= measured
        return advantages

    def optimise(
        self,
        rollout: Rollout,
        advantages: Advantages,
        metrics: dict[str, float],
        first_pass: PolicyPass | None = None,
    ) -> Tensor:
        """All epochs of minibatches; the last one's gradient is left for the Trainer to apply.

        The first epoch takes the responses in the order in which they were measured, so that its
        first update sees π = π_old to the last bit; later epochs shuffle.
        """
        generator = self._generator("minibatches")
        updates: list[Update] = []
        self.optimizer.zero_grad()
        for epoch in range(self.args.num_ppo_epochs):
            order = torch.arange(len(rollout))
            if epoch > 0 and self.args.num_mini_batches > 1:
                order = torch.randperm(len(rollout), generator=generator, device=generator.device)
            for rows in order.split(self.args.mini_batch_size):
                if updates:
                    self._apply_gradient()
                update = self.accumulate_gradient(
                    rollout,
                    rows,
                    advantages,
                    first_pass,
                    off_policy=bool(updates) and self.args.kl_off_policy != "none",
                )
                first_pass = None  # of the policy before its first update
                updates.append(update)
        self._clip(self.critic, "the critic's")
        updates = whole_updates(updates)
        metrics |= update_metrics(
            updates, self.args.cliprange, self.args.cliprange_value, self.args.kl_weight_bound
        )
        return updates[-1].loss

    def accumulate_gradient(
        self,
        rollout: Rollout,
        rows: Tensor,
        advantages: Advantages,
        policy_pass: PolicyPass | None = None,
        *,
        off_policy: bool = False,
    ) -> Update:
        """Gradient of one minibatch: means over its tokens of policy, value and KL losses.

        Of several processes each has rows of its own, and the sum of all gradients. The update that
        is returned is this process's share of the means.

        `policy_pass` is the minibatch's, where it was made already. `off_policy` takes the KL of
        the policy as it is now, by weights of the prefixes, in place of the rollout's: see
        `PrefixCorrection`.

        The KL in the loss is divided by the advantages' scale σ: both channels of the objective
        E[score] − β D_KL keep their proportion.
        """
        args, old = self.args, rollout.tokens
        count = total(rollout.responses.mask[rows].sum())
        beta = self.kl_coefficient.value / float(advantages.scale)
        parts: list[Update] = []
        assert old.values is not None  # the trainer always passes its critic
        for micro in rows.split(args.micro_batch_size or len(rows)):
            batch = rollout.responses.rows(micro)
            mask, length = batch.mask, batch.tokens.shape[1]
            old_logp, old_values, target = (
                x[micro, :length] for x in (old.policy_logp, old.values, advantages.returns)
            )
            hidden, values = policy_pass or self.policy_pass(batch)
            assert values is not None
            policy = self.policy_loss(
                rollout, micro, hidden, advantages.tokens, beta, count, off_policy=off_policy
            )
            value_loss = clipped_value_loss(
                values, old_values[mask], target[mask], args.cliprange_value
            )
            value_loss = value_loss.sum() / count
            loss = policy.loss + args.vf_coef * value_loss
            self.accelerator.backward(loss)
            logps = scatter_tokens(policy.logp, mask), old_logp, mask
            parts.append(
                Update(
                    loss=loss.detach(),
                    policy_loss=policy.policy_loss,
                    kl_loss=policy.kl_loss,
                    value_loss=value_loss.detach(),
                    log_ratio=policy.logp - old_logp[mask],
                    value_change=values.detach() - old_values[mask],
                    prefix_weight=prefix_weights(*logps)[mask],
                    response_weight=response_weights(*logps),
                )
            )
        add_gradients([*self.model.parameters(), *self.critic.parameters()])
        return Update.join(parts)

    def _apply_gradient(self) -> None:
        """Clips and steps between minibatches, as the Trainer does after the last one."""
        self._clip(self.model, "the policy's")
        self._clip(self.critic, "the critic's")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _clip(self, module: nn.Module, whose: str) -> None:
        """Clips a gradient to `max_grad_norm`; the critic's is clipped by itself, since the Trainer
        clips the policy's.
        """
        largest = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        norm = self.accelerator.clip_grad_norm_(module.parameters(), largest)
        self.check_finite(f"the norm of {whose} gradient", cast(Tensor, norm))

    def _generator(self, purpose: str) -> torch.Generator:
        """Randomness of this step and process alone, so that a resumed run draws what it would have
        drawn; that of evaluations is the same at every step.
        """
        number = ["sampling", "minibatches", "evaluation"].index(purpose)
        step = 0 if purpose == "evaluation" else self.state.global_step
        place = process_place(self.args)
        return generator_of(self.args.device, self.args.seed, step, number, *place)

    # ---- what surrounds a step -------------------------------------------------------------------

    def tracked(self, resume: bool = False) -> AbstractContextManager[None]:
        """The W&B run, of the group that estimator and placement name."""
        names = [self.estimator.name, str(self.placement), type(self).__name__]
        return wandb_run(self.args, self.args.to_dict(), "-".join(names[:2]), names, resume)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the critic as a parameter group of its own.

        Which weights are trained is settled here: those that were frozen when the trainer was built
        may not be.
        """
        if self.optimizer is None:
            check_reference_stays(self.model, self.ref_model)
            self.optimizer = super().create_optimizer(model)
            own_rate = self.args.value_learning_rate
            self.optimizer.add_param_group(
                {
                    "params": [p for p in self.critic.parameters() if p.requires_grad],
                    "lr": self.args.learning_rate if own_rate is None else own_rate,
                    "weight_decay": 0.0,
                }
            )
        return self.optimizer

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Samples `num_generations` responses to each evaluation prompt and summarises them: score,
        judges, KL, errors.

        The randomness is the same at every call, so that evaluations differ by the policy alone. Of
        several processes each answers its share of the prompts.
        """
        data = cast(Any, self.eval_dataset if eval_dataset is None else eval_dataset)
        if isinstance(data, dict):
            return self.evaluate_each(data, metric_key_prefix)
        self._check_data(data, "eval_dataset")
        self.model.eval()
        clock = StepClock()
        rows = own_share(len(data))
        responses = self.sample(data[rows], self._generator("evaluation"), clock)
        rollout, _ = whole_rollout(self.measure(responses, clock))
        summary = summarise(rollout)
        return self.report_evaluation(
            {f"{metric_key_prefix}_{name}": value for name, value in summary.items()}
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy as `from_pretrained` reads it; critic and KL coefficient beside it."""
        for name, weight in self.critic.named_parameters():
            self.check_finite(f"the critic's weight {name}", weight)
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            save_model(self.critic, str(folder / "critic.safetensors"))
            state = json.dumps(self.kl_coefficient.state_dict())
            (folder / "kl_coefficient.json").write_text(state)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_beside(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_beside(Path(str(self.state.best_model_checkpoint)))

    def _load_beside(self, folder: Path) -> None:
        """Critic and KL coefficient, which `save_model` puts beside the policy."""
        load_model(self.critic, str(folder / "critic.safetensors"))
        if self.args.kl_target is not None:  # a fixed coefficient is that of the settings
            state = json.loads((folder / "kl_coefficient.json").read_text())
            self.kl_coefficient.load_state_dict(state)
