"""The gradient that the trainer follows against autograd through the enumerated objective.

A model of four tokens and three steps has 40 responses. Their gradients, weighted by probability,
are the expected gradient of the trainer's loss: no sampling, so no tolerance for it.
"""

import copy
import itertools

import pytest
import torch

from rlkl.kl import get_estimator, kl_surrogate, prefix_weights
from rlkl.rollout import Responses, Rollout, collect_rollout
from rlkl.trainers import PPOTrainer, RaoBlackwellPPOTrainer

PROMPT = [0, 1, 2]
LENGTH = 3
PURE = {  # the plain policy gradient: no clipping, no critic, no whitening, no discount
    "whiten_advantages": False,
    "lam": 1.0,
    "gamma": 1.0,
    "vf_coef": 0.0,
    "cliprange": 1e6,
    "kl_coef": 0.7,
    "allow_biased_kl": True,
}


def every_response() -> list[tuple[int, ...]]:
    """All sequences of at most three of the tokens 0..3 that end with 0 or are cut."""
    responses = []
    for length in range(1, LENGTH + 1):
        for y in itertools.product(range(4), repeat=length):
            if 0 not in y[:-1] and (y[-1] == 0 or length == LENGTH):
                responses.append(y)
    return responses


@pytest.fixture
def responses() -> Responses:
    rows = every_response()
    assert len(rows) == 1 + 3 + 36
    return Responses(
        prompts=["red green"] * len(rows),
        texts=[str(row) for row in rows],
        prompt_ids=torch.tensor([PROMPT] * len(rows)),
        prompt_mask=torch.ones(len(rows), len(PROMPT), dtype=torch.bool),
        tokens=torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in rows]),
        mask=torch.tensor([[t < len(row) for t in range(LENGTH)] for row in rows]),
        ended=torch.tensor([row[-1] == 0 for row in rows]),
    )


