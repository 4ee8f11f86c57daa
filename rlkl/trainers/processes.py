"""What the processes of one training tell each other (data parallelism: torchrun, accelerate).

Each has the whole model and its own part of a batch. In a single process all of it does nothing.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor, nn
from transformers import TrainingArguments

from rlkl.rollout import Rollout
from rlkl.rollout.records import joined, moved
from rlkl.trainers.step import Update

T = TypeVar("T")


def check_processes(args: TrainingArguments) -> None:
    """Refuses models that are spread over processes.

    Raises:
        ValueError: DeepSpeed or FSDP is asked for, by the settings or by accelerate's.
    """
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP"))
    if args.deepspeed is not None or args.fsdp or launched:
        raise ValueError(
            "DeepSpeed and FSDP spread a model over processes, and the exact KL reads heads and "
            "hidden states whole: leave them out. Several processes (torchrun, accelerate launch) "
            "have a whole model each"
        )


def process_place(args: TrainingArguments) -> list[int]:
    """What this process adds to the place of its random numbers (see `generator_of`).

    The first one draws what a single process would.
    """
    return [args.process_index] if args.process_index > 0 else []


def of_all(record: T) -> list[T]:
    """What each process calls with, by rank. Tensors in it must be on the CPU."""
    return [record] if PartialState().num_processes == 1 else gather_object([record])


def of_first(record: T) -> T:
    """What the first process calls with."""
    return record if PartialState().num_processes == 1 else broadcast_object_list([record])[0]


def own_share(count: int) -> list[int]:
    """The rows of this process where `count` rows are shared in their order, one at least to each:
    where they are fewer than the processes, some are shared by several.
    """
    place, processes = PartialState().process_index, PartialState().num_processes
    first, end = (k * count // processes for k in (place, place + 1))
    return list(range(first, max(end, first + 1)))


def whole(record: T) -> T:
    """The records of all processes as one, rows under rows, by rank; on the CPU."""
    return record if PartialState().num_processes == 1 else joined(of_all(moved(record, "cpu")))


def whole_rollout(rollout: Rollout) -> tuple[Rollout, int]:
    """The rollout of all processes, by rank, and where this one's begins in it.

    It is on the CPU and without hidden states ([B, T, 0]), which only their own process reads.
    """
    if PartialState().num_processes == 1:
        return rollout, 0
    tokens = replace(rollout.tokens, ref_hidden=rollout.tokens.ref_hidden[..., :0])
    parts = of_all(moved(replace(rollout, tokens=tokens), "cpu"))
    return joined(parts), sum(map(len, parts[: PartialState().process_index]))


def whole_updates(updates: list[Update]) -> list[Update]:
    """The updates of which each process has a share."""
    if PartialState().num_processes == 1:
        return updates
    parts = of_all([moved(update, "cpu") for update in updates])
    return [Update.join(shares) for shares in zip(*parts, strict=True)]


def total(x: Tensor) -> Tensor:
    """The sum over all processes."""
    if PartialState().num_processes > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def add_gradients(parameters: Iterable[Tensor], scale: float = 1.0) -> None:
    """Gives every process the sum of all processes' gradients, times `scale`.

    DistributedDataParallel would do so for what its own forward pass has computed; the losses here
    differentiate trunk and head apart.
    """
    if PartialState().num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    under_way = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work in under_way:
        cast(dist.Work, work).wait()
    for gradient in gradients:
        gradient.mul_(scale)


@torch.no_grad()
def share_weights(*models: nn.Module | None) -> None:
    """Gives every process the first one's weights, of which some may have been drawn."""
    if PartialState().num_processes > 1:
        for model in filter(None, models):
            for weight in (*model.parameters(), *model.buffers()):
                dist.broadcast(weight, src=0)
