"""What was published of K-FAC on the residual networks of ImageNet, and the shapes of their layers.

Memory and time: KAISA (Pauloski et al., SC'21, arXiv 2107.01739), Figure 6 and Table 5, 64 V100 in nodes of 4, K-FAC on
all convolutions and the last layer, factors every 50 steps and decompositions every 500 (Table 2). The figure's values
were read off its pixels, with an error of about 1 %.

Shapes: He et al. 2016 (arXiv 1512.03385), Table 1, with torchvision's choice of where strides and biases are.
"""

from __future__ import annotations

from kaisa.kfac.placement import FactorShape, LayerShape
from kaisa.kfac.workload import LayerWork, Workload

WORLD_SIZE, BATCH = 64, 32
LOCAL_BATCH = {"resnet18": 32, "resnet50": 32, "resnet101": 32, "resnet152": 24}
FACTOR_STEPS, INVERSE_STEPS = 50, 500
WORKERS = (1, 2, 4, 8, 16, 32, 64)

OVERHEAD_MB = {  # 10⁶ bytes a rank, the mean over ranks, by WORKERS
    "resnet18": (383, 390, 401, 428, 477, 587, 807),
    "resnet101": (1148, 1170, 1193, 1295, 1454, 1784, 2442),
}

SECONDS = {  # of an iteration, by WORKERS
    "resnet18": (0.1155, 0.1117, 0.1144, 0.1117, 0.1095, 0.1073, 0.1024),
    "resnet50": (0.2350, 0.2167, 0.2206, 0.2106, 0.2078, 0.2022, 0.1756),
    "resnet101": (0.399, 0.394, 0.390, 0.377, 0.375, 0.370, 0.355),
    "resnet152": (0.650, 0.617, 0.620, 0.599, 0.608, 0.58, 0.583),
}

STAGES = {
    "resnet18": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
WIDTHS = (64, 128, 256, 512)


def resnet(name: str, batch: int = BATCH) -> Workload:
    """Returns the convolutions and the last layer, for images of 224 × 224."""
    layers = [_convolution("conv1", 3, 64, 7, 112, batch, stride=2)]
    inputs = 64
    for stage, (blocks, width) in enumerate(zip(STAGES[name], WIDTHS, strict=True)):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            prefix, size = f"layer{stage + 1}.{block}", 56 // 2**stage
            layers += (
                _basic(prefix, inputs, width, size, batch, stride)
                if name == "resnet18"
                else _bottleneck(prefix, inputs, width, size, batch, stride)
            )
            inputs = width if name == "resnet18" else 4 * width
    shape = LayerShape("fc", FactorShape(inputs + 1), FactorShape(1000), (1, 1000, inputs + 1))
    layers.append(LayerWork(shape, batch))
    operations = sum(2.0 * layer.rows * layer.shape.gradient_elements for layer in layers)
    return Workload(name, tuple(layers), operations, sum(layer.shape.gradient_elements for layer in layers), batch)


def _basic(prefix: str, inputs: int, width: int, size: int, batch: int, stride: int) -> list[LayerWork]:
    layers = [
        _convolution(f"{prefix}.conv1", inputs, width, 3, size, batch, stride),
        _convolution(f"{prefix}.conv2", width, width, 3, size, batch),
    ]
    return layers + _shortcut(prefix, inputs, width, size, batch, stride)


def _bottleneck(prefix: str, inputs: int, width: int, size: int, batch: int, stride: int) -> list[LayerWork]:
    layers = [
        _convolution(f"{prefix}.conv1", inputs, width, 1, size * stride, batch),
        _convolution(f"{prefix}.conv2", width, width, 3, size, batch, stride),
        _convolution(f"{prefix}.conv3", width, 4 * width, 1, size, batch),
    ]
    return layers + _shortcut(prefix, inputs, 4 * width, size, batch, stride)


def _shortcut(prefix: str, inputs: int, outputs: int, size: int, batch: int, stride: int) -> list[LayerWork]:
    if inputs == outputs and stride == 1:
        return []
    return [_convolution(f"{prefix}.downsample.0", inputs, outputs, 1, size, batch, stride)]


def _convolution(
    name: str, inputs: int, outputs: int, kernel: int, size: int, batch: int, stride: int = 1
) -> LayerWork:
    columns = inputs * kernel**2
    shape = LayerShape(name, FactorShape(columns), FactorShape(outputs), (1, outputs, columns))
    taps = (kernel, kernel) if stride == 1 else ()
    return LayerWork(shape, batch * size**2, "convolution", taps)
