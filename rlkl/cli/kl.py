"""`rlkl kl`: how far one language model has moved from another, with error bars."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rlkl.cli.errors import check_writable, fail, refusing_bad_input
from rlkl.cli.json_output import write_json
from rlkl.cli.kl_tables import print_report, progress_bar

if TYPE_CHECKING:
    from rlkl.evaluation.kl_estimate import KLEstimation, KLReport
    from rlkl.evaluation.kl_estimate.draws import ResponseSource
    from rlkl.models import ModelPair

DEFAULT_SAMPLES, DEFAULT_NEW_TOKENS, DEFAULT_MAX_SAMPLES = 256, 64, 65_536


def kl(
    policy: Annotated[
        str,
        typer.Option(
            help="The model that has moved: hub id, folder, PEFT adapter folder, or 'embedded'."
        ),
    ],
    ref: Annotated[str, typer.Option(help="The model it is compared with, likewise.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="txt (one a line), jsonl or csv file, data set folder, or hub data set "
            "(id or id:split). Default: the embedded openings of film reviews."
        ),
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="Where the prompts are.")] = "prompt",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Use the first N tokens of each text as the prompt. Default: all."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Responses, over all prompts together. Default: 256.")
    ] = None,
    samples_per_prompt: Annotated[
        int | None, typer.Option(help="Instead: responses to each prompt.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit; the KL is that of these tokens. Default: 64.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of the sampling, and of both distributions.")
    ] = 1.0,
    target_stderr: Annotated[
        float | None,
        typer.Option(help="Go on until the standard error is this small, in nats per response."),
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(help="With --target-stderr: stop here in any case. Default: 65536."),
    ] = None,
    estimator: Annotated[
        str,
        typer.Option(
            help="The one to quote and to stop by: k1, k2, k3, rb, topk or topk_bucket. These and "
            "the estimators of whole responses (cv, mcv, ht, ...) are all reported."
        ),
    ] = "rb",
    estimand: Annotated[
        str,
        typer.Option(
            help="'population': intervals cover the draw of the prompts too. 'given_prompts': the "
            "mean over exactly these prompts (needs two responses to each)."
        ),
    ] = "population",
    completions: Annotated[
        str | None,
        typer.Option(
            help="Replay: jsonl of prompt and completion (text, or prompt_ids and completion_ids), "
            "with logprobs or logprob of the sampler if known. Nothing is sampled then."
        ),
    ] = None,
    truncate_at: Annotated[
        float | None,
        typer.Option(help="With log-probs: cut importance weights here. Default: not at all."),
    ] = None,
    both: Annotated[bool, typer.Option("--both", help="The other direction as well.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the prompts and of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Responses at once.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, float64, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    json: Annotated[
        str | None, typer.Option(help="Write the numbers here; '-' is standard output.")
    ] = None,
    html: Annotated[str | None, typer.Option(help="Write a page to look at here.")] = None,
    top_k: Annotated[int | None, typer.Option(hidden=True)] = None,
    top_p: Annotated[float | None, typer.Option(hidden=True)] = None,
    min_p: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """KL of one causal language model from another, by every estimator on the same responses.

    Responses are sampled from the policy; D_KL(policy ‖ ref) is reported in nats per response and
    per token, with 95% intervals that count prompts, not responses, as independent. Ctrl-C ends
    the sampling and reports what there is.

    \b
    Example:
      rlkl kl --policy runs/final/policy --ref embedded --max-new-tokens 24 --html kl.html
      rlkl kl --policy org/chat-dpo --ref org/chat --prompts prompts.jsonl --target-stderr 0.1
      rlkl kl --policy org/chat-dpo --ref org/chat --completions sampled.jsonl --json -
    """  # noqa: D301 (typer reads the backspace: lines to be kept)
    _refuse_filters({"--top-k": top_k, "--top-p": top_p, "--min-p": min_p})
    console = Console(stderr=json == "-")
    for name, value in (("--policy", policy), ("--ref", ref), ("--prompts", prompts)):
        if value == "":
            fail(f"{name} is empty: name one, such as 'embedded' or a folder")
    with refusing_bad_input():
        from rlkl.evaluation.kl_estimate import Estimand, KLEstimation, Settings
        from rlkl.kl import ESTIMATORS

        if estimator not in ESTIMATORS:
            fail(f"--estimator {estimator}: use one of {', '.join(ESTIMATORS)}")
        if estimand not in list(Estimand):
            fail(f"--estimand {estimand}: use one of {', '.join(Estimand)}")
        settings = Settings(
            temperature=temperature,
            target_stderr=target_stderr,
            min_samples=DEFAULT_SAMPLES if num_samples is None else num_samples,
            max_samples=DEFAULT_MAX_SAMPLES if max_samples is None else max_samples,
            headline=estimator,
            estimand=Estimand(estimand),
            truncate_at=truncate_at,
        )
        check_writable(json, html)
        from rlkl.cli.quiet import quiet_libraries

        quiet_libraries()
        texts = []  # for sampling only
        if completions is None:
            if truncate_at is not None:
                fail("--truncate-at cuts the weights of --completions: what is sampled has none")
            if max_samples is not None and target_stderr is None:
                fail("--max-samples is the limit of --target-stderr; else give --num-samples")
            texts = _load_prompts(prompts, prompt_column)
            number = _number_of_samples(num_samples, samples_per_prompt, len(texts))
            settings = replace(settings, min_samples=number)
        else:
            _refuse_beside_completions(
                {
                    "--prompts": prompts,
                    "--prompt-tokens": prompt_tokens,
                    "--num-samples": num_samples,
                    "--samples-per-prompt": samples_per_prompt,
                    "--max-new-tokens": max_new_tokens,
                    "--target-stderr": target_stderr,
                    "--max-samples": max_samples,
                    "--both": both or None,
                }
            )
        pair = _load_models(policy, ref, dtype, device)

        def responses(pair: "ModelPair") -> "ResponseSource":
            from rlkl.evaluation.kl_estimate import ReplayedResponses, SampledResponses

            if completions is not None:
                replayed = ReplayedResponses(pair, completions, batch_size=batch_size)
                if truncate_at is not None and replayed.log_prob_kind == "none":
                    fail(
                        f"--truncate-at cuts weights: {completions} has no log-probs, so no weights"
                    )
                return replayed
            return SampledResponses(
                pair,
                _first_tokens(pair.tokenizer, texts, prompt_tokens),
                limit=settings.limit,
                max_new_tokens=DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
            )

        directions = [KLEstimation(pair, responses(pair), settings, (policy, ref))]
        if both:
            other = pair.swapped()
            directions.append(KLEstimation(other, responses(other), settings, (ref, policy)))
    reports = []
    with ctrl_c_ends_the_sampling(directions) as stopped:
        for estimation in directions:
            interrupted = _run(estimation, stopped)
            if estimation.n == 0:
                break
            reports.append(estimation.report(interrupted))
            print_report(console, reports[-1])
            if interrupted:
                break
    if not reports:
        console.print("stopped before the first batch was done: there is nothing to report")
        raise typer.Exit(130)
    if json is not None:
        write_json({"seed": seed, **_record(reports)}, json)
    if html is not None:
        from rlkl.evaluation.kl_estimate.page import write_page

        write_page(reports, html)
        console.print(f"page: {html}", highlight=False)
    if reports[-1].interrupted or len(reports) < len(directions):
        raise typer.Exit(130)


def _refuse_filters(filters: dict[str, Any]) -> None:
    for name, value in filters.items():
        if value is not None:
            fail(
                f"{name} {value}: a truncated sampler is another policy, and the KL between the "
                "models' whole distributions is not its KL; sample with --temperature alone"
            )


def _load_prompts(source: str | None, column: str) -> list[str]:
    from rlkl.data import EMBEDDED_EVAL_PROMPTS, load_prompts

    return list(load_prompts(source or EMBEDDED_EVAL_PROMPTS, column)["prompt"])


def _load_models(policy: str, ref: str, dtype: str, device: str) -> Any:
    import torch

    from rlkl.models import load_pair

    dtypes = {str(d).removeprefix("torch."): d for d in _dtypes(torch)}
    if dtype not in dtypes:
        fail(f"--dtype {dtype}: use one of {', '.join(dtypes)}")
    kind, _, number = device.partition(":")
    if not re.fullmatch("(cpu|cuda|mps)(:[0-9]+)?", device):
        fail(f"--device {device}: use cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        fail(f"--device {device}: torch sees no CUDA device here")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        fail(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if kind == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {device}: torch sees no MPS device here")
    return load_pair(policy, ref, dtype=dtypes[dtype], device=device)


def _dtypes(torch: Any) -> list[Any]:
    return [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _first_tokens(tokenizer: Any, texts: list[str], count: int | None) -> list[str]:
    if count is None:
        return texts
    if count < 1:
        fail(f"--prompt-tokens {count}: must be at least 1")
    rows = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=count)
    return tokenizer.batch_decode(rows["input_ids"])


def _number_of_samples(whole: int | None, per_prompt: int | None, prompts: int) -> int:
    if whole is not None and per_prompt is not None:
        fail("--num-samples and --samples-per-prompt exclude each other")
    if per_prompt is not None:
        if per_prompt < 1:
            fail(f"--samples-per-prompt {per_prompt}: must be at least 1")
        return per_prompt * prompts
    return DEFAULT_SAMPLES if whole is None else whole


def _refuse_beside_completions(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            fail(f"{name} has no meaning beside --completions: nothing is sampled")


class Stop:
    """Whether Ctrl-C was pressed."""

    requested = False


@contextmanager
def ctrl_c_ends_the_sampling(estimations: list["KLEstimation"]) -> Iterator[Stop]:
    """The first Ctrl-C ends the sampling after the batch in work, the second drops that batch."""
    stop = Stop()

    def interrupt(number: int, frame: Any) -> None:
        if stop.requested and not any(estimation.adding for estimation in estimations):
            raise KeyboardInterrupt
        stop.requested = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _run(estimation: "KLEstimation", stop: Stop) -> bool:
    """Samples until there is enough; True if Ctrl-C ended it before."""
    with progress_bar(estimation) as show:
        while not estimation.done:
            if stop.requested:
                return True
            try:
                estimation.step()
            except KeyboardInterrupt:  # the batch in work is lost, the sums of the others are whole
                return True
            show(stop.requested)
    return False


def _record(reports: list["KLReport"]) -> dict[str, Any]:
    """The first direction, and the other one under the key "reverse"."""
    record = reports[0].to_dict()
    if len(reports) > 1:
        record["reverse"] = reports[1].to_dict()
    return record
