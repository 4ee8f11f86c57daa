"""Distillation on transformers.Trainer: a student towards its teacher, by any divergence."""

from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from rlkl.kl import TokenStats, fused_logp_loss, fused_token_loss, future_kl
from rlkl.kl.chunked import vocabulary_of
from rlkl.models import (
    check_apart,
    check_causal_lm,
    load_causal_lm,
    model_and_tokenizer,
    output_head,
    recomputing,
    response_hidden,
)
from rlkl.models.language_model import check_positions
from rlkl.rl import leave_one_out_mean
from rlkl.rollout import Responses, sample_responses
from rlkl.rollout.divergence import (
    DivergenceRecord,
    divergence_statistics,
    hidden_statistics,
    summarise_divergences,
)
from rlkl.rollout.given import given_responses
from rlkl.rollout.randomness import generator_of
from rlkl.rollout.records import scatter_tokens
from rlkl.trainers.distill_config import DistillConfig
from rlkl.trainers.distill_data import check_data, prompts_of
from rlkl.trainers.processes import (
    add_gradients,
    of_all,
    own_share,
    process_place,
    share_weights,
    total,
    whole,
)
from rlkl.trainers.step import StepClock
from rlkl.trainers.text_trainer import TextTrainer, check_weights, named_sets
from rlkl.trainers.tracking import wandb_run

# What a generator is for: its place, beside the batch.
_TRAINING, _EVALUATION = 0, 1


