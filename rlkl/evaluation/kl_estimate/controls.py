"""Control variates on sums per unit: how much of a mean-zero sum to add, fitted on other units.

For a base B and controls Z_j of mean zero, B + Σ_j λ_j Z_j has the same mean for any fixed λ, and
the least variance at λ* = -Var(Z)⁻¹ Cov(Z, B). A λ fitted on the very units it is used on would
bias the mean; here the units are dealt to folds, and each fold uses the λ of the others.
"""

import torch
from torch import Tensor

from rlkl.evaluation.kl_estimate.units import Units

FOLDS = 10


def folds(units: Units) -> Tensor:
    """[U] fold of each unit: whole strata, unless there are fewer of them than folds."""
    unit = torch.arange(len(units))
    return (unit // units.replicates if units.strata >= FOLDS else unit) % FOLDS


def add_fitted_control(base: Tensor, control: Tensor, counts: Tensor, units: Units) -> Tensor:
    """[U] sums B_u + λ Z_u with λ = -Σ e_v Z_v / Σ Z_v² over the units v of the other folds.

    e_v is B_v less what its stratum's mean makes expected of it. λ is 0 where the others have no
    spread in Z.

    Args:
        base: [U] sums B_u of an unbiased estimate.
        control: [U] sums Z_u of the mean-zero control.
        counts: [U] responses per unit.
        units: of which the sums are.
    """
    fold, stratum = folds(units), units.stratum
    result = base.clone()
    for f in range(FOLDS):
        fit = (fold != f) & (counts > 0)
        totals = torch.zeros(2, units.strata, dtype=base.dtype)
        totals[0].index_add_(0, stratum[fit], base[fit])
        totals[1].index_add_(0, stratum[fit], counts[fit])
        mean = totals[0] / totals[1].clamp(min=1)
        error = base[fit] - mean[stratum[fit]] * counts[fit]
        spread = control[fit].square().sum()
        if float(spread) > 0:
            result[fold == f] -= (error * control[fit]).sum() / spread * control[fold == f]
    return result
