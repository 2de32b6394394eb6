"""What a saved state says of itself, and how it differs from what should go on from it."""

from collections.abc import Mapping
from typing import Any

from kaisa.kfac.placement import Placement

FORMAT = 1
KEYS = (
    "share", "steps", "last_factors", "last_inverses", "queue", "ready", "begun", "deferred", "solver", "scaling",
    "shapes", "factors", "decompositions", "failures", "label_generator", "example_generator", "damping",
)  # fmt: skip


def share(placement: Placement, rank: int) -> dict[str, Any]:
    """Returns which part of all states a rank holds: the rank of how many, and who works on what."""
    assignments = {
        name: [list(a.a_owners), list(a.g_owners), list(a.gradient_workers)] for name, a in placement.assignments
    }
    return {"rank": rank, "world_size": placement.world_size, "assignments": assignments}


def differences(found: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Returns, a line each, why a preconditioner cannot go on from a state.

    Args:
        found: the state.
        own: the entries "shapes", "solver", "scaling" and "share" of the preconditioner.
    """
    if found.get("format") != FORMAT:
        return [f"format: found {found.get('format')!r}, expected {FORMAT}"]
    missing = sorted(set(KEYS) - set(found))
    if missing:
        return [f"missing entries: {', '.join(missing)}"]
    lines = _of_shapes(found["shapes"], own["shapes"])
    if found["solver"] != own["solver"]:
        lines.append(f"solver: {found['solver']} in the state, {own['solver']} here")
    if found["scaling"] != own["scaling"]:
        lines.append(f"factor_scaling: {found['scaling']} in the state, {own['scaling']} here")
    return lines + _of_shares(found["share"], own["share"])


def _of_shapes(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: missing from the state" for name in expected if name not in found]
    lines += [f"{name}: in the state, but not in the model" for name in found if name not in expected]
    return lines + [
        f"{name}: shape {tuple(found[name])} in the state, {tuple(expected[name])} in the model"
        for name in expected
        if name in found and list(found[name]) != expected[name]
    ]


def _of_shares(found: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{key}: {found[key]} in the state, {own[key]} here" for key in ("rank", "world_size") if found[key] != own[key]
    ]
    if not lines and found != own:
        moved = [name for name in own["assignments"] if found["assignments"].get(name) != own["assignments"][name]]
        lines = [f"placement: {', '.join(moved)} are worked on by other ranks"] if moved else []
    return [f"{line} (kaisa.kfac.checkpoint goes from any world to any other)" for line in lines]
