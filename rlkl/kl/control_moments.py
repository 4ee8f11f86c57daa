"""Averages with control variates from additive moments: cross-fitted, streamed, with errors.

The value of response i is x_i = A_i + Σ_p c_p C_ip, with E[C_i | prompt] = 0. Its coefficients c
are fitted on folds that i is not in. Everything needed of the responses is additive:

- per fold, the Gram matrix Σ_i z_i z_iᵀ of z = (1, A, C): count, sums and cross-products. From the
  others' Gram matrices follow a fold's coefficients, from its own the sum and the square sum of x.
- per fold and prompt, Σ_i z_i, from which follow the sums of x over the responses of a prompt.

So memory is K (P+2)² + K G (P+2) numbers for K folds, P controls and G prompts, however many
responses are added, and the moments of two machines add.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ControlEstimate(NamedTuple):
    """A mean over responses with its errors, in the unit of the anchor."""

    mean: Float[Tensor, ""]
    stderr: Float[Tensor, ""]
    """Responses independent: the error given these prompts. inf for one response."""
    clustered_stderr: Float[Tensor, ""]
    """Prompts independent, their responses not: the error over prompts. inf for one prompt."""
    coefficients: Float[Tensor, "K P"]
    """What was applied to each fold."""


@dataclass(frozen=True)
class ControlMoments:
    """Additive moments of anchors and controls; start with `zeros`, then `add` batches.

    Example:
        >>> moments = ControlMoments.zeros(controls=1, folds=2, prompts=2)
        >>> anchor, controls = torch.tensor([3.0, 1.0]), torch.tensor([[-1.0], [1.0]])
        >>> for _ in range(2):  # the second batch is like the first, in the other fold
        ...     fold = torch.full((2,), int(moments.count) // 2)
        ...     moments.add(anchor, controls, fold=fold, prompt=torch.tensor([0, 1]))
        >>> estimate = moments.estimate(moments.fit_others())
        >>> estimate.coefficients.tolist(), estimate.mean.item()  # A + 1·C is 2 for all
        ([[1.0], [1.0]], 2.0)
    """

    responses: Float[Tensor, "K Z Z"]
    """Σ_i z_i z_iᵀ of each fold, z = (1, A, C), Z = P + 2; float64."""
    prompts: Float[Tensor, "K G Z"]
    """Σ_i z_i of each fold and prompt; float64."""

    @classmethod
    def zeros(cls, *, controls: int, folds: int, prompts: int) -> "ControlMoments":
        """The moments of no response.

        Raises:
            ValueError: no fold or no prompt.
        """
        if folds < 1 or prompts < 1:
            raise ValueError(
                f"folds is {folds} and prompts {prompts}; use at least 1 of each (2 or more folds "
                "where coefficients are fitted)"
            )
        size = controls + 2
        return cls(
            torch.zeros(folds, size, size, dtype=torch.float64),
            torch.zeros(folds, prompts, size, dtype=torch.float64),
        )

    def add(
        self,
        anchor: Float[Tensor, " n"],
        controls: Float[Tensor, "n P"],
        *,
        fold: Int[Tensor, " n"],
        prompt: Int[Tensor, " n"],
    ) -> None:
        """Adds n responses in place; detached.

        Args:
            anchor: A.
            controls: C; no columns for a plain average.
            fold: 0..K-1 of each response. All responses of a prompt in one fold, where there are
                prompts enough: the coefficients are then fitted on other prompts.
            prompt: 0..G-1 of each response.
        """
        z = torch.cat([torch.ones_like(anchor).unsqueeze(1), anchor.unsqueeze(1), controls], 1)
        z = z.detach().to(self.responses)
        for f in fold.unique().tolist():
            own = z[fold == f]
            self.responses[f] += own.T @ own
            self.prompts[f].index_add_(0, prompt[fold == f].to(z.device), own)

    def __add__(self, other: "ControlMoments") -> "ControlMoments":
        """The moments of the responses of both."""
        return ControlMoments(self.responses + other.responses, self.prompts + other.prompts)

    @property
    def count(self) -> float:
        """Number of responses."""
        return float(self.responses[:, 0, 0].sum())

    def fit_others(self, shrinkage: float = 0.0) -> Float[Tensor, "K P"]:
        """For each fold, the coefficients fitted to all the others; see `fit_coefficients`."""
        others = self.responses.sum(0) - self.responses
        return torch.stack([fit_coefficients(gram, shrinkage) for gram in others])

    def estimate(self, coefficients: Float[Tensor, "K P"]) -> ControlEstimate:
        """The mean of x = A + c·C over all responses, with errors that take c as given.

            stderr           = √( Σ_i (x_i - x̄)² / (n (n-1)) )
            clustered_stderr = √( G/(G-1) Σ_g (S_g - x̄ n_g)² ) / n

        S_g is the sum over the n_g responses of prompt g, G the number of prompts with a response.

        Raises:
            ValueError: there is no response.
        """
        n = self.responses[:, 0, 0].sum()
        if n == 0:
            raise ValueError("there is no response yet; add some before asking for their mean")
        ones = self.responses.new_ones(len(coefficients), 1)
        weights = torch.cat([0 * ones, ones, coefficients], 1)  # x = weights · z
        mean = (self.responses[:, 0] * weights).sum() / n
        squares = torch.einsum("kz,kzy,ky->", weights, self.responses, weights)
        variance = (squares - n * mean**2).clamp(min=0) / (n - 1)  # rounding may leave -1e-17

        sums = torch.einsum("kz,kgz->g", weights, self.prompts)
        sizes = self.prompts[:, :, 0].sum(0)
        groups = (sizes > 0).sum()
        between = (sums - mean * sizes).square().sum() * groups / (groups - 1)
        infinite = torch.full_like(mean, torch.inf)
        return ControlEstimate(
            mean=mean,
            stderr=(variance / n).sqrt() if n > 1 else infinite,
            clustered_stderr=between.sqrt() / n if groups > 1 else infinite,
            coefficients=coefficients,
        )


def fit_coefficients(gram: Float[Tensor, "Z Z"], shrinkage: float = 0.0) -> Float[Tensor, " P"]:
    """The c that makes A + c·C vary least: -S⁻¹ b, S = Σ_i C_i C_iᵀ, b = Σ_i C_i (A_i - Ā).

    The controls' mean is known to be 0, so S is not centred. With several controls they are
    c_p = c̄ + δ_p: c̄ is the best common coefficient, and δ minimises the squares plus a penalty
    κ v_p δ_p² with v_p = S_pp / n and κ = `shrinkage` · P, as if κ responses had shown no
    difference. A control that never varied gets c̄, and 0 if none did.

    Args:
        gram: Σ_i z_i z_iᵀ of z = (1, A, C), or of any weights in place of counts.
        shrinkage: pseudo-responses per control; 0 for the plain least squares.
    """
    count, total = gram[0, 0], gram[0, 1]
    if count == 0:
        return gram.new_zeros(len(gram) - 2)
    controls = gram[2:, 2:]
    b = gram[1, 2:] - total / count * gram[0, 2:]
    common = torch.where(controls.sum() > 0, -b.sum() / controls.sum(), 0.0)
    if len(b) <= 1:
        return common.expand(len(b))
    penalty = shrinkage * len(b) / count * controls.diagonal()
    residual = b + controls.sum(1) * common
    return common - torch.linalg.pinv(controls + penalty.diag(), hermitian=True) @ residual
