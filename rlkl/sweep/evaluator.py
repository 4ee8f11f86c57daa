"""The one evaluator of a sweep: the same prompts, draws, reward and judge for every cell.

    python -m rlkl.sweep.evaluator FOLDER

It reads the ``cell.json`` of a cell and writes ``points.json``: {"points": one record a policy
measured (the run's end, last; its checkpoints before, where they are kept), "samples": texts,
"measured": how (see `Evaluator.measured`), "versions": {...}}; for the reference
{"reference": {...}} beside no points, with its reward and, where they are measured, judge, optimal
and best_of_n (see `Evaluator.reference`). A point's keys: step, kl, kl_se (exact token KL, nats per
response), kl_k1, kl_k1_se (sampled, on the same responses), reward, reward_se, judge, judge_se,
length, truncated, prompts (how many there were); every ``_se`` is clustered by prompt.
"""

import hashlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

import rlkl
from reward_models import EMBEDDED_JUDGE, SentimentReward
from rlkl.data import EMBEDDED_EVAL_PROMPTS, load_prompts
from rlkl.evaluation import OptimalTilt, best_of_n_curve, evaluate_policy, sample_scores
from rlkl.kl import mean_and_stderr, sequence_kl
from rlkl.models import frozen_copy, load_causal_lm, load_tokenizer
from rlkl.rollout import Rollout
from rlkl.rollout.summary import token_kl
from rlkl.sweep.spec import EVALUATED_FIELDS

_PACKAGES = ("torch", "transformers", "trl", "peft", "optuna", "moocore", "numpy")


