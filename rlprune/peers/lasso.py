"""Group lasso over the filters of a network, as a proximal step on its weights (Lym et al. 2019, arXiv 1901.09290)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlprune.groups import FilterGroup
from rlprune.masking import carriers


class Lasso:
    """The norms of a network's filters, all groups' in one row, and the step that shrinks them.

    A part is one axis of one layer's weight: what makes filters, or what reads them. In each a filter has a norm of its
    own. One norm of all of them would not do: what makes a filter is held up by the batch norm behind it, which makes
    its scale worth nothing, and beside that a reader near 0 would hardly be pulled at.

    Args:
        network: its weights are changed in place by `shrink`.
        groups: its filter groups.
        least: how many filters of each are spared.
    """

    def __init__(self, network: nn.Module, groups: Sequence[FilterGroup], least: Sequence[int]) -> None:
        self.sizes, self.least = [group.size for group in groups], least
        self.device = next(network.parameters()).device
        parts: dict[tuple[int, int], tuple[Tensor, int, bool, Tensor]] = {}
        modules, first = dict(network.named_modules()), 0
        for group in groups:
            for part in group.slices:
                module = modules[part.module]
                # of a grouped convolution that has come down to one group its output is all that there is
                for name, dim in (carriers(module, part.axis) or carriers(module, "out"))[0].items():
                    tensor = getattr(module, name)
                    if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                        # places that are in no group belong to one filter more, whose norm nobody asks for
                        nobody = torch.full((tensor.shape[dim],), sum(self.sizes))
                        owner = parts.setdefault((id(tensor), dim), (tensor, dim, part.axis == "in", nobody))[-1]
                        inside = part.index < len(owner)  # an axis of a grouped convolution repeats its weight's
                        owner[part.index[inside]] = first + part.source[inside]
            first += group.size
        self.parts = [(tensor, dim, reads, owner.to(self.device)) for tensor, dim, reads, owner in parts.values()]

    def split(self, values: Tensor) -> list[Tensor]:
        """Per group, on the CPU."""
        return list(values.cpu().split(self.sizes))

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Of every filter in every part, (parts, filters); 0 where it is not in a part."""
        total = torch.zeros(len(self.parts), sum(self.sizes) + 1, device=self.device)
        for of_part, (tensor, dim, _, owner) in zip(total, self.parts, strict=True):
            others = [d for d in range(tensor.ndim) if d != dim]
            of_part.index_add_(0, owner, torch.linalg.vector_norm(tensor.float(), dim=others).square())
        return total[:, :-1].sqrt()

    def strength(self) -> Tensor:
        """The norm of all weights that make or read a filter, (filters,)."""
        return torch.linalg.vector_norm(self.norms(), dim=0)

    @torch.no_grad()
    def reading(self) -> list[Tensor]:
        """The largest absolute weight that reads each filter, per group."""
        largest = torch.zeros(sum(self.sizes) + 1, device=self.device)
        for tensor, dim, reads, owner in self.parts:
            if reads:
                found = tensor.float().abs().amax([d for d in range(tensor.ndim) if d != dim])
                largest.scatter_reduce_(0, owner, found, "amax")
        return self.split(largest[:-1])

    @torch.no_grad()
    def shrink(self, step: float) -> None:
        """Take ``step`` off every norm, down to 0, but those of each group's strongest filters."""
        norms = self.norms()
        factors = (1 - step / norms.clamp_min(1e-12)).clamp_min(0)
        strength = torch.linalg.vector_norm(norms, dim=0)
        for of_group, factor, least in zip(
            strength.split(self.sizes), factors.split(self.sizes, 1), self.least, strict=True
        ):
            factor[:, of_group.topk(least).indices] = 1
        factors = torch.cat([factors, factors.new_ones(len(factors), 1)], 1)
        for of_part, (tensor, dim, _, owner) in zip(factors, self.parts, strict=True):
            tensor.mul_(of_part[owner].view([-1 if d == dim else 1 for d in range(tensor.ndim)]))
