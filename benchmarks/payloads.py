"""What rounding on the way does to the update: the change of one preconditioned gradient, by payload.

Four simulated ranks precondition the gradients of the convolutional network of the digits at MEM-OPT, where everything
travels, and what K-FAC leaves is compared with the unrounded result for the same parameters and batches.

    python benchmarks/payloads.py --output benchmarks/results/payloads.json
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import kaisa
from kaisa.kfac import Payload
from kaisa.recipes.models import build_model
from tests.support.world import Simulated, run

RANKS, SIZE = 4, 32
FORMS: dict[str, Payload] = {
    "float32": Payload(),
    "bfloat16 statistics": Payload(statistics=torch.bfloat16),
    "bfloat16 gradients": Payload(gradients=torch.bfloat16),
    "int8 statistics": Payload(statistics="int8"),
    "int8 gradients": Payload(gradients="int8"),
}


def updates(model: nn.Module, payload: Payload, steps: int, seed: int) -> list[Tensor]:
    """Returns the preconditioned gradients of every step, of parameters that stay as they are."""

    def main(collectives: Simulated) -> list[Tensor]:
        own = copy.deepcopy(model)
        kfac = kaisa.KFACPreconditioner(
            own, factor_update_steps=1, inv_update_steps=1, damping=0.01, kl_clip=None,
            grad_worker_fraction="mem", payload=payload, collectives=collectives,
        )  # fmt: skip
        found = []
        for step in range(steps):
            generator = torch.Generator().manual_seed(1000 * seed + step * RANKS + collectives.rank)
            x = torch.randn(SIZE, 1, 8, 8, generator=generator)
            y = torch.randint(0, 10, (SIZE,), generator=generator)
            own.zero_grad()
            nn.functional.cross_entropy(own(x), y).backward()
            for parameter in own.parameters():
                parameter.grad = collectives.mean(parameter.grad.flatten()).reshape(parameter.shape)
            kfac.step()
            found.append(torch.cat([parameter.grad.flatten() for parameter in own.parameters()]))
        return found

    return run(RANKS, main)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    changes: dict[str, list[float]] = {form: [] for form in FORMS}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        model = build_model("cnn", (1, 8, 8), 10)
        exact = updates(model, FORMS["float32"], arguments.steps, seed)
        for form, payload in FORMS.items():
            found = updates(model, payload, arguments.steps, seed)
            changes[form] += [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
    table = {form: {"median": statistics.median(parts), "largest": max(parts)} for form, parts in changes.items()}
    for form, row in table.items():
        print(f"{form:<22} median {row['median']:.1e}   largest {row['largest']:.1e}")
    if arguments.output:
        record = {"steps": arguments.steps, "seeds": arguments.seeds, "ranks": RANKS, "torch": torch.__version__}
        arguments.output.write_text(json.dumps({**record, "relative_change": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
