"""The reference model: a frozen copy of the policy, or the policy with its adapter off."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def reference_model(policy: nn.Module, ref_model: nn.Module | None) -> Iterator[nn.Module]:
    """Gives the reference: `ref_model` where there is one, else the PEFT policy with its adapter
    off, or with the adapter on that is named "ref" (TRL's trainers keep a trained adapter so, as it
    was when they got it).

    Example:
        with reference_model(policy, None) as ref:
            hidden = response_hidden(ref, input_ids, attention_mask, length)
    """
    if ref_model is not None:
        yield ref_model
    elif isinstance(policy, PeftModel) and "ref" in policy.peft_config:
        trained = cast(str, policy.active_adapter)
        policy.set_adapter("ref", inference_mode=True)
        try:
            yield policy
        finally:
            policy.set_adapter(trained)
    elif isinstance(policy, PeftModel):
        with policy.disable_adapter():
            yield policy
    else:
        raise ValueError("a policy without adapter needs a ref_model: frozen_copy(policy)")


def keep_adapter(policy: PeftModel) -> None:
    """Keeps a copy of the policy's adapter as it is now, named "ref", for `reference_model`."""
    trained = cast(str, policy.active_adapter)
    policy.add_adapter("ref", policy.peft_config[trained])
    weights = get_peft_model_state_dict(policy, adapter_name=trained)
    set_peft_model_state_dict(policy, weights, adapter_name="ref")
    policy.set_adapter(trained)


def check_reference(policy: nn.Module, ref_model: nn.Module | None) -> None:
    """Refuses a reference that is not the model it looks like, before anything is measured.

    `get_peft_model` puts the adapter into the base model itself: that base as `ref_model` is the
    policy again, and every KL 0.

    Raises:
        ValueError: no `ref_model` and no adapter to switch off, or one whose base is trained too
            (its biases by the adapter's config, weights whose ``requires_grad`` is True); a
            `ref_model` with the policy's adapter in it. (The policy itself is allowed: its KL
            from itself is 0.)
    """
    if ref_model is None and not isinstance(policy, PeftModel):
        raise ValueError("a policy without adapter needs a ref_model: frozen_copy(policy)")
    if ref_model is not None and ref_model is not policy and _share_adapter(policy, ref_model):
        raise ValueError(
            "ref_model and the policy have the same adapter layers, so that they are one model and "
            "their KL is 0: pass None, which is the policy with its adapter off, or load the "
            "reference a second time"
        )
    if ref_model is not None or not isinstance(policy, PeftModel):
        return
    if any(trains_base(adapter) for adapter in policy.peft_config.values()):
        raise ValueError(
            "the policy's adapter trains biases of the base model itself (its config says "
            "bias='all' or 'lora_only'): they stay on when it is off, which is then not the "
            "reference: use bias='none', or pass a ref_model that is loaded a second time"
        )
    trained = _trained_base(policy)
    if trained:
        more = f" and {len(trained) - 1} more" if trained[1:] else ""
        raise ValueError(
            "weights of the policy's base model are trained beside its adapter (requires_grad of "
            f"{trained[0]}{more}): they stay on when it is off, which is then not the reference: "
            "freeze them before training, or pass a ref_model that is loaded a second time"
        )


def _trained_base(policy: PeftModel) -> list[str]:
    """Names of the trained weights that are not the adapter's."""
    if not isinstance(policy.base_model, BaseTuner):
        return []  # adaption prompts, which cannot be told from the base
    base = {id(weight) for weight in _base_weights(policy)}
    return [name for name, p in policy.named_parameters() if p.requires_grad and id(p) in base]


def _base_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that an adapter has not brought: those that are left when it is off."""
    if isinstance(module, BaseTuner):
        below = [module.model]
    elif isinstance(module, BaseTunerLayer):
        below = [module.get_base_layer()]
    elif isinstance(module, AuxiliaryTrainingWrapper):  # of modules_to_save, of single tokens
        below = [module.original_module]
    else:
        yield from module.parameters(recurse=False)
        below = list(module.children())
    for each in below:
        yield from _base_weights(each)


def trains_base(adapter: PeftConfig) -> bool:
    """Whether switching the adapter off leaves something of it on: trained biases of its base.

    Everything else that PEFT trains (layers in modules_to_save, single tokens) goes off with it.
    """
    return getattr(adapter, "bias", "none") != "none"


def check_apart(model: nn.Module, fixed: nn.Module, name: str, remedy: str) -> None:
    """Refuses a reference or teacher, `name`, that would move while `model` is trained.

    Frozen weights may be shared.

    Raises:
        ValueError: they share weights that are trained, or an adapter; it ends in `remedy`.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if any(id(p) in trained for p in fixed.parameters()) or _share_adapter(model, fixed):
        raise ValueError(
            f"model and {name} share the weights that are trained: {name} must stay as it is; "
            f"{remedy}"
        )


def _share_adapter(first: nn.Module, second: nn.Module) -> bool:
    layers = {id(module) for module in first.modules() if isinstance(module, BaseTunerLayer)}
    return any(id(module) in layers for module in second.modules())


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy as it is in memory now, without gradient and dropout."""
    return copy.deepcopy(policy).requires_grad_(False).eval()
