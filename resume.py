"""Start a run of train.py, or go on with one that was interrupted: its folder and its last.pt.

A resumed run trains as if it had never stopped, so last.pt must be of a run with the same flags, on
the same tiles; else one line says what differs.
"""

import torch
import torch.distributed as dist

from data import set_of
from models import MODELS, build_model
from recipes import COMMON, RECIPE_VERSION
from report import read_scores
from utils import CHECKPOINT_SCHEMA, load_checkpoint, lock_folder, on_rank_0


def open_folder(args):
    """Create and lock the run's folder.

    Raises ValueError if it holds a run that is not to be resumed, or that has no last.pt, or if
    another process writes there.
    """
    existing = [name for name in ("last.pt", "best.pt", "log.csv") if (args.out / name).exists()]
    if existing and not args.resume:
        raise ValueError(f"{args.out} holds a run already: continue it with --resume, or name "
                         "another folder with --out")
    if existing and "last.pt" not in existing:
        raise ValueError(f"{args.out} holds a {existing[0]} without the last.pt to go on from: "
                         "name another folder with --out")
    args.lock = lock_folder(args.out)  # held as long as `args` exists


def start_or_resume(args, run, model, eval_model, optimizer, scaler):
    """Load last.pt into model, `eval_model` (the same, or its average), optimizer and scaler.

    Without a last.pt a new run starts: a pretrained network then loads its encoder's weights.
    Returns the entries of `run` that this changes -> dict. Raises ValueError if last.pt cannot be
    resumed as this run, FileNotFoundError if there are no pretrained weights to start from.
    """
    checkpoint = on_rank_0(read_last, args.out / "last.pt", run, optimizer)
    if checkpoint:
        check_origin(args, checkpoint["weights"])
        restore(checkpoint, model, eval_model, optimizer, scaler)
        return {name: checkpoint[name]
                for name in ("weights", "step", "losses", "log", "seconds", "elapsed")}
    if MODELS[args.model].pretrained and not args.no_pretrained:
        weights = on_rank_0(model.load_pretrained, args.weights)
        if dist.is_initialized():
            for value in model.state_dict().values():
                dist.broadcast(value, 0)
        eval_model.load_state_dict(model.state_dict())
        return {"weights": weights}
    return {}


def check_origin(args, started):
    """ValueError if the flags ask for other initial weights than those that the run started with.

    `started` is a checkpoint's "weights": "from scratch", or where the encoder's came from.
    """
    asked = started  # where no flag says otherwise
    if args.no_pretrained:
        asked = "from scratch"
    elif args.weights:
        asked = f"encoder weights from {args.weights}"
    elif MODELS[args.model].pretrained and started == "from scratch":
        asked = "pretrained"
    if asked != started:
        raise ValueError(f"{args.out / 'last.pt'}: its initial weights: {started}; the flags ask "
                         f"for: {asked}. Give the same flags, or another --out")


def restore(checkpoint, model, eval_model, optimizer, scaler):
    """Put what last.pt holds into the four parts of a training."""
    eval_model.load_state_dict(checkpoint["model"])
    model.load_state_dict(checkpoint["trained"])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
    # Moments must lie in memory as their weights do, which depends on the device.
    for parameter, moments in optimizer.state.items():
        for name in "exp_avg", "exp_avg_sq":
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    if checkpoint["scaler"]:  # empty if it was not float16
        scaler.load_state_dict(checkpoint["scaler"])


def read_last(path, run, optimizer):
    """Read last.pt and check that it belongs to this run -> checkpoint, None if there is none.

    Raises ValueError if it is damaged, of another version or another run, or has trained for longer
    than --epochs.
    """
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path, CHECKPOINT_SCHEMA | {
        "step": int, "losses": torch.Tensor, "seconds": [float], "elapsed": float,
        "trained": {str: torch.Tensor},  # what steps change; "model" is what is scored
        "optimizer": {"state": {int: dict}}, "scaler": dict})
    for name in ("data", "model", "recipe", *run["args"]):  # first those on which others depend
        value = run["args"][name]
        before = checkpoint["args"].get(name, COMMON.get(name))  # older files lack newer flags
        # A run may be lengthened, unless its learning rate depends on its length.
        if before != value and (name != "epochs" or run["args"]["schedule"] != "constant"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: {path} was trained with "
                             f"{before}; give the same, or another --out")
    epochs, num_steps = len(checkpoint["log"]), len(run["losses"])
    if checkpoint["recipe_version"] != RECIPE_VERSION:
        raise ValueError(f"{path}: was trained by version {checkpoint['recipe_version']} of the "
                         f"recipe, and this is version {RECIPE_VERSION}: start anew, in another "
                         "--out")
    known = set_of(checkpoint, path)
    if (checkpoint["split"] != run["split"] or
            any(known[name] != run["set"][name] for name in ("classes", "scale"))):
        raise ValueError(f"{path}: was trained on other tiles, or with other classes or another "
                         "scale: prepare the same images again, with the same flags")
    if run["args"]["epochs"] * num_steps < checkpoint["step"]:
        raise ValueError(f"--epochs {run['args']['epochs']}: {path} has trained longer, "
                         f"{checkpoint['step'] / num_steps:.1f} epochs")
    for name in "model", "trained":
        build_model(checkpoint | {"model": checkpoint[name]}, path)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = checkpoint["optimizer"]["state"]
    sound = (checkpoint["step"] // num_steps == epochs == len(checkpoint["seconds"])
             and checkpoint["losses"].shape == run["losses"].shape
             and [*moments] in ([], [*range(len(parameters))])
             and all(isinstance(moment.get(name), torch.Tensor) and moment[name].shape == shape
                     for parameter, moment in zip(parameters, moments.values())
                     for name, shape in (("step", ()), ("exp_avg", parameter.shape),
                                         ("exp_avg_sq", parameter.shape))))
    if not sound:
        raise ValueError(f"{path}: its parts do not fit each other: it is damaged; start anew, in "
                         "another --out")
    return checkpoint


def finished_scores(folder, log):
    """Read the scores of a finished run -> dict.

    None if they must be made (again): there are none, they are damaged, or the run has been
    lengthened since.
    """
    try:
        scores = read_scores(folder / "scores.json")
    except (FileNotFoundError, ValueError):
        return None
    return scores if scores["log"] == log else None
