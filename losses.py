"""The paper's losses, by hand (paper 2.2): BCE for one class, cross-entropy + Dice for more.

Each loss gives one value per tile, (N,), of which train.py takes the mean: every tile counts alike,
and no value depends on how tiles were batched. All are computed in float32, whatever the logits
are: half precision can neither overflow nor round a sum over 50,000 pixels.
"""

from functools import partial

import torch
import torch.nn.functional as F


def bce_loss(logits, masks):
    """Binary cross-entropy with logits, the mean over a tile's pixels (paper 2.2, MoNuSeg).

    logits (N, 1, H, W) float, masks (N, H, W) integer 0 or 1 -> (N,) float32.
    -y log s(x) - (1 - y) log(1 - s(x)), s the sigmoid, is softplus(x) - x y, which never overflows.
    """
    x, y = logits[:, 0].float(), masks.float()
    return (F.softplus(x) - x * y).mean(dim=(1, 2))


def ce_dice_loss(logits, masks, ignore=()):
    """Cross-entropy + Dice loss (paper 2.2, BCSS and BCSS512).

    logits (N, C, H, W) float, masks (N, H, W) integer 0..C-1 -> (N,) float32.
    Cross-entropy: mean over a tile's pixels. Dice loss: 1 - 2 sum(p y) / (sum(p) + sum(y)) for each
    class over a tile's pixels, mean over the classes that the tile's mask holds; the others have no
    overlap to measure. Pixels with a label in `ignore` count in neither term; a tile with no other
    pixels has loss 0. The paper gives no formula: the averages are ours, made as its metric's.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    p = log_p.exp()
    classes = torch.arange(logits.shape[1], device=masks.device)
    y = masks[:, None] == classes[:, None, None]                # (N, C, H, W), one-hot
    for label in ignore:
        valid = (masks != label)[:, None]
        y, p = y & valid, p * valid
    counts = y.sum(dim=(2, 3))                                  # (N, C), pixels of each class
    cross_entropy = -(log_p * y).sum(dim=(1, 2, 3)) / counts.sum(dim=1).clamp(min=1)
    dice = 2 * (p * y).sum(dim=(2, 3)) / (p.sum(dim=(2, 3)) + counts).clamp(min=1)
    present = counts > 0
    dice_loss = ((1 - dice) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    return cross_entropy + dice_loss


def loss_for(num_classes, ignore=()):
    """The paper's loss, (logits, masks) -> (N,), for a data set of so many classes (paper 2.2)."""
    return bce_loss if num_classes == 1 else partial(ce_dice_loss, ignore=ignore)