class Evaluator:
    """Measures policies against one reference.

    Args:
        settings: of the cell; only those of `rlkl.sweep.spec.EVALUATED_FIELDS` are read.
        evaluation: prompts, responses_per_prompt, reference_samples, seed, samples.
    """

    def __init__(self, settings: dict[str, Any], evaluation: dict[str, Any]) -> None:
        self.settings, self.evaluation = settings, evaluation
        self.tokenizer = load_tokenizer(settings["model_name_or_path"])
        name = settings["ref_model_name_or_path"] or settings["model_name_or_path"]
        self.ref = frozen_copy(load_causal_lm(name))
        self.reward = SentimentReward(
            settings["reward_model"],
            positive_label=settings["positive_label"],
            score=settings["reward_score"],
            clamp=settings["reward_clamp"],
        )
        self.judge = SentimentReward(settings["judge_model"] or EMBEDDED_JUDGE)
        source = settings["eval_prompts"] or EMBEDDED_EVAL_PROMPTS
        self.prompts = list(load_prompts(source)["prompt"])[: evaluation["prompts"]]

    def measured(self) -> dict[str, Any]:
        """What two measurements must share to be compared: settings, draws, and the very prompts
        (their number and a digest of their texts).
        """
        texts = "\0".join(self.prompts).encode(errors="surrogatepass")
        return {name: self.settings.get(name) for name in EVALUATED_FIELDS} | {
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(texts).hexdigest()[:16],
            **{name: self.evaluation[name] for name in ("responses_per_prompt", "seed")},
        }

    def point(self, policy: nn.Module, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Means of a policy with standard errors clustered by prompt, and sample texts."""
        repeats = self.evaluation["responses_per_prompt"]
        prompts = [prompt for prompt in self.prompts for _ in range(repeats)]
        rollout = evaluate_policy(
            policy,
            self.ref,
            self.tokenizer,
            prompts,
            self.reward,
            self.settings["response_length"],
            judges={"judge": self.judge},
            temperature=self.settings["temperature"],
            max_prompt_length=self.settings.get("max_prompt_length"),
            seed=self.evaluation["seed"],
        ).rollout
        mask = rollout.responses.mask
        point: dict[str, float] = {"step": step, "prompts": len(self.prompts)}
        for name, values in {
            "kl": sequence_kl(token_kl("rb", rollout), mask),
            "kl_k1": sequence_kl(token_kl("k1", rollout), mask),
            "reward": rollout.scores,
            "judge": rollout.other_scores["judge"],
            "length": mask.sum(1).float(),
        }.items():
            point[name], point[f"{name}_se"] = clustered(values, repeats)
        point["truncated"] = float((~rollout.responses.ended).float().mean())
        return point, self._samples(rollout, step, repeats)

    def _samples(self, rollout: Rollout, step: int, repeats: int) -> list[dict[str, Any]]:
        """The first response to each of the first prompts: not picked."""
        rows = range(0, min(self.evaluation["samples"] * repeats, len(rollout)), repeats)
        return [
            {
                "step": step,
                "prompt": rollout.responses.prompts[i],
                "response": rollout.responses.texts[i],
                "reward": round(float(rollout.scores[i]), 2),
                "judge": round(float(rollout.other_scores["judge"][i]), 2),
            }
            for i in rows
        ]

    def reference(self, on_progress: Callable[[float], object] | None = None) -> dict[str, Any]:
        """The reference's own scores, the optimum and best-of-n on the same prompts.

        `on_progress` is told the share of the samples that are drawn.
        """
        count, drawn = self.evaluation["reference_samples"], 0

        def on_batch(responses: int) -> None:
            nonlocal drawn
            drawn += responses
            if on_progress is not None:
                on_progress(drawn / (count * len(self.prompts)))

        scores = sample_scores(
            self.ref,
            self.tokenizer,
            self.prompts,
            {"reward": self.reward, "judge": self.judge},
            count,
            self.settings["response_length"],
            temperature=self.settings["temperature"],
            max_prompt_length=self.settings.get("max_prompt_length"),
            seed=self.evaluation["seed"] + 1,
            on_batch=on_batch,
        )
        reward, judge = scores["reward"], scores["judge"]
        tilt = OptimalTilt(reward, {"judge": judge})
        own = {name: mean_and_stderr(values.mean(1)) for name, values in scores.items()}
        return {
            "reward": float(own["reward"].mean),
            "reward_se": float(own["reward"].stderr),
            "judge": float(own["judge"].mean),
            "judge_se": float(own["judge"].stderr),
            "samples": count,
            "trusted_kl": tilt.trusted_kl,
            "half_sample_drop": tilt.half_sample_drop(),
            "optimal": [asdict(point) for point in tilt.curve()],
            "best_of_n": [asdict(p) for p in best_of_n_curve(reward, {"judge": judge})],
        }

    def load(self, folder: Path) -> nn.Module:
        """A policy that a run has saved: whole, or an adapter on the reference."""
        if (folder / "adapter_config.json").is_file():
            base = load_causal_lm(self.settings["model_name_or_path"])
            return PeftModel.from_pretrained(base, str(folder))
        return load_causal_lm(folder)


def clustered(values: Tensor, repeats: int) -> tuple[float, float]:
    """Mean and standard error of values [P · repeats], the repeats of a prompt side by side.

    The P means of the prompts are independent draws; the responses to one prompt are not.

    >>> import torch
    >>> clustered(torch.tensor([1.0, 1.0, 3.0, 3.0]), 2)
    (2.0, 1.0)
    """
    mean, stderr = mean_and_stderr(values.view(-1, repeats).mean(1))
    return float(mean), float(stderr)


def steps_of(run: Path, settings: dict[str, Any]) -> int:
    """How many steps a finished run took: ``max_steps``, or where epochs or the recipe's default
    say how many, what it logged last.
    """
    if (settings.get("max_steps") or 0) > 0:
        return settings["max_steps"]
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def main() -> None:
    """Measures the policies of one cell, or the reference."""
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "cell.json").read_text())
    if plan["recipe"] is not None and not (folder / "run" / "policy").is_dir():
        (folder / "trained").unlink(missing_ok=True)  # so that another attempt trains
        sys.exit(
            f"{plan['recipe']} ended with code 0 and left no policy to measure: it must save it in "
            f"{folder / 'run' / 'policy'}"
        )
    evaluator = Evaluator(plan["settings"], plan["evaluation"])
    record: dict[str, Any] = {"points": [], "samples": [], "measured": evaluator.measured()}
    if plan["recipe"] is None:
        progress = folder / "progress"
        progress.write_text("0")  # an earlier attempt's
        record["reference"] = evaluator.reference(lambda share: progress.write_text(f"{share}"))
    else:
        run = folder / "run"
        policies = {int(p.name.split("-")[1]): p for p in run.glob("checkpoint-*")}
        policies[steps_of(run, plan["settings"])] = run / "policy"
        for step, policy in sorted(policies.items()):
            point, samples = evaluator.point(evaluator.load(policy), step)
            record["points"].append(point)
            record["samples"].extend(samples)
    record["versions"] = {"rlkl": rlkl.__version__} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }
    temporary = folder / "points.tmp"
    temporary.write_text(json.dumps(record))
    temporary.replace(folder / "points.json")
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
