from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from kaisa.recipes.digits import read_digits


def test_the_digits_keep_their_labels_and_all_shades() -> None:
    digits, expected = read_digits(), load_digits()
    assert digits.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    np.testing.assert_array_equal(digits.labels.numpy(), expected.target)
    shades = (digits.pixels[:, 0].double() * 16 / 255).round().numpy()
    np.testing.assert_array_equal(shades, expected.images)
