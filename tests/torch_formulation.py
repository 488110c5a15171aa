"""SDPoint nets as plain PyTorch calls on a state dict, written from the method alone: nothing of ours is used.

The net is read off the names and shapes of its tensors, so that only a net's tensors have to be right.
"""

import math
import re
import zlib

import numpy as np

RELEASE = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "preresnet18": (2, 2, 2, 2),
    "preresnet34": (3, 4, 6, 3),
    "preresnet50": (3, 4, 6, 3),
    "preresnet101": (3, 4, 23, 3),
    "preresnet152": (3, 8, 36, 3),
    "preresnet200": (3, 24, 36, 3),
    "resnext50": (3, 4, 6, 3),
    "resnext101": (3, 4, 23, 3),
    "resnext152": (3, 8, 36, 3),
}

# Not in the release: its names on nets for small images.
SMALL = {
    "resnet20": {"bottleneck": False, "preactivation": False, "shortcut": "padded_identity"},
    "resnet20_projection_norm": {"bottleneck": False, "preactivation": False},
    "preresnet20": {"bottleneck": False, "preactivation": True, "shortcut": "projection"},
    "preresnet20_projection_norm": {"bottleneck": False, "preactivation": True},
}


def net_shapes(name, num_classes):
    """Names and shapes of the tensors of a net of `RELEASE` or `SMALL`, in order."""
    if name in SMALL:
        return tensor_shapes((3, 3, 3), num_classes, stem=16, inner=16, out=16, stem_kernel=3, **SMALL[name])
    family, depth = re.fullmatch("([a-z]+)([0-9]+)", name).groups()
    return tensor_shapes(
        RELEASE[name],
        num_classes,
        bottleneck=int(depth) >= 50,
        preactivation=family == "preresnet",
        groups=32 if family == "resnext" else 1,
        inner=128 if family == "resnext" else 64,
    )


