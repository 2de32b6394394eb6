"""Factors of convolutions against what an identity kernel reads at every output position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kaisa.kfac import convolution
from kaisa.kfac.convolution import (
    Geometry,
    input_factor,
    mean_patch,
    output_factor,
    output_positions,
    patches,
)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)

# PyTorch says so once a process when the reference pads on one side only.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def read_by_identity(module: nn.Module, x: Tensor) -> Tensor:
    """Return (batch, groups, positions, n): outputs of the convolution whose weights are units."""
    groups, per_group = module.groups, x.shape[1] // module.groups
    n = per_group * math.prod(module.kernel_size)
    units = torch.eye(n, dtype=x.dtype).view(n, per_group, *module.kernel_size)
    options: dict[str, Any] = {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": groups,
        "bias": False,
        "dtype": x.dtype,
    }
    if isinstance(module, tuple(TRANSPOSED.values())):
        options["output_padding"] = module.output_padding
        units = units.transpose(0, 1)
    else:
        options["padding_mode"] = module.padding_mode
    reader = type(module)(x.shape[1], groups * n, **options)
    with torch.no_grad():
        reader.weight.copy_(torch.cat([units] * groups))
        read = reader(x)
    return read.reshape(x.shape[0], groups, n, -1).mT


def expected_factor(read: Tensor, *, bias: bool) -> Tensor:
    a = torch.cat((read, torch.ones_like(read[..., :1])), -1) if bias else read
    factor = torch.einsum("bgpi,bgpj->gij", a, a)
    return factor if read.shape[1] > 1 else factor[0]


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """An input: contiguous, channels last, or a slice of something larger."""
    layout = draw(st.sampled_from(["contiguous", "channels last", "slice"]))
    if layout == "slice":
        return random(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "channels last" and len(shape) in CHANNELS_LAST:
        return random(*shape).contiguous(memory_format=CHANNELS_LAST[len(shape)])
    return random(*shape)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = each(1, 5 - dims // 2), each(1, draw(st.sampled_from([1, 1, 2])))
    stride = each(1, draw(st.sampled_from([1, 1, 2, 3])))
    padding: Any = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    if padding == "same":
        stride = (1,) * dims
    elif padding == "numbers":
        padding = each(0, 3)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    groups, width = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 2), (3, 1)]))
    module = CONVOLUTIONS[dims](
        groups * width,
        groups,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        padding_mode=mode,
        dtype=torch.float64,
    )
    pads = Geometry.of(module).padding
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    # A reflection must be shorter than the image, a wrap no longer than it.
    least = [
        max(1, far - sum(pad), 0 if mode == "zeros" else max(pad) + 1) for far, pad in zip(reach, pads, strict=True)
    ]
    sizes = (low + draw(st.integers(0, 6 - dims)) for low in least)
    return module, draw(layouts((draw(st.integers(1, 2)), groups * width, *sizes)))


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.sampled_from([1, 2, 2, 3]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 5 - dims // 2), each(1, 3), each(1, 2)
    padding, sizes = each(0, 2), each(1, 4)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    groups, width = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    outputs = zip(sizes, stride, padding, dilation, kernel, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e >= 0 for n, s, p, d, k, e in outputs))
    module = TRANSPOSED[dims](
        groups * width,
        groups,
        kernel,
        stride,
        padding,
        extra,
        groups,
        dilation=dilation,
        dtype=torch.float64,
    )
    return module, draw(layouts((draw(st.integers(1, 2)), groups * width, *sizes)))


@pytest.fixture(scope="module", params=["cheapest route", "never unfolded if avoidable"])
def _routes(request: pytest.FixtureRequest) -> Iterator[None]:
    """The second lets these small examples take the routes of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "cheapest route":
            patch.setattr(convolution, "_unfolding_work", lambda *_: float("inf"))
        convolution._plan.cache_clear()
        yield
    convolution._plan.cache_clear()


