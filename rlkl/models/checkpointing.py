"""Gradient checkpointing of models that are trained without dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlkl.models.language_model import causal_lm, trunk_of


@contextmanager
def recomputing(*models: nn.Module) -> Iterator[None]:
    """Passes in the block keep the inputs alone of layers that `enable_checkpointing` is for.

    transformers' layers recompute what is between in train mode only. Here these layers are in it,
    and nothing below them is: dropout stays off, and what a pass computes is the same to the bit.
    """
    modules = (module for model in models for module in model.modules())
    layers = [
        module
        for module in modules
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def enable_checkpointing(model: nn.Module, name: str) -> None:
    """Has the passes of a model within `recomputing` keep less in memory, and take longer.

    Args:
        model: a causal LM or one with an adapter, in eval mode.
        name: what a complaint calls it.

    Raises:
        ValueError: a model whose layers cannot do it, or have dropout that is no module of its own.
    """
    lm = causal_lm(model)
    lm.activation_checkpointing_enable()
    ids = torch.zeros(1, 4, dtype=torch.long, device=lm.device)
    if not any(isinstance(module, GradientCheckpointingLayer) for module in lm.modules()):
        raise ValueError(
            f"the layers of {name} know no gradient checkpointing: leave gradient_checkpointing out"
        )
    with torch.no_grad():
        plain = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        with recomputing(model):
            recomputed = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.equal(plain, recomputed):
        raise ValueError(
            f"the layers of {name} have dropout that gradient checkpointing switches on: set its "
            "config's dropout fields to 0 before it is loaded, or leave gradient_checkpointing out"
        )
