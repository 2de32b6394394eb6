"""Figures of quality: against Captum, closed forms, and models whose evidence is known."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa.errors import ConfigurationError
from kaisa.explain import Comparison, Effort, Explanation, compare, explain, measure, quality
from kaisa.explain.plots import draw_curves

EFFORT = Effort(changes=16, neighbours=2, points=6)


class Corner(nn.Module):
    """Says class 1 where the upper left corner is bright, and looks at nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        bright = self.weight * x[:, :, :2, :2].sum((1, 2, 3))
        return torch.stack([-bright, bright], 1)


def linear(weight: Tensor) -> quality.Score:
    return lambda x, rows: x.flatten(1) @ weight


def test_the_gap_is_what_the_values_leave_unsaid() -> None:
    weight, x = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])
    values = x * weight
    assert quality.completeness_gap(linear(weight), x, values, torch.zeros(3)).tolist() == [0, 0]
    gaps = quality.completeness_gap(
        linear(weight), x, values + torch.tensor([[1.0, 0, 0], [0, 0, -2.0]]), torch.zeros(3)
    )
    assert gaps.tolist() == [1, 2]


def test_the_gradient_of_a_linear_model_is_infallible_and_anything_else_is_not(generator: torch.Generator) -> None:
    weight, x = torch.randn(12), torch.randn(4, 3, 2, 2)
    gradient = weight.reshape(1, 3, 2, 2).expand_as(x)
    for scale in (1.0, 7.0, -2.0):
        found = quality.relative_infidelity(linear(weight), x, scale * gradient, generator)
        assert found.abs().max() < 1e-9
    noise = quality.relative_infidelity(linear(weight), x, torch.randn_like(x), generator, samples=500)
    assert ((noise > 0.3) & (noise <= 1 + 1e-6)).all()
    assert (quality.infidelity(linear(weight), x, 2 * gradient, generator, is_scaled=False) > 1e-3).all()


@pytest.mark.parametrize("is_scaled", [False, True])
def test_infidelity_is_that_of_captum_for_the_same_changes(is_scaled: bool) -> None:
    metrics = pytest.importorskip("captum.metrics", reason="captum is not installed: kaisa[explain]")
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    values = torch.randn_like(x)
    own = torch.Generator().manual_seed(1)
    found = quality.infidelity(
        lambda y, rows: model(y)[:, 0].detach(), x, values, own, samples=20, noise=0.3, is_scaled=is_scaled
    )
    same = torch.Generator().manual_seed(1)
    scale = 0.3 * x.std(1)[:, None]

    def change(inputs: Tensor) -> tuple[Tensor, Tensor]:
        moved = scale * torch.randn(x.shape, generator=same).to(x)
        return moved, inputs - moved

    expected = torch.zeros(3, dtype=torch.float64)
    if is_scaled:  # Captum draws all samples at once: the same numbers in another order
        changes = torch.stack([change(x)[0] for _ in range(20)])
        expected = metrics.infidelity(
            lambda y: model(y)[:, 0],
            lambda inputs: (flat := changes.transpose(0, 1).reshape(-1, 5), inputs - flat),
            x,
            values,
            n_perturb_samples=20,
            normalize=True,
        )
    else:
        for _ in range(20):
            expected += metrics.infidelity(lambda y: model(y)[:, 0], change, x, values, n_perturb_samples=1) / 20
    assert torch.allclose(found, expected.detach(), rtol=1e-9)


def test_values_that_do_not_move_are_not_sensitive_and_the_largest_move_counts(generator: torch.Generator) -> None:
    x = torch.randn(3, 4)
    assert quality.max_sensitivity(lambda y: torch.ones(3, 4), x, torch.ones(3, 4), generator).tolist() == [0, 0, 0]
    steps = iter([0.1, 0.5, 0.2])

    def explained(y: Tensor) -> Tensor:
        assert (y - x).abs().max() <= 0.02
        return torch.ones(3, 4) * (1 + next(steps))

    found = quality.max_sensitivity(explained, x, torch.ones(3, 4), generator, samples=3)
    assert torch.allclose(found, torch.tensor(0.5))


def test_relative_infidelity_is_what_the_best_factor_leaves_of_the_changes() -> None:
    x, values, weight = torch.randn(2, 4).double(), torch.randn(2, 4).double(), torch.randn(4).double()
    score = lambda y, rows: (y @ weight).exp()  # noqa: E731
    found = quality.relative_infidelity(score, x, values, torch.Generator().manual_seed(1), samples=30, noise=0.5)
    same = torch.Generator().manual_seed(1)
    changes = torch.stack([0.5 * x.std(1)[:, None] * torch.randn(2, 4, generator=same).double() for _ in range(30)])
    predicted, changed = (changes * values).sum(2), score(x, None) - score(x - changes, None)
    for row in range(2):
        factor = torch.linalg.lstsq(predicted[:, row : row + 1], changed[:, row : row + 1]).solution.item()
        left = (factor * predicted[:, row] - changed[:, row]).square().mean() / changed[:, row].square().mean()
        assert found[row].item() == pytest.approx(left.item())


