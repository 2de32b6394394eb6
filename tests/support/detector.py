"""A detector of a few thousand weights with torchvision's interface: losses in training, otherwise what it finds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIDE, PATCH, LEAST = 4, 7, 8
REACH = 16.0  # pixels from a region's centre to its sides, about


class TinyDetector(nn.Module):
    """Each cell of a feature map may be a region; heads for class, box and mask look at the regions alone."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.rpn = nn.Conv2d(16, 1, 3, padding=1)
        self.roi_heads = nn.ModuleDict(
            {
                "hidden": nn.Linear(16 * 9, 32),
                "classes": nn.Linear(32, classes + 1),
                "boxes": nn.Linear(32, 4),
                "masks": nn.Linear(32, PATCH * PATCH),
            }
        )

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        assert self.training == (targets is not None)
        if targets is None:
            return [self._find(image) for image in images]
        losses = [self._losses(image, target) for image, target in zip(images, targets, strict=True)]
        return {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}

    def _cells(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the patches of all cells, their centres (x, y), and how likely each is a region."""
        features = self.backbone(image[None])
        rows, columns = features.shape[-2:]
        patches = functional.unfold(features, 3, padding=1)[0].T
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centres = (torch.stack([x, y], -1).reshape(-1, 2) + 0.5) * STRIDE
        return patches, centres, self.rpn(features).flatten()

    def _heads(self, patches: Tensor) -> dict[str, Tensor]:
        hidden = functional.relu(self.roi_heads["hidden"](patches))
        return {name: self.roi_heads[name](hidden) for name in ("classes", "boxes", "masks")}

    def _losses(self, image: Tensor, target: dict[str, Tensor]) -> dict[str, Tensor]:
        assert "iscrowd" not in target
        patches, centres, likely = self._cells(image)
        sides = torch.cat([centres[:, None] - target["boxes"][:, :2], target["boxes"][:, 2:] - centres[:, None]], -1)
        is_inside = sides.amin(-1) > 1
        is_region = is_inside.any(1)
        drawn = torch.cat([is_region.nonzero()[:, 0], torch.randint(len(patches), (LEAST,))])
        owner = is_inside.float().argmax(1)[drawn] if is_inside.shape[1] else torch.zeros_like(drawn)
        positive = is_region[drawn]
        out = self._heads(patches[drawn])
        labels = torch.zeros_like(drawn)
        labels[positive] = target["labels"][owner[positive]]
        found, owner = drawn[positive], owner[positive]
        masks = [_patch(target["masks"][one], target["boxes"][one]) for one in owner.tolist()]
        return {
            "loss_objectness": functional.binary_cross_entropy_with_logits(likely, is_region.float()),
            "loss_classifier": functional.cross_entropy(out["classes"], labels),
            "loss_box_reg": functional.mse_loss(out["boxes"][positive], sides[found, owner] / REACH, reduction="sum")
            / len(drawn),
            "loss_mask": functional.binary_cross_entropy_with_logits(
                out["masks"][positive], torch.stack(masks) if masks else out["masks"][positive], reduction="sum"
            )
            / (len(drawn) * PATCH * PATCH),
        }

    def _find(self, image: Tensor) -> dict[str, Tensor]:
        patches, centres, likely = self._cells(image)
        best = likely.topk(12).indices
        out = self._heads(patches[best])
        scores, labels = out["classes"].softmax(1)[:, 1:].max(1)
        scores = scores * likely[best].sigmoid()
        sides = out["boxes"] * REACH
        boxes = torch.cat([centres[best] - sides[:, :2], centres[best] + sides[:, 2:]], 1)
        kept = _apart(boxes, scores)
        masks = [_paste(out["masks"][one], boxes[one], image) for one in kept]
        return {"boxes": boxes[kept], "labels": labels[kept] + 1, "scores": scores[kept], "masks": torch.stack(masks)}


def _patch(mask: Tensor, box: Tensor) -> Tensor:
    left, top, right, bottom = box.round().long().tolist()
    inside = mask[None, None, top : max(bottom, top + 1), left : max(right, left + 1)].float()
    return functional.interpolate(inside, (PATCH, PATCH), mode="area").flatten().round()


def _paste(logits: Tensor, box: Tensor, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    left, top, right, bottom = box.tolist()
    x = ((torch.arange(width) + 0.5 - left) / max(right - left, 1e-3) * PATCH).floor()
    y = ((torch.arange(height) + 0.5 - top) / max(bottom - top, 1e-3) * PATCH).floor()
    values = logits.sigmoid().reshape(PATCH, PATCH)
    pasted = values[y.clamp(0, PATCH - 1).long()][:, x.clamp(0, PATCH - 1).long()]
    inside = ((y >= 0) & (y < PATCH))[:, None] & ((x >= 0) & (x < PATCH))[None]
    return (pasted * inside)[None]  # (1, height, width), as torchvision has it


def _apart(boxes: Tensor, scores: Tensor) -> list[int]:
    """Return the best of boxes that overlap by more than a third."""
    kept: list[int] = []
    for one in scores.argsort(descending=True).tolist():
        low, high = torch.maximum(boxes[one, :2], boxes[kept, :2]), torch.minimum(boxes[one, 2:], boxes[kept, 2:])
        shared = (high - low).clamp(min=0).prod(-1)
        areas = [(boxes[some, 2:] - boxes[some, :2]).clamp(min=0).prod(-1) for some in ([one], kept)]
        if not kept or (shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)).max() < 1 / 3:
            kept.append(one)
    return kept
