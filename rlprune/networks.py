"""VGG and ResNet of the CIFAR kind (3×32×32 in, a 3×3 stem, one linear layer out), and torchvision's by name.

VGG: Simonyan & Zisserman 2015, with batch norm and a single 512→classes linear
layer (arXiv 2110.08558, section 4). ResNet-18/34/50: He et al. 2016 with the
ImageNet widths; ResNet-20/56: the same paper's section 4.2 (16, 32, 64
filters), with 1×1 convolutions where a shortcut changes shape.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rlprune._torchvision import torchvision
from rlprune.errors import InputError, one_of

VGG_LAYERS: dict[str, list[int | str]] = {
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg16": [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"],
    "vgg19": [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"],
}


class VGG(nn.Module):
    """VGG with batch norm: (N, 3, 32, 32) → (N, classes)."""

    def __init__(self, layers: list[int | str], classes: int = 10) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = 3
        for width in layers:
            if width == "M":
                modules.append(nn.MaxPool2d(2))
            else:
                # batch norm adds the bias, so the convolution has none
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                if modules:  # a plain network learns faster if at first it passes its inputs on (Jordan 2024)
                    nn.init.dirac_(conv.weight.data[:channels])
                modules += [conv, nn.BatchNorm2d(width)]
                modules.append(nn.ReLU(inplace=True))
                channels = width
        self.features = nn.Sequential(*modules)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """A residual block: two 3×3 convolutions, or 1×1, 3×3, 1×1 with ``bottleneck``."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        self.convs = nn.ModuleList(_conv_norm(*shape) for shape in shapes)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs[:-1]:
            y = torch.relu(conv(y))
        return torch.relu(self.convs[-1](y) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet for small images: (N, 3, 32, 32) → (N, classes)."""

    def __init__(self, blocks: list[int], widths: list[int], bottleneck: bool = False, classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv_norm(3, widths[0], 3)
        channels = widths[0]
        stages = []
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage_blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                stage_blocks.append(Block(channels, width, stride, bottleneck))
                channels = 4 * width if bottleneck else width
            stages.append(nn.Sequential(*stage_blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.stem(x)))
        return self.classifier(self.pool(x).flatten(1))


_WIDE, _NARROW = [64, 128, 256, 512], [16, 32, 64]
RESNET_LAYERS: dict[str, tuple[list[int], list[int], bool]] = {
    "resnet18": ([2, 2, 2, 2], _WIDE, False),
    "resnet20": ([3, 3, 3], _NARROW, False),
    "resnet34": ([3, 4, 6, 3], _WIDE, False),
    "resnet50": ([3, 4, 6, 3], _WIDE, True),
    "resnet56": ([9, 9, 9], _NARROW, False),
}

NAMES = [*VGG_LAYERS, *RESNET_LAYERS]
TORCHVISION = "torchvision."  # before the name of one of torchvision's classification networks


def build(name: str, classes: int = 10, seed: int = 0) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: one of `NAMES`, or "torchvision." and the name of one of its networks, such as "torchvision.resnet50".
        classes: size of the output.
        seed: of the initial weights; torch's global generator is left as it was.

    Raises:
        InputError: the name is unknown.
    """
    check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of all GPUs, too
        if name.startswith(TORCHVISION):
            models = torchvision().models
            network = models.get_model(name.removeprefix(TORCHVISION), weights=None, num_classes=classes)
        elif name in VGG_LAYERS:
            network = VGG(VGG_LAYERS[name], classes)
        else:
            blocks, widths, bottleneck = RESNET_LAYERS[name]
            network = ResNet(blocks, widths, bottleneck, classes)
    network.architecture = {"name": name, "classes": classes}  # a saved result names it
    return network


# what a layer states of its own size, beside the shapes of its tensors
SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")
PAIRS = ("kernel_size", "padding")  # that a method may change, too


def architecture_of(network: nn.Module) -> dict[str, Any]:
    """What `build` makes such a network from, by argument, whatever its layers' sizes; empty for one of the caller's
    own, and for one that was changed since, as by another activation or stride.
    """  # noqa: D205
    found = getattr(network, "architecture", None)
    if not isinstance(found, dict) or set(found) != {"name", "classes"}:
        return {}
    with warnings.catch_warnings(action="ignore"):
        try:
            with torch.device("meta"):  # without memory
                made = build(**found)
        except InputError:  # someone else's attribute of that name
            return {}
        except Exception:  # of an initialisation that looks at values
            made = build(**found)
    return dict(found) if _settings(network) == _settings(made) else {}


def _settings(network: nn.Module) -> dict[str, Any]:
    """Kind of every module, and what it states of itself in plain values but for `SIZES` and `PAIRS`."""
    plain = (bool, int, float, str, tuple)
    return {
        name: (
            type(module),
            {
                key: value
                for key, value in vars(module).items()
                if not key.startswith("_") and key not in (*SIZES, *PAIRS, "training") and isinstance(value, plain)
            },
        )
        for name, module in network.named_modules()
    }


def check_name(name: str) -> None:
    """Raise `InputError` unless `build` knows the name."""
    if str(name).startswith(TORCHVISION):
        models = torchvision().models
        one_of("network of torchvision", name.removeprefix(TORCHVISION), models.list_models(module=models))
    else:
        one_of("network", name, [*NAMES, f"{TORCHVISION}<one of its classification networks>"])
