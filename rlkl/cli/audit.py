"""`rlkl audit`: what each KL term estimates and optimises, exact by enumeration."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlkl.cli.errors import check_writable, fail, refusing_bad_input
from rlkl.cli.json_output import write_json

if TYPE_CHECKING:
    from rlkl.evaluation.audit import Models

COLUMNS = {
    "value_bias": "bias",
    "value_var": "variance",
    "grad_rel_err": "error",
    "grad_cos": "cosine",
    "grad_var": "variance",
}


def audit(
    context: typer.Context,
    vocab: Annotated[int, typer.Option(help="Tokens of the random models.")] = 4,
    length: Annotated[int, typer.Option(help="Longest response of the random models.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random models.")] = 0,
    eos: Annotated[int, typer.Option(help="Token that ends a response; -1 for none.")] = 0,
    drift: Annotated[
        float, typer.Option(help="Noise on the policy's logits that makes the older sampler.")
    ] = 1.0,
    models: Annotated[
        Path | None,
        typer.Option(
            help='JSON in place of random models: {"length", "eos" or null, "policy", "ref", and '
            '"sampler" if wanted}: tables of logits, one row per prefix, shorter prefixes first.'
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Head of topk and topk_bucket.")] = 2,
    truncate_at: Annotated[
        float, typer.Option(help="Bound of truncated prefix weights, at least 1.")
    ] = 1.5,
    json: Annotated[
        str | None, typer.Option(help="Write the audit as JSON to a file; - for standard output.")
    ] = None,
    html: Annotated[str | None, typer.Option(help="Write the audit as one web page.")] = None,
) -> None:
    """Is a KL term unbiased, does its gradient point the right way, how noisy is it?

    Measures every estimator in every placement, and the KL terms of TRL, verl,
    OpenRLHF and the KL-RB code, on a language model so small that all of its
    responses are listed: the numbers are exact. Sampling "on": the policy's
    own responses; "off": those of an older policy. The estimators of whole
    responses (cv, mcv, ht) measure and are not trained on: they have a value
    and no gradient; ht is for the policy's own responses alone.

    \b
    Examples:
      rlkl audit
      rlkl audit --vocab 5 --seed 1 --html audit.html
      rlkl audit --models mine.json --json -
    """  # noqa: D301 (typer reads the backspace: lines to be kept)
    with refusing_bad_input():
        check_writable(json, html)
        for name in ("vocab", "length", "seed", "eos", "drift") if models is not None else ():
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                fail(f"--{name} is of random models, and has no meaning beside --models")
        chosen = _models(models, vocab, length, seed, None if eos < 0 else eos, drift)
        from rlkl.evaluation.audit import audit as measure_all

        with Console(stderr=True).status("differentiating every term"):
            record = measure_all(chosen, top_k=top_k, truncate_at=truncate_at)
    if json is not None:
        write_json(record, json)
    if html is not None:
        from rlkl.evaluation.audit_page import audit_page

        Path(html).write_text(audit_page(record), encoding="utf-8")
    if json != "-":
        _print(record, Console())
        if html is not None:
            print(f"page: {html}")


def _models(
    file: Path | None, vocab: int, length: int, seed: int, eos: int | None, drift: float
) -> "Models":
    from rlkl.evaluation.audit import models_from_json, random_models

    if file is None:
        return random_models(vocab, length, seed=seed, eos=eos, drift=drift)
    import json

    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return models_from_json(record)


def _print(record: dict[str, Any], console: Console) -> None:
    from rlkl.evaluation.audit_page import formatted, verdict, who_sampled_off

    console.print(
        f"Exact D_KL(policy ‖ ref) = [bold]{record['exact_kl']:.5f}[/] nats per response "
        f"({record['responses']} responses, vocabulary {record['vocab']}, length "
        f"{record['length']})."
    )
    console.print(f"Sampling off: {who_sampled_off(record)}")
    for title, rows, named in (
        ("Estimators", record["rows"], False),
        ("Configurations of the field, by name", record["configurations"], True),
    ):
        for sampling in ("on", "off"):
            table = Table(
                title=f"{title} · sampling {sampling}",
                title_justify="left",
                box=SIMPLE,
                pad_edge=False,
                collapse_padding=True,
            )
            table.add_column("configuration" if named else "estimator · placement", min_width=20)
            for key, label in COLUMNS.items():
                side = "value" if key.startswith("value") else "gradient"
                table.add_column(f"{side}\n{label}", justify="right", no_wrap=True)
            for row in rows:
                if row["sampling"] == sampling:
                    cells = [
                        Text(formatted(row, key), verdict(row, key, record["exact_kl"]))
                        for key in COLUMNS
                    ]
                    what = row["name"] if named else f"{row['estimator']} · {row['placement']}"
                    table.add_row(what, *cells)
            console.print(table)
    console.print(
        "[green]green[/]: exact. [yellow]yellow[/]: off by less than 25%. [red]red[/]: by more. "
        "Bias in nats per response; gradient error relative to ‖∇D_KL‖; variances of one response."
    )
