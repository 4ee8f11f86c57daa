"""Sweeps over the strength of the KL and what they show: reward-vs-KL frontiers.

A spec (YAML) names a recipe, or algorithms of rlkl's, and what varies; its cells are run by workers
over a database, each to one record; the frontier is a function of the records, and the report shows
it.
"""

from rlkl.sweep.frontier import hypervolume, pareto_front

__all__ = ["hypervolume", "pareto_front"]
