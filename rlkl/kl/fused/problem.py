"""What a call of the fused functions asks for, checked."""

import importlib
import importlib.util
import math
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Self

import torch
from torch import Tensor, nn

from rlkl.kl.distillation import Divergence
from rlkl.kl.fused import torch_rows
from rlkl.kl.fused.generators import RowDivergence, TopK, row_divergence
from rlkl.kl.fused.heads import ModuleHead, OutputHead, Product, check_head, inputs_of, products_of
from rlkl.kl.fused.records import TokenLogp, TokenStats

# A chunk holds about this many logits of each model (48 MB in float32), within these rows. Fewer
# rows make the products slower: each chunk reads the whole head and adds to its whole gradient.
_CHUNK_ELEMENTS = 12_000_000
_CHUNK_ROWS = (240, 512)
# From this vocabulary on threads take whole shares: see `large`. (Below torch's grain of 32,768 a
# row is summed by one thread: its bits do not depend on how rows are divided.)
_LARGE_VOCAB = 16_384


def default_chunk_size(vocab: int, n: int) -> int:
    """Tokens of a chunk, for a vocabulary of this size, so that n > 0 of them fill the last too."""
    rows = min(max(_CHUNK_ELEMENTS // vocab, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])
    return math.ceil(n / math.ceil(n / rows))


def row_passes(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Passes over rows of logits: Triton's on a GPU, Numba's on a CPU in float32, or torch's."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("rlkl.kl.fused.triton_rows")
    numba = device.type == "cpu" and dtype == torch.float32 and importlib.util.find_spec("numba")
    return importlib.import_module("rlkl.kl.fused.numba_rows") if numba else torch_rows


def described(x: object) -> str:
    """What was passed: a tensor's dtype and shape, or the type of anything else."""
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _check_tokens(tokens: Tensor) -> None:
    kinds = torch.int32, torch.int64
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.dtype not in kinds:
        raise ValueError(f"tokens is {described(tokens)}: pass a tensor [N] of int64 or int32")


def _check_divergence(divergence: str | Divergence | TopK) -> None:
    if not isinstance(divergence, str | Divergence | TopK):
        raise ValueError(
            f"divergence is {described(divergence)}: pass a name or member of DIVERGENCES, or "
            "TopK(k)"
        )
    if isinstance(divergence, TopK) and not isinstance(divergence.k, int):
        raise ValueError(f"divergence={divergence}: k must be a whole number")


def _check_model(name: str, hidden: Tensor, head: OutputHead | ModuleHead) -> None:
    """What the parts of a model are; `check_head` says whether they fit each other."""
    if not isinstance(head, OutputHead | ModuleHead):
        raise ValueError(
            f"{name}_head is {described(head)}: pass its weight [V, H] and {name}_bias, an "
            "OutputHead, or ModuleHead(module, vocab_size)"
        )
    if isinstance(head, ModuleHead):
        if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in head.module.modules()):
            raise ValueError(
                f"{name}_head.module has active dropout, so that its logits change from call to "
                "call: set dropout to 0 or call its eval()"
            )
    elif not isinstance(head.weight, Tensor) or head.weight.ndim != 2:
        raise ValueError(f"{name}_head is {described(head.weight)}: pass its weight [V, H]")
    for i, x in enumerate(inputs_of(hidden, head)):
        if x is not None and not (isinstance(x, Tensor) and x.is_floating_point()):
            part = "head" if i else "hidden"
            raise ValueError(f"{name}_{part} is {described(x)}: pass floating-point numbers")


def _check_devices(tokens: Tensor, tensors: dict[str, list[Tensor]]) -> None:
    """One device for all: products of ours read memory by its address."""
    for name, parts in tensors.items():
        for x in parts:
            if x.device != tokens.device:
                raise ValueError(
                    f"{name}'s hidden states or head are on {x.device} and tokens on "
                    f"{tokens.device}: bring all of them to one device"
                )
    if tokens.device.type == "meta":
        raise ValueError("the tensors are on meta, where there is nothing to sum: load them")


def _check_number(name: str, x: object, *, optional: bool = False) -> None:
    """A number, or a tensor of one that is no parameter: none gets a gradient here."""
    if optional and x is None:
        return
    one = x.numel() == 1 if isinstance(x, Tensor) else isinstance(x, Real)
    if not one or (isinstance(x, Tensor) and x.requires_grad):
        shown = described(x) + " that requires a gradient" * (isinstance(x, Tensor) and one)
        raise ValueError(
            f"{name} is {shown}: pass a number, the same for all tokens, which gets no gradient"
        )


def _tensors(hidden: Tensor, head: OutputHead | ModuleHead) -> list[Tensor]:
    """All that a model's logits are made of."""
    if isinstance(head, ModuleHead):
        return [hidden, *head.module.parameters()]
    return [x for x in inputs_of(hidden, head) if x is not None]


@dataclass(frozen=True)
class Problem:
    """The checked arguments of one call."""

    policy: Product
    ref: Product | None
    tokens: Tensor  # [N]
    chunk_size: int
    divergence: RowDivergence
    ref_logp: Tensor | None  # [N], where the caller knows it
    watched: tuple[Tensor, ...]  # all that the statistics are made of, for autograd to watch

    @classmethod
    def of(
        cls,
        policy: tuple[Tensor, OutputHead | ModuleHead],
        ref: tuple[Tensor, OutputHead | ModuleHead] | None,
        tokens: Tensor,
        divergence: str | Divergence | TopK,
        *,
        temperature: float,
        vocab_size: int | None,
        chunk_size: int | None,
        gemm_dtype: torch.dtype | None,
        ref_logp: Tensor | None = None,
    ) -> Self:
        """Check the arguments of a public function; every model is (hidden, head)."""
        models = {"policy": policy} if ref is None else {"policy": policy, "ref": ref}
        for name, model in models.items():
            _check_model(name, *model)
            _check_number(f"{name}_head.scale", model[1].scale)
            _check_number(f"{name}_head.softcap", model[1].softcap, optional=True)
            for _, _, scale in getattr(model[1], "adapters", ()):
                _check_number(f"{name}_head.adapters' scale", scale)
        _check_tokens(tokens)
        _check_devices(tokens, {name: _tensors(*model) for name, model in models.items()})
        _check_divergence(divergence)
        row = row_divergence(divergence)
        _check_number("temperature", temperature)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be positive and finite")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
        if gemm_dtype not in (None, torch.bfloat16):
            raise ValueError(f"gemm_dtype={gemm_dtype}: use None or torch.bfloat16")
        if ref_logp is not None and row.read is not None:
            raise ValueError("ref_logp serves D_KL(policy ‖ ref) only: leave it None")
        if ref_logp is not None and ref_logp.shape != tokens.shape:
            raise ValueError(
                f"ref_logp has shape {tuple(ref_logp.shape)}: expected that of tokens, "
                f"{tuple(tokens.shape)}"
            )
        sizes = {
            name: check_head(name, head, hidden, tokens.shape[0])
            for name, (hidden, head) in models.items()
        }
        vocab = min(sizes.values()) if vocab_size is None else vocab_size
        if vocab_size is None and len(set(sizes.values())) > 1:
            raise ValueError(
                f"ref_head has {sizes['ref']} rows, policy_head {sizes['policy']}: "
                "pass vocab_size, the number of real tokens, if the rest is padding"
            )
        for name, size in sizes.items():
            if not 0 < vocab <= size:
                raise ValueError(f"vocab_size={vocab}: {name}_head has {size} rows")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
            raise ValueError(
                f"tokens lie in [{int(tokens.min())}, {int(tokens.max())}]: the vocabulary has "
                f"{vocab}; leave masked positions out"
            )
        operands = [x for model in models.values() for x in inputs_of(*model) if x is not None]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32
        if gemm_dtype is not None and (dtype == torch.float64 or tokens.device.type != "cpu"):
            raise ValueError(
                f"gemm_dtype={gemm_dtype} is for float32 and 16-bit tensors on a CPU, these are "
                f"{dtype} on {tokens.device.type}: leave it None"
            )
        products = products_of(models.values(), vocab, temperature, dtype, gemm_dtype)
        n = max(len(tokens), 1)
        chunk_size = default_chunk_size(vocab, n) if chunk_size is None else min(chunk_size, n)
        ref_product = products[1] if len(products) == 2 else None
        if ref_logp is not None:
            ref_logp = ref_logp.detach().to(dtype)
        read = (tokens, *(x for model in models.values() for x in _tensors(*model)))
        # An inference tensor has no version, by which autograd could see that it was changed.
        watched = tuple(x.detach() for x in read if not x.is_inference())
        return cls(products[0], ref_product, tokens, chunk_size, row, ref_logp, watched)

    @property
    def passes(self) -> ModuleType:
        """The module of these logits' passes: `read_rows`, `gradient_rows`."""
        return row_passes(self.tokens.device, self.policy.dtype)

    @property
    def large(self) -> bool:
        """Whether threads divide products as well, in parts of the vocabulary.

        Left to itself torch splits every operation over its threads and waits for all of them. Its
        threads spin between two operations, the fastest way through small logits on an idle
        machine; but a wait may last a time slice of the scheduler on a busy one, and a large
        vocabulary takes thousands of waits. There five waits per chunk are enough, and a thread
        that is slowed down leaves more of the products to the others.
        """
        return self.tokens.device.type == "cpu" and self.policy.vocab >= _LARGE_VOCAB

    @property
    def threads(self) -> int:
        """How many threads take their share of the passes: all, but for torch's over few logits."""
        compiled = self.tokens.device.type == "cpu" and self.passes is not torch_rows
        return torch.get_num_threads() if compiled or self.large else 1

    @property
    def record(self) -> type[TokenStats] | type[TokenLogp]:
        """What the statistics of this problem are called, in their order."""
        return TokenLogp if self.ref is None else TokenStats
