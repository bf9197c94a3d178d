"""Roles: for each a protocol, a decorator that marks a part, and a battery of checks every part must pass."""

from lossary.roles._battery import Result
from lossary.roles._mark import Mark, mark_of
from lossary.roles.assigner import assigner
from lossary.roles.estimator import estimator
from lossary.roles.guidance import guidance
from lossary.roles.layer import layer
from lossary.roles.loss import loss
from lossary.roles.measure import measure
from lossary.roles.optimizer import optimizer
from lossary.roles.penalty import penalty
from lossary.roles.perturbation import perturbation
from lossary.roles.procedure import Procedure, advance, procedure
from lossary.roles.registry import ROLES, check
from lossary.roles.score import score
from lossary.roles.selector import selector
from lossary.roles.suppressor import suppressor
from lossary.roles.weighting import weighting

__all__ = [
    "ROLES",
    "Mark",
    "Procedure",
    "Result",
    "advance",
    "assigner",
    "check",
    "estimator",
    "guidance",
    "layer",
    "loss",
    "mark_of",
    "measure",
    "optimizer",
    "penalty",
    "perturbation",
    "procedure",
    "score",
    "selector",
    "suppressor",
    "weighting",
]
