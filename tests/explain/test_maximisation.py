"""Activation maximisation, DeepDream and inversion: formulas, golden values, and what every picture must keep to."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.explain.activations import mean_activation, reaching
from kaisa.explain.image_priors import alpha_norm, blur, total_variation
from kaisa.explain.inversion import Descent, invert, relative_distance
from kaisa.explain.maximisation import Ascent, Priors, dream, jittered, maximise, resized
from kaisa.explain.parametrisations import Fourier, Pixels, colour_correlation

GOLDEN = json.loads((Path(__file__).parent / "golden" / "inversion.json").read_text())
UNIT = (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def network(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.Tanh())


def objective(model: nn.Module, channel: int = 0) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x)[:, channel].mean((1, 2))


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_distance_norm_and_variation_are_those_of_the_golden_values() -> None:
    x = tensor(GOLDEN["x"])
    distance = relative_distance(tensor(GOLDEN["phi"])[None], tensor(GOLDEN["phi0"])[None])
    found = [distance.item(), alpha_norm(x, 6).item(), total_variation(x, 2).item()]
    assert found == pytest.approx([GOLDEN[name] for name in ("rel_sq", "alpha_norm6", "tv_beta2")], rel=1e-9)


def test_variation_is_of_height_and_width_and_never_across_channels() -> None:
    x = torch.zeros(1, 5, 4, 4, dtype=torch.float64)
    x += torch.arange(5.0)[:, None, None]
    assert total_variation(x).item() == 0
    x[0, 2, 1, 1] += 1  # differs from its left and upper neighbours, and they from it: once each, and once both
    assert total_variation(x).item() == pytest.approx(4)


def test_variation_of_one_dimension_is_the_sum_of_the_powers_of_differences() -> None:
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    assert torch.allclose(total_variation(x, 3.0), x.diff().abs().pow(3).sum((1, 2)))


def test_the_variation_of_a_flat_image_has_a_finite_gradient() -> None:
    x = torch.ones(1, 1, 3, 3, requires_grad=True)
    total_variation(x, 1.0).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_rows_without_positions_have_no_variation() -> None:
    assert total_variation(torch.randn(3, 5)).tolist() == [0, 0, 0]


def test_a_blur_keeps_the_mean_of_a_flat_image_and_spreads_a_point() -> None:
    assert torch.allclose(blur(torch.full((1, 2, 9, 9), 3.0), 1.0), torch.full((1, 2, 9, 9), 3.0))
    point = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    point[..., 10, 10] = 1
    spread = blur(point, 1.5)
    places = torch.arange(21, dtype=torch.float64) - 10
    assert spread.sum().item() == pytest.approx(1)
    assert (spread[0, 0].sum(0) @ places**2).item() == pytest.approx(1.5**2, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    channels=st.integers(1, 5),
    bounded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_image_inside_its_bounds_survives_being_encoded(
    shape: list[int], channels: int, bounded: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = 0.01 + 0.98 * torch.rand(2, channels, *shape, generator=generator, dtype=torch.float64)
    ones = torch.ones(1, 1, *[1] * len(shape), dtype=torch.float64)
    bounds = (0 * ones, ones) if bounded else None
    colours = torch.eye(channels, dtype=torch.float64) + 0.2
    for form in (Pixels(), Fourier(), Fourier(colours)):
        assert torch.allclose(form.decode(form.encode(image, bounds), image.shape[2:], bounds), image, atol=1e-9)


def test_colours_give_independent_channels_the_correlations_of_the_data() -> None:
    mixing = torch.tensor([[1.0, 0.0], [0.8, 0.1]], dtype=torch.float64)
    images = torch.einsum("dc,nchw->ndhw", mixing, torch.randn(50, 2, 8, 8, dtype=torch.float64))
    matrix = colour_correlation(images)
    wanted = torch.corrcoef(images.movedim(1, 0).flatten(1))
    found = matrix @ matrix.mT
    scale = found.diagonal().sqrt()
    assert torch.allclose(found / scale / scale[:, None], wanted, atol=1e-3)
    assert matrix.norm(dim=0).max().item() == pytest.approx(1)


def test_a_plain_step_is_the_gradient_over_its_root_mean_square(generator: torch.Generator) -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    ascent = Ascent(steps=3, rate=0.7, optimiser="normalised", jitter=0)
    found = maximise(objective(model), x, ascent, generator).images
    for row in range(2):
        expected = x[row : row + 1].clone()
        for _ in range(3):
            expected.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(model)(expected).sum(), expected)
            expected = (expected + 0.7 * gradient / (gradient.square().mean().sqrt() + 1e-5)).detach()
        assert torch.allclose(found[row : row + 1], expected, atol=1e-6)


@pytest.mark.parametrize("form", [Pixels(), Fourier()], ids=["pixels", "fourier"])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("optimiser", ["adam", "normalised"])
def test_the_objective_rises_whatever_the_channels(
    form: Pixels | Fourier, channels: int, optimiser: str, generator: torch.Generator
) -> None:
    model = network(channels)
    start = torch.rand(2, channels, 9, 12)
    ascent = Ascent(steps=20, optimiser=optimiser, jitter=0)
    made = maximise(objective(model), start, ascent, generator, parametrisation=form, bounds=UNIT)
    assert made.trace.shape == (21, 2)
    assert (made.trace[-1] > made.trace[0]).all()
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    assert torch.equal(made.trace[-1], objective(model)(made.images))


def test_signals_of_one_dimension_are_maximised_too(generator: torch.Generator) -> None:
    model = nn.Conv1d(2, 3, 5)
    made = maximise(
        lambda x: model(x)[:, 1].mean(1), torch.randn(1, 2, 30), Ascent(10), generator, parametrisation=Fourier()
    )
    assert made.trace[-1] > made.trace[0]


def test_pictures_of_a_batch_do_not_know_one_another(generator: torch.Generator) -> None:
    model, start = network(), torch.rand(3, 3, 8, 8)
    ascent = Ascent(steps=5, jitter=0)
    together = maximise(objective(model), start, ascent, generator).images
    alone = maximise(objective(model), start[1:2], ascent, generator).images
    assert torch.allclose(together[1:2], alone, atol=1e-6)


def test_octaves_pass_through_smaller_sizes_and_end_at_the_full_one(generator: torch.Generator) -> None:
    sizes = []

    def watch(x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape[2:]))
        return x.mean((1, 2, 3))

    made = maximise(watch, torch.rand(1, 2, 16, 8), Ascent(2, octaves=3, scale=2.0, jitter=0), generator)
    assert list(dict.fromkeys(sizes)) == [(4, 2), (8, 4), (16, 8)]
    assert made.images.shape == (1, 2, 16, 8)
    assert made.trace.shape == (7, 1)


def test_priors_are_taken_off_what_is_raised(generator: torch.Generator) -> None:
    model, start = network(), torch.rand(1, 3, 12, 12)
    ascent = Ascent(steps=40, jitter=0)
    free = maximise(objective(model), start, ascent, generator).images
    smooth = Ascent(steps=40, jitter=0, priors=Priors(total_variation=0.1))
    small = Ascent(steps=40, jitter=0, priors=Priors(alpha_norm=0.1))
    assert total_variation(maximise(objective(model), start, smooth, generator).images) < total_variation(free)
    assert alpha_norm(maximise(objective(model), start, small, generator).images) < alpha_norm(free)
    blurred = Ascent(steps=40, jitter=0, priors=Priors(blur_every=4, blur=1.0))
    assert total_variation(maximise(objective(model), start, blurred, generator).images) < total_variation(free)


def test_a_spectrum_is_not_blurred(generator: torch.Generator) -> None:
    ascent = Ascent(priors=Priors(blur_every=2))
    with pytest.raises(ConfigurationError, match="a blur is of pixels"):
        maximise(objective(network()), torch.rand(1, 3, 8, 8), ascent, generator, parametrisation=Fourier())


def test_a_shift_moves_all_dimensions_and_loses_nothing(generator: torch.Generator) -> None:
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    moved = jittered(x, 2, generator)
    assert moved.flatten().sort().values.equal(x.flatten())
    assert not moved.equal(x)
    assert jittered(x, 0, generator) is x


def test_dreams_raise_the_objective_and_keep_what_shrinking_loses(generator: torch.Generator) -> None:
    model, image = network(), torch.rand(2, 3, 20, 16)
    told = []
    made = dream(
        objective(model), image, generator, bounds=UNIT, progress=lambda done, total: told.append((done, total))
    )
    assert made.images.shape == image.shape
    assert (made.trace[-1] > made.trace[0]).all()
    assert told[-1] == (40, 40)
    # Where nothing is dreamt, the image comes back whole, although it went through a smaller size.
    still = dream(lambda x: (0 * x).sum((1, 2, 3)), image, generator, octaves=4)
    assert torch.allclose(still.images, image, atol=1e-5)


def test_a_dream_of_one_octave_is_plain_ascent_by_the_mean_of_the_gradient(generator: torch.Generator) -> None:
    model, x = network(), torch.rand(1, 3, 8, 8)
    found = dream(objective(model), x, generator, octaves=1, steps=1, rate=0.1, jitter=0).images
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(model)(x).sum(), x)
    assert torch.allclose(found, x + 0.1 * gradient / gradient.abs().mean(), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 9), (1, 2, 9, 7), (1, 2, 5, 6, 7)])
def test_images_of_any_dimension_are_resized(shape: tuple[int, ...]) -> None:
    flat = torch.full(shape, 2.0)
    assert torch.allclose(resized(flat, [4] * (len(shape) - 2)), torch.tensor(2.0))
    assert resized(flat, shape[2:]) is flat


@pytest.mark.parametrize("optimiser", ["adam", "lbfgs"])
def test_inversion_finds_an_input_with_the_wanted_features(optimiser: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.Tanh()).double()
    image = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    wanted = model(image).detach()
    descent = Descent(steps=300 if optimiser == "adam" else 30, alpha_weight=0, variation_weight=0, optimiser=optimiser)
    descent = descent if optimiser == "adam" else Descent(**{**vars(descent), "rate": 1.0})
    found = invert(model, wanted, 0.1 * torch.randn_like(image), descent)
    assert (found.distance[-1] < 1e-3).all()
    assert torch.allclose(found.images, image, atol=0.1)
    assert found.loss.shape == (descent.steps + 1, 2)


def test_the_loss_of_inversion_is_the_sum_of_its_terms() -> None:
    model, x = network().double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    wanted = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    found = invert(model, wanted, x, Descent(steps=1, alpha_weight=0.3, variation_weight=0.7))
    features = model(x).detach()
    distance = (features - wanted).square().sum() / wanted.square().sum()
    differences = (x[..., :-1, 1:] - x[..., :-1, :-1]).square() + (x[..., 1:, :-1] - x[..., :-1, :-1]).square()
    expected = distance + 0.3 * x.pow(6).sum() + 0.7 * differences.sum()
    assert found.loss[0].item() == pytest.approx(expected.item())
    assert found.distance[0].item() == pytest.approx(distance.item())


def test_a_forward_pass_ends_at_the_layer_and_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    with reaching(model, "0") as activation:
        assert activation(torch.randn(1, 3, 20, 20)).shape == (1, 4, 18, 18)  # a size that the Linear layer refuses
    assert not model[0]._forward_hooks
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 2)


def test_hooks_are_gone_after_an_error() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="expected input"), reaching(model, "0") as activation:
        activation(torch.randn(1, 9, 8, 8))
    assert not model[0]._forward_hooks


def test_a_layer_that_is_not_called_is_named() -> None:
    model = network()
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    with reaching(model, "spare") as activation, pytest.raises(ConfigurationError, match="'spare' is not called"):
        activation(torch.randn(1, 3, 8, 8))


def test_one_channel_counts_for_each_picture() -> None:
    output = torch.randn(3, 4, 5, 5)
    found = mean_activation(output, torch.tensor([2, 0, 3]))
    assert torch.allclose(found, torch.stack([output[0, 2].mean(), output[1, 0].mean(), output[2, 3].mean()]))
    assert torch.allclose(mean_activation(output, None), output.mean((1, 2, 3)))
    with pytest.raises(ConfigurationError, match=r"channel \[4, 0, 0\].*0 to 3"):
        mean_activation(output, torch.tensor([4, 0, 0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ascent(steps=0), "steps is 0"),
        (lambda: Ascent(optimiser="sgd"), "optimiser is 'sgd'"),
        (lambda: Ascent(octaves=0), "octaves is 0"),
        (lambda: Ascent(scale=1.0), "scale 1"),
        (lambda: Ascent(jitter=-1), "jitter is -1"),
        (lambda: Priors(blur=-1.0), "blur is -1"),
        (lambda: Descent(alpha=0.5), "alpha 0.5"),
        (lambda: Descent(alpha_weight=-1.0), "a weight is negative"),
        (lambda: Descent(optimiser="sgd"), "optimiser is 'sgd'"),
    ],
)
def test_numbers_that_cannot_work_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
