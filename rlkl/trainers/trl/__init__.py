"""TRL's RLOO and GRPO trainers with the exact token KL and the true gradient of the sequence KL.

They extend TRL's by the methods that every release so far has changed; the release that they were
written for is 1.16.
"""

import logging

import trl

from rlkl.trainers.trl.grpo import RaoBlackwellGRPOTrainer
from rlkl.trainers.trl.rloo import RaoBlackwellRLOOTrainer

__all__ = ["RaoBlackwellGRPOTrainer", "RaoBlackwellRLOOTrainer"]

if not trl.__version__.startswith("1.16."):
    logging.getLogger(__name__).warning(
        "TRL %s is installed, and these trainers were written for and tested with 1.16: compare "
        "the KL of the first step (it must be 0), or pip install 'trl==1.16.*'",
        trl.__version__,
    )