def test_neighbours_lie_on_all_sides_and_up_to_the_radius(generator: torch.Generator) -> None:
    x, seen = torch.randn(2, 500), []
    quality.max_sensitivity(lambda y: seen.append(y - x) or y, x, x, generator, radius=0.3, samples=2)
    moves = torch.cat(seen)
    assert -0.3 <= moves.min() < -0.28
    assert 0.28 < moves.max() <= 0.3 + 1e-6
    assert abs(moves.mean()) < 0.03  # its deviation is 0.3 / √3 / √2000 = 0.004


def test_what_speaks_against_goes_last_and_channels_speak_together() -> None:
    x = torch.ones(1, 2, 2)  # two channels of two places
    values = torch.tensor([[[-5.0, 1.0], [5.5, 1.0]]])  # together 0.5 and 2
    weight = torch.tensor([1.0, 10.0, 1.0, 10.0])
    assert quality.deletion(linear(weight), x, values, points=3).scores.tolist() == [[22, 2, 0]]
    against = torch.tensor([[-3.0, 1.0]])
    assert quality.deletion(linear(weight[:2]), x[:, 0], against, points=3).scores.tolist() == [[11, 1, 0]]


def test_what_goes_is_replaced_by_the_baseline() -> None:
    x, values = torch.ones(1, 2), torch.tensor([[2.0, 1.0]])
    weight = torch.tensor([1.0, 10.0])
    assert quality.deletion(linear(weight), x, values, baseline=0.5, points=3).scores.tolist() == [[11, 10.5, 5.5]]
    assert quality.insertion(linear(weight), x, values, baseline=0.5, points=3).scores.tolist() == [[5.5, 6, 11]]


def test_curves_follow_the_order_of_the_values() -> None:
    x = torch.ones(1, 4)
    values = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    weight = torch.tensor([1.0, 2.0, 4.0, 8.0])
    deleted = quality.deletion(linear(weight), x, values, points=5)
    inserted = quality.insertion(linear(weight), x, values, points=5)
    assert deleted.scores.tolist() == [[15, 13, 5, 1, 0]]
    assert inserted.scores.tolist() == [[0, 2, 10, 14, 15]]
    assert deleted.area.item() == pytest.approx((15 / 2 + 13 + 5 + 1) / 4)


def test_whole_pixels_go_and_not_single_channels() -> None:
    x = torch.rand(2, 3, 4, 4)
    seen = []

    def score(y: Tensor, rows: Tensor) -> Tensor:
        seen.append((y == 0).all(1) == (y == 0).any(1))
        return y.sum((1, 2, 3))

    quality.deletion(score, x, torch.randn(2, 4, 4), points=4)
    assert torch.stack(seen).all()


def test_values_of_other_shapes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="are not of inputs"):
        quality.deletion(linear(torch.ones(4)), torch.ones(1, 4), torch.ones(1, 3))


def test_values_of_a_place_are_divided_among_its_channels() -> None:
    x, values = torch.zeros(2, 3, 4, 4), torch.randn(2, 4, 4)
    spread = quality.spread(x, values)
    assert spread.shape == x.shape
    assert torch.allclose(spread.sum(1), values)


def test_rank_correlation_is_spearman_s_of_sizes() -> None:
    x, y = torch.randn(4, 30), torch.randn(4, 30).round(decimals=1)
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    expected = [stats.spearmanr(a.abs().double(), b.abs().double()).statistic for a, b in zip(x, y, strict=True)]
    assert quality.rank_correlation(x, y).tolist() == pytest.approx(expected)
    assert quality.rank_correlation(x, torch.ones(4, 30)).tolist() == [0] * 4


def test_shuffled_weights_are_the_same_numbers_elsewhere_in_a_copy(
    generator: torch.Generator,
) -> None:
    model = nn.Linear(5, 7)
    before = model.weight.clone()
    other = quality.shuffled(model, generator)
    assert torch.equal(other.weight.flatten().sort().values, before.flatten().sort().values)
    assert not torch.equal(other.weight, before)
    assert torch.equal(model.weight, before)
    again = quality.shuffled(model, torch.Generator().manual_seed(0))
    assert torch.equal(other.weight, again.weight)


def test_probabilities_stay_and_logits_become_some() -> None:
    logits = torch.randn(3, 4)
    assert torch.equal(quality.probabilities(logits), logits.softmax(1))
    assert torch.equal(quality.probabilities(logits.softmax(1)), logits.softmax(1))
    assert torch.equal(quality.probabilities(logits[:, :1]), logits[:, :1])


@pytest.fixture(scope="module")
def compared() -> Comparison:
    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 8)
    x[:, :, :2, :2] += 1
    return compare(Corner(), x, ["saliency", "integrated_gradients"], 1, effort=EFFORT)


