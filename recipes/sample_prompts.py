"""Samples the embedded prompts: openings of reviews, three to eight words, by the review LM itself.

    python recipes/sample_prompts.py --output_dir rlkl/data/assets

Every opening is different, training and held-out ones too; nothing else is filtered or picked.
"""

import argparse
from pathlib import Path
from typing import cast

import torch

from rlkl.models import load_causal_lm, load_tokenizer
from rlkl.rollout.sampling import sample_responses


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_name_or_path", default=None, help="default: the embedded LM")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1024, help="training prompts")
    parser.add_argument("--held_out", type=int, default=256, help="held-out prompts")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="below 1: fewer invented names"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_causal_lm(args.model_name_or_path).eval()
    generator = torch.Generator().manual_seed(args.seed)
    openings: dict[str, None] = {}  # keeps the order of sampling
    while len(openings) < args.train + args.held_out:
        responses = sample_responses(
            model,
            tokenizer,
            [cast(str, tokenizer.bos_token)] * 256,
            24,
            temperature=args.temperature,
            generator=generator,
        )
        counts = torch.randint(3, 9, (len(responses),), generator=generator).tolist()
        for text, count in zip(responses.texts, counts, strict=True):
            words = text.split()
            if len(words) > count:  # the last word taken is whole
                openings[" ".join(words[:count])] = None
    chosen = list(openings)
    files = {"prompts_train.txt": chosen[: args.train], "prompts_eval.txt": chosen[args.train :]}
    files["prompts_eval.txt"] = files["prompts_eval.txt"][: args.held_out]
    for name, prompts in files.items():
        (args.output_dir / name).write_text("\n".join(prompts) + "\n", encoding="utf-8")
        print(f"{len(prompts)} openings in {args.output_dir / name}")


if __name__ == "__main__":
    main()
