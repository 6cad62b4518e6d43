"""Methods to compare with, all with the signature of `rlprune.prune`."""

from rlprune.peers.blind import evolution, random
from rlprune.peers.paper import paper_coarse, paper_fine
from rlprune.peers.ranked import batchnorm, magnitude, taylor
from rlprune.peers.uniform import uniform

__all__ = ["batchnorm", "evolution", "magnitude", "paper_coarse", "paper_fine", "random", "taylor", "uniform"]
