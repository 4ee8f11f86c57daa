"""Output heads: how hidden states become logits, and how a gradient of the logits goes back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlkl.kl.fused.openblas import addmm
from rlkl.kl.fused.precision import gemm_precision
from rlkl.kl.fused.workers import Shared, Workers

# Heads are multiplied in slices of this many rows: faster for BLAS, which keeps less of them in
# buffers of its own, and no 16-bit head is widened whole.
_VOCAB_SLICE = 8192


class LowRank(NamedTuple):
    """An addition to a head's weight, scale · B A, that is never built (LoRA)."""

    a: Float[Tensor, "R H"]
    b: Float[Tensor, "V R"]
    scale: float = 1.0


class OutputHead(NamedTuple):
    """logits = cap(scale · (hidden (W + Σ s B A)ᵀ + bias)); cap(x) = softcap · tanh(x / softcap).

    Example:
        >>> import torch
        >>> head = OutputHead(torch.eye(2), softcap=30.0)  # Gemma's soft-capped logits
        >>> head_logits(head, torch.tensor([[3.0, 0.0]]))
        tensor([[2.9900, 0.0000]])
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    """Factor of the logits: Cohere's logit_scale, the inverse of Granite's logits_scaling."""
    softcap: float | None = None
    """Bound of the logits, as in Gemma's final_logit_softcapping."""
    adapters: tuple[LowRank, ...] = ()


class ModuleHead(NamedTuple):
    """logits = cap(scale · module(hidden)) for a head of any other form.

    The module is called on chunks of hidden states, with autograd inside each chunk, so that its
    memory is that of a chunk too. Gradients reach those of its parameters that require one.
    """

    module: nn.Module
    vocab_size: int
    """Number of logits that the module returns."""
    scale: float = 1.0
    softcap: float | None = None


def head_logits(
    head: Float[Tensor, "V H"] | OutputHead | ModuleHead, hidden: Float[Tensor, "*B H"]
) -> Tensor:
    """Logits `[..., V]` of some hidden states, whole, in the dtype of the head: for sampling.

    Raises:
        ValueError: `head` is none.
    """
    head = as_head("policy", head, None)
    if not isinstance(head, OutputHead | ModuleHead):
        raise ValueError(
            f"head is {type(head).__name__}: pass its weight [V, H], an OutputHead, or "
            "ModuleHead(module, vocab_size)"
        )
    if isinstance(head, ModuleHead):
        logits = _call(head.module, hidden)
    else:
        logits = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
        for a, b, scale in head.adapters:
            inner = nn.functional.linear(hidden.to(a.dtype), a)
            logits = logits + scale * nn.functional.linear(inner, b).to(logits.dtype)
    logits = logits if head.scale == 1.0 else logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


