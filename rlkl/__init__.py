"""KL-regularised fine-tuning of language models, with the KL exact and its gradient the true one.

The packages, lowest first: `rlkl.kl` (estimators, surrogates, divergences: torch only), `rlkl.rl`,
`rlkl.models`, `rlkl.data`, `rlkl.rollout`, `rlkl.trainers`, `rlkl.evaluation`, `rlkl.sweep`,
`rlkl.cli`. Each imports only those before it; importing `rlkl` itself imports none of them.
"""

__version__ = "0.1.0"
