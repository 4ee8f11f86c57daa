"""Settings from YAML and the command line, as the training commands and recipes take them."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from rlkl.cli.errors import fail
from rlkl.models import load_causal_lm
from rlkl.sweep.fields import check_setting, nearest, read_yaml, refuse_unknown
from rlkl.trainers.run_config import check_numbers


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and says the defaults."""


class SettingsParser(TrlParser):
    """TrlParser whose complaints are one line: dataclass fields, ``--config FILE``, command line
    over YAML.

    An option is written out: an abbreviation could be meant for another one (``--loss`` for
    ``--losses``), or become another one when settings are added.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type],
        *,
        description: str | None = None,
    ) -> None:
        super().__init__(
            dataclass_types,  # pyright: ignore[reportArgumentType]
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Says what is wrong without the several hundred lines of usage; exit code 2."""
        fail(f"{message} (see --help)")

    def parse(self, default_config: str | None = None) -> tuple[Any, ...]:
        """Parses ``sys.argv``; without ``--config`` the settings of `default_config` hold.

        Raises:
            ValueError: an unknown key in the YAML file, a value of another type, an unknown option,
                or one that is not read here.
            yaml.YAMLError: a file that is no YAML, or has a key twice.
            FileNotFoundError: a config file that is not there.
        """
        given = [part for word in sys.argv[1:] for part in _split_option(word)]
        if "--config" not in given and default_config is not None:
            given = ["--config", default_config, *given]
        if given[-1:] == ["--config"]:
            self.error("--config needs a file")
        if "--config" in given:
            self._check_file(Path(given[given.index("--config") + 1]))
        *settings, unknown = self.parse_args_and_config(given, return_remaining_strings=True)
        if unknown:
            near = nearest(unknown[0].lstrip("-").split("=")[0], self._hints())
            raise ValueError(
                f"there is no setting {' '.join(unknown)!r}{near or ': --help lists them all'}"
            )
        for each in settings:
            check_numbers(each)
            if isinstance(each, ModelConfig):
                _refuse_unread(each)
            elif getattr(each, "resume_from_checkpoint", None):
                raise ValueError(
                    f"resume_from_checkpoint {each.resume_from_checkpoint} has no effect: the same "
                    "command goes on from the last checkpoint in its output_dir; leave it out"
                )
        return tuple(settings)

    def _hints(self) -> dict[str, Any]:
        """The types of all settings, by name."""
        classes = [cls for cls in self.dataclass_types if is_dataclass(cls)]
        hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
        return {f.name: hints[f.name] for cls in classes for f in fields(cls) if f.init}

    def _check_file(self, file: Path) -> None:
        """Refuses a YAML that the parser would take for something else, or fall over."""
        given, hints = read_yaml(file), self._hints()
        if not isinstance(given, dict):
            raise ValueError(f"{file} holds no settings: give lines of the form name: value")
        given.pop("env", None)  # TRL's, which it checks
        refuse_unknown(given, list(hints), str(file))
        for name, value in given.items():
            check_setting(value, hints[name], f"{file}: {name}")


def _refuse_unread(model: ModelConfig) -> None:
    """Refuses what TRL's ModelConfig has and `load_policy` does not do."""
    below_an_adapter = {"load_in_4bit", "load_in_8bit"} | (
        {"dtype"} if model.dtype == "bfloat16" else set()
    )
    for setting in fields(model):
        name, value = setting.name, getattr(model, setting.name)
        if value == setting.default or (model.use_peft and name in below_an_adapter):
            continue
        if name.startswith(("bnb_", "use_bnb_")) and not model.load_in_4bit:
            raise ValueError(f"{name} {value} has no effect without load_in_4bit; leave it out")
        if name.startswith(("model_revision", "dtype", "load_in_")):
            raise ValueError(
                f"{name} {value} has no effect: the trained model is loaded as it is, in float32 "
                "(bf16 computes in bfloat16; dtype bfloat16, load_in_8bit and load_in_4bit are for "
                "the weights below an adapter, with use_peft); leave it out"
            )


def load_policy(model_args: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The model that is trained: in float32, or as asked for the weights below an adapter.

    Those of 4 and 8 bits are loaded to `device`, and cannot be moved; others are left to the
    trainer.

    Raises:
        ValueError: see `load_causal_lm`.
    """
    quantization = get_quantization_config(model_args)
    return load_causal_lm(
        model_args.model_name_or_path,
        dtype=torch.bfloat16 if model_args.dtype == "bfloat16" else torch.float32,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization,
        device="cpu" if quantization is None else device,
    )


def _split_option(word: str) -> list[str]:
    """``--config=FILE`` as two words, which is how TrlParser looks for it."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def set_threads(count: int | None) -> None:
    """CPU threads of torch; None leaves its choice.

    Raises:
        ValueError: fewer than 1.
    """
    if count is not None:
        if count < 1:
            raise ValueError(f"threads is {count}; give at least 1, or nothing for torch's choice")
        torch.set_num_threads(count)


def adapter_of(model_args: ModelConfig, model: nn.Module) -> PeftConfig | None:
    """The adapter that the settings ask for, if any, told how the model's layers keep their
    weights (GPT-2's transposed).
    """
    adapter = get_peft_config(model_args)
    if isinstance(adapter, LoraConfig):
        adapter.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in model.modules())
        only = adapter.target_modules
        if isinstance(only, str) and only.isidentifier():  # TRL unpacks a list of one name, which
            adapter.target_modules = [only]  # PEFT would take for a pattern of whole paths
    return adapter
