"""Two language models to compare: loaded once where they share weights, checked to be comparable.

A policy that is a PEFT adapter on the reference (or the other way round, or two adapters on one
base) needs the base in memory once: each side is then that base with its own adapter switched on,
or with none.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

from rlkl.kl.chunked import vocabulary_of
from rlkl.models.checks import check_causal_lm
from rlkl.models.language_model import (
    EMBEDDED_LM,
    load_causal_lm,
    model_source,
    reading_model,
)
from rlkl.models.output_head import output_head
from rlkl.models.reference import check_reference, trains_base
from rlkl.models.tokenizers import check_same_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Side:
    """One of the two models: a module, and which of its PEFT adapters is on (None: none)."""

    model: nn.Module
    adapter: str | None = None

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Gives the module with this side's adapter on, or with all adapters off."""
        if not isinstance(self.model, PeftModel):
            yield self.model
        elif self.adapter is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(self.adapter)
            yield self.model


@dataclass(frozen=True)
class ModelPair:
    """A policy and its reference over one vocabulary; the two may share their weights.

    Example:
        with pair.ref.active() as model:
            hidden = response_hidden(model, input_ids, attention_mask, length)
    """

    policy: Side
    ref: Side
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...] = ()
    """What a reader of the numbers has to know about the models, one sentence each."""
    vocab_size: int | None = None
    """Tokens of both distributions, where one head has more rows than the other; None: all rows.
    The rows beyond are padding: no text has such a token, and none is sampled."""

    @classmethod
    def of(
        cls, policy: nn.Module, ref_model: nn.Module | None, tokenizer: PreTrainedTokenizerBase
    ) -> "ModelPair":
        """The pair of two modules in memory; `ref_model` None is the policy with its adapter off.

        Raises:
            ValueError: see `check_reference`; a head that lacks a row for some token.
        """
        check_reference(policy, ref_model)
        ref = Side(policy) if ref_model is None else Side(ref_model, _active_adapter(ref_model))
        return cls._of_sides(Side(policy, _active_adapter(policy)), ref, tokenizer)

    @classmethod
    def _of_sides(
        cls, policy: Side, ref: Side, tokenizer: PreTrainedTokenizerBase, notes: Sequence[str] = ()
    ) -> "ModelPair":
        """The pair, with the vocabulary that its heads share.

        Raises:
            ValueError: one of the heads lacks a row for some token.
        """
        rows = []
        for side in (policy, ref):
            with side.active() as model:
                rows.append(vocabulary_of(output_head(model)))
        real = max(tokenizer.get_vocab().values()) + 1
        if min(rows) < real:
            raise ValueError(
                f"a head has {min(rows)} rows for the {real} tokens of the tokenizer: the "
                "vocabularies differ by more than padding, and a KL needs one vocabulary"
            )
        if rows[0] == rows[1]:
            return cls(policy, ref, tokenizer, tuple(notes))
        note = (
            f"The heads have {rows[0]} and {rows[1]} rows for {real} tokens: the rows beyond are "
            "padding and are left out of sampling and of both distributions."
        )
        return cls(policy, ref, tokenizer, (note, *notes), vocab_size=real)

    def swapped(self) -> "ModelPair":
        """The other direction: the reference as policy."""
        return replace(self, policy=self.ref, ref=self.policy)

    def modules(self) -> list[nn.Module]:
        """The distinct modules in memory: one or two."""
        first, second = self.policy.model, self.ref.model
        return [first] if first is second else [first, second]


def _active_adapter(model: nn.Module) -> str | None:
    """The PEFT adapter that is on, None where there is none.

    Raises:
        ValueError: several are on at once.
    """
    active = model.active_adapter if isinstance(model, PeftModel) else None
    if active is None or isinstance(active, str):
        return active
    raise ValueError(f"the adapters {', '.join(active)} are on at once: merge them first")


