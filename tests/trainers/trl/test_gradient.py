"""The gradient that RLOO and GRPO follow against autograd through the enumerated objective.

A model of four tokens and three steps has 40 responses. Their gradients, weighted by probability,
are the expected gradient of the trainer's loss.
"""

import copy
import itertools

import pytest
import torch

from rlkl.rollout import TokenRecord
from rlkl.trainers.trl import RaoBlackwellGRPOTrainer, RaoBlackwellRLOOTrainer
from rlkl.trainers.trl.exact_kl import future_kl_above_group
from tests.trainers.trl.cases import both_trainers

PROMPT = [0, 1, 2]
LENGTH = 3
BETA = 0.7


def every_response() -> list[tuple[int, ...]]:
    """All sequences of at most three of the tokens 0..3 that end with 0 or are cut."""
    return [
        y
        for length in range(1, LENGTH + 1)
        for y in itertools.product(range(4), repeat=length)
        if 0 not in y[:-1] and (y[-1] == 0 or length == LENGTH)
    ]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """All responses as TRL has them, each with a score of its own for an advantage."""
    rows = every_response()
    assert len(rows) == 1 + 3 + 36
    return {
        "prompt_ids": torch.tensor([PROMPT] * len(rows)),
        "prompt_mask": torch.ones(len(rows), len(PROMPT), dtype=torch.long),
        "completion_ids": torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in rows]),
        "completion_mask": torch.tensor(
            [[int(t < len(row)) for t in range(LENGTH)] for row in rows]
        ),
        "advantages": torch.randn(len(rows), generator=torch.Generator().manual_seed(7)),
        "num_items_in_batch": torch.tensor(float(LENGTH)),
    }


@pytest.fixture
def make_four_tokens(make_trl_trainer, make_tokenizer, make_lm):
    """A trainer of the four-token model, with a reference that is another model."""

    def make(trainer_class, **changes):
        settings = {
            "model": make_lm(vocab_size=4, seed=0),
            "ref_model": make_lm(vocab_size=4, seed=1),
            "processing_class": make_tokenizer(["red", "green", "blue"]),
            "max_completion_length": LENGTH,
            "beta": BETA,
            "epsilon": 0.5,
        }
        if trainer_class is RaoBlackwellGRPOTrainer:
            settings["loss_type"] = "dr_grpo"
        trainer = make_trl_trainer(trainer_class, **(settings | changes))
        trainer.num_generations = 1  # no baseline: of one response there is none
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        return trainer

    return make


def measured(trainer, batch) -> TokenRecord:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return trainer._measure(ids, mask, LENGTH)


def with_kl(trainer, batch, *, future: bool = True) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What `_compute_loss` is given, and the probability of each response."""
    tokens = measured(trainer, batch)
    probability = tokens.policy_logp.double().sum(1).exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
    whole = batch | {
        "old_logps": tokens.policy_logp.sum(1),
        "old_per_token_logps": tokens.policy_logp,
    }
    mask = batch["completion_mask"].bool()
    cost = future_kl_above_group(tokens.kl, mask, trainer.num_generations)
    whole["ref_hidden"] = tokens.ref_hidden
    return trainer.with_kl(whole, cost if future else torch.zeros_like(cost)), probability


def row(inputs, i):
    return {name: x[i : i + 1] if x.ndim else x for name, x in inputs.items()}


def expected_gradient(trainer, batch, flat_gradient, *, future: bool = True) -> torch.Tensor:
    """Σ_y π(y) of the gradient of y's own loss."""
    inputs, probability = with_kl(trainer, batch, future=future)
    total = torch.zeros(())
    for i, weight in enumerate(probability):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, row(inputs, i)).backward()
        total = total + weight * flat_gradient(trainer.model)
    return total * (LENGTH if isinstance(trainer, RaoBlackwellGRPOTrainer) else 1)


