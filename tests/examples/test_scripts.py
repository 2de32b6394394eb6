"""The examples train, go on where they were stopped, and stay short."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_fewer_than_a_hundred_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100


def test_the_own_loop_learns_and_a_stopped_run_of_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    loop = script("own_loop")
    whole = loop.train(2, tmp_path / "whole")
    assert whole > 0.9
    loop.train(2, tmp_path / "stopped")
    for path in (tmp_path / "stopped").glob("*46"):  # what was written after the second epoch of 23 steps
        path.rename(path.with_name("gone"))
    assert loop.train(2, tmp_path / "stopped") == whole


def test_the_loop_under_accelerate_learns_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState

    loop = script("accelerate_loop")
    torch.manual_seed(0)
    whole = loop.train(3)
    assert whole > 0.9
    loop.train(2, tmp_path / "state")
    capsys.readouterr()
    assert loop.train(3, tmp_path / "state") == whole
    assert capsys.readouterr().out.startswith("epoch 3")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