@dataclass(frozen=True)
class _Source:
    """Where one side's weights are: the base, and the adapter on it if any."""

    name: str
    base: str
    adapter: str | None
    shared: bool = True
    """Whether the base in memory stays the base, so that the other side may use it too."""

    @classmethod
    def of(cls, name: str | os.PathLike[str]) -> "_Source":
        source = model_source(EMBEDDED_LM if str(name) == "embedded" else name)
        config_file = find_adapter_config_file(source)
        if config_file is None:
            return cls(str(name), _canonical(source), None)
        with reading_model(source):
            config = PeftConfig.from_pretrained(str(Path(config_file).parent))
        base = config.base_model_name_or_path
        if not base:
            raise ValueError(f"the adapter {name} does not name its base model")
        try:
            return cls(str(name), _canonical(model_source(base)), source, not trains_base(config))
        except ValueError as error:
            raise ValueError(
                f"the base model of the adapter {name} is not there: {base}; correct "
                f"base_model_name_or_path in {config_file}"
            ) from error

    @property
    def memory(self) -> tuple[str, str | None]:
        """Which module in memory holds it: that of its base, or one of its own."""
        return self.base, None if self.shared else self.adapter

    @property
    def tokenizer(self) -> str:
        """The adapter's own tokenizer where it was saved with one, else the base's."""
        own = self.adapter is not None and os.path.isfile(
            os.path.join(self.adapter, "tokenizer_config.json")
        )
        return self.adapter if own and self.adapter is not None else self.base


def _canonical(source: str) -> str:
    return os.path.realpath(source) if os.path.isdir(source) else source


def load_pair(
    policy: str | os.PathLike[str],
    ref: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> ModelPair:
    """Loads two causal LMs, each a hub id, a folder, a PEFT adapter, or ``embedded``.

    Where one head has more rows than the other, and all tokens of the tokenizer have a row in
    both, the rows beyond the tokenizer are padding and are cut off: no text has such a token, and
    the distributions are those over the real ones.

    Args:
        policy: the model π that will be sampled.
        ref: the model q.
        dtype: dtype of the weights. Sixteen bits save memory and round away a small KL.
        device: where to put both.

    Raises:
        ValueError: a model that is no causal LM, different tokenizers, vocabularies of different
            size that are not padding, an adapter without its base, or what cannot be found or
            read.
    """
    sources = [_Source.of(policy), _Source.of(ref)]
    for source in sources:
        _check_architecture(source)
    tokenizer = load_tokenizer(sources[0].tokenizer)
    check_same_tokenizer(tokenizer, load_tokenizer(sources[1].tokenizer))
    bases = {
        source.memory: load_causal_lm(source.base, dtype=dtype, device=device).eval()
        for source in sources
    }
    notes = _filter_notes({s.name: bases[s.memory] for s in sources})
    adapted: dict[tuple[str, str | None], PeftModel] = {}
    names: dict[str, str] = {}
    for source, label in zip(sources, ("policy", "ref"), strict=True):
        if source.adapter is None or source.adapter in names:
            continue
        names[source.adapter] = label
        if source.memory in adapted:
            with reading_model(source.adapter):
                adapted[source.memory].load_adapter(source.adapter, adapter_name=label)
        else:
            with reading_model(source.adapter):
                adapted[source.memory] = PeftModel.from_pretrained(
                    bases[source.memory], source.adapter, adapter_name=label
                )
    sides = []
    for source in sources:
        model = adapted.get(source.memory, bases[source.memory]).eval()
        adapter = None if source.adapter is None else names[source.adapter]
        sides.append(Side(model, adapter))
    for source, side in zip(sources, sides, strict=True):
        with side.active() as model:
            check_causal_lm(model, source.name)
    return ModelPair._of_sides(sides[0], sides[1], tokenizer, notes)


def _check_architecture(source: _Source) -> None:
    """Refuses, before any weight is read, a model whose config says that it is something else."""
    if os.path.isdir(source.base) and not os.path.isfile(os.path.join(source.base, "config.json")):
        raise ValueError(
            f"{source.base} holds no config.json: name a folder written by save_pretrained"
        )
    with reading_model(source.base):
        config = AutoConfig.from_pretrained(source.base)
    causal = {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([names] if isinstance(names, str) else names)
    }
    architectures = config.architectures or []
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and not causal & set(architectures)
    ):
        raise ValueError(
            f"{source.name} is no causal language model: its config.json says "
            f"{', '.join(architectures) or config.model_type}"
        )


_FILTERS = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Settings of a generation config that change the sampled distribution, where they do nothing."""


def _filter_notes(models: dict[str, PreTrainedModel]) -> list[str]:
    """What the models' generation configs would do to the sampler, and that it is not done.

    A warning, not a refusal: the KL reported is that of the models' whole distributions, and well
    defined; many chat models carry such settings. It is not the KL of what their `generate` says.
    """
    notes = []
    for name, model in models.items():
        config = model.generation_config
        values = {} if config is None else config.to_dict()
        active = [
            f"{k}={values[k]}"
            for k, off in _FILTERS.items()
            if values.get(k, off) not in (None, off)
        ]
        if active:
            notes.append(
                f"{name} asks for {', '.join(active)} when it generates. That is not applied: the "
                "KL is between the whole distributions at the temperature above."
            )
    return notes
