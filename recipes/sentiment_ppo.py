"""Sentiment-controlled fine-tuning: a review LM learns to write positive reviews under a KL
penalty.

    python recipes/sentiment_ppo.py                           # the embedded models, on a CPU
    python recipes/sentiment_ppo.py --kl_estimator k1 --seed 1 --output_dir runs/k1
    python recipes/sentiment_ppo.py --config recipes/sentiment_ppo_gpt2.yaml

Settings come from the YAML file (default: sentiment_ppo.yaml beside this script), then from the
command line. A run that was stopped goes on from its last checkpoint when the same command is
given again.
"""

from pathlib import Path

from rlkl.cli.sentiment.algorithms import PPO
from rlkl.cli.sentiment.run import run

SETTINGS = PPO.settings
"""What the YAML and the command line may set; a sweep checks its cells against it."""

if __name__ == "__main__":
    run(PPO, __doc__, str(Path(__file__).parent / "sentiment_ppo.yaml"))