def test_a_comparison_measures_every_method_and_random_values_beside_them(compared: Comparison) -> None:
    figures = compared.figures()
    assert list(figures) == ["saliency", "integrated_gradients", "random"]
    for name in ("saliency", "integrated_gradients"):
        assert figures[name]["infidelity"] < 0.1 < figures["random"]["infidelity"]
        assert figures[name]["deletion"] < figures["random"]["deletion"]
        assert figures[name]["insertion"] > figures["random"]["insertion"]
    assert figures["saliency"]["infidelity"] < 1e-6  # the model is linear
    assert figures["saliency"]["max_sensitivity"] == 0
    assert figures["integrated_gradients"]["completeness_gap"] == pytest.approx(0, abs=1e-4)
    assert figures["saliency"]["randomisation"] == pytest.approx(1)  # one weight, which shuffling leaves where it is
    assert str(compared).splitlines()[1].startswith("saliency")


def test_a_page_of_a_comparison_holds_all_and_asks_for_nothing(compared: Comparison, tmp_path: Path) -> None:
    html = compared.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 4  # three methods and the curves
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "<script" not in html
    assert "default-src &#x27;none&#x27;" in html
    assert "best" in html
    with pytest.raises(ConfigurationError, match=r"give \.html or \.json"):
        compared.save(tmp_path / "page.pdf")


def test_measures_keep_to_a_model_and_leave_it_as_it_was(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.5)).train()
    x = torch.randn(2, 1, 4, 4)
    measured = measure(model, explain(model, x, "saliency"), effort=EFFORT)
    assert set(quality_names(measured)) == {"infidelity", "max_sensitivity", "deletion", "insertion", "randomisation"}
    assert model.training
    assert model[2].training
    again = measure(model, explain(model, x, "saliency"), effort=EFFORT)
    assert measured.quality == again.quality
    assert measured.details["deletion_curve"].shape == (2, 6)


def test_an_explanation_is_measured_with_its_own_options_seed_and_effort() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    options = {"samples": 3, "noise": 0.4}
    said = explain(model, x, "smoothgrad", [2, 1], seed=5, **options)
    effort = Effort(changes=7, noise=0.6, neighbours=3, radius=0.2, points=5, baseline=0.3)
    found = measure(model, said, effort=effort).quality
    score = lambda y, rows: model(y).detach()[torch.arange(2), [2, 1]]  # noqa: E731
    chance = lambda y, rows: model(y).detach().softmax(1)[torch.arange(2), [2, 1]]  # noqa: E731
    again = lambda net, y: explain(net, y, "smoothgrad", [2, 1], seed=5, **options).values  # noqa: E731
    seeded = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    expected = {
        "infidelity": quality.relative_infidelity(score, x, said.values, seeded(), samples=7, noise=0.6),
        "max_sensitivity": quality.max_sensitivity(
            lambda y: again(model, y), x, said.values, seeded(), radius=0.2, samples=3
        ),
        "deletion": quality.deletion(chance, x, said.values, 0.3, 5).area,
        "insertion": quality.insertion(chance, x, said.values, 0.3, 5).area,
        "randomisation": quality.rank_correlation(said.values, again(quality.shuffled(model, seeded()), x)),
    }
    assert set(found) == set(expected)
    for name, figures in expected.items():
        assert found[name] == pytest.approx(figures.tolist()), name


def test_figures_of_a_comparison_are_means_over_the_inputs() -> None:
    said = explain(nn.Linear(3, 2), torch.rand(2, 3), "saliency").with_quality({"deletion": (0.25, 0.75)})
    assert Comparison((said,)).figures() == {"saliency": {"deletion": 0.5}}


def test_curves_are_means_over_the_inputs_and_there_may_be_many() -> None:
    shares, scores = torch.linspace(0, 1, 3), torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 0.5]])
    names = [f"method {number}" for number in range(12)]
    both = draw_curves({"deletion": dict.fromkeys(names, (shares, scores))})
    mean = draw_curves({"deletion": dict.fromkeys(names, (shares, scores.mean(0, keepdim=True)))})
    assert both == mean
    assert both != draw_curves({"deletion": dict.fromkeys(names, (shares, scores[:1]))})


def quality_names(explanation: Explanation) -> list[str]:
    return list(explanation.quality)


def test_a_function_is_measured_as_far_as_it_can_be() -> None:
    def predict(x: Tensor) -> Tensor:
        return functional.pad(x[:, :1], (1, 0)).softmax(1)

    compared = compare(
        predict, torch.randn(1, 3), ["kernelshap"], 1, effort=EFFORT, measures=["deletion", "randomisation"]
    )
    assert "deletion" in compared["kernelshap"].quality
    assert "randomisation" not in compared["kernelshap"].quality


def test_pictures_are_not_measured() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    explanation = explain(model, None, "logit", 0, input_shape=(1, 4, 4), steps=2)
    assert measure(model, explanation) is explanation
    assert math.isfinite(explanation.quality["objective"][0])


@pytest.mark.parametrize(
    ("methods", "options", "measures", "message"),
    [
        ([], {}, ["deletion"], "give a list of names"),
        ("saliency", {}, ["deletion"], "give a list of names"),
        (["logit"], {}, ["deletion"], "logit is not local"),
        (["saliency"], {"lime": {}}, ["deletion"], "options of lime"),
        (["saliency"], {}, ["speed"], "unknown measure 'speed'"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    methods: list[str], options: dict[str, dict[str, int]], measures: list[str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compare(Corner(), torch.rand(1, 1, 8, 8), methods, options=options, measures=measures)
