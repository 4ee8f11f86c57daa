"""How far a sweep is: a table of its cells, and the time left."""

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlkl.sweep.ledger import REFERENCE, Cell
from rlkl.sweep.spec import SweepSpec

_COLOURS = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "red"}


def seconds_per_cell(cells: Sequence[Cell], spec: SweepSpec) -> float | None:
    """Mean working time of the cells that are done, else what the spec says; None if neither."""
    ended = [c.seconds for c in cells if c.state == "done" and c.key != REFERENCE]
    if ended:
        return sum(ended) / len(ended)
    return None if spec.minutes_per_cell is None else 60 * spec.minutes_per_cell


def seconds_left(cells: Sequence[Cell], spec: SweepSpec, workers: int) -> float | None:
    """Work that is left, in cells, times the time of a cell, over the workers; None: not known."""
    each = seconds_per_cell(cells, spec)
    if each is None:
        return None
    runs = [c for c in cells if c.key != REFERENCE]
    unknown = spec.num_cells - len(runs)  # configurations that a search has yet to choose
    left = sum(1 - c.progress for c in runs if c.state in ("waiting", "running"))
    return (left + unknown) * each / max(1, workers)


def duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> duration(20), duration(600), duration(9000), duration(None)
    ('20 s', '10 min', '2.5 h', 'unknown')
    """
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _state(cell: Cell, spec: SweepSpec) -> Text:
    """What a cell is doing, how far it is, and which attempt it is when not the first."""
    silent = cell.state == "running" and cell.silent > spec.grace
    said = "silent" if silent else cell.state
    if cell.state == "running":
        said += f" {cell.progress:.0%}"
    if cell.attempt > 1:
        said += f" (try {cell.attempt})"
    return Text(said, style=_COLOURS["failed" if silent else cell.state])


def status_table(cells: Sequence[Cell], spec: SweepSpec, workers: int, rows: int) -> RenderableType:
    """Counts, time left, and up to `rows` cells: failed and running ones first.

    A running cell whose worker has been silent for longer than the sweep's `grace` is shown as
    silent: any worker that asks for work will take it.
    """
    count = Counter(cell.state for cell in cells)
    said = ", ".join(f"{count[s]} {s}" for s in _COLOURS if count[s]) or "no cells yet"
    left = duration(seconds_left(cells, spec, workers))
    head = Text(f"{spec.name}: {said}; time left with {workers} worker(s): {left}", style="bold")
    order = {"failed": 0, "running": 1, "done": 2, "waiting": 3}
    shown = sorted(range(len(cells)), key=lambda i: order[cells[i].state])[:rows]
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("cell", "configuration", "state", "KL, nats", "reward"):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for cell in (cells[i] for i in sorted(shown)):
        points = (cell.record or {}).get("points") or []
        kl = f"{points[-1]['kl']:.2f} ± {1.96 * points[-1]['kl_se']:.2f}" if points else ""
        reward = (
            f"{points[-1]['reward']:+.2f} ± {1.96 * points[-1]['reward_se']:.2f}" if points else ""
        )
        table.add_row(
            cell.key,
            cell.label,
            _state(cell, spec),
            kl,
            reward,
        )
    parts: list[RenderableType] = [head, table]
    if len(cells) > len(shown):
        parts.append(Text(f"and {len(cells) - len(shown)} more", style="dim"))
    for cell in cells:
        if cell.error:
            parts.append(Text(f"{cell.key} {cell.label}: {cell.error}", style="red"))
    return Group(*parts)
