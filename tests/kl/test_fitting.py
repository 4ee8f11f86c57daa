"""Fits of a table of logits: the paper's toy claims, where they hold and where they do not."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlkl.kl import forward_kl, reverse_kl
from rlkl.kl.fitting import fit_policy, gaussian_mixture, long_tail

RECIPE = Path(__file__).parents[2] / "recipes" / "akl_toy.py"


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("akl_toy", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["akl_toy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def experiments(toy) -> dict:
    """The figures' settings: the recipe's own defaults."""
    return {e.name: e for e in toy.run(steps=toy.STEPS, learning_rate=toy.LEARNING_RATE)}


@pytest.mark.parametrize("name", ["two Gaussians", "long tail"])
def test_both_directions_converge_to_the_same_target(name, experiments):
    for fit in experiments[name].fits.values():
        total = fit.head_error + fit.tail_error
        assert total[-1] < 0.02 * total[0]


def test_on_two_gaussians_forward_kl_leads_on_the_head_and_reverse_on_the_tail_early(experiments):
    experiment = experiments["two Gaussians"]
    forward, reverse = experiment.pair
    early = slice(1, experiment.early + 1)
    assert experiment.early >= 10
    assert (forward.head_error[early] < reverse.head_error[early]).all()
    assert (reverse.tail_error[early] < forward.tail_error[early]).all()


def test_on_a_long_tail_forward_kl_leads_on_the_head_early(experiments):
    experiment = experiments["long tail"]
    forward, reverse = experiment.pair
    early = slice(1, experiment.early + 1)
    assert experiment.early >= 10
    assert (forward.head_error[early] < reverse.head_error[early]).all()


def test_on_a_long_tail_reverse_kl_leads_on_the_tail_only_after_the_early_steps(experiments):
    """The paper's second claim fails at first on Zipf's law: forward KL leads on both parts."""
    experiment = experiments["long tail"]
    forward, reverse = experiment.pair
    first, last = experiment.leads()["RKL on the tail"]
    assert experiment.early < first < 3 * experiment.early
    assert last == len(forward.tail_error) - 1
    early = slice(1, experiment.early + 1)
    assert (forward.tail_error[early] < reverse.tail_error[early]).all()
    assert reverse.tail_error[first] > 0.3 * reverse.tail_error[0]  # far from done by then


def test_adaptive_kl_lies_between_on_the_tail_early(experiments):
    for experiment in experiments.values():
        tails = torch.stack([f.tail_error[1 : experiment.early] for f in experiment.fits.values()])
        forward, reverse, adaptive = tails
        low, high = torch.minimum(forward, reverse), torch.maximum(forward, reverse)
        assert ((adaptive > low) & (adaptive < high)).all()


def test_a_fit_is_plain_gradient_descent_from_its_start():
    target, start = long_tail(7), torch.arange(7.0)
    fit = fit_policy(target, forward_kl, 2, 0.5, start_logits=start)
    logits = start
    for step in range(2):
        torch.testing.assert_close(fit.policies[step], logits.softmax(0))
        logits = logits - 0.5 * (logits.softmax(0) - target.exp())  # ∇ of the cross-entropy
    torch.testing.assert_close(fit.policies[2], logits.softmax(0))
    gap = (fit.policies - target.exp()).abs().sum(1)
    torch.testing.assert_close(fit.head_error + fit.tail_error, gap)


def test_targets_are_distributions():
    for target in (gaussian_mixture(), long_tail(), gaussian_mixture(11, (0.5,), (0.1,), (2.0,))):
        torch.testing.assert_close(target.exp().sum(), torch.tensor(1.0))
    assert fit_policy(long_tail(5), reverse_kl, 0, 1.0).policies.shape == (1, 5)


def test_the_recipe_writes_its_table_and_figures(toy, tmp_path, monkeypatch, capsys):
    words = ["akl_toy.py", "--steps", "40", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    toy.main()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "table.json",
        "errors.png",
        "two_Gaussians.png",
        "long_tail.png",
    }
    assert "FKL on the head: leads from step 1" in capsys.readouterr().out


def test_the_recipe_refuses_nonsense_in_one_line(toy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["akl_toy.py", "--steps", "1"])
    with pytest.raises(SystemExit, match="2"):
        toy.main()
    assert capsys.readouterr().err.count("\n") == 1