def tensor_shapes(
    depths,
    num_classes,
    *,
    bottleneck,
    preactivation,
    groups=1,
    inner=64,
    stem=64,
    out=64,
    stem_kernel=7,
    channels=3,
    shortcut="projection_norm",
):
    """Names and shapes of the tensors of a net, in PyTorch's order; `out` is the width of a basic block."""
    shapes = {"conv1.weight": (stem, channels, stem_kernel, stem_kernel)}
    if stem_kernel == 7 or not preactivation:
        shapes |= _norm_shapes("bn1", stem)
    before = stem
    for stage, depth in enumerate(depths):
        width, features = inner * 2**stage, (256 if bottleneck else out) * 2**stage
        for index in range(depth):
            block = f"layer{stage + 1}.{index}"
            convolutions = (
                [(width, before, 1), (width, width // groups, 3), (features, width, 1)]
                if bottleneck
                else [(features, before, 3), (features, features, 3)]
            )
            for number, (outputs, inputs, kernel) in enumerate(convolutions, 1):
                convolution = {f"{block}.conv{number}.weight": (outputs, inputs, kernel, kernel)}
                norm = _norm_shapes(f"{block}.bn{number}", inputs if preactivation else outputs)
                if preactivation and bottleneck and number == 3:
                    norm = _norm_shapes(f"{block}.bn3", width)
                shapes |= norm | convolution if preactivation else convolution | norm
            if index == 0 and (stage or before != features) and shortcut != "padded_identity":
                shapes[f"{block}.downsample.0.weight"] = (features, before, 1, 1)
                shapes |= _norm_shapes(f"{block}.downsample.1", features) if shortcut == "projection_norm" else {}
            before = features
    if preactivation:
        shapes |= _norm_shapes("bn2", before)
    return shapes | {"fc.weight": (num_classes, before), "fc.bias": (num_classes,)}


def _norm_shapes(name, width):
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (width,) for leaf in leaves} | {f"{name}.num_batches_tracked": ()}


def named_tensor(name, shape):
    """The tensor that goes with a name: the same on every machine and NumPy."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    normal = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return (0.5 + rng.random_sample(shape)).astype(np.float32)
    if name.endswith(("running_mean", "bias")):
        return 0.1 * normal
    if len(shape) == 1:  # Scale of a BatchNorm.
        return (0.25 + 0.5 * rng.random_sample(shape)).astype(np.float32)
    if len(shape) == 2:  # The classifier, [out, in].
        return 0.05 * normal
    return normal * math.sqrt(2.0 / (shape[1] * shape[2] * shape[3]))  # OIHW.


def named_state_dict(shapes):
    """The tensors that go with the names of `shapes`."""
    return {name: named_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def named_images(batch, channels, height, width):
    """Images [B, C, H, W] from a seed."""
    return np.random.RandomState(0).standard_normal((batch, channels, height, width)).astype(np.float32)


def torch_logits(tensors, images, point=0, ratio=1.0, *, train=False):
    """Logits [B, K] of the net whose state dict is `tensors`, for images [B, C, H, W]; all PyTorch tensors."""
    from torch.nn import functional as F

    def convolve(x, name, stride=1):
        weight = tensors[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)

    def normalize(x, name):
        leaves = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (tensors[f"{name}.{leaf}"] for leaf in leaves)
        if train:
            mean = var = None
        return F.batch_norm(x, mean, var, scale, shift, training=train, eps=1e-5)

    def size(x):
        return [max(1, round(side * ratio)) for side in x.shape[2:]]

    preactivation = "bn2.weight" in tensors
    imagenet = tensors["conv1.weight"].shape[-1] == 7
    x = convolve(images, "conv1", 2 if imagenet else 1)
    if imagenet or not preactivation:
        x = F.relu(normalize(x, "bn1"))
    if imagenet:
        pooled = F.max_pool2d(x, 3, stride=2, padding=1)
        x = F.adaptive_max_pool2d(x, size(pooled)) if point == -1 else pooled
    for k, block in enumerate(block_names(tensors), 1):
        x = _block(tensors, block, x, preactivation, convolve, normalize, F.relu)
        if k == point:
            x = F.adaptive_avg_pool2d(x, size(x))
        if not preactivation:
            x = F.relu(x)
    if preactivation:
        x = F.relu(normalize(x, "bn2"))
    return F.linear(x.mean((2, 3)), tensors["fc.weight"], tensors["fc.bias"])


def block_names(tensors):
    """The residual blocks of a net, as `layer1.0`, from the input to the output."""
    return list(dict.fromkeys(match[0] for name in tensors if (match := re.match(r"layer\d+\.\d+", name))))


def _block(tensors, block, x, preactivation, convolve, normalize, relu):
    bottleneck = f"{block}.conv3.weight" in tensors
    stride = 2 if re.fullmatch(r"layer[2-9]\.0", block) else 1
    strided = 2 if bottleneck else 1  # The convolution that has the stride.
    y, shortcut = x, x
    for number in range(1, 4 if bottleneck else 3):
        if preactivation:
            y = relu(normalize(y, f"{block}.bn{number}"))
            shortcut = y if number == 1 and f"{block}.downsample.0.weight" in tensors else shortcut
        y = convolve(y, f"{block}.conv{number}", stride if number == strided else 1)
        if not preactivation:
            y = normalize(y, f"{block}.bn{number}")
            y = relu(y) if f"{block}.conv{number + 1}.weight" in tensors else y
    if f"{block}.downsample.0.weight" in tensors:
        shortcut = convolve(shortcut, f"{block}.downsample.0", stride)
        if f"{block}.downsample.1.weight" in tensors:
            shortcut = normalize(shortcut, f"{block}.downsample.1")
    elif shortcut.shape != y.shape:
        shortcut = _padded_identity(shortcut, stride, y.shape[1])
    return shortcut + y


def _padded_identity(x, stride, features):
    """He et al. 2016, option A, as PyTorch's users write it for CIFAR: as many channels of zeros before as after."""
    from torch.nn import functional as F

    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, (features - x.shape[1]) // 2, (features - x.shape[1]) // 2))
