"""The reference model: a frozen copy of the policy, or the policy with its adapter off."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn


@contextmanager
def reference_model(policy: nn.Module, ref_model: nn.Module | None) -> Iterator[nn.Module]:
    """Gives the reference: `ref_model` where there is one, else the PEFT policy with its adapter
    off.

    Example:
        with reference_model(policy, None) as ref:
            hidden = response_hidden(ref, input_ids, attention_mask, length)
    """
    if ref_model is not None:
        yield ref_model
    elif isinstance(policy, PeftModel):
        with policy.disable_adapter():
            yield policy
    else:
        raise ValueError("a policy without adapter needs a ref_model: frozen_copy(policy)")


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy as it is in memory now, without gradient and dropout."""
    return copy.deepcopy(policy).requires_grad_(False).eval()
