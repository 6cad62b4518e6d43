"""Methods to compare with.

All take a network, an example input, budgets, data, seed, evaluate, criterion, minimum, multiple, exclude, evaluation
and progress as `rlprune.prune` does, `random` and `evolution` also its episodes; each says what else it takes.
"""

from rlprune.peers.blind import evolution, random
from rlprune.peers.genetic import genetic
from rlprune.peers.hfp import hfp
from rlprune.peers.paper import paper_coarse, paper_fine
from rlprune.peers.prunenet import prunenet
from rlprune.peers.prunetrain import prunetrain
from rlprune.peers.ranked import batchnorm, magnitude, taylor
from rlprune.peers.smof import smof, smof_filters
from rlprune.peers.uniform import uniform

__all__ = ["batchnorm", "evolution", "genetic", "hfp", "magnitude", "paper_coarse", "paper_fine", "prunenet"]
__all__ += ["prunetrain", "random", "smof", "smof_filters", "taylor", "uniform"]
