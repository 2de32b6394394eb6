"""K-FAC for the heads of torchvision's Mask R-CNN, as in the KAISA paper: squares and discs that are drawn here.

python examples/maskrcnn.py --steps 200 --side 128
"""

import argparse

import torch
from torch import Tensor, nn

import kaisa

REGIONS = 512  # of each image, over which the losses of the heads are averaged
Objects = dict[str, Tensor]


def mask_rcnn(side: int) -> nn.Module:
    """Returns a detector of two kinds of things with random weights."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return MaskRCNN(backbone, 3, min_size=side, max_size=side, box_batch_size_per_image=REGIONS)


def draw(side: int) -> tuple[Tensor, Objects]:
    """Returns a noisy image (3, side, side) with a square (label 1) and a disc (label 2) in it, and where they are."""
    image = 0.2 * torch.rand(3, side, side)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    masks = []
    for label, half in enumerate((0, side // 2), start=1):  # one on the left and one on the right
        radius = int(torch.randint(side // 10, side // 5, ()))
        middle = int(torch.randint(radius, side - radius, ()))
        across = half + int(torch.randint(radius, side // 2 - radius, ()))
        far = (torch.maximum((x - across).abs(), (y - middle).abs()), ((x - across) ** 2 + (y - middle) ** 2).sqrt())
        masks.append(far[label - 1] < radius)
        image[label, masks[-1]] += 0.7
    return image, {
        "boxes": torch.stack(
            [torch.stack([x[m].min(), y[m].min(), x[m].max() + 1, y[m].max() + 1]) for m in masks]
        ).float(),
        "labels": torch.tensor([1, 2]),
        "masks": torch.stack(masks).to(torch.uint8),
    }


def train(model: nn.Module, steps: int, side: int, batch: int = 4, heads: str = "roi_heads") -> list[float]:
    """Trains a detector with the interface of torchvision's; returns its losses."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    others = [f"^{name}\\b" for name, _ in model.named_children() if name != heads]
    kfac = kaisa.KFACPreconditioner(
        model, optimizer, skip_layers=others, factor_update_steps=5, inv_update_steps=25, loss_terms=batch * REGIONS
    )
    print(kfac.coverage())
    model.train()
    losses: list[float] = []
    for step in range(steps):
        images, objects = zip(*(draw(side) for _ in range(batch)), strict=True)
        optimizer.zero_grad()
        parts = model(list(images), list(objects))
        loss = torch.stack(list(parts.values())).sum()
        loss.backward()
        kfac.step()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: " + ", ".join(f"{name} {part.item():.3f}" for name, part in parts.items()))
    return losses


@torch.no_grad()
def find(model: nn.Module, side: int) -> Objects:
    """Returns what a detector finds in a new image: boxes, labels, scores and masks."""
    model.eval()
    return model([draw(side)[0]])[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--side", type=int, default=128, help="width and height of an image")
    arguments = parser.parse_args()
    detector = mask_rcnn(arguments.side)
    train(detector, arguments.steps, arguments.side)
    print(find(detector, arguments.side))
