"""Stage peers: the methods of other papers beside the agents, from the search to the test split."""

from pathlib import Path
from typing import Any

from rlprune import peers
from rlprune.stages import finetune, search

METHODS: dict[str, search.Method] = {name: getattr(peers, name) for name in peers.__all__}


def run(name: str, root: str | Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Prune with every method of an entry of ``comparisons``, then fine-tune what they left; see `search`, `finetune`.

    Returns:
        the metrics of the fine-tuning.
    """
    _, checkpoints = search.searched(name, root, progress, METHODS)
    metrics = finetune.run(name, root, progress)
    search.tidy(checkpoints)
    return metrics
