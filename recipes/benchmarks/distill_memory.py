"""Memory of a distillation loss and its gradient: fused from hidden states, beside the plain way.

    python recipes/benchmarks/distill_memory.py
    python recipes/benchmarks/distill_memory.py --loss js --tokens 4096 --json -

Both ways take hidden states [N, H] and heads [V, H] of student and teacher to the mean loss and the
gradients of the student's two. The plain way forms both logits [N, V] and differentiates the
formula of `rlkl.kl`; the fused way is `rlkl.kl.fused_token_loss`. Each runs in a process of its
own; memory is the process's peak (ru_maxrss) above what it was before the loss. Seconds are of one
call, CPU time.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from rlkl.cli import fail
from rlkl.cli.json_output import write_json
from rlkl.kl import DIVERGENCES, fused_token_loss, get_divergence

WAYS = {"plain": "logits [N, V], autograd", "fused": "hidden states, in chunks"}


def measure(way: str, loss_name: str, n: int, vocab: int, width: int) -> dict[str, float]:
    """One way in this process: peak memory, seconds, and the results to compare."""
    torch.manual_seed(0)
    divergence = get_divergence(loss_name)

    def inputs(n: int, vocab: int) -> list[torch.Tensor]:
        """Hidden states and head of the student, then the teacher's; nothing else is ever held."""
        shapes = [(n, width), (vocab, width)] * 2
        scales = [1.0, 0.3] * 2
        return [
            torch.randn(*shape).mul_(scale).requires_grad_(i < 2)
            for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
        ]

    def loss_of(
        student: torch.Tensor,
        student_head: torch.Tensor,
        teacher: torch.Tensor,
        teacher_head: torch.Tensor,
    ) -> torch.Tensor:
        if way == "plain":
            return divergence(student @ student_head.T, teacher @ teacher_head.T).mean()
        tokens = torch.zeros(len(student), dtype=torch.long)
        loss, _ = fused_token_loss(
            lambda stats: stats.kl.sum() / len(tokens),
            student,
            student_head,
            teacher,
            teacher_head,
            tokens,
            divergence=divergence,
        )
        return loss

    loss_of(*inputs(2, 9)).backward()  # what a process makes once, it makes before the count
    given = inputs(n, vocab)
    student, student_head = given[:2]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    loss = loss_of(*given)
    loss.backward()
    seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert student.grad is not None
    assert student_head.grad is not None
    return {
        "peak_mb": (peak - before) / 1024,
        "seconds": seconds,
        "loss": float(loss.detach()),
        "hidden_grad_norm": float(student.grad.norm()),
        "head_grad_norm": float(student_head.grad.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--loss", default="akl", help=f"one of {', '.join(DIVERGENCES)}")
    parser.add_argument("--tokens", type=int, default=1024, help="N")
    parser.add_argument("--vocab", type=int, default=50_257, help="V")
    parser.add_argument("--width", type=int, default=256, help="H of both models")
    parser.add_argument("--json", help="also write the record here; - for standard output")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loss not in DIVERGENCES:
        fail(f"--loss {args.loss} is unknown; use one of {', '.join(DIVERGENCES)}")
    if min(args.tokens, args.vocab, args.width) < 9:
        fail("--tokens, --vocab and --width must be at least 9")
    if args.way is not None:
        print(json.dumps(measure(args.way, args.loss, args.tokens, args.vocab, args.width)))
        return
    sizes = ["--tokens", str(args.tokens), "--vocab", str(args.vocab), "--width", str(args.width)]
    rows = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--loss", args.loss, *sizes]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[way] = json.loads(done.stdout)
    logits = args.tokens * args.vocab * 4 / 2**20
    record = {"loss": args.loss, "tokens": args.tokens, "vocab": args.vocab, "width": args.width}
    record |= {"logits_mb": logits, "threads": torch.get_num_threads(), "ways": rows}
    table = Table(
        title=f"{args.loss}, N = {args.tokens}, V = {args.vocab}, H = {args.width}: "
        f"one [N, V] in float32 is {logits:.0f} MB"
    )
    for column in ("way", "peak MB above inputs", "CPU seconds", "loss"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, row in rows.items():
        cells = (f"{row['peak_mb']:.0f}", f"{row['seconds']:.2f}", f"{row['loss']:.6f}")
        table.add_row(f"{way}: {WAYS[way]}", *cells)
    Console(stderr=args.json == "-").print(table)
    if args.json:
        write_json(record, args.json)


if __name__ == "__main__":
    main()