@pytest.mark.usefixtures("_routes")
class TestAnyConvolution:
    @PROPERTY
    @given(st.one_of(convolutions(), convolutions(), transposed_convolutions()), st.booleans())
    def test_sums_the_outer_products_of_what_every_position_reads(
        self, case: tuple[nn.Module, Tensor], bias: bool
    ) -> None:
        module, x = case
        expected = expected_factor(read_by_identity(module, x), bias=bias)
        assert_close(input_factor(x, Geometry.of(module), bias=bias), expected, 1e-12)

    @PROPERTY
    @given(st.one_of(convolutions(), transposed_convolutions()))
    def test_unfolds_and_averages_what_every_position_reads(self, case: tuple[nn.Module, Tensor]) -> None:
        module, x = case
        geometry, read = Geometry.of(module), read_by_identity(module, x)
        assert output_positions(x.shape, geometry) == read.shape[2]
        torch.testing.assert_close(patches(x, geometry), read, rtol=0, atol=0)
        mean = read.mean(2).transpose(0, 1)
        mean = mean if module.groups > 1 else mean[0]
        torch.testing.assert_close(mean_patch(x, geometry), mean, rtol=1e-12, atol=1e-12)


AWKWARD = [
    pytest.param(nn.Conv1d(1, 1, 3, padding=3, dilation=4), (1, 1, 4), id="window within a run"),
    pytest.param(nn.Conv2d(2, 2, 3, padding=1), (1, 2, 1, 1), id="kernel larger than image"),
    pytest.param(nn.Conv2d(2, 2, 4), (3, 2, 4, 4), id="one position"),
    pytest.param(nn.Conv2d(2, 2, (2, 4), padding="same"), (2, 2, 7, 6), id="padding on one side"),
    pytest.param(nn.Conv2d(4, 4, 2, stride=3, padding=1), (2, 4, 8, 8), id="stride over kernel"),
    pytest.param(nn.Conv2d(2, 2, 5, stride=(2, 1)), (2, 2, 9, 9), id="stride in one dimension"),
    pytest.param(nn.Conv2d(2, 2, 1, padding=2), (2, 2, 3, 3), id="padding beyond the taps"),
    pytest.param(
        nn.ConvTranspose1d(1, 1, 1, stride=5, padding=2, output_padding=4),
        (2, 1, 1),
        id="nothing read",
    ),
]


@pytest.mark.usefixtures("_routes")
@pytest.mark.parametrize(("module", "shape"), AWKWARD)
def test_an_awkward_geometry_is_no_exception(module: nn.Module, shape: tuple[int, ...]) -> None:
    module, x = module.double(), random(*shape)
    read, geometry = read_by_identity(module, x), Geometry.of(module)
    expected = expected_factor(read, bias=True)
    assert_close(input_factor(x, geometry, bias=True), expected, 1e-12)
    torch.testing.assert_close(patches(x, geometry), read, rtol=0, atol=0)


@PROPERTY
@given(st.data())
def test_the_output_factor_sums_outer_products_over_positions_within_groups(
    data: st.DataObject,
) -> None:
    groups, width = data.draw(st.sampled_from([(1, 1), (1, 5), (2, 3), (4, 1)]))
    spatial = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    batch = data.draw(st.integers(1, 9))
    grad = data.draw(layouts((batch, groups * width, *spatial)))
    split = grad.reshape(batch, groups, width, -1)
    expected = torch.einsum("bgip,bgjp->gij", split, split)
    expected = expected if groups > 1 else expected[0]
    assert_close(output_factor(grad, groups), expected, 1e-12)


