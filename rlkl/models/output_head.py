"""The head of a causal LM as data: what is multiplied, and what the model does before and after."""

import copy
import logging
import math
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkl.kl import LowRank, ModuleHead, OutputHead
from rlkl.models.language_model import causal_lm, trunk_of

_log = logging.getLogger(__name__)


class _AroundHead(NamedTuple):
    """logits = cap(scale · head(before · the trunk's hidden states))."""

    before: float
    scale: float
    softcap: float | None


_around_head: WeakKeyDictionary[PreTrainedModel, _AroundHead] = WeakKeyDictionary()
_told: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def output_head(model: nn.Module) -> OutputHead | ModuleHead:
    """The language-model head, for the fused functions of `rlkl.kl` and `rlkl.kl.head_logits`.

    Plain, tied, soft-capped (Gemma), scaled (Cohere, Granite) heads and heads with LoRA or among a
    PEFT model's modules_to_save become an OutputHead that shares their tensors: gradients reach
    them. With the adapter off (`reference_model`) it is the head without it. Any other head becomes
    a ModuleHead, which is slower; the log says so once.

    What a model does before and after the head is measured, not looked up: the first call on a
    model runs it on two tokens with known numbers in place of the head's output. A factor of the
    hidden states (MiniCPM3) becomes one of the logits.

    Raises:
        ValueError: no causal LM, or one without output embeddings, or one that does more to its
            hidden states than scaling (BERT's second projection) or more to its logits than scaling
            and soft-capping, or a head with active dropout.
    """
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(lm).__name__} has no output embeddings: a causal LM is needed")
    if lm not in _around_head:
        _around_head[lm] = _measure(lm, head)
    before, scale, softcap = _around_head[lm]
    if isinstance(head, ModulesToSaveWrapper):
        saved = [name for name in head.active_adapters if name in head.modules_to_save]
        off = head.disable_adapters or not saved
        head = head.original_module if off else head.modules_to_save[saved[0]]
    adapters = _low_rank(head) if isinstance(head, LoraLinear) else ()
    linear = head.base_layer if isinstance(head, LoraLinear) and adapters is not None else head
    if type(linear) is nn.Linear and adapters is not None:
        bias = linear.bias if linear.bias is None or before == 1.0 else linear.bias / before
        return OutputHead(linear.weight, bias, before * scale, softcap, adapters)
    if before != 1.0:
        raise ValueError(
            f"{type(lm).__name__} scales its hidden states by {before:.6g} before the head "
            f"{type(head).__name__}, which is not linear: let the head scale them"
        )
    if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in head.modules()):
        raise ValueError(
            f"the head {type(head).__name__} has active dropout, so that its logits change from "
            "call to call: set dropout to 0 or call model.eval()"
        )
    if lm not in _told:
        _told[lm] = type(head).__name__
        _log.warning(
            "%s has the head %s, which is not linear: its logits are formed in chunks by the head "
            "itself, which is slower",
            type(lm).__name__,
            type(head).__name__,
        )
    return ModuleHead(head, _vocab_size(lm), scale, softcap)


