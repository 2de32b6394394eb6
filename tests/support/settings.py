"""Settings that make the preconditioner a plain linear map, to be compared with a dense solve."""

from __future__ import annotations

import torch

DAMPING = 1e-2

# Everything is renewed at every step, nothing is scaled afterwards, no precision is lost.
EVERY_STEP = {
    "factor_update_steps": 1,
    "inv_update_steps": 1,
    "damping": DAMPING,
    "kl_clip": None,
    "lr": 1.0,
    "factor_dtype": torch.float64,
    "inv_dtype": torch.float64,
}
