"""The fused functions and how autograd sees them."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlkl.kl.distillation import Divergence
from rlkl.kl.fused.engine import OnLogits, sweep
from rlkl.kl.fused.generators import TopK
from rlkl.kl.fused.heads import ModuleHead, OutputHead, as_head, inputs_of
from rlkl.kl.fused.problem import Problem, described
from rlkl.kl.fused.records import TokenLogp, TokenStats
from rlkl.kl.fused.tiles import can_tile, tile_statistics

# A 16-bit head's gradient is rounded so many rows at a time.
_ROUNDED_ROWS = 8192


def fused_token_stats(
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"] | OutputHead | ModuleHead,
    ref_hidden: Float[Tensor, "N G"],
    ref_head: Float[Tensor, "W G"] | OutputHead | ModuleHead,
    tokens: Int[Tensor, " N"],
    *,
    divergence: str | Divergence | TopK = "rkl",
    policy_bias: Float[Tensor, " V"] | None = None,
    ref_bias: Float[Tensor, " W"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    whole_rows: bool = False,
    on_logits: OnLogits | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> TokenStats:
    """Log-probabilities, exact D_KL(policy ‖ ref) and entropy per token, for any later use.

    Differentiable, once, in policy_hidden and in all parts of policy_head through policy_logp, kl
    and entropy; the reference is treated as constant. The backward pass multiplies the logits
    again, and refuses tensors changed in place since; where the loss is known, `fused_token_loss`
    saves that.

    Valid for tokens sampled from the policy at this temperature, without top-k or top-p. Where the
    reference forbids (bias −inf) what the policy allows, kl is +inf and its gradient NaN.

    Args:
        policy_hidden: last hidden states of the policy, at the positions that predict `tokens`.
        policy_head: rows of the policy's output embedding, or a head with more parts.
        ref_hidden: last hidden states of the reference; its width may differ.
        ref_head: rows of the reference's output embedding, or a head with more parts.
        tokens: the sampled tokens.
        divergence: what `kl` is: a name or member of `rlkl.kl.DIVERGENCES` (the policy is the
            student), or `TopK(k)`; default: D_KL(policy ‖ ref).
        policy_bias: added to the policy's logits; −inf forbids a token.
        ref_bias: added to the reference's logits; −inf forbids a token.
        temperature: sampling temperature; all logits are divided by it.
        vocab_size: use only the first rows of both heads (the rest pads the vocabulary).
        chunk_size: tokens whose rows of logits are held at once, for gradients and `whole_rows`;
            default: at most 240 to 512, about 13 million logits, in chunks of one size.
        whole_rows: sum each row in the order of `fused_token_loss`. At unchanged weights its
            log-probabilities of the same tokens in the same chunks, with as many threads, are then
            these to the last bit (PPO's ratios start at exactly 1), and so is its KL with this
            log q(y) as `ref_logp`. In other chunks the last bits may differ: a BLAS sums products
            of a few rows (15 and fewer were seen) in another order than longer ones. Default: tiles
            of the vocabulary, which are faster and smaller, on a CPU, for heads that are matrices,
            if `divergence` is "rkl".
        on_logits: for what else is asked of the distributions: called without gradient on every
            chunk with its slice of the tokens and the logits `[n, V]` of policy and reference,
            divided by the temperature, which are overwritten afterwards. Implies `whole_rows`.
        gemm_dtype: torch.bfloat16 rounds the factors of every matrix product to bfloat16 where the
            CPU multiplies that faster; sums and logits stay float32. Models whose weights differ by
            less than bfloat16's 3 digits then look alike. Default: no rounding.

    Returns:
        TokenStats of `[N]` tensors, nats per token.

    Raises:
        ValueError: shapes, vocabularies, tokens, temperature, divergence or gemm_dtype do not fit.
        RuntimeError: in backward, under create_graph=True: there are no second derivatives.

    Example:
        >>> import torch
        >>> hidden, head = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> tokens = torch.tensor([0, 1])
        >>> fused_token_stats(hidden, head, hidden, 2 * head, tokens).kl
        tensor([0.1120, 0.1120])
        >>> fused_token_stats(hidden, head, hidden, 2 * head, tokens, divergence="fkl").kl
        tensor([0.0989, 0.0989])
        >>> fused_token_stats(hidden, head, hidden, head, tokens).kl
        tensor([0., 0.])
    """
    policy = policy_hidden, as_head("policy", policy_head, policy_bias)
    problem = Problem.of(
        policy,
        (ref_hidden, as_head("ref", ref_head, ref_bias)),
        tokens,
        divergence,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        gemm_dtype=gemm_dtype,
    )
    return TokenStats(*_Statistics.apply(problem, whole_rows, on_logits, *inputs_of(*policy)))


def fused_divergence(
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"] | OutputHead | ModuleHead,
    ref_hidden: Float[Tensor, "N G"],
    ref_head: Float[Tensor, "W G"] | OutputHead | ModuleHead,
    divergence: str | Divergence = "rkl",
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> Float[Tensor, " N"]:
    """A divergence of policy and reference at each position: `kl` of `fused_token_stats`.

    In distillation the student is the policy and the teacher the reference. Differentiable in
    policy_hidden and policy_head. Arguments and errors are those of `fused_token_stats`; TopK is
    refused, being an estimate from the sampled tokens.

    Returns:
        `[N]`, nats.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.25], [0.75]])
        >>> fused_divergence(torch.ones(1, 1), student, torch.ones(1, 1), teacher.log(), "fkl")
        tensor([0.1308])
    """
    if isinstance(divergence, TopK):
        raise ValueError(
            f"divergence={divergence} needs the sampled tokens: pass them to fused_token_stats, "
            "whose `kl` it then is"
        )
    tokens = torch.zeros(len(policy_hidden), dtype=torch.long, device=policy_hidden.device)
    if isinstance(policy_head, OutputHead) and isinstance(policy_head.bias, Tensor):
        # Rows whose token the policy forbids are read anew, and here any token will do.
        allowed = (policy_head.bias.flatten()[:vocab_size] > -torch.inf).nonzero()
        if len(allowed):
            tokens.fill_(int(allowed[0]))
    return fused_token_stats(
        policy_hidden,
        policy_head,
        ref_hidden,
        ref_head,
        tokens,
        divergence=divergence,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        gemm_dtype=gemm_dtype,
    ).kl


def fused_token_logp(
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"] | OutputHead | ModuleHead,
    tokens: Int[Tensor, " N"],
    *,
    policy_bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    whole_rows: bool = False,
    gemm_dtype: torch.dtype | None = None,
) -> TokenLogp:
    """Log-probability and entropy per token of one model: `fused_token_stats` without a reference.

    Differentiable in policy_hidden and in all parts of policy_head. Arguments, validity and errors
    are those of `fused_token_stats`.

    Returns:
        TokenLogp of `[N]` tensors, nats per token.

    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(1, 2), torch.ones(4, 2)
        >>> fused_token_logp(hidden, head, torch.tensor([3])).entropy
        tensor([1.3863])
    """
    policy = policy_hidden, as_head("policy", policy_head, policy_bias)
    problem = Problem.of(
        policy,
        None,
        tokens,
        "rkl",
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        gemm_dtype=gemm_dtype,
    )
    return TokenLogp(*_Statistics.apply(problem, whole_rows, None, *inputs_of(*policy)))


def fused_token_loss(
    loss_fn: Callable[..., Tensor],
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"] | OutputHead | ModuleHead,
    ref_hidden: Float[Tensor, "N G"],
    ref_head: Float[Tensor, "W G"] | OutputHead | ModuleHead,
    tokens: Int[Tensor, " N"],
    *per_token: Tensor,
    divergence: str | Divergence | TopK = "rkl",
    ref_logp: Float[Tensor, " N"] | None = None,
    policy_bias: Float[Tensor, " V"] | None = None,
    ref_bias: Float[Tensor, " W"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, ""], TokenStats]:
    """Σ over chunks of loss_fn(stats, *per_token), with its gradient made in the same pass.

    The logits are multiplied once: when this returns, the gradients of policy_hidden and of all
    parts of policy_head are ready, and `loss.backward()` hands them out, times the upstream scalar.
    Those of 16-bit inputs are kept as float32 sums, and rounded once, after the scalar. Under
    torch.no_grad only the value is computed.

    With `ref_logp`, log q(y) of these tokens from an earlier call (`fused_token_stats` with
    `whole_rows`), the reference is not normalised again: in PPO it stays the same over the epochs
    of a rollout. The KL is then log π(y) − log q(y) + t_y. Its gradient has all its digits still
    (exactly 0 for identical models), but the value is rounded by about 1e-6 nats: it serves a loss;
    report the KL of `fused_token_stats`.

    The gradient flows through the statistics alone: per_token holds constants, and tensors that
    loss_fn closes over get no gradient. All other arguments are those of `fused_token_stats`.

    Args:
        loss_fn: called on each chunk with TokenStats of `[n]` tensors and the `[n, ...]` slices of
            per_token; returns a scalar, the *sum* over the chunk's tokens (for a mean, divide by
            the number of all tokens inside it).
        policy_hidden: last hidden states of the policy.
        policy_head: rows of the policy's output embedding.
        ref_hidden: last hidden states of the reference.
        ref_head: rows of the reference's output embedding.
        tokens: the sampled tokens.
        *per_token: tensors with N rows: advantages, old log-probabilities, coefficients.
        divergence: what `kl` is.
        ref_logp: log q(y), where it is known; only with D_KL(policy ‖ ref).
        policy_bias: added to the policy's logits.
        ref_bias: added to the reference's logits.
        temperature: sampling temperature.
        vocab_size: use only the first rows of both heads.
        chunk_size: tokens multiplied at once.
        gemm_dtype: precision of the factors of matrix products.

    Returns:
        The loss, a scalar that can be differentiated once, and the detached TokenStats `[N]`.

    Raises:
        ValueError: as `fused_token_stats`; also for a per_token of another length or that requires
            a gradient, a loss_fn that does not return a scalar, and a ref_logp of another shape or
            beside another divergence.

    Example:
        >>> import torch
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> weight = torch.tensor([1.0, 0.5])
        >>> loss, stats = fused_token_loss(
        ...     lambda stats, weight: (weight * stats.kl).sum(),
        ...     hidden, head, hidden.detach(), 2 * head, torch.tensor([0, 1]), weight,
        ... )
        >>> loss.backward()
        >>> round(loss.item(), 3), hidden.grad.shape
        (0.168, torch.Size([2, 2]))
    """
    policy = policy_hidden, as_head("policy", policy_head, policy_bias)
    problem = Problem.of(
        policy,
        (ref_hidden, as_head("ref", ref_head, ref_bias)),
        tokens,
        divergence,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        gemm_dtype=gemm_dtype,
        ref_logp=ref_logp,
    )
    chunk_loss = _ChunkLoss(loss_fn, problem, per_token)
    differentiate = torch.is_grad_enabled()
    loss, *stats = _Loss.apply(problem, chunk_loss, differentiate, *inputs_of(*policy))
    return loss, TokenStats(*stats)


def fused_logp_loss(
    loss_fn: Callable[..., Tensor],
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"] | OutputHead | ModuleHead,
    tokens: Int[Tensor, " N"],
    *per_token: Tensor,
    policy_bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, ""], TokenLogp]:
    """`fused_token_loss` without a reference: loss_fn gets a TokenLogp (PPO with a sampled KL).

    Returns:
        The loss, a scalar that can be differentiated once, and the detached TokenLogp `[N]`.

    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(1, 2, requires_grad=True), torch.eye(2)
        >>> loss, _ = fused_logp_loss(
        ...     lambda stats: -stats.policy_logp.sum(), hidden, head, torch.tensor([0])
        ... )
        >>> loss.backward()
        >>> hidden.grad
        tensor([[-0.5000,  0.5000]])
    """
    policy = policy_hidden, as_head("policy", policy_head, policy_bias)
    problem = Problem.of(
        policy,
        None,
        tokens,
        "rkl",
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        gemm_dtype=gemm_dtype,
    )
    chunk_loss = _ChunkLoss(loss_fn, problem, per_token)
    differentiate = torch.is_grad_enabled()
    loss, *stats = _Loss.apply(problem, chunk_loss, differentiate, *inputs_of(*policy))
    return loss, TokenLogp(*stats)


class _Statistics(torch.autograd.Function):
    """Statistics now; gradients for whatever upstream arrives, by a second sweep."""

    @staticmethod
    def forward(ctx, problem, whole_rows, on_logits, *inputs):
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        # All that backward reads again, so that autograd refuses what was changed in place.
        ctx.save_for_backward(*inputs, *problem.watched)
        tiled = not whole_rows and on_logits is None and can_tile(problem)
        stats = tile_statistics(problem) if tiled else sweep(problem, on_logits=on_logits)
        if problem.ref is not None:
            ctx.mark_non_differentiable(stats[TokenStats._fields.index("ref_logp")])
        return stats

    @staticmethod
    def backward(ctx, *upstream):
        _refuse_create_graph()
        problem, needed = ctx.problem, ctx.needs_input_grad[3:]
        inputs = ctx.saved_tensors[: len(needed)]
        given = {
            name: gradient
            for name, gradient in zip(problem.record._fields, upstream, strict=True)
            if gradient is not None
        }
        gradients = problem.policy.gradients(inputs, needed)
        sweep(problem, lambda rows, _: {k: g[rows] for k, g in given.items()}, gradients)
        return None, None, None, *gradients.in_dtype_of(inputs)


class _Loss(torch.autograd.Function):
    """Loss and gradients in one sweep; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx, problem, chunk_loss, differentiate, *inputs):
        needed, gradients = ctx.needs_input_grad[3:], None
        if differentiate and any(needed):
            gradients = problem.policy.gradients(inputs, needed)
        stats = sweep(problem, chunk_loss, gradients)
        if gradients is not None:
            # As they were summed: a gradient in 16 bits would be rounded before it is scaled.
            ctx.save_for_backward(*gradients.sums)
            ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.mark_non_differentiable(*stats)
        return chunk_loss.total, *stats

    @staticmethod
    def backward(ctx, *upstream):
        _refuse_create_graph()
        sums = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if x is None else _scaled(x, upstream[0], dtype) for x, dtype in sums]
        return None, None, None, *scaled