LAYERS = [
    pytest.param(nn.Conv2d(3, 16, 3, padding=1), 32, id="first"),
    pytest.param(nn.Conv2d(16, 16, 3, padding=1), 32, id="wide image"),
    pytest.param(nn.Conv2d(16, 32, 3, stride=2, padding=1), 32, id="stride"),
    pytest.param(nn.Conv2d(64, 64, 3, padding=1), 8, id="many channels"),
    pytest.param(nn.Conv2d(3, 8, 7, stride=2, padding=3), 48, id="stem of a ResNet-50"),
    pytest.param(nn.Conv2d(32, 32, 3, padding=1, groups=32), 32, id="depthwise"),
    pytest.param(nn.Conv2d(32, 32, 5, padding=4, dilation=2), 16, id="dilation"),
    pytest.param(nn.Conv2d(32, 32, 1), 16, id="one tap"),
    pytest.param(nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1), 16, id="transposed"),
]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("module", "size"), LAYERS)
def test_single_precision_of_real_layers(module: nn.Module, size: int, memory: torch.memory_format) -> None:
    shape = (16, module.in_channels, size, size)
    x = random(*shape, dtype=torch.float32).contiguous(memory_format=memory)
    expected = expected_factor(read_by_identity(module.double(), x.double()), bias=True)
    found = input_factor(x, Geometry.of(module), bias=True)
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, 1e-5)


def test_large_images_are_not_unfolded() -> None:
    axes = convolution._axes(Geometry.of(nn.Conv2d(16, 16, 3, padding=1)))
    assert convolution._plan(axes, (128, 32, 32, 16), 1)[1] is convolution._autocorrelated
    axes = convolution._axes(Geometry.of(nn.Conv2d(3, 64, 7, stride=2, padding=3)))
    assert convolution._plan(axes, (128, 224, 224, 3), 1)[1] is convolution._phases_as_channels


class LargestStorage(TorchDispatchMode):
    """Records the size of the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 5, padding=2),
        nn.Conv2d(4, 4, 5, stride=2, padding=2),
        nn.Conv2d(4, 4, 3, stride=2, dilation=2),
        nn.Conv2d(4, 4, 5, padding=2, padding_mode="reflect"),
        nn.ConvTranspose2d(2, 2, 5, stride=2),
    ],
)
def test_no_temporary_is_as_large_as_the_unfolded_input(
    module: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = random(16, module.in_channels, 40, 40, dtype=dtype)
    size = x.untyped_storage().nbytes()
    monkeypatch.setattr(convolution, "CHUNK_BYTES", size)
    with LargestStorage() as largest:
        factor = input_factor(x, Geometry.of(module), bias=False)
    assert largest.bytes <= 1.7 * size
    expected = expected_factor(read_by_identity(module.double(), x.double()), bias=False)
    assert_close(factor.double(), expected, 1e-5 if dtype == torch.float32 else 1e-12)


def test_chunks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, module = random(5, 3, 9, 9), nn.Conv2d(3, 2, 3, stride=2, dtype=torch.float64)
    monkeypatch.setattr(convolution, "CHUNK_BYTES", 1)
    expected = expected_factor(read_by_identity(module, x), bias=True)
    assert_close(input_factor(x, Geometry.of(module), bias=True), expected, 1e-12)


def test_nothing_is_recorded_for_a_backward_pass() -> None:
    x, geometry = random(2, 2, 5, 5).requires_grad_(), Geometry.of(nn.Conv2d(2, 2, 3))
    assert not input_factor(x, geometry, bias=True).requires_grad
    assert not output_factor(x, 1).requires_grad
    assert not mean_patch(x, geometry).requires_grad


def test_geometries_of_equal_modules_are_one_key() -> None:
    modules = [nn.Conv2d(2, width, 3, padding="same", dilation=2) for width in (4, 6)]
    assert len({Geometry.of(module) for module in modules}) == 1
    assert Geometry.of(modules[0]).padding == ((2, 2), (2, 2))


def test_only_convolutions_have_a_geometry() -> None:
    with pytest.raises(TypeError, match=r"expected a convolution of torch\.nn, found Linear"):
        Geometry.of(nn.Linear(2, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("module", "size"), LAYERS)
def test_a_cuda_device_finds_the_same(module: nn.Module, size: int) -> None:
    x = random(4, module.in_channels, size, size)
    expected = expected_factor(read_by_identity(module.double(), x), bias=True)
    found = input_factor(x.cuda(), Geometry.of(module), bias=True)
    assert_close(found.cpu(), expected, 1e-12)
