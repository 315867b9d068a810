"""Recipes, the paper's (3.2, Training) and ours: what the flags of train.py default to."""

import math

# The paper's. We read its rates, "10e-3" and "10e-5", as 1e-3 and 1e-5. The synthetic set's recipe
# is ours, sized for a laptop. An entry named after a network overrides the others. A set of your
# own takes MoNuSeg's if it has one class, else BCSS's.
RECIPES = {
    #             epochs       tiles a step     Adam's rate  U-Net's first level
    "synthetic": {"epochs": 8, "batch_size": 2, "lr": 1e-3, "width": 16, "swin_unet": {"lr": 1e-4}},
    "monuseg": {"epochs": 50, "batch_size": 8, "lr": 1e-3, "width": 64},
    "bcss": {"epochs": 10, "batch_size": 50, "lr": 1e-3, "width": 64, "swin_unet": {"lr": 1e-5}},
    "bcss512": {"epochs": 10, "batch_size": 50, "lr": 1e-3, "width": 64, "swin_unet": {"lr": 1e-5}},
}
# What all of them have in common; a loss of None is the paper's for that number of classes.
COMMON = {"classes": None, "loss": None, "schedule": "constant", "weight_decay": 0.0, "ema": 0.0,
          "augment": "all", "windows": 0.0, "stain": 0.0, "skip_depth": 1, "bf16": False}

# --recipe strong, for each of them: what is common in later work. results/README.md tells what all
# of it together gives to a U-Net and a Swin-UNet on MoNuSeg, and what its 200 epochs add to 60.
STRONG = {"lr": 2e-3, "schedule": "cosine", "weight_decay": 0.05, "ema": 0.999, "windows": 0.25,
          "stain": 0.25, "swin_unet": {"lr": 2e-4}}
RECIPES |= {f"{name} strong": paper | STRONG for name, paper in RECIPES.items()}
RECIPES["synthetic strong"]["loss"] = "bce+dice"
RECIPES["monuseg strong"] |= {"loss": "bce+dice", "epochs": 200}

# Raised whenever the same flags train differently: runs of two versions are never averaged.
RECIPE_VERSION = 3
RECIPE_VERSIONS = {
    1: "brightness of all colours alike, up to 20 %; skips of one seed share no initial weights",
    2: "brightness of red, green and blue each by itself, up to 30 %; no common initial weights",
    3: "brightness as in 1; skips of one seed have the same initial weights in common layers",
}


def recipe_for(recipe, model):
    """The values that train.py's flags default to, of a row of RECIPES -> {flag: value}.

    Raises ValueError for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe is called {recipe!r}: there are {', '.join(RECIPES)}")
    values = COMMON | RECIPES[recipe]
    values |= values.get(model, {})  # what the recipe says of this network
    return {name: value for name, value in values.items() if not isinstance(value, dict)}


def recipe_overrides(args):
    """The part of a run's arguments, a dict, that differs from its recipe -> {flag: value}."""
    recipe = recipe_for(args["recipe"], args["model"])
    overrides = {name: args[name] for name, value in recipe.items()
                 if args.get(name, value) != value}  # older runs lack newer flags
    if args["ignore_index"]:
        overrides["ignore_index"] = " ".join(map(str, args["ignore_index"]))
    return overrides


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
