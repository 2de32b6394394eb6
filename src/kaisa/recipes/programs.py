"""Models that `torch.export` has saved, as modules that can be explained.

Such a file is not safe to read. It is a zip file of JSON and tensors, but `torch.export.load` also unpickles what it
holds (example inputs, constants, some weights), evaluates expressions in it as Python, and looks up functions by
names in it: whoever made the file can run code here. So it is read only for those who say that they trust it.

An exported program keeps no modules and no modes, often a fixed batch size, and its inputs have the shape that they
were exported with.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, StateError

SUFFIX = ".pt2"


class Program(nn.Module):
    """An exported program of one tensor, called with any number of inputs.

    Attributes:
        shape: of one input.
        batch: the number of inputs that it takes at once; None for any.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.module = program.module()
        placeholder = _only_input(program)
        self.shape = tuple(int(size) for size in placeholder.shape[1:])
        first = placeholder.shape[0]
        self.batch = first if isinstance(first, int) else None

    def train(self, mode: bool = True) -> Program:
        """Note the mode, which an exported program cannot change."""
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Any:
        """Run the program; as often as its batch size asks for, with the last inputs repeated to fill it."""
        if self.batch is None or len(x) == self.batch:
            return self.module(x)
        missing = -len(x) % self.batch
        padded = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
        return torch.cat([self.module(part) for part in padded.split(self.batch)])[: len(x)]


def read_program(path: Path, is_trusted: bool) -> Program:
    """Read an exported program.

    Raises:
        ConfigurationError: nobody said that the file is trusted; nothing was read.
        StateError: it is no exported program, or one of other inputs than one tensor.
    """
    if not is_trusted:
        raise ConfigurationError(
            f"{path.name} is an exported program, and reading one can run code that is hidden in it (it holds pickles "
            "and expressions that are evaluated); if you know who made it, give --trust"
        )
    if not zipfile.is_zipfile(path):
        raise StateError(f"{path} is not an exported program; make one by torch.export.save")
    try:
        program = torch.export.load(path)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise StateError(f"{path} is not an exported program: {str(error).splitlines()[0]}") from error
    return Program(program)


def _only_input(program: torch.export.ExportedProgram) -> Tensor:
    """Return what the program says of its only input."""
    names = set(program.graph_signature.user_inputs)
    found = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(found) != 1 or not isinstance(found[0], Tensor) or found[0].ndim < 2:
        raise StateError(f"the program takes {len(names)} inputs; one tensor with the batch first can be explained")
    return found[0]