class Product(ABC):
    """One model's logits in a call: hidden states times head, chunk by chunk, in `dtype`."""

    sliced: bool
    """Whether the logits of a part of the vocabulary cost only their share."""
    lossless = False
    """Whether all factors are bfloat16 numbers, which a bfloat16 product with a float32 sum does
    not round."""

    def __init__(
        self,
        hidden: Tensor,
        head: OutputHead | ModuleHead,
        vocab: int,
        temperature: float,
        dtype: torch.dtype,
        gemm_dtype: torch.dtype | None,
    ):
        self.hidden, self.vocab, self.dtype = hidden.detach(), vocab, dtype
        # What oneDNN rounds factors to, for `gemm_precision` around all calls of `logits`.
        self.gemm_dtype = self.gradient_gemm_dtype = gemm_dtype
        scale, softcap = head.scale, head.softcap
        # What is multiplied is the argument of tanh if there is one, else the logits themselves.
        self.scale = scale / temperature if softcap is None else scale / softcap
        self.cap = None if softcap is None else softcap / temperature

    def logits(
        self,
        rows: slice | Tensor,
        out: Tensor,
        slope: Tensor | None = None,
        columns: slice | None = None,
    ) -> None:
        """Fill `out` [n, V] with the logits of some tokens, divided by the temperature.

        `slope` receives what the gradient of the logits must be multiplied by (only with a cap);
        `columns` is a part of the vocabulary, if `sliced` says that this product has parts.
        """
        self._multiply(rows, out, slice(0, self.vocab) if columns is None else columns)
        if self.cap is not None:
            out.tanh_()
            if slope is not None:
                torch.mul(out, out, out=slope).sub_(1).mul_(-self.cap)
            out.mul_(self.cap)

    @abstractmethod
    def _multiply(self, rows: slice | Tensor, out: Tensor, columns: slice) -> None: ...

    def only(self, index: Tensor) -> Self:
        """The product of some of the tokens."""
        part = copy(self)
        part.hidden = self.hidden[index]
        return part

    @abstractmethod
    def gradients(self, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> "Gradients":
        """Sums of the gradients of those `inputs_of` this product that need one."""


class Gradients(ABC):
    """Sums of the gradients of a product's inputs, for those that need one."""

    sums: list[Tensor | None]

    def __init__(self, inputs: Sequence[Tensor | None], needed: Sequence[bool], dtype: torch.dtype):
        self.sums = [
            torch.zeros_like(x, dtype=dtype) if need and x is not None else None
            for x, need in zip(inputs, needed, strict=True)
        ]

    @abstractmethod
    def add(self, rows: slice, grad: Tensor, workers: Workers) -> None:
        """Add a chunk, given the gradient [n, V] of what was multiplied (before any cap)."""

    def in_dtype_of(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The sums, each in its input's dtype."""
        return tuple(
            None if total is None or x is None else total.to(x.dtype)
            for total, x in zip(self.sums, inputs, strict=True)
        )


class LinearProduct(Product):
    """scale · (hidden weightᵀ + bias + Σ s (hidden Aᵀ) Bᵀ)."""

    sliced = True

    def __init__(
        self,
        hidden: Tensor,
        head: OutputHead,
        vocab: int,
        temperature: float,
        dtype: torch.dtype,
        gemm_dtype: torch.dtype | None,
    ):
        super().__init__(hidden, head, vocab, temperature, dtype, gemm_dtype)
        # An adapter's inner product is float32, whatever its factors.
        unrounded = self.scale == 1.0 and not head.adapters
        self.lossless = unrounded and hidden.dtype == head.weight.dtype == torch.bfloat16
        self.weight = head.weight.detach()[:vocab]
        self.bias = None if head.bias is None else head.bias.detach()[:vocab]
        self.adapters = [
            (a.detach().to(dtype), b.detach()[:vocab].to(dtype), scale)
            for a, b, scale in head.adapters
        ]

    def scaled_hidden(self, rows: slice | Tensor) -> Tensor:
        """Scaled hidden states of some tokens, [n, H]."""
        hidden = self.hidden[rows].to(self.dtype)
        return hidden if self.scale == 1.0 else hidden * self.scale

    def weight_slices(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary, counted from the first of `columns`, with their weight."""
        weight = self.weight[columns]
        for start in range(0, len(weight), _VOCAB_SLICE):
            part = slice(start, start + _VOCAB_SLICE)
            yield part, weight[part].to(self.dtype)

    def _multiply(self, rows: slice | Tensor, out: Tensor, columns: slice) -> None:
        hidden, rounded = self.scaled_hidden(rows), self.gemm_dtype is not None
        for part, weight in self.weight_slices(columns):
            addmm(out[:, part], hidden, weight.t(), beta=0, rounded=rounded)
        for a, b, scale in self.adapters:
            out.addmm_(hidden @ a.t(), b[columns].t(), alpha=scale)
        if self.bias is not None:
            out.add_(self.bias[columns].to(self.dtype) * self.scale)

    def gradients(self, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> Gradients:
        """Sums of the gradients of hidden, weight, bias and the adapters' factors."""
        return _LinearGradients(self, inputs, needed)


class _LinearGradients(Gradients):
    def __init__(
        self, product: LinearProduct, inputs: Sequence[Tensor | None], needed: Sequence[bool]
    ):
        super().__init__(inputs, needed, product.dtype)
        self.product = product

    def add(self, rows: slice, grad: Tensor, workers: Workers) -> None:
        product, vocab = self.product, self.product.vocab
        # Rows beyond the vocabulary are padding: their gradient stays 0.
        hidden_sum, weight_sum, bias_sum, *_ = self.sums
        hidden = product.scaled_hidden(rows)

        hidden_parts = list[Tensor]()
        if hidden_sum is not None:
            hidden_parts = [hidden_sum[rows], *hidden.new_zeros(workers.parts - 1, *hidden.shape)]

        pieces = Shared(workers.pieces(vocab))
        rounded = product.gradient_gemm_dtype is not None

        def share(worker: int) -> None:
            if hidden_parts:  # a sum over the vocabulary: in one order, hence fixed parts
                part = workers.share(worker, vocab) if workers.parts > 1 else slice(0, vocab)
                grad_part = grad[:, part]
                target = hidden_parts[worker]
                for columns, weight in product.weight_slices(part):
                    grad_slice = grad_part[:, columns]
                    addmm(target, grad_slice, weight, alpha=product.scale, rounded=rounded)
            for piece in pieces:
                for start in range(piece.start, piece.stop, _VOCAB_SLICE):
                    part = slice(start, min(start + _VOCAB_SLICE, piece.stop))
                    if weight_sum is not None:
                        addmm(weight_sum[part], grad[:, part].t(), hidden, rounded=rounded)
                    if bias_sum is not None:
                        bias_sum[part].add_(grad[:, part].sum(0), alpha=product.scale)

        with gemm_precision(product.gradient_gemm_dtype):
            workers.multiply(share)
            for part in hidden_parts[1:]:
                hidden_parts[0].add_(part)
            with workers.torch_threads():
                self._add_adapters(rows, grad, hidden)

    def _add_adapters(self, rows: slice, grad: Tensor, hidden: Tensor) -> None:
        product, (hidden_sum, _, _, *factor_sums) = self.product, self.sums
        for i, (a, b, scale) in enumerate(product.adapters):
            a_sum, b_sum = factor_sums[2 * i : 2 * i + 2]
            if b_sum is not None:
                b_sum[: product.vocab].addmm_(grad.t(), hidden @ a.t(), alpha=scale)
            if a_sum is not None or hidden_sum is not None:
                inner = grad @ b  # [n, R]
                if a_sum is not None:
                    a_sum.addmm_(inner.t(), hidden, alpha=scale)
                if hidden_sum is not None:
                    hidden_sum[rows].addmm_(inner, a, alpha=scale * product.scale)


class ModuleProduct(Product):
    """scale · module(hidden), differentiated by autograd within each chunk."""

    sliced = False

    def __init__(
        self,
        hidden: Tensor,
        head: ModuleHead,
        vocab: int,
        temperature: float,
        dtype: torch.dtype,
        gemm_dtype: torch.dtype | None,
    ):
        super().__init__(hidden, head, vocab, temperature, dtype, gemm_dtype)
        self.module, self.parameters = head.module, _trained(head.module)

    def call(self, hidden: Tensor) -> Tensor:
        """What is multiplied, [n, V], differentiable if autograd is on."""
        logits = _call(self.module, hidden)
        if logits.shape[-1] < self.vocab:
            raise ValueError(
                f"ModuleHead's module returned {logits.shape[-1]} logits per token, fewer than "
                f"{self.vocab}: set its vocab_size to that number"
            )
        return logits[:, : self.vocab].to(self.dtype) * self.scale

    def _multiply(self, rows: slice | Tensor, out: Tensor, columns: slice) -> None:
        out.copy_(self.call(self.hidden[rows])[:, columns])

    def gradients(self, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> Gradients:
        """Sums of the gradients of hidden and the module's parameters."""
        return _ModuleGradients(self, inputs, needed)


class _ModuleGradients(Gradients):
    def __init__(
        self, product: ModuleProduct, inputs: Sequence[Tensor | None], needed: Sequence[bool]
    ):
        super().__init__(inputs, needed, product.dtype)
        self.product = product

    def add(self, rows: slice, grad: Tensor, workers: Workers) -> None:
        hidden = self.product.hidden[rows].detach().requires_grad_()
        leaves = [hidden, *self.product.parameters]
        pairs = [(x, s) for x, s in zip(leaves, self.sums, strict=True) if s is not None]
        with gemm_precision(self.product.gradient_gemm_dtype), workers.torch_threads():
            with torch.enable_grad():
                logits = self.product.call(hidden)
            found = torch.autograd.grad(logits, [x for x, _ in pairs], grad, allow_unused=True)
        for (x, total), part in zip(pairs, found, strict=True):
            if part is not None:
                (total[rows] if x is hidden else total).add_(part)


def _call(module: nn.Module, hidden: Tensor) -> Tensor:
    """The module on hidden states of any precision, in its own."""
    dtype = next((x.dtype for x in module.parameters()), hidden.dtype)
    return module(hidden.to(dtype))


def _trained(module: nn.Module) -> tuple[Tensor, ...]:
    return tuple(x for x in module.parameters() if x.requires_grad)


def inputs_of(hidden: Tensor, head: OutputHead | ModuleHead) -> tuple[Tensor | None, ...]:
    """What autograd must know of: hidden states, then the head's parts."""
    if isinstance(head, ModuleHead):
        return hidden, *_trained(head.module)
    factors = [x for adapter in head.adapters for x in (adapter.a, adapter.b)]
    return hidden, head.weight, head.bias, *factors


def products_of(
    models: Iterable[tuple[Tensor, OutputHead | ModuleHead]],
    vocab: int,
    temperature: float,
    dtype: torch.dtype,
    gemm_dtype: torch.dtype | None,
) -> list[Product]:
    """The products of (hidden states [N, H], head) with the first `vocab` rows of each head."""
    products = list[Product]()
    for hidden, head in models:
        if isinstance(head, ModuleHead):
            product = ModuleProduct(hidden, head, vocab, temperature, dtype, gemm_dtype)
        else:
            product = LinearProduct(hidden, head, vocab, temperature, dtype, gemm_dtype)
        products.append(product)
        # A bfloat16 product is the faster, but sums in another order: a reference beside a policy
        # that cannot have it takes the policy's, so that equal models have equal logits.
        if all(x.lossless for x in products):
            product.gemm_dtype = torch.bfloat16
    return products


def as_head(
    name: str, head: Tensor | OutputHead | ModuleHead, bias: Tensor | None
) -> OutputHead | ModuleHead:
    """The head of an argument that may be a bare weight."""
    if isinstance(head, Tensor):
        return OutputHead(head, bias)
    if bias is not None:
        raise ValueError(f"{name}_bias is given beside a head of its own: put it into the head")
    return head


def check_head(name: str, head: OutputHead | ModuleHead, hidden: Tensor, n: int) -> int:
    """The number of logits of a head, once its parts fit each other and the hidden states.

    Raises:
        ValueError: they do not.
    """
    if not 0 < abs(head.scale) < float("inf"):
        raise ValueError(f"{name}_head.scale={head.scale}: must be finite and not 0")
    if head.softcap is not None and not 0 < head.softcap < float("inf"):
        raise ValueError(f"{name}_head.softcap={head.softcap}: must be positive, or None for none")
    if isinstance(head, ModuleHead):
        if hidden.ndim != 2 or hidden.shape[0] != n:
            raise ValueError(
                f"{name}_hidden has shape {tuple(hidden.shape)}: expected [N, H], N = {n}"
            )
        return head.vocab_size
    vocab, width = head.weight.shape
    if hidden.shape != (n, width):
        raise ValueError(
            f"{name}_hidden has shape {tuple(hidden.shape)}: expected [N, H] = "
            f"{(n, width)} from tokens and {name}_head"
        )
    if head.bias is not None and head.bias.shape != (vocab,):
        raise ValueError(f"{name}_bias has shape {tuple(head.bias.shape)}: expected {(vocab,)}")
    for i, (a, b, _) in enumerate(head.adapters):
        if a.shape[1:] != (width,) or b.shape != (vocab, a.shape[0]):
            raise ValueError(
                f"{name}_head.adapters[{i}] has a {tuple(a.shape)} and b {tuple(b.shape)}: "
                f"expected [R, {width}] and [{vocab}, R]"
            )
    return vocab
