"""Methods to compare with, all with the signature of `rlprune.prune`."""

from rlprune.peers.uniform import uniform

__all__ = ["uniform"]
