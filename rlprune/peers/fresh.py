"""Weights made anew, for methods that train a network from scratch."""

import torch
from torch import nn

from rlprune.errors import InputError
from rlprune.forward import seeded
from rlprune.masking import rebuild
from rlprune.networks import architecture_of, build


def fresh(network: nn.Module, seed: int, reset: bool = False) -> nn.Module:
    """The same architecture with new weights, all of which are trained.

    They are those of `rlprune.networks.build` where it knows the architecture and ``reset`` is not set, else those of
    every module's ``reset_parameters``.

    Raises:
        InputError: a module cannot make its weights anew.
    """
    architecture = None if reset else architecture_of(network)
    made = build(**architecture, seed=seed) if architecture else network
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (network, made)]
    if architecture and shapes[0] == shapes[1]:  # a slim network names the architecture that it comes from
        return made.requires_grad_()
    made = rebuild(network, {}).cpu()  # where the same numbers are drawn for every device
    with seeded(seed, torch.device("cpu")):
        for name, module in made.named_modules():
            anew = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if anew is not None:
                anew()
            elif next(module.parameters(recurse=False), None) is not None:
                raise InputError(f"The weights of module {name!r} cannot be made anew: give it reset_parameters().")
    return made.requires_grad_()
