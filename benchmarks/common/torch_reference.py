"""The peer: ResNet and PreResNet with SDPoint in plain PyTorch, as its users would write and run them.

    python benchmarks/torch_reference.py --nets=preresnet50:224:16

Two ways to run it. `eager` is the authors': float32, NCHW, eager, `adaptive_avg_pool2d` where the instance says so.
`tuned` is as well as PyTorch can: channels_last, autocast to bfloat16, `torch.compile` for each instance, SGD in one
kernel. Its command times it alone; the other benchmarks time it beside ours, in a process of its own.
"""

import functools
import sys

import torch
from common import report
from common.workload import MEAN, STD, Setting, Workload, random_batch, sample_instances
from torch import nn
from torch.nn import functional as F

from sdpoint_jax.instance import STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture, BlockSpec, ConvolutionSpec, ShortcutSpec
from sdpoint_jax.models.resnet import architecture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _convolution(features_in: int, spec: ConvolutionSpec) -> nn.Conv2d:
    convolution = nn.Conv2d(
        features_in, spec.features, spec.kernel, spec.stride, spec.kernel // 2, groups=spec.groups, bias=False
    )
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return convolution


class PaddedIdentity(nn.Module):
    """Every `stride`-th pixel, with channels of zeros on both sides."""

    def __init__(self, stride: int, missing: int):
        super().__init__()
        self.stride, self.channels = stride, (missing // 2, missing - missing // 2)

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.channels))


def _shortcut(features_in: int, spec: ShortcutSpec) -> nn.Module:
    convolution = spec.convolution
    if spec.kind == "padded_identity":
        return PaddedIdentity(convolution.stride, convolution.features - features_in)
    projection = _convolution(features_in, convolution)
    return projection if spec.kind == "projection" else nn.Sequential(projection, nn.BatchNorm2d(convolution.features))


def _pool_to(x, height, width, ratio, pool):
    return pool(x, (max(1, round(height * ratio)), max(1, round(width * ratio))))


class Block(nn.Module):
    """A residual block up to and including the addition."""

    def __init__(self, spec: BlockSpec, features_in: int, preactivation: bool):
        super().__init__()
        features = [features_in, *(convolution.features for convolution in spec.convolutions)]
        self.preactivation = preactivation
        self.convolutions = nn.ModuleList(map(_convolution, features, spec.convolutions))
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, features if preactivation else features[1:]))
        if preactivation:
            self.norms = self.norms[:-1]
        self.shortcut = None
        if spec.shortcut:
            self.shortcut = _shortcut(features_in, spec.shortcut)

    def forward(self, x):
        return self._before(x) if self.preactivation else self._after(x)

    def _after(self, x):
        y = x
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms), 1):
            y = norm(convolution(y))
            if index < len(self.convolutions):
                y = F.relu(y, inplace=True)
        return y + (self.shortcut(x) if self.shortcut else x)

    def _before(self, x):
        y = F.relu(self.norms[0](x), inplace=True)
        shortcut = self.shortcut(y) if self.shortcut else x
        for norm, convolution in zip(self.norms[1:], self.convolutions):
            y = F.relu(norm(convolution(y)), inplace=True)
        return self.convolutions[-1](y) + shortcut