def any_reward(prompts, texts):
    return torch.randn(len(texts), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def make_pure_trainer(make_trainer, make_tokenizer, make_lm):
    """A trainer of the four-token model, with a reference that is another model."""

    def make(trainer_class=PPOTrainer, **changes) -> PPOTrainer:
        settings = {
            "model": make_lm(vocab_size=4, seed=0),
            "ref_model": make_lm(vocab_size=4, seed=1),
            "processing_class": make_tokenizer(["red", "green", "blue"]),
            "reward_funcs": any_reward,
            "response_length": LENGTH,
        }
        return make_trainer(trainer_class, **(settings | PURE | changes))

    return make


def measured(trainer: PPOTrainer, responses: Responses) -> Rollout:
    tokens = trainer.token_statistics(responses)
    return collect_rollout(responses, trainer.reward, tokens)


def log_probs(model, responses: Responses, temperature: float) -> torch.Tensor:
    """[N, T, V] next-token log-probabilities in float64, by the model's own forward."""
    logits = model(responses.input_ids).logits[:, len(PROMPT) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def expected_gradient(trainer, responses, gradient) -> torch.Tensor:
    """Σ_y π(y) of the gradient of y's own loss; a loss is a mean over tokens: times T_y."""
    rollout = measured(trainer, responses)
    advantages = trainer.advantages(rollout, {})
    lengths = responses.mask.sum(1)
    probability = rollout.tokens.policy_logp.double().sum(1).exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
    return sum(
        probability[i] * lengths[i] * gradient(trainer, rollout, torch.tensor([i]), advantages)
        for i in range(len(responses))
    )


def true_gradients(trainer, responses) -> tuple[torch.Tensor, torch.Tensor]:
    """∇E[score] and ∇D_KL(policy ‖ ref) by autograd through their sums over all responses."""
    policy, temperature = copy.deepcopy(trainer.model).double(), trainer.args.temperature
    index, mask = responses.tokens[..., None], responses.mask
    logp, ref_logp = (
        (log_probs(model, responses, temperature).gather(2, index).squeeze(2) * mask).sum(1)
        for model in (policy, copy.deepcopy(trainer.ref_model).double())
    )
    scores = any_reward(responses.prompts, responses.texts).double()
    parameters = list(policy.parameters())
    results = []
    for objective in ((logp.exp() * scores).sum(), (logp.exp() * (logp - ref_logp)).sum()):
        parts = torch.autograd.grad(objective, parameters, retain_graph=True)
        results.append(torch.cat([part.flatten() for part in parts]))
    return results[0], results[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("estimator", "placement"),
    [("k1", "reward"), ("k1", "both"), ("k3", "both"), ("rb", "both")],
)
def test_the_expected_gradient_is_that_of_reward_less_kl(
    make_pure_trainer, responses, gradient, estimator, placement, temperature
):
    trainer = make_pure_trainer(
        kl_estimator=estimator, kl_placement=placement, temperature=temperature
    )
    reward_part, kl_part = true_gradients(trainer, responses)
    truth = -reward_part + trainer.args.kl_coef * kl_part
    ours = expected_gradient(trainer, responses, gradient)
    assert float((ours - truth).norm() / truth.norm()) < 1e-4


@pytest.mark.parametrize(
    ("estimator", "placement"),
    [("rb", "reward"), ("rb", "loss"), ("k3", "loss"), ("k2", "both"), ("k1", "loss")],
)
def test_refused_pairs_would_follow_another_gradient(
    make_pure_trainer, responses, gradient, estimator, placement
):
    trainer = make_pure_trainer(kl_estimator=estimator, kl_placement=placement)
    reward_part, kl_part = true_gradients(trainer, responses)
    ours = expected_gradient(trainer, responses, gradient)
    kl_ours = (ours + reward_part) / trainer.args.kl_coef
    assert float((kl_ours - kl_part).norm() / kl_part.norm()) > 0.1
    if (estimator, placement) == ("k1", "loss"):
        assert float(kl_ours.norm() / kl_part.norm()) < 1e-4  # nothing pulls to the reference


def test_the_two_trainers_follow_these_gradients_by_default(make_pure_trainer):
    ppo, rb = make_pure_trainer(), make_pure_trainer(RaoBlackwellPPOTrainer)
    assert (ppo.estimator.name, ppo.placement) == ("k1", "reward")
    assert (rb.estimator.name, rb.placement) == ("rb", "both")


class Recording(PPOTrainer):
    """Keeps its last rollout."""

    def measure(self, *args, **kwargs):
        self.last_rollout = super().measure(*args, **kwargs)
        return self.last_rollout


@pytest.mark.parametrize(
    ("estimator", "placement"), [("k1", "reward"), ("rb", "both"), ("k3", "both")]
)
def test_a_step_leaves_the_gradient_of_score_and_surrogate_on_its_own_rollout(
    make_trainer, make_lm, estimator, placement
):
    changes = PURE | {"kl_estimator": estimator, "kl_placement": placement, "num_ppo_epochs": 1}
    trainer = make_trainer(Recording, ref_model=make_lm(seed=1), **changes)
    trainer.create_optimizer()
    trainer.training_step(
        trainer.model, {"columns": {"prompt": ["the film", "I found this plot", "it"]}}
    )
    ours = torch.cat([p.grad.double().flatten() for p in trainer.model.parameters()])

    rollout, kl = trainer.last_rollout, get_estimator(estimator)
    r, policy, ref = rollout.responses, trainer.model.double(), trainer.ref_model.double()
    objective = torch.zeros((), dtype=torch.float64)
    for i in range(len(r)):
        prompt, tokens = r.prompt_ids[i][r.prompt_mask[i]], r.tokens[i][r.mask[i]][None]
        ids, real = torch.cat([prompt, tokens[0]])[None], torch.ones_like(tokens).bool()
        policy_logp, ref_logp = (
            model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1) for model in (policy, ref)
        )
        token_logp = policy_logp.gather(2, tokens[..., None]).squeeze(2)
        k = kl(policy_logp, ref_logp.detach(), tokens, real)
        surrogate = kl_surrogate(
            k, token_logp, real, placement, own_token=kl.claims.own_token
        ).squeeze()
        objective = objective - rollout.scores[i] * token_logp.sum() + 0.7 * surrogate
    objective = objective / r.mask.sum()
    truth = torch.autograd.grad(objective, list(policy.parameters()))
    truth = torch.cat([part.flatten() for part in truth])
    assert float((ours - truth).norm() / truth.norm()) < 1e-4


@pytest.mark.parametrize("trainer_class", [PPOTrainer, RaoBlackwellPPOTrainer])
def test_whitening_divides_reward_and_loss_channel_alike(
    make_pure_trainer, responses, gradient, trainer_class
):
    rows, real = torch.arange(len(responses)), responses.mask
    plain = make_pure_trainer(trainer_class)
    rollout = measured(plain, responses)
    unscaled = plain.advantages(rollout, {})
    assert unscaled.scale == 1
    mean, scale = unscaled.tokens[real].mean(), unscaled.tokens[real].std(correction=0)
    centred = unscaled._replace(tokens=unscaled.tokens - mean)
    expected = gradient(plain, rollout, rows, centred) / scale

    whitened = make_pure_trainer(trainer_class, whiten_advantages=True)
    ours = gradient(whitened, rollout, rows, whitened.advantages(rollout, {}))
    assert float((ours - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("trainer_class", [PPOTrainer, RaoBlackwellPPOTrainer])
def test_micro_batches_leave_the_gradient_of_the_whole_minibatch(
    make_pure_trainer, responses, gradient, trainer_class
):
    settings = {"whiten_advantages": True, "vf_coef": 0.5, "cliprange": 0.2}
    rows = torch.tensor([0, 39, 2, 7, 1, 20])  # lengths 1, 3, 2, 3, 2, 3
    results = []
    for micro in (None, 1, 2):
        trainer = make_pure_trainer(trainer_class, **settings, micro_batch_size=micro)
        torch.nn.init.ones_(trainer.critic.head.weight)
        rollout = measured(trainer, responses)
        advantages = trainer.advantages(rollout, {})
        policy = gradient(trainer, rollout, rows, advantages)
        critic = trainer.critic.head.weight.grad.double().flatten()
        results.append(torch.cat([policy, critic]))
    for other in results[1:]:
        assert float((other - results[0]).norm() / results[0].norm()) < 1e-5


def test_the_value_loss_moves_the_critic_towards_the_returns(
    make_pure_trainer, responses, gradient
):
    trainer = make_pure_trainer(vf_coef=1.0, cliprange_value=1e6)
    rollout = measured(trainer, responses)
    advantages = trainer.advantages(rollout, {})
    rows, real = torch.arange(len(responses)), responses.mask
    nothing = advantages._replace(tokens=torch.zeros_like(advantages.tokens))
    gradient(trainer, rollout, rows, nothing)
    # d/db of mean ½ (b − R)² at b = 0 is minus the mean return
    bias = float(trainer.critic.head.bias.grad)
    assert bias == pytest.approx(-float(advantages.returns[real].mean()), rel=1e-4)


def later_update_gradient(trainer, responses, gradient, **options) -> torch.Tensor:
    """Σ_y π_old(y) of the gradient of y's own loss, after the policy has moved from π_old."""
    rollout = measured(trainer, responses)
    advantages = trainer.advantages(rollout, {})
    lengths = responses.mask.sum(1)
    probability = rollout.tokens.policy_logp.double().sum(1).exp()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise)
    return sum(
        probability[i]
        * lengths[i]
        * gradient(trainer, rollout, torch.tensor([i]), advantages, **options)
        for i in range(len(responses))
    )


@pytest.mark.parametrize(
    ("estimator", "placement"), [("rb", "both"), ("k1", "reward"), ("k1", "both"), ("k3", "both")]
)
def test_a_later_update_with_prefix_weights_follows_the_kl_of_the_policy_as_it_is(
    make_pure_trainer, responses, gradient, estimator, placement
):
    """No reward, so that the whole gradient is the KL's; without weights it is another one."""
    errors = {}
    for kl_off_policy in ("none", "prefix", "prefix_truncated"):
        trainer = make_pure_trainer(
            kl_estimator=estimator,
            kl_placement=placement,
            kl_off_policy=kl_off_policy,
            kl_weight_bound=1.05,
            reward_funcs=lambda prompts, texts: torch.zeros(len(texts)),
        )
        ours = later_update_gradient(
            trainer, responses, gradient, off_policy=kl_off_policy != "none"
        )
        _, kl_part = true_gradients(trainer, responses)
        truth = trainer.args.kl_coef * kl_part
        errors[kl_off_policy] = float((ours - truth).norm() / truth.norm())
    assert errors["prefix"] < 1e-4
    assert min(errors["none"], errors["prefix_truncated"]) > 1e-2


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("placement", ["both", "reward"])
def test_the_parts_of_a_later_loss_are_reported_by_their_formulas(
    make_pure_trainer, responses, off_policy, placement
):
    """With prefix weights more is differentiated; its value is arbitrary and no part of either."""
    trainer = make_pure_trainer(
        kl_estimator="rb", kl_placement=placement, kl_off_policy="prefix" if off_policy else "none"
    )
    rollout, real = measured(trainer, responses), responses.mask
    advantages = trainer.advantages(rollout, {})
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
    rows = torch.arange(len(responses))
    update = trainer.accumulate_gradient(rollout, rows, advantages, off_policy=off_policy)
    now, old = measured(trainer, responses).tokens, rollout.tokens
    ratio = (now.policy_logp - old.policy_logp).exp()
    weight = prefix_weights(now.policy_logp, old.policy_logp, real)
    k = now.kl * (weight if off_policy else 1.0)
    kl_loss = trainer.args.kl_coef * float(k[real].mean()) if placement == "both" else 0.0
    assert float(update.policy_loss) == pytest.approx(
        -float((ratio * advantages.tokens)[real].mean())
    )
    assert float(update.kl_loss) == pytest.approx(kl_loss, rel=1e-4)


@pytest.mark.parametrize(("estimator", "placement"), [("rb", "both"), ("k1", "reward")])
def test_where_the_policy_has_not_moved_prefix_weights_change_nothing(
    make_pure_trainer, responses, gradient, estimator, placement
):
    trainer = make_pure_trainer(
        kl_estimator=estimator, kl_placement=placement, kl_off_policy="prefix", lam=0.9
    )
    rollout, rows = measured(trainer, responses), torch.arange(len(responses))
    advantages = trainer.advantages(rollout, {})
    plain, weighted = (
        gradient(trainer, rollout, rows, advantages, off_policy=flag) for flag in (False, True)
    )
    assert float((weighted - plain).norm() / plain.norm()) < 1e-6


def test_a_clipped_token_keeps_its_kl_gradient(make_pure_trainer, responses, gradient):
    """Clipping is for the score: the KL of the policy as it is stays exact with a tight ε."""
    trainer = make_pure_trainer(
        kl_estimator="rb",
        kl_placement="both",
        kl_off_policy="prefix",
        cliprange=1e-9,
        reward_funcs=lambda prompts, texts: torch.zeros(len(texts)),
    )
    ours = later_update_gradient(trainer, responses, gradient, off_policy=True)
    _, kl_part = true_gradients(trainer, responses)
    truth = trainer.args.kl_coef * kl_part
    assert float((ours - truth).norm() / truth.norm()) < 1e-4
