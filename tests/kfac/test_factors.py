"""Running averages against their closed form, and factors as a value that a file keeps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kaisa.errors import StateError
from kaisa.kfac.factors import Factors, Label, Pair, Statistics


def pair(seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(
        torch.randn(3, 3, generator=generator, dtype=torch.float64), torch.rand(2, generator=generator).double()
    )


def test_the_average_after_k_updates_is_the_bias_corrected_weighted_mean() -> None:
    factors, decay, updates = Factors(), 0.8, [pair(seed) for seed in range(6)]
    for update in updates:
        factors.update("layer", update, decay)
    weights = [(1 - decay) * decay ** (5 - index) / (1 - decay**6) for index in range(6)]
    for side in ("a", "g"):
        expected = sum(weight * getattr(update, side) for weight, update in zip(weights, updates, strict=True))
        torch.testing.assert_close(getattr(factors["layer"], side), expected)


def test_the_reference_starts_from_the_identity_without_correction() -> None:
    factors, update = Factors(from_identity=True), pair(0)
    factors.update("layer", update, 0.95)
    torch.testing.assert_close(factors["layer"].a, 0.95 * torch.eye(3).double() + 0.05 * update.a)
    torch.testing.assert_close(factors["layer"].g, 0.95 * torch.ones(2).double() + 0.05 * update.g)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_update_that_is_not_finite_is_as_if_it_had_not_been(bad: float, position: int) -> None:
    clean, stained = Factors(), Factors()
    for index in range(3):
        update = pair(index)
        if index != position:
            clean.update("layer", update, 0.9)
        else:
            update.g[1] = bad
        stained.update("layer", update, 0.9)
    torch.testing.assert_close(list(stained["layer"]), list(clean["layer"]))


def test_statistics_of_two_micro_batches_add_up() -> None:
    total = Statistics(torch.ones(2, 2), torch.ones(1), positions=3, examples=2)
    total.add_(Statistics(torch.full((2, 2), 2.0), torch.full((1,), 4.0), positions=5, examples=7))
    assert total.positions == 8
    assert total.examples == 9
    torch.testing.assert_close([total.a, total.g], [torch.full((2, 2), 3.0), torch.tensor([5.0])])


def test_saved_factors_are_read_back_to_the_bit_with_their_label(tmp_path: Path) -> None:
    factors = Factors(Label("running", "categorical", "reduce", 128))
    factors.update("block.0/conv", pair(1), 0.9)
    factors.update("head", pair(2), 0.9)
    factors.save(tmp_path / "factors.safetensors")
    read = Factors.load(tmp_path / "factors.safetensors")
    assert read.label == factors.label
    assert list(read) == list(factors)
    for name in factors:
        torch.testing.assert_close(list(read[name]), list(factors[name]), rtol=0, atol=0)
    factors.update("head", pair(3), 0.9)
    read.update("head", pair(3), 0.9)
    torch.testing.assert_close(list(read["head"]), list(factors["head"]), rtol=0, atol=0)


def test_a_file_of_other_tensors_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(StateError, match="holds no Kronecker factors"):
        Factors.load(tmp_path / "model.safetensors")