def at_least_float32(head: OutputHead | ModuleHead) -> OutputHead | ModuleHead:
    """A copy of a head whose products are not rounded to 16 bits; float32 heads share tensors."""
    if isinstance(head, ModuleHead):
        if all(x.dtype in (torch.float32, torch.float64) for x in head.module.parameters()):
            return head
        return head._replace(module=copy.deepcopy(head.module).float())

    def widen(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    return OutputHead(
        widen(head.weight),
        None if head.bias is None else widen(head.bias),
        head.scale,
        head.softcap,
        tuple(LowRank(widen(x.a), widen(x.b), x.scale) for x in head.adapters),
    )


def _low_rank(head: LoraLinear) -> tuple[LowRank, ...] | None:
    """The active adapters of a LoRA head; None if they are more than scale · B A."""
    if head.disable_adapters or head.merged:
        return ()
    adapters = []
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        a, b, dropout = head.lora_A[name], head.lora_B[name], head.lora_dropout[name]
        plain = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0
        if name in head.lora_variant or b.bias is not None or not plain:
            return None
        factors = cast(Tensor, a.weight), cast(Tensor, b.weight)
        adapters.append(LowRank(*factors, head.scaling[name]))
    return tuple(adapters)


def _vocab_size(lm: PreTrainedModel) -> int:
    return cast(Tensor, lm.get_input_embeddings().weight).shape[0]


@torch.no_grad()
def _measure(lm: PreTrainedModel, head: nn.Module) -> _AroundHead:
    """What is between trunk and head, and between head and logits."""
    probe = torch.tensor([2.0**-7, 1e6, -1e6, -(2.0**-7), 1.0, -1.0, 10.0, -10.0, 0.0])
    seen, before = list[Tensor](), list[float | None]()
    # The first may be padding, whose states may be 0.
    ids = torch.arange(2, device=lm.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def replace(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        # Here the trunk is run in the precision (autocast) in which the model ran it.
        torch.manual_seed(0)
        if not args[0].isfinite().all():
            raise ValueError(
                f"{type(lm).__name__} has hidden states that are no numbers: look for NaN and inf "
                "in its weights, or load them in float32"
            )
        before.append(_factor(trunk_of(lm)(**inputs).last_hidden_state, args[0]))
        size = out.shape[-1]
        row = probe.to(out.device).repeat(math.ceil(size / len(probe)))[:size]
        seen.append(row.expand(out.shape).clone())
        return seen[-1].clone()

    hook = head.register_forward_hook(replace)
    try:
        # Dropout would draw random numbers that a run's seed does not know of, and others twice.
        with torch.random.fork_rng(), torch.autocast(lm.device.type, enabled=False):
            torch.manual_seed(0)
            logits = lm(**inputs).logits
    finally:
        hook.remove()
    if not seen or seen[0].shape != logits.shape:
        raise ValueError(f"{type(lm).__name__} does not make its logits by its output embeddings")
    if before[0] is None:
        raise ValueError(
            f"{type(lm).__name__} does more to its hidden states than scaling before its head "
            "reads them: such a model's logits cannot be formed outside it"
        )
    return _AroundHead(before[0], *_scale_and_softcap(lm, seen[0], logits))


def _factor(x: Tensor, y: Tensor) -> float | None:
    """The c with y = c · x up to rounding, if there is one."""
    if x.shape != y.shape:
        return None
    rounding = torch.finfo(y.dtype).eps
    x, y = x.double(), y.double()
    factor = float((x * y).sum() / (x * x).sum())
    error = float((y - factor * x).abs().max() / y.abs().max())
    if not error < max(4 * rounding, 1e-4):  # also where it is NaN
        return None
    return 1.0 if abs(factor - 1) < max(rounding, 1e-5) else factor


def _scale_and_softcap(
    lm: PreTrainedModel, given: Tensor, logits: Tensor
) -> tuple[float, float | None]:
    """Scale and soft-cap between head and logits, from the model's answer to known numbers."""
    given, logits = given.flatten(), logits.flatten().float()
    scale, bound = float(logits[0] / given[0]), float(logits[1].abs())
    softcap = bound if bound < 0.5 * abs(scale) * float(given[1]) else None
    if softcap is not None:
        scale = softcap * math.atanh(float(logits[0]) / softcap) / float(given[0])
    scale = 1.0 if abs(scale - 1) < 1e-5 else scale  # rounding
    expected = given * scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if not torch.allclose(logits, expected, rtol=1e-2, atol=1e-6):
        raise ValueError(
            f"{type(lm).__name__} does more to its logits than scaling and soft-capping: such a "
            "model's logits cannot be formed outside it"
        )
    return scale, softcap