class Net(nn.Module):
    """Images [B, 3, H, W] and an instance to logits [B, K]."""

    def __init__(self, net: Architecture, num_classes: int):
        super().__init__()
        self.net = net
        self.stem = _convolution(3, net.stem_convolution)
        self.norm = nn.BatchNorm2d(net.stem) if net.imagenet_stem or not net.preactivation else None
        specs = list(net.blocks())
        features = [net.stem, *(spec.convolutions[-1].features for spec in specs)]
        self.blocks = nn.ModuleList(Block(spec, width, net.preactivation) for spec, width in zip(specs, features))
        self.last_norm = nn.BatchNorm2d(features[-1]) if net.preactivation else None
        self.classifier = nn.Linear(features[-1], num_classes)

    def forward(self, images, instance: SDPointInstance):
        x = self._stem(images, instance)
        for k, block in enumerate(self.blocks, 1):
            x = block(x)
            if k == instance.point:
                x = _pool_to(x, *x.shape[2:], instance.ratio, F.adaptive_avg_pool2d)
            if not self.net.preactivation:
                x = F.relu(x, inplace=True)
        if self.last_norm:
            x = F.relu(self.last_norm(x), inplace=True)
        return self.classifier(x.mean((2, 3)))

    def _stem(self, images, instance):
        x = self.stem(images)
        if self.norm:
            x = F.relu(self.norm(x), inplace=True)
        if not self.net.imagenet_stem:
            return x
        if instance.point == STEM:
            height, width = (-(-side // 2) for side in x.shape[2:])
            return _pool_to(x, height, width, instance.ratio, F.adaptive_max_pool2d)
        return F.max_pool2d(x, 3, stride=2, padding=1)


class _Workload(Workload):
    """A net and a batch on the device, normalised already."""

    def __init__(self, setting: Setting, tuned: bool):
        self._tuned = tuned
        batch = random_batch(setting)
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        images = (torch.from_numpy(batch["images"]).permute(0, 3, 1, 2).contiguous() / 255 - mean) / std
        net = Net(architecture(setting.name), setting.num_classes)
        memory_format = torch.channels_last if tuned else torch.contiguous_format
        self._images = images.to(DEVICE, memory_format=memory_format)
        self._labels = torch.from_numpy(batch["labels"]).long().to(DEVICE)
        self._net = net.to(DEVICE, memory_format=memory_format)
        self._functions = {}

    def _function(self, instance):
        """Returns the net under `instance`."""
        if instance not in self._functions:
            function = functools.partial(self._net, instance=instance)
            self._functions[instance] = torch.compile(function, dynamic=False) if self._tuned else function
        return self._functions[instance]

    def _logits(self, instance):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self._tuned):
            return self._function(instance)(self._images)

    def wait(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()


class Training(_Workload):
    """Training steps."""

    def __init__(self, setting: Setting, tuned: bool = False):
        super().__init__(setting, tuned)
        self._net.train()
        fused = {"fused": True} if tuned else {}
        self._optimizer = torch.optim.SGD(self._net.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4, **fused)

    def step(self, instance: SDPointInstance) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self._logits(instance).float(), self._labels).backward()
        self._optimizer.step()


class Inference(_Workload):
    """Logits with running statistics."""

    def __init__(self, setting: Setting, tuned: bool = False):
        super().__init__(setting, tuned)
        self._net.eval()

    def step(self, instance: SDPointInstance) -> None:
        with torch.inference_mode():
            self._logits(instance)


def prepare(tuned: bool) -> None:
    """PyTorch's own choices of kernels, and room for a program per instance."""
    torch.backends.cudnn.benchmark = True
    if tuned:
        from torch import _dynamo

        _dynamo.config.recompile_limit = 1000


def memory_peak() -> int | None:
    """Bytes of the device's memory that were in use at most so far."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


PRESETS = {
    "small": {"nets": "resnet20:32:128", "tuned": False, "rounds": 3, "steps": 2},
    "cpu": {"nets": "preresnet50:224:16,resnet20:32:128", "tuned": False, "rounds": 5, "steps": 2},
    "gpu": {"nets": "preresnet101:224:256,resnet50:224:256", "tuned": True, "rounds": 5, "steps": 10},
}


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = report.parse(
        __doc__,
        PRESETS,
        tuned=(report.switch, "yes: as well as PyTorch can; no: as the authors run it"),
    )
    prepare(options.tuned)
    rows = {}
    for setting in Setting.parse_list(options.nets):
        workload = Training(setting, options.tuned)
        runs = {
            f"{setting} {instance.name}": functools.partial(
                workload.seconds_per_step, [instance] * options.steps, options.clock
            )
            for instance in sample_instances(setting.model())
        }
        for name, values in report.take_turns(runs, options.rounds).items():
            rows[name] = report.summary([setting.batch_size / value for value in values])
    report.write(options.json, options, images_per_second=rows, memory_peak=memory_peak())
    print(report.heading())
    print(f"{'PyTorch, training':40}{'images/s':>28}")
    for name, row in rows.items():
        print(f"{name:40}{report.show(row):>28}")


if __name__ == "__main__":
    sys.exit(main())
