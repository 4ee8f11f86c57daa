"""What the tests of TRL's trainers share."""

import pytest
from trl import GRPOConfig, RLOOConfig

from rlkl.trainers.trl import RaoBlackwellGRPOTrainer, RaoBlackwellRLOOTrainer

CONFIGS = {RaoBlackwellRLOOTrainer: RLOOConfig, RaoBlackwellGRPOTrainer: GRPOConfig}
both_trainers = pytest.mark.parametrize("trainer_class", list(CONFIGS))