def true_gradients(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """∇E[score] and ∇D_KL(policy ‖ ref) by autograd through their sums over all responses."""
    policy, mask = copy.deepcopy(trainer.model).double(), batch["completion_mask"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    index = batch["completion_ids"][..., None]

    def response_logp(model):
        logits = type(model).forward(model, ids).logits[:, len(PROMPT) - 1 : -1]
        logp = (logits / trainer.args.temperature).log_softmax(-1)
        return (logp.gather(2, index).squeeze(2) * mask).sum(1)

    logp, ref_logp = response_logp(policy), response_logp(copy.deepcopy(trainer.ref_model).double())
    scores = batch["advantages"].double()
    results = []
    for objective in ((logp.exp() * scores).sum(), (logp.exp() * (logp - ref_logp)).sum()):
        parts = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True)
        results.append(torch.cat([part.flatten() for part in parts]))
    return results[0], results[1]


@both_trainers
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_expected_gradient_is_that_of_score_less_kl(
    make_four_tokens, batch, flat_gradient, trainer_class, temperature
):
    trainer = make_four_tokens(trainer_class, temperature=temperature)
    reward_part, kl_part = true_gradients(trainer, batch)
    truth = -reward_part + BETA * kl_part
    ours = expected_gradient(trainer, batch, flat_gradient)
    assert float((ours - truth).norm() / truth.norm()) < 1e-4


@both_trainers
def test_without_the_future_it_would_be_another(
    make_four_tokens, batch, flat_gradient, trainer_class
):
    trainer = make_four_tokens(trainer_class)
    reward_part, kl_part = true_gradients(trainer, batch)
    ours = expected_gradient(trainer, batch, flat_gradient, future=False)
    kl_ours = (ours + reward_part) / BETA
    assert float((kl_ours - kl_part).norm() / kl_part.norm()) > 0.1


@both_trainers
def test_trls_own_kl_term_follows_another_gradient(
    make_four_tokens, batch, flat_gradient, trainer_class
):
    """GRPO's k3 that of the forward token KL; RLOO's k1 in the reward is right but noisier."""
    trainer = make_four_tokens(trainer_class)
    reward_part, kl_part = true_gradients(trainer, batch)
    tokens = measured(trainer, batch)
    inputs, probability = with_kl(trainer, batch)
    k1 = (tokens.policy_logp - tokens.ref_logp).sum(1)
    inputs |= {"ref_per_token_logps": tokens.ref_logp, "advantages": batch["advantages"]}
    if trainer_class is RaoBlackwellRLOOTrainer:  # TRL has the KL in the advantage there
        inputs["advantages"] = batch["advantages"] - BETA * k1
    trainer.beta = BETA
    scale, total, squares = 1 if trainer_class is RaoBlackwellRLOOTrainer else LENGTH, 0, 0
    for i, weight in enumerate(probability):
        trainer.model.zero_grad()
        trainer._joint = trainer.differentiable(row(inputs, i))
        super(trainer_class, trainer)._compute_loss(trainer.model, row(inputs, i)).backward()
        each = scale * flat_gradient(trainer.model)
        total, squares = total + weight * each, squares + weight * each.square().sum()
    error = float(((total + reward_part) / BETA - kl_part).norm() / kl_part.norm())
    assert error < 1e-3 if trainer_class is RaoBlackwellRLOOTrainer else error > 0.1


def test_the_exact_kl_makes_rloos_gradient_less_noisy_than_k1(
    make_four_tokens, batch, flat_gradient
):
    """Variance of one response's gradient, its score constant, k1 as TRL has it."""
    batch |= {"advantages": torch.zeros_like(batch["advantages"])}
    trainer = make_four_tokens(RaoBlackwellRLOOTrainer)
    tokens = measured(trainer, batch)
    inputs, probability = with_kl(trainer, batch)
    k1 = inputs | {"advantages": -BETA * (tokens.policy_logp - tokens.ref_logp).sum(1)}
    variances = []
    for losses in (inputs, k1):
        mean, square = torch.zeros(()), 0.0
        trainer.kl_coef = BETA if losses is inputs else 0.0
        for i, weight in enumerate(probability):
            trainer.model.zero_grad()
            trainer._compute_loss(trainer.model, row(losses, i)).backward()
            each = flat_gradient(trainer.model)
            mean, square = mean + weight * each, square + float(weight * each.square().sum())
        variances.append(square - float(mean.square().sum()))
    assert variances[0] < variances[1] / 2


def test_the_groups_baseline_is_the_mean_of_the_others_that_reach_a_token():
    kl = torch.tensor([[5.0, 2.0, 1.0], [5.0, 4.0, 0.0], [5.0, 6.0, 2.0], [5.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    first_pair = [[3.0 - 4.0, 1.0 - 0.0, 0.0], [4.0 - 3.0, 0.0 - 1.0, 0.0]]
    second_pair = [[8.0 - 0.0, 2.0, 0.0], [0.0 - 8.0, 0.0, 0.0]]
    expected = torch.tensor([*first_pair, *second_pair])
    assert torch.equal(future_kl_above_group(kl, mask, group_size=2), expected)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("training", [True, False])
def test_the_kl_is_averaged_as_trl_averages_its_own(make_four_tokens, batch, loss_type, training):
    """TRL's loss with its k3 less the one without is β times the mean of k3."""
    trainer = make_four_tokens(RaoBlackwellGRPOTrainer, loss_type=loss_type)
    trainer.current_gradient_accumulation_steps = 2
    trainer.args.steps_per_generation = 4
    trainer.model.train(training)
    tokens = measured(trainer, batch)
    inputs = batch | {
        "ref_hidden": tokens.ref_hidden,
        "ref_per_token_logps": tokens.ref_logp,
        "num_items_in_batch": batch["completion_mask"].sum() * 4.0,
    }
    trainer._joint = tokens
    losses = []
    for trainer.beta in (0.0, BETA):
        losses.append(super(RaoBlackwellGRPOTrainer, trainer)._compute_loss(trainer.model, inputs))
    log_ratio = tokens.ref_logp - tokens.policy_logp
    ours = BETA * trainer.mean_over_tokens(log_ratio.exp() - 1 - log_ratio, inputs)
    assert float(ours) == pytest.approx(float(losses[1] - losses[0]), rel=1e-4)


def test_a_clipped_response_pulls_neither_to_its_score_nor_to_the_reference(
    make_four_tokens, batch, flat_gradient
):
    trainer = make_four_tokens(RaoBlackwellRLOOTrainer, epsilon=0.2, epsilon_high=0.4)
    inputs, _ = with_kl(trainer, batch)
    old = inputs["old_logps"].clone()
    for ratio, advantage, pulls in (
        (1.5, 1.0, False),
        (1.5, -1.0, True),
        (1.3, 1.0, True),
        (0.7, -1.0, False),
        (0.7, 1.0, True),
    ):
        inputs["old_logps"] = old - torch.tensor(ratio).log()
        inputs["advantages"] = torch.full_like(batch["advantages"], advantage)
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, row(inputs, 20)).backward()
        assert bool(flat_gradient(trainer.model).any()) == pulls


@both_trainers
def test_a_rollout_has_the_future_kl_of_its_own_responses(make_trl_trainer, make_lm, trainer_class):
    trainer = make_trl_trainer(trainer_class, ref_model=make_lm(seed=1), beta=BETA)
    trainer.model.train()
    prompts = ["the film is", "a plot"]
    inputs = [{"prompt": p} for p in prompts for _ in range(trainer.num_generations)]
    rollout = trainer._generate_and_score_completions(inputs)
    mask = rollout["completion_mask"].bool()
    ids, attention = (
        torch.cat([rollout[f"prompt_{name}"], rollout[f"completion_{name}"]], 1)
        for name in ("ids", "mask")
    )
    tokens = trainer._measure(ids, attention, mask.shape[1])
    cost = future_kl_above_group(tokens.kl, mask, trainer.num_generations)
    assert float(cost.abs().max()) > 0.1
    if trainer_class is RaoBlackwellGRPOTrainer:
        of_scores = rollout["advantages"] + BETA * cost  # one number for a response
        torch.testing.assert_close(of_scores, of_scores[:, :1].expand_as(of_scores))
    else:
        torch.testing.assert_close(rollout["kl_cost"], cost)