def _refuse_create_graph() -> None:
    # Autograd records a backward pass only under create_graph. torch's once_differentiable leaves
    # constants there, and raises nothing where the upstream gradient is one.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused functions have first derivatives only, which create_graph=True would treat "
            "as constants: leave it False, or take second derivatives of rlkl.kl.reverse_kl"
        )


def _scaled(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Total · scale, rounded once, without a second wide copy of a whole head."""
    if total.dtype == dtype:
        return total if scale == 1 else total * scale
    out = torch.empty_like(total, dtype=dtype)
    slices = (torch.atleast_1d(x).split(_ROUNDED_ROWS) for x in (out, total))
    for target, part in zip(*slices, strict=True):
        target.copy_(part * scale)
    return out


class _ChunkLoss:
    """loss_fn on one chunk: adds its value to `total`, returns its gradient per statistic."""

    def __init__(
        self, loss_fn: Callable[..., Tensor], problem: Problem, per_token: tuple[Tensor, ...]
    ):
        n = len(problem.tokens)
        for i, x in enumerate(per_token):
            if not isinstance(x, Tensor) or x.shape[:1] != (n,):
                raise ValueError(f"per_token[{i}] is {described(x)}: pass a tensor of {n} rows")
            if x.requires_grad:
                raise ValueError(f"per_token[{i}] requires a gradient, but is constant: detach it")
        self.loss_fn, self.record, self.per_token = loss_fn, problem.record, per_token
        self.total = torch.zeros((), dtype=problem.policy.dtype, device=problem.tokens.device)

    def __call__(self, rows: slice, stats: tuple[Tensor, ...]) -> dict[str, Tensor]:
        named = {k: x.detach() for k, x in zip(self.record._fields, stats, strict=True)}
        inputs = {k: x.requires_grad_() for k, x in named.items() if k != "ref_logp"}
        with torch.enable_grad():
            loss = self.loss_fn(self.record(**named), *(x[rows] for x in self.per_token))
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise ValueError(
                f"loss_fn returned {described(loss)}: return a scalar, the sum over its tokens"
            )
        self.total += loss.detach()
        if not loss.requires_grad:  # this chunk's loss does not depend on the statistics
            return {}
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return {k: g for k, g in zip(inputs, gradients, strict=True) if g is not None}
