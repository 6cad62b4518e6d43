"""Import torchvision whatever build of torch is installed.

The wheels of torchvision on PyPI are built for CUDA. Beside a CPU build of
torch their compiled operators do not load, and the import then stops at the
first one that is described but absent (`torchvision::nms does not exist`).
rlprune uses datasets and networks only, which need no compiled operator, so it
declares the missing ones by name; calling them still fails, as it should.
"""

from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # a Library takes its operators along when collected


def torchvision() -> ModuleType:
    """The torchvision module, imported on first use."""
    try:
        import torchvision as module
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision as module
    return module
