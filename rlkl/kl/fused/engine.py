"""The sweep over chunks: logits, statistics, gradient of the logits, and back."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlkl.kl.divergences import log_softmax_pair
from rlkl.kl.fused.buffers import Buffers
from rlkl.kl.fused.generators import SMALLEST_P
from rlkl.kl.fused.heads import Gradients, Product
from rlkl.kl.fused.precision import gemm_precision
from rlkl.kl.fused.problem import Problem
from rlkl.kl.fused.workers import Shared, Workers

OnLogits = Callable[[slice, Tensor, Tensor], None]
"""Called with rows, and the logits [n, V] of policy and reference there."""

# Above this t, p may have underflowed where the reference still has mass.
MAX_T = 60.0
# Rows that need a second look are copied so many at a time.
_ROWS_AT_A_TIME = 208


def sweep(
    problem: Problem,
    upstream: Callable[[slice, tuple[Tensor, ...]], dict[str, Tensor]] | None = None,
    gradients: Gradients | None = None,
    on_logits: OnLogits | None = None,
) -> tuple[Tensor, ...]:
    """The statistics [N] of all tokens, chunk by chunk.

    `upstream(rows, statistics)` is called on each chunk and returns the gradient of some loss
    per statistic; `gradients` adds up what follows from it. `on_logits` sees a chunk's logits of
    policy and reference before they are overwritten.
    """
    n, dtype, device = len(problem.tokens), problem.policy.dtype, problem.tokens.device
    stats = tuple(torch.empty(n, dtype=dtype, device=device) for _ in problem.record._fields)
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        Workers(problem.threads, divide_products=problem.large) as workers,
    ):
        chunk = Chunk(problem, workers, differentiate=gradients is not None)
        for start in range(0, n, problem.chunk_size):
            rows = slice(start, min(start + problem.chunk_size, n))
            part = tuple(out[rows] for out in stats)
            chunk.multiply(start, len(part[0]))
            if on_logits is not None:
                with workers.torch_threads():
                    on_logits(rows, chunk.rows.p, chunk.rows.t)
            chunk.read(part)
            given = {}
            if upstream is not None:
                with workers.torch_threads():
                    given = upstream(rows, part)
            if gradients is not None and given:
                gradients.add(rows, chunk.logit_gradient(part, given), workers)
    return stats


class Chunk(Buffers):
    """Some tokens with their whole rows: first logits, then p and t, then the gradient.

    What is per token is done once for the chunk.
    """

    def __init__(self, problem: Problem, workers: Workers, *, differentiate: bool):
        size, vocab = problem.chunk_size, problem.policy.vocab
        super().__init__(problem, workers, size, vocab, differentiate=differentiate)
        self.start = 0

    def multiply(self, start: int, n: int) -> None:
        """The logits of these tokens, in the places of p and t."""
        problem = self.problem
        rows, self.start = slice(start, start + n), start
        here = self.fit(n, problem.policy.vocab)
        here.tokens.copy_(problem.tokens[rows, None])
        self._multiply(problem.policy, rows, here.p, here.slope if here.slope.numel() else None)
        if problem.ref is not None:
            self._multiply(problem.ref, rows, here.t)

    def read(self, out: tuple[Tensor, ...]) -> None:
        """Reduce the logits at hand to statistics; leave p and t."""
        problem, here = self.problem, self.rows
        token_logit = here.p.gather(1, here.tokens)
        self.reduce()
        log_sum = here.p_sum.log()
        logp = token_logit - here.peak - log_sum
        entropy = log_sum - here.a_sum / here.p_sum
        if problem.ref is None:
            values = logp, entropy
        else:
            values = logp, *self._joint_values(logp), entropy
        for target, value in zip(out, values, strict=True):
            target.copy_(value[:, 0])

    def _multiply(
        self, product: Product, rows: slice | Tensor, out: Tensor, slope: Tensor | None = None
    ) -> None:
        """The logits [n, V] of some tokens."""
        pieces = Shared(self.workers.pieces(product.vocab))

        def share(_: int) -> None:
            for part in pieces:
                part_slope = None if slope is None else slope[:, part]
                product.logits(rows, out[:, part], part_slope, part)

        with gemm_precision(product.gemm_dtype):
            if product.sliced:
                self.workers.multiply(share)
            else:
                with self.workers.torch_threads():
                    product.logits(rows, out, slope)

    def _joint_values(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """(log q(y), divergence), [n, 1] each."""
        problem, here = self.problem, self.rows
        excess, alone = here.excess, here.outside > -torch.inf
        far = ~(torch.maximum(here.t_max, excess) < MAX_T)  # also where it is NaN
        far |= alone & (logp == -torch.inf)  # the reference's logit of the token is gone
        if problem.divergence.read is not None:
            kl, gain = here.kl, problem.divergence.gain
            ref_logp, value = logp + here.t_token - kl, here.other
            if gain is None:
                far |= alone
            else:
                value.add_((excess - kl).exp().div_(here.p_sum), alpha=gain)
        elif problem.ref_logp is not None:
            ref_logp = problem.ref_logp[self.start : self.start + len(logp), None]
            value = (logp - ref_logp).add_(here.t.gather(1, here.tokens)).clamp_(min=0)
        else:
            value = here.kl
            ref_logp = logp + here.t.gather(1, here.tokens) - value
        for index in _where(far):
            value[index], logq = self._far_divergence(index)
            if problem.ref_logp is None:
                ref_logp[index] = logq
        return ref_logp, value

    def _far_divergence(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence, log q(y)) of rows where p underflows and q does not, or the KL is infinite.

        Their logits are multiplied anew, and the definitions of `rlkl.kl.divergences` summed.
        """
        problem, here, tokens = self.problem, self.rows, self.rows.tokens[index]
        rows = index + self.start
        a, b = (torch.empty_like(here.p[: len(rows)]) for _ in range(2))
        assert problem.ref is not None
        self._multiply(problem.policy, rows, a)
        self._multiply(problem.ref, rows, b)
        with self.workers.torch_threads():
            logp, logq = log_softmax_pair(a, b)
            if self.differentiate:
                with torch.enable_grad():
                    value = problem.divergence.dense(a.requires_grad_(), b, tokens)
                    (gradient,) = torch.autograd.grad(value.sum(), a)
                # The gradient is −p ⊙ t, and must be where p underflows too.
                p = logp.exp().clamp_(min=SMALLEST_P)
                here.p[index], here.t[index] = p, -gradient / p
                here.p_sum[index], here.t_sum[index] = 1.0, 0.0
            else:
                value = problem.divergence.dense(a, b, tokens)
        return value.detach()[:, None], logq.gather(1, tokens)

    def logit_gradient(self, stats: tuple[Tensor, ...], given: dict[str, Tensor]) -> Tensor:
        """Gradient [n, V] with respect to what the head multiplied for the chunk last read.

        g_logp onehot(y) − p ⊙ (g_kl (t − E_p[t]) + g_logp + g_entropy (log p + H)), in p's buffer:
        where the policy is nearly certain, what rounding left of the mean is as large as t.
        """
        here, p_sum = self.rows, self.rows.p_sum
        g_logp, g_kl, g_entropy = map(given.get, ("policy_logp", "kl", "entropy"))
        here.constant.zero_()
        if g_logp is not None:
            here.token_gradient.copy_(g_logp[:, None])
            here.constant.sub_(here.token_gradient)
        if g_kl is not None:
            torch.div(g_kl[:, None], -p_sum, out=here.t_factor)
            here.constant.sub_(here.t_factor * here.t_sum)
        if g_entropy is not None:  # log p = log(p · p_sum) − log p_sum
            torch.div(g_entropy[:, None], -p_sum, out=here.log_factor)
            here.constant.sub_(g_entropy[:, None] * (stats[-1][:, None] - p_sum.log()))
        here.constant.div_(p_sum)
        self.differentiate_logits(
            logp=g_logp is not None, kl=g_kl is not None, entropy=g_entropy is not None
        )
        return here.p


def _where(mask: Tensor) -> Sequence[Tensor]:
    """The rows where a mask [n, 1] is true, some at a time."""
    index = mask[:, 0].nonzero()[:, 0]
    return index.split(_ROWS_AT_A_TIME) if len(index) else ()
