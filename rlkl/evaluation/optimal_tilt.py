"""The reward-vs-KL frontier that no policy can pass: the reference tilted by the reward."""

import math
from dataclasses import dataclass

from torch import Tensor

from rlkl.kl import mean_and_stderr

MIN_EFFECTIVE_SAMPLES = 16.0


@dataclass(frozen=True)
class TiltPoint:
    """The tilt at one β: nats per response and reward, means over prompts with standard errors."""

    beta: float
    kl: float
    kl_se: float
    reward: float
    reward_se: float
    others: dict[str, tuple[float, float]]
    """Means under the tilt of other scores of the same responses, with standard errors."""
    trusted: bool
    """Whether the samples carry the estimate: see `OptimalTilt`."""


class OptimalTilt:
    """For each prompt the maximiser of E[r] − β D_KL(π ‖ ref) is π* ∝ ref · exp(r/β).

    From N samples of the reference for a prompt, with w_i ∝ exp(r_i/β), Σ w_i = 1:

        E_π*[r] = Σ_i w_i r_i        D_KL(π* ‖ ref) = Σ_i w_i log(N w_i)

    in nats per response (of responses cut where the samples were cut), averaged over prompts at
    the same β. As β falls from ∞ to 0 the two trace the frontier of all policies: no other has more
    mean reward at the same mean KL.

    Σ w_i log(N w_i) is log N minus the entropy of w: N exp(−KL) samples carry the estimate, as many
    as equal weights of that entropy would have. A point is `trusted` while their geometric mean
    over prompts, N exp(−mean KL), is at least 16: up to log(N/16) nats. Beyond, the estimate bends
    towards the best of the samples and says too little of the optimum. Standard errors are over
    prompts; the samples' own error comes on top, see `half_sample_drop`.

    Args:
        scores: [P, N] rewards of N samples of the reference for each of P prompts.
        others: other scores [P, N] of the same samples, such as a judge's.

    Raises:
        ValueError: no prompts, or fewer than two samples of each.

    Example: two equally likely responses with rewards 0 and 1; at β = 1 the optimum takes the
    better one with probability e/(1 + e).

        >>> import torch
        >>> tilt = OptimalTilt(torch.tensor([[0.0, 1.0]] * 2))
        >>> round(tilt.at(1.0).reward, 4), round(tilt.at(1.0).kl, 4)
        (0.7311, 0.1109)
    """

    def __init__(self, scores: Tensor, others: dict[str, Tensor] | None = None) -> None:
        if scores.ndim != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
            raise ValueError(
                f"scores have shape {tuple(scores.shape)}; [prompts, samples >= 2] are needed"
            )
        self.scores = scores.double()
        self.others = {name: other.double() for name, other in (others or {}).items()}

    @property
    def trusted_kl(self) -> float:
        """log(N/16): how far in nats the samples carry the estimate."""
        return max(0.0, math.log(self.scores.shape[1] / MIN_EFFECTIVE_SAMPLES))

    def at(self, beta: float) -> TiltPoint:
        """The tilt at β > 0, in reward units per nat.

        Raises:
            ValueError: β is not positive.
        """
        if not beta > 0:
            raise ValueError(f"beta is {beta}; it must be > 0 (β → 0 is the best of the samples)")
        logw = (self.scores / beta).log_softmax(1)  # [P, N]
        w = logw.exp()
        kl, kl_se = mean_and_stderr((w * (logw + math.log(w.shape[1]))).sum(1).clamp(min=0.0))
        reward, reward_se = mean_and_stderr((w * self.scores).sum(1))
        others = {}
        for name, other in self.others.items():
            mean, stderr = mean_and_stderr((w * other).sum(1))
            others[name] = (float(mean), float(stderr))
        trusted = float(kl) <= self.trusted_kl
        return TiltPoint(
            beta, float(kl), float(kl_se), float(reward), float(reward_se), others, trusted
        )

    def curve(self, points: int = 40) -> list[TiltPoint]:
        """Points at even steps of the KL, from nearly 0 to a little beyond what is trusted."""
        end = min(1.2 * self.trusted_kl + 0.1, 0.98 * math.log(self.scores.shape[1]))
        return [self.at(self.beta_of(end * (i + 1) / points)) for i in range(points)]

    def beta_of(self, kl: float) -> float:
        """The β at which the mean KL is `kl` nats: it falls as β rises, so by bisection of log β.

        Where ties among the best samples keep the KL below `kl`, the smallest β searched.
        """
        spread = float(self.scores.std()) + 1e-12
        low, high = math.log(1e-4 * spread), math.log(1e5 * spread)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(math.exp(middle)).kl > kl else (low, middle)
        return math.exp(high)

    def half_sample_drop(self) -> float | None:
        """Largest drop in reward, over the trusted KL, of the curve from half of the samples.

        The mean of the curves of the two halves, below that of all: a bias of order 1/N is about as
        large as this. It tells how the estimate depends on N, not how far the optimum is: samples
        that all miss a rare reward show no drop. None where nothing is trusted.
        """
        if self.trusted_kl == 0:
            return None
        half = self.scores.shape[1] // 2
        halves = [OptimalTilt(part) for part in (self.scores[:, :half], self.scores[:, -half:])]
        kls = [self.trusted_kl * (i + 1) / 8 for i in range(8)]
        return max(
            self.at(self.beta_of(kl)).reward
            - sum(part.at(part.beta_of(kl)).reward for part in halves) / 2
            for kl in kls
        )
