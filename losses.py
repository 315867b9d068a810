"""Losses, learning rate schedules and recipes: the paper's (2.2; 3.2, Training), and others.

Each loss gives one value per tile, (N,), of which train.py takes the mean: every tile counts alike,
and no value depends on how tiles were batched. All are computed in float32, whatever the logits
are: half precision could overflow, or round a sum over 50,000 pixels.
"""

import math
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
    # exp(log_softmax) is softmax, up to rounding, on which the last digits of earlier runs depend.
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


def loss_for(num_classes, ignore=(), name=None):
    """The loss called `name`, or the paper's (2.2), as a function (logits, masks) -> (N,).

    The paper takes BCE for one class, cross-entropy + Dice for more. Raises ValueError for a loss
    that does not fit this number of classes.
    """
    name = name or ("bce" if num_classes == 1 else "ce+dice")
    unfit = SEVERAL_CLASSES if num_classes == 1 else ONE_CLASS
    if name in unfit:
        raise ValueError(f"--loss {name}: does not fit {num_classes} "
                         f"{'class' if num_classes == 1 else 'classes'}; take one of "
                         f"{', '.join(other for other in LOSSES if other not in unfit)}")
    return partial(LOSSES[name], ignore=ignore)


# -----------------------------------------------------------------------------
# Learning rate schedules: share of the run that is done, 0..1 -> factor of the learning rate


def constant(done):
    return 1.0


def cosine(done, warm_up=0.03):
    """Rise linearly from 0 over the first 3 % of the run, then fall to 0 as half a cosine."""
    if done < warm_up:
        return done / warm_up
    return (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2


SCHEDULES = {"constant": constant, "cosine": cosine}

# -----------------------------------------------------------------------------
# Recipes

# The paper's (3.2). We read its rates, "10e-3" and "10e-5", as 1e-3 and 1e-5. The synthetic
# set's recipe is ours, sized for a laptop. An entry named after a network overrides the others. A
# set of your own takes MoNuSeg's if it has one class, else BCSS's.
RECIPES = {
    #             passes       tiles a step     Adam's rate  U-Net's first level
    "synthetic": {"epochs": 8, "batch_size": 2, "lr": 1e-3, "width": 16, "swin_unet": {"lr": 1e-4}},
    "monuseg": {"epochs": 50, "batch_size": 8, "lr": 1e-3, "width": 64},
    "bcss": {"epochs": 10, "batch_size": 50, "lr": 1e-3, "width": 64, "swin_unet": {"lr": 1e-5}},
    "bcss512": {"epochs": 10, "batch_size": 50, "lr": 1e-3, "width": 64, "swin_unet": {"lr": 1e-5}},
}
# What all of them have in common; a loss of None is the paper's for that number of classes.
COMMON = {"classes": None, "loss": None, "schedule": "constant", "weight_decay": 0.0, "ema": 0.0,
          "augment": "all", "windows": 0.0, "stain": 0.0, "skip_depth": 1, "bf16": False}

# --recipe strong, for each of them: what later work found to pay. results/README.md tells what all
# of it together gives to a U-Net on MoNuSeg. Swin-UNet's rate and the 200 passes are untried.
STRONG = {"lr": 2e-3, "schedule": "cosine", "weight_decay": 0.05, "ema": 0.999, "windows": 0.25,
          "stain": 0.25, "swin_unet": {"lr": 2e-4}}
RECIPES |= {f"{name} strong": paper | STRONG for name, paper in RECIPES.items()}
RECIPES["synthetic strong"] |= {"loss": "bce+dice"}
RECIPES["monuseg strong"] |= {"loss": "bce+dice", "epochs": 200}

# Raised whenever the same flags train differently: runs of two versions are never averaged.
RECIPE_VERSION = 3
RECIPE_VERSIONS = {
    1: "brightness of all colours alike, up to 20 %; skips of one seed share no initial weights",
    2: "brightness of red, green and blue each by itself, up to 30 %; no common initial weights",
    3: "brightness as in 1; skips of one seed have the same initial weights in common layers",
}


def recipe_for(recipe, model):
    """The values that train.py's flags default to, of a row of RECIPES -> {flag: value}."""
    values = COMMON | RECIPES[recipe]
    values |= values.get(model, {})  # what the recipe says of this network
    return {name: value for name, value in values.items() if not isinstance(value, dict)}


def recipe_overrides(args):
    """The part of a run's arguments, a dict, that differs from its recipe -> {flag: value}."""
    recipe = recipe_for(args.get("recipe", args["data"]), args["model"])  # older runs name none
    overrides = {name: args[name] for name, value in recipe.items()
                 if args.get(name, value) != value}
    if args["ignore_index"]:
        overrides["ignore_index"] = " ".join(map(str, args["ignore_index"]))
    return overrides