class DistillTrainer(TextTrainer):
    """Trains a student to have its teacher's next-token distributions.

        loss = (1 − c) T² D(student / T, teacher / T) + c (−log student(y_t)),   mean over tokens

    D is any divergence of `rlkl.kl.DIVERGENCES`. A step: texts -> responses (given, the teacher's,
    or the student's own) -> hidden states of both -> divergence, chunk by chunk -> θ. Whatever is
    trained on, each logged step measures every divergence on its own batch, head and tail gaps and
    AKL's weights.

    With `on_policy_fraction` λ a batch is, with probability λ, sampled by the student (GKD's
    mixture); cross-entropy then does not apply, since its expected gradient on one's own samples
    is zero. On-policy training at ``on_policy_gradient="token"`` holds the visited prefixes fixed.
    With ``"sequence"`` it follows the gradient of the sequence KL, D_KL(student ‖ teacher) =
    E_student[Σ_t D_t]:

        ∇ = E[ Σ_t ∇D_t + Σ_t ∇log student(y_t) (Σ_{s>t} D_s − b_t) ]

    with b_t the mean of Σ_{s>t} D_s over the batch's other responses (`leave_one_out_mean`), which
    changes no expectation. As every loss here it is divided by the batch's tokens: their number is
    random where responses end by themselves, and the direction then right up to O(1/B).

    Reference: On-Policy Distillation of Language Models (Agarwal et al., 2023),
    https://arxiv.org/abs/2306.13649; MiniLLM (Gu et al., 2023), https://arxiv.org/abs/2306.08543;
    the adaptive divergence: Wu et al. (2024), https://arxiv.org/abs/2404.02657.

    Args:
        model: the student, a causal LM, its name, or one with a PEFT adapter. No dropout.
        teacher_model: any causal LM of the same tokenizer, or its name; it is frozen. In float32 or
            bfloat16, or in any precision without ``bf16``.
        args: settings.
        train_dataset: columns ``prompt`` and ``completion`` (the loss is on the completion alone),
            ``prompt`` alone where all responses are sampled, or ``text``.
        processing_class: the tokenizer of both; None loads it by the student's name.
        eval_dataset: likewise, for `evaluate`; or several sets by name.
        peft_config: puts this adapter on the student.
        callbacks: further transformers callbacks.

    Raises:
        ValueError: columns that the settings do not work with, no rows, an empty text, a head
            smaller than the tokenizer, a row longer than a model's positions, a teacher that shares
            what is trained of the student (`train` looks once more), an adapter and a
            `peft_config`, weights that bf16 cannot be mixed with, a model that `check_causal_lm`
            refuses, fewer rows than a batch with ``dataloader_drop_last``, DeepSpeed or FSDP.
        FloatingPointError: in `train`: loss, gradient or weights are no longer finite.
    """

    if_diverged: ClassVar[str] = (
        "a lower learning_rate, or, where one model forbids what the other allows, with loss js"
    )

    args: DistillConfig
    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel,
        args: DistillConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        model, processing_class = model_and_tokenizer(model, processing_class)
        teacher_model = (
            load_causal_lm(teacher_model) if isinstance(teacher_model, str) else teacher_model
        )
        if peft_config is not None and isinstance(model, PeftModel):
            raise ValueError("the model has an adapter already: leave peft_config out")
        if peft_config is not None:
            set_seed(args.seed)  # the adapter's start is drawn; the Trainer seeds later
            model = get_peft_model(model, peft_config)  # pyright: ignore[reportArgumentType]
        check_weights({"model": model, "teacher_model": teacher_model}, args)
        for each, name in ((model.eval(), "model"), (teacher_model.eval(), "teacher_model")):
            check_causal_lm(each, name)
        self.divergence = args.divergence()
        self.vocab_size = shared_vocabulary(model, teacher_model, processing_class)
        check_apart(model, teacher_model, "teacher_model", "load it a second time")
        for each in (model, teacher_model):
            check_positions(each, (args.max_prompt_length or 1) + args.response_length - 1)
        check_data(
            train_dataset,
            "train_dataset",
            processing_class,
            (model, teacher_model),
            args,
            given=args.reads_answers,
            sampled=args.on_policy_fraction > 0 or args.teacher_generated,
        )
        self.teacher = teacher_model.requires_grad_(False).eval()
        self._step = self._calls = 0  # of `_generator`
        super().__init__(model, args, train_dataset, processing_class, eval_dataset, callbacks)
        for name, data in named_sets(eval_dataset).items():
            self._check_evaluation(data, name)
        self.teacher.to(args.device)  # pyright: ignore[reportArgumentType] (decorated)
        share_weights(self.model)

    # ---- one step --------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; of several processes each then has the mean of all gradients."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            add_gradients(self.model.parameters(), 1 / self.args.world_size)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Texts -> responses -> hidden states -> loss; the Trainer differentiates and steps.

        With gradient accumulation, or several processes, a step's loss is the mean of its batches'
        token means.
        """
        self.model.eval()  # dropout off: one student samples, is measured and is trained
        clock, generator = StepClock(), self._generator()
        with clock("sampling"):
            responses, on_policy = self.responses(inputs, generator)
        with clock("trunks"):
            student, teacher = self.hidden_states(responses)
        with clock("loss"):
            loss, parts = self.loss(responses, student, teacher, on_policy)
        self.check_finite("the loss", loss)
        with clock("measure"):
            if self._logs_this_step():
                self.noted["measured"] += of_all(self.measure(responses, student, teacher))
        tokens = float(responses.mask.sum())
        parts |= {"data/on_policy": float(on_policy), "data/tokens": tokens, "loss": loss.item()}
        self.noted["steps"] += of_all(parts | clock.seconds)
        return loss

    def responses(
        self, inputs: dict[str, Any], generator: torch.Generator
    ) -> tuple[Responses, bool]:
        """The batch's responses, and whether the student sampled them."""
        args = self.args
        coin = torch.rand((), generator=generator, device=generator.device)
        on_policy = float(coin) < args.on_policy_fraction
        if on_policy or args.teacher_generated:
            sampler = self.model if on_policy else self.teacher
            return self.sample(sampler, prompts_of(inputs, self.tokenizer), generator), on_policy
        return self.given(inputs), False

    def sample(self, model: nn.Module, prompts: list[str], generator: torch.Generator) -> Responses:
        """Responses of student or teacher, of real tokens only where its head is padded."""
        with self.accelerator.autocast():
            return sample_responses(
                model,
                self.tokenizer,
                prompts,
                self.args.response_length,
                temperature=self.args.sampling_temperature,
                generator=generator,
                max_prompt_length=self.args.max_prompt_length,
                vocab_size=self.vocab_size,
            )

    def given(self, inputs: dict[str, Any]) -> Responses:
        """The batch's own completions or texts."""
        return given_responses(
            self.tokenizer,
            inputs.get("prompt"),
            inputs["completion"] if "prompt" in inputs else inputs["text"],
            self.args.response_length,
            max_prompt_length=self.args.max_prompt_length,
            device=self.args.device,
        )

    def hidden_states(self, responses: Responses) -> tuple[Tensor, Tensor]:
        """Hidden states of student (with graph) and teacher at the response tokens, [N, H]."""
        ids, attention, length = (
            responses.input_ids,
            responses.attention_mask,
            responses.tokens.shape[1],
        )
        with self.accelerator.autocast():
            with recomputing(self.model):
                student = response_hidden(self.model, ids, attention, length)
            with torch.no_grad():
                teacher = response_hidden(self.teacher, ids, attention, length)
        return student[responses.mask], teacher[responses.mask]

    def loss(
        self, responses: Responses, student: Tensor, teacher: Tensor, on_policy: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and its parts for the log."""
        args, count = self.args, len(student)
        ce_weight = 0.0 if on_policy else args.ce_weight
        scale = (1 - ce_weight) * args.temperature**2 / count
        tokens = responses.tokens[responses.mask]
        future = torch.zeros_like(tokens, dtype=torch.float32)
        if on_policy and args.on_policy_gradient == "sequence":
            future = self.excess_future(responses, student, teacher)

        def token_loss(stats: TokenStats, future: Tensor) -> Tensor:
            return scale * (stats.kl + future * stats.policy_logp).sum()

        loss, stats = self._token_loss(token_loss, student, teacher, tokens, future)
        parts = {"loss/divergence": float(stats.kl.mean()) * args.temperature**2}
        cross_entropy = torch.zeros_like(loss)
        if ce_weight > 0:
            cross_entropy, _ = fused_logp_loss(
                lambda stats: -stats.policy_logp.sum() / count,
                student,
                output_head(self.model),
                tokens,
                vocab_size=self.vocab_size,
                gemm_dtype=args.gemm_dtype,
            )
            loss = loss + ce_weight * cross_entropy
        parts["loss/cross_entropy"] = float(cross_entropy.detach())
        return loss, parts

    @torch.no_grad()
    def excess_future(self, responses: Responses, student: Tensor, teacher: Tensor) -> Tensor:
        """Σ_{s>t} D_s, the KL at the prefixes that y_t leads to, above that of the other responses.

        [N] nats, detached.
        """
        mask = responses.mask
        _, stats = self._token_loss(
            lambda stats: stats.kl.sum(), student, teacher, responses.tokens[mask]
        )
        future = future_kl(scatter_tokens(stats.kl, mask), mask, own_token=False)
        return (future - leave_one_out_mean(future, mask))[mask].float()

    def _token_loss(
        self, loss_fn: Any, student: Tensor, teacher: Tensor, tokens: Tensor, *per_token: Tensor
    ) -> tuple[Tensor, TokenStats]:
        return fused_token_loss(
            loss_fn,
            student,
            output_head(self.model),
            teacher,
            output_head(self.teacher),
            tokens,
            *per_token,
            divergence=self.divergence,
            temperature=self.args.temperature,
            vocab_size=self.vocab_size,
            gemm_dtype=self.args.gemm_dtype,
        )

    def measure(self, responses: Responses, student: Tensor, teacher: Tensor) -> dict[str, float]:
        """Every divergence on the batch that is trained on, before its update."""
        stats = hidden_statistics(
            (self.model, student.detach()),
            (self.teacher, teacher),
            responses.tokens[responses.mask],
            head_mass=self.args.head_mass,
            head_rule=self.args.head_rule,  # pyright: ignore[reportArgumentType] (checked)
            vocab_size=self.vocab_size,
        )
        return summarise_divergences(DivergenceRecord.of(stats, responses.mask))

    def _logs_this_step(self) -> bool:
        """Whether the Trainer logs after this step, by its own rule."""
        step, args = self.state.global_step + 1, self.args
        if step >= self.state.max_steps or (step == 1 and args.logging_first_step):
            return True
        if args.logging_strategy == IntervalStrategy.EPOCH:
            return self.accelerator.gradient_state.end_of_dataloader
        every = self.state.logging_steps
        return args.logging_strategy == IntervalStrategy.STEPS and step % every == 0

    def _generator(self) -> torch.Generator:
        """Randomness of this batch alone, so that a resumed run draws what it would have drawn."""
        step, accumulated = self.state.global_step, self.args.gradient_accumulation_steps
        if step != self._step:  # the last step of an epoch may have fewer batches
            self._step, self._calls = step, 0
        batch = step * accumulated + self._calls % accumulated
        self._calls += 1
        place = [batch, _TRAINING, *process_place(self.args)]
        return generator_of(self.args.device, self.args.seed, *place)

    # ---- what surrounds a step -------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """TextTrainer.train; a step that an exception cut short is drawn from its first batch."""
        self._step = -1
        return super().train(resume_from_checkpoint, **kwargs)

    def tracked(self, resume: bool = False) -> AbstractContextManager[None]:
        """The W&B run, of the group that the loss names."""
        tags = ["distill", self.args.loss, type(self).__name__]
        return wandb_run(self.args, self.args.to_dict(), self.args.loss, tags, resume)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, of the weights that are trained now: none of them may be the teacher's."""
        check_apart(self.model, self.teacher, "teacher_model", "load it a second time")
        return super().create_optimizer(model)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss and every divergence on the held-out texts; with `eval_on_policy` the latter on
        the student's samples too.

        The randomness is the same at every call, so that evaluations differ by the student alone.
        Of several processes each takes its share of the texts.
        """
        data = cast(Any, self.eval_dataset if eval_dataset is None else eval_dataset)
        if data is None:
            raise ValueError("evaluate needs texts: pass eval_dataset here or to the trainer")
        if isinstance(data, dict):
            return self.evaluate_each(data, metric_key_prefix)
        if eval_dataset is not None:
            self._check_evaluation(data, "eval_dataset")
        self.model.eval()
        inputs = data[own_share(len(data))]
        sets = {"": self.given(inputs)}
        if self.args.eval_on_policy:
            place = _EVALUATION, *process_place(self.args)
            generator = generator_of(self.args.device, self.args.seed, 0, *place)
            sets["own/"] = self.sample(self.model, prompts_of(inputs, self.tokenizer), generator)
        metrics = {}
        for name, responses in sets.items():
            record = divergence_statistics(
                self.model,
                self.teacher,
                responses,
                head_mass=self.args.head_mass,
                head_rule=self.args.head_rule,  # pyright: ignore[reportArgumentType] (checked)
                vocab_size=self.vocab_size,
                batch_size=self.args.per_device_eval_batch_size,
                autocast=self.accelerator.autocast,  # pyright: ignore[reportArgumentType]
            )
            summary = summarise_divergences(whole(record))
            metrics |= {f"{metric_key_prefix}_{name}{k}": v for k, v in summary.items()}
        metrics[f"{metric_key_prefix}_loss"] = self._held_out_loss(sets[""])
        return self.report_evaluation(metrics)

    @torch.no_grad()
    def _held_out_loss(self, responses: Responses) -> float:
        """The loss at its own temperature, settings and cross-entropy, mean over all tokens."""
        summed = torch.zeros(2, dtype=torch.double, device=self.args.device)
        for rows in torch.arange(len(responses)).split(self.args.per_device_eval_batch_size):
            batch = responses.rows(rows)
            loss, _ = self.loss(batch, *self.hidden_states(batch), on_policy=False)
            tokens = batch.mask.sum()
            summed += torch.stack([loss.double() * tokens, tokens])
        loss, tokens = total(summed)
        return float(loss / tokens)

    def _check_evaluation(self, data: Dataset, which: str) -> None:
        check_data(
            data,
            which,
            self.tokenizer,
            (self.model, self.teacher),
            self.args,
            given=True,
            sampled=self.args.eval_on_policy,
        )


def shared_vocabulary(
    student: nn.Module, teacher: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Rows that both heads have: the smaller of the two where one is padded further.

    Raises:
        ValueError: a head has fewer rows than the tokenizer has tokens.
    """
    models = {"student": student, "teacher": teacher}
    sizes = {name: vocabulary_of(output_head(model)) for name, model in models.items()}
    for name, rows in sizes.items():
        if rows < len(tokenizer):
            raise ValueError(
                f"the {name}'s head has {rows} rows for {len(tokenizer)} tokens of the tokenizer: "
                "student and teacher need one tokenizer"
            )
    return min(sizes.values())
