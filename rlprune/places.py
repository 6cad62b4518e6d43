"""Places along the axes of a network's nodes, linked where they belong to the same filter; see `rlprune.coupling`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch_pruning.dependency.node import Node

OUTPUT = "it makes the output"
Key = tuple[Node, str]  # a layer's "in" or "out", or the one axis of anything else


class Places:
    """Places, links between those of the same filter, and reasons for which some stay."""

    def __init__(self) -> None:
        self.seen: dict[Key, np.ndarray] = {}
        self.reasons: dict[int, str] = {}
        self._numbers: dict[Key, int] = {}
        self._links: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64),) * 2]
        self._stays: list[tuple[np.ndarray, str]] = []

    def ids(self, key: Key, places: np.ndarray) -> np.ndarray:
        """A number for each place, unlike those of any other axis."""
        return (self._numbers.setdefault(key, len(self._numbers)) << 32) + places

    def visit(self, key: Key, places: np.ndarray) -> np.ndarray:
        """Those places where no walk has been yet; now one has."""
        before = self.seen.get(key)
        new = np.unique(places) if before is None else np.setdiff1d(places, before)
        self.seen[key] = new if before is None else np.union1d(before, new)
        return new

    def link(self, ids: np.ndarray, others: np.ndarray) -> None:
        """The places belong together pair by pair."""
        self._links.append(tuple(part.ravel() for part in np.broadcast_arrays(ids, others)))

    def stay(self, ids: np.ndarray, reason: str, first: bool = False) -> None:
        """The filters of these places stay; what was said first counts, but `OUTPUT` comes before everything."""
        self._stays.insert(0 if first else len(self._stays), (ids, reason))

    def join(self, more: Iterable[tuple[np.ndarray, np.ndarray]] = ()) -> None:
        """Find the filters from all links, and ``more`` that may be taken back."""
        kept = len(self._links)
        for pair in more:
            self.link(*pair)
        ones, others = (np.concatenate(side) for side in zip(*self._links, strict=True))
        seen = [self.ids(key, places) for key, places in self.seen.items()]
        self._known = np.unique(np.concatenate([ones, others, *seen, *(ids for ids, _ in self._stays)]))
        ends = np.searchsorted(self._known, ones), np.searchsorted(self._known, others)
        shape = (len(self._known), len(self._known))
        self._labels = connected_components(coo_matrix((np.ones(len(ones), np.int8), ends), shape), directed=False)[1]
        self.reasons = {}
        for ids, reason in sorted(self._stays, key=lambda stay: stay[1] is not OUTPUT):
            for one in np.unique(self.filters(ids)).tolist():
                self.reasons.setdefault(one, reason)
        del self._links[kept:]

    def filters(self, ids: np.ndarray) -> np.ndarray:
        """The filter of each place, of the same shape."""
        return self._labels[np.searchsorted(self._known, ids)].astype(np.int64)

    def stays(self, ids: np.ndarray) -> bool:
        """Whether one of these places belongs to a filter that stays."""
        return not self.reasons.keys().isdisjoint(self.filters(ids).ravel().tolist())
