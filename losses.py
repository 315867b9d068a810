"""Losses: the paper's (2.2), and others.

Each loss gives one value per tile, (N,), of which train.py takes the mean: every tile counts alike,
and no value depends on how tiles were batched. All are computed in float32, whatever the logits
are: half precision could overflow, or round a sum over 50,000 pixels.
"""

from functools import partial

import torch
import torch.nn.functional as F


def bce_loss(logits, masks, ignore=()):
    """Binary cross-entropy with logits, the mean over a tile's pixels (paper 2.2, MoNuSeg).

    logits (N, 1, H, W) float, masks (N, H, W) integer 0 or 1 -> (N,) float32.
    -y log s(x) - (1 - y) log(1 - s(x)), s the sigmoid, is softplus(x) - x y, which never overflows:
    what F.binary_cross_entropy_with_logits computes.
    `ignore` is always empty here, as one class has no label to leave out.
    """
    x, y = logits[:, 0].float(), masks.float()
    return (F.softplus(x) - x * y).mean(dim=(1, 2))


def one_hot(masks, num_classes, ignore=()):
    """masks (N, H, W) integer -> (N, C, H, W) bool, all False where a label is in `ignore`.

    With one class, the only channel is that of label 1, the foreground.
    """
    first = 1 if num_classes == 1 else 0
    classes = torch.arange(first, first + num_classes, device=masks.device)
    y = masks[:, None] == classes[:, None, None]
    for label in ignore:
        y = y & (masks != label)[:, None]
    return y


def ce_loss(logits, masks, ignore=()):
    """Cross-entropy, the mean over a tile's pixels (paper 2.2, BCSS and BCSS512).

    logits (N, C, H, W) float, masks (N, H, W) integer 0..C-1 -> (N,) float32. Pixels with a label
    in `ignore` do not count; a tile with no other pixels has loss 0.
    """
    log_p, y = F.log_softmax(logits.float(), dim=1), one_hot(masks, logits.shape[1], ignore)
    return -(log_p * y).sum(dim=(1, 2, 3)) / y.sum(dim=(1, 2, 3)).clamp(min=1)


def dice_loss(logits, masks, ignore=()):
    """Dice loss (paper 2.2): 1 - 2 sum(p y) / (sum(p) + sum(y)) over the pixels of a tile.

    logits (N, C, H, W) float, masks (N, H, W) integer -> (N,) float32, the mean over the classes
    that the tile's mask holds; the others have no overlap to measure. Pixels with a label in
    `ignore` do not count. The paper gives no formula: the averages are ours, as in our metric.
    """
    num_classes = logits.shape[1]
    # exp(log_softmax) is softmax, which differs in the last digits, on which earlier runs depend.
    p = logits.float().sigmoid() if num_classes == 1 else F.log_softmax(logits.float(), 1).exp()
    for label in ignore:
        p = p * (masks != label)[:, None]
    y = one_hot(masks, num_classes, ignore)
    counts = y.sum(dim=(2, 3))                                  # (N, C), pixels of each class
    dice = 2 * (p * y).sum(dim=(2, 3)) / (p.sum(dim=(2, 3)) + counts).clamp(min=1)
    present = counts > 0
    return ((1 - dice) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)


def focal_loss(logits, masks, ignore=()):
    """Focal loss (Lin et al., 2017): cross-entropy times (1 - p)^2, p of the true class.

    logits (N, C, H, W) float, masks (N, H, W) integer -> (N,) float32, the mean over a tile's
    pixels but those with a label in `ignore`.
    """
    logits = logits.float()
    if logits.shape[1] == 1:  # a foreground against a background, as two classes
        logits = torch.cat((torch.zeros_like(logits), logits), dim=1)
    log_p, y = F.log_softmax(logits, dim=1), one_hot(masks, logits.shape[1], ignore)
    weighted = -log_p * (1 - log_p.exp()) ** 2 * y
    return weighted.sum(dim=(1, 2, 3)) / y.sum(dim=(1, 2, 3)).clamp(min=1)


def sum_of(*losses):
    """The sum of several losses, which is a loss, too."""
    return lambda logits, masks, ignore=(): sum(loss(logits, masks, ignore) for loss in losses)


# --loss. A loss takes logits, masks and the labels to ignore. To add one, enter it here.
LOSSES = {"bce": bce_loss, "ce": ce_loss, "dice": dice_loss, "focal": focal_loss,
          "bce+dice": sum_of(bce_loss, dice_loss), "ce+dice": sum_of(ce_loss, dice_loss)}
ONE_CLASS, SEVERAL_CLASSES = ("bce", "bce+dice"), ("ce", "ce+dice")  # the others fit both


def papers_loss(num_classes):
    """The name of the paper's loss (2.2): BCE for one class, cross-entropy + Dice for more."""
    return "bce" if num_classes == 1 else "ce+dice"


def loss_for(num_classes, ignore=(), name=None):
    """The loss called `name`, or the paper's, as a function (logits, masks) -> (N,).

    Raises ValueError for a loss that does not fit this number of classes.
    """
    name = name or papers_loss(num_classes)
    unfit = SEVERAL_CLASSES if num_classes == 1 else ONE_CLASS
    if name in unfit:
        raise ValueError(f"--loss {name}: does not fit {num_classes} "
                         f"{'class' if num_classes == 1 else 'classes'}; take one of "
                         f"{', '.join(other for other in LOSSES if other not in unfit)}")
    return partial(LOSSES[name], ignore=ignore)
