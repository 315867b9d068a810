"""How the paper trains: its losses, by hand (2.2), and its recipes (3.2).

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


# -----------------------------------------------------------------------------
# Recipes

# The paper's (3.2). It writes the rates "10e-3" and "10e-5" and means 1e-3 and 1e-5. The synthetic
# set's recipe is ours, sized for a laptop. What a network's own entry holds replaces the rest.
RECIPES = {
    #             passes       tiles a step     Adam's rate  U-Net's first level
    "synthetic": {"epochs": 8, "batch_size": 2, "lr": 1e-3, "width": 16, "swin_unet": {"lr": 1e-4}},
    "monuseg": {"epochs": 50, "batch_size": 8, "lr": 1e-3, "width": 64},
    "bcss": {"epochs": 10, "batch_size": 50, "lr": 1e-3, "width": 64, "swin_unet": {"lr": 1e-5}},
    "bcss512": {"epochs": 10, "batch_size": 50, "lr": 1e-3, "width": 64, "swin_unet": {"lr": 1e-5}},
}

# Raised whenever the same flags train differently: runs of two versions share no mean.
RECIPE_VERSION = 3
RECIPE_VERSIONS = {
    1: "brightness of all colours alike, up to 20 %; skips of one seed share no weights",
    2: "brightness of red, green and blue each by itself, up to 30 %; skips share no weights",
    3: "brightness as in 1; skips of one seed share the weights that they have in common",
}


def recipe_for(data, model):
    """The values that train.py's flags default to -> {"epochs", "batch_size", "lr", "width"}."""
    recipe = RECIPES[data] | RECIPES[data].get(model, {})
    return {name: recipe[name] for name in ("epochs", "batch_size", "lr", "width")}


def recipe_overrides(args):
    """The part of a run's arguments that differs from its recipe -> {name: value}."""
    overrides = {name: args[name] for name, value in recipe_for(args["data"], args["model"]).items()
                 if args[name] != value}
    if args["ignore_index"]:
        overrides["ignore_index"] = " ".join(map(str, args["ignore_index"]))
    return overrides
