"""A sentiment-controlled run, whatever trains it: `rlkl ppo`, `rlkl rloo`, `rlkl grpo`, and
recipes/sentiment_ppo.py.

`settings` (what may be set), `algorithms` (how the trainers differ), `run` (from the settings to
the files), `results` (its numbers), `tables` and `plot` (as they are shown). ``ppo.yaml``,
``rloo.yaml`` and ``grpo.yaml`` are the commands' defaults.
"""

import os
import sys
from contextlib import redirect_stdout

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before the hub's library is imported
with redirect_stdout(sys.stderr):  # where it says that WANDB_MODE is offline
    import transformers.integrations.integration_utils  # noqa: F401
