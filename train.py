"""Train the paper's networks (3.2, Training): U-Net or Swin-UNet, with one of three kinds of skip.

    python train.py                                               # synthetic data, two minutes
    python train.py --model unet --skip conv --data monuseg       # the paper's run
    python train.py --model unet --skip conv --data monuseg --resume
    torchrun --nproc-per-node 8 train.py --model unet --skip conv --data monuseg

Writes runs/DATA-MODEL-SKIP-seedK/: log.csv, curves.png, best.pt (best validation IoU), last.pt (to
resume from) and, at the end, scores.json of the test tiles.
"""

import argparse
import time
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import related  # noqa: F401, its skips and networks join SKIPS and MODELS
from data import (AUGMENTATIONS, SPLITS, fingerprint, load, normalize, read_info, split_tiles,
                  train_batches, whole_images)
from eval import compute_metrics, evaluate, metrics_table, scored_labels
from losses import LOSSES, loss_for, papers_loss
from models import MODELS, MAX_SKIP_DEPTH, SKIPS, build_model, create_model
from plots import draw_curves
from recipes import COMMON, RECIPE_VERSION, RECIPES, SCHEDULES, recipe_for, recipe_overrides
from resume import finished_scores, open_folder, start_or_resume
from utils import (ARGS_SCHEMA, autocast, device_name, leave_processes, load_checkpoint,
                   memory_format_for, number, on_rank_0, output_folder, pick_device, print_progress,
                   run_cli, save_checkpoint, setup_processes, write_atomic, write_json)

# The flags that checkpoints and scores.json record: all on which a run's digits depend by more than
# rounding. (The origin of pretrained weights has an entry of its own, "weights". The number of
# processes matters, too, but is torchrun's.)
RECORDED = [*ARGS_SCHEMA | COMMON]

# Seconds: an epoch that ends so soon after a save is not saved, unless it is the best or the last.
SAVE_GAP = 30

LOWER_RATE = "try a smaller --lr in another --out; if {} exists, it holds the last good state"


def parse_args(argv=None):
    paper = {name: recipe for name, recipe in RECIPES.items() if not name.endswith(" strong")}
    papers = "; ".join("{}: --epochs {epochs} --batch-size {batch_size} --lr {lr:g} --width {width}"
                       .format(name, **recipe) for name, recipe in paper.items())
    swin = ", ".join(f"{recipe['swin_unet']['lr']:g} on {name}" for name, recipe in paper.items()
                     if "swin_unet" in recipe)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Where no default is named, it is the recipe's, in recipes.py. The paper's recipes: "
               f"{papers}; swin_unet: --lr {swin}. A set of your own takes monuseg's if it has one "
               "class, else that of bcss.")
    # What to train
    parser.add_argument("--model", choices=MODELS, default="unet",
                        help="network; double_unet is another paper's (default: unet)")
    parser.add_argument("--skip", choices=SKIPS, default="standard",
                        help="skip connections; nested and fusionunet are other papers' (default: "
                        "standard)")
    parser.add_argument("--skip-depth", type=number(int, maximum=MAX_SKIP_DEPTH), metavar="N",
                        help="conv and fusion: N 1x1 convolutions in a row, with ReLU between "
                             "them, to make y_i; the paper has one (default: 1)")
    parser.add_argument("--data", default="synthetic", help="monuseg, monuseg-exact, bcss, "
                        "bcss512, or a prepared set of your own (default: synthetic, drawn on the "
                        "spot)")
    parser.add_argument("--classes", type=number(int, minimum=3, maximum=22), metavar="K",
                        help="synthetic: regions and nuclei of 3 to 22 classes instead of nuclei "
                             "alone; the tiles are the same for every K, with labels K to 21 "
                             "merged into those that they are part of")
    parser.add_argument("--split", choices=SPLITS,
                        help="what is drawn for testing: tiles, as in the paper, or whole images; "
                             "official takes the parts that the set came in, official-sites "
                             "validates on other tissue source sites than it trains on, "
                             "official-all also trains on the validation images (default: tile; "
                             "own sets: official if they came in parts, else image)")
    parser.add_argument("--seed", type=number(int, minimum=0, maximum=2**63 - 1), default=0,
                        help="of everything random except the split and the synthetic tiles "
                        "(default: 0)")
    # The recipe
    parser.add_argument("--recipe", choices=("paper", "strong"), default="paper",
                        help="what the flags below default to: the paper's values, or those common "
                        "in later work (default: paper)")
    parser.add_argument("--epochs", type=number(int, maximum=10**6),
                        help="passes over the training tiles (strong: 200 for monuseg)")
    parser.add_argument("--batch-size", type=number(int), help="tiles per step")
    parser.add_argument("--lr", type=number(float), help="Adam's learning rate (strong: 0.002; "
                        "swin_unet 0.0002)")
    parser.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate: constant, "
                        "or cosine with warm-up (strong: cosine)")
    parser.add_argument("--weight-decay", type=number(float, minimum=0), help="AdamW's; "
                        "biases and norms never decay (strong: 0.05; 0: none)")
    parser.add_argument("--ema", type=number(float, minimum=0, maximum=0.9999), metavar="DECAY",
                        help="score an exponential moving average of the weights (strong: 0.999; "
                        "0: the weights themselves)")
    parser.add_argument("--loss", choices=LOSSES, help="bce and bce+dice are for one class, ce and "
                        "ce+dice for several (paper: bce, or ce+dice; strong: bce+dice, or "
                        "ce+dice)")
    parser.add_argument("--augment", nargs="+", choices=("all", "none", *AUGMENTATIONS),
                        help="augmentations of training tiles (default: all)")
    parser.add_argument("--windows", type=number(float, minimum=0, maximum=1), metavar="SCALE",
                        help="train on windows, random crops of whole images, scaled by up to "
                        "exp(+-SCALE) (strong: 0.25; 0: on the tiles as they are)")
    parser.add_argument("--stain", type=number(float, minimum=0, maximum=1), metavar="STRENGTH",
                        help="vary each tile's hematoxylin, eosin and residual by up to this "
                        "share (strong: 0.25; 0: do not)")
    parser.add_argument("--width", type=number(int, maximum=1024),
                        help="channels of the U-Net's first level")
    parser.add_argument("--ignore-index", type=int, nargs="+", default=[], metavar="LABEL",
                        help="labels left out of loss and scores (default: none, as the paper)")
    encoder = parser.add_mutually_exclusive_group()
    encoder.add_argument("--weights", type=Path, help="file for the encoder: Microsoft's or timm's "
                         "for Swin-UNet, torchvision's for DoubleU-Net, or a checkpoint of ours "
                         "(default: timm's hub, torchvision's download)")
    encoder.add_argument("--no-pretrained", action="store_true",
                         help="start Swin-UNet or DoubleU-Net from scratch")
    # Speed and memory
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 on a "
                        "CPU, too: it may pay on one with instructions for it (avx512_bf16, amx) "
                        "and is slower on others, often far slower; CUDA always trains in half "
                        "precision")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the network, but for recomputed blocks (it has not "
                        "paid where we timed it)")
    parser.add_argument("--checkpointing", action="store_true",
                        help="recompute the U-Net's largest feature maps instead of keeping them: "
                        "at least a third less memory, more time (other networks ignore this)")
    # Where
    parser.add_argument("--out", type=output_folder, help="run folder (default: "
                        "runs/DATA-MODEL-SKIP, what differs from the recipe, and the seed)")
    parser.add_argument("--resume", action="store_true",
                        help="continue from the run folder's last.pt, or start if it holds no run")
    parser.add_argument("--save-every", type=number(float), default=5, metavar="MINUTES",
                        help="how often to save within an epoch (default: 5)")
    parser.add_argument("--data-root", default="data", help="folder of the prepared data "
                        "(default: data)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    return complete(parser.parse_args(argv), parser)


def complete(args, parser):
    """Refuse flags that contradict each other, and fill in the recipe's values -> args."""
    if args.classes and args.data != "synthetic":
        parser.error("--classes is for synthetic: other sets have the classes of their masks")
    info, pretrained = read_info(args.data, args.data_root), MODELS[args.model].pretrained
    if args.width and pretrained:
        parser.error(f"--width is the U-Net's: the widths of {args.model} are fixed")
    if (args.weights or args.no_pretrained) and not pretrained:
        parser.error("--weights and --no-pretrained are for networks that start from ImageNet's "
                     f"weights: {args.model} starts from scratch")
    if args.augment:
        if len(args.augment) > 1 and {"all", "none"} & {*args.augment}:
            parser.error("--augment: all and none stand alone")
        args.augment = " ".join(name for name in ("all", "none", *AUGMENTATIONS)
                                if name in args.augment)
    args.ignore_index = sorted({*args.ignore_index})
    args.recipe = info["recipe"] + (" strong" if args.recipe == "strong" else "")
    args.split = args.split or info["split"]
    if args.classes and args.recipe.endswith(" strong") and not args.loss:
        args.loss = "ce+dice"  # the recipe's own, bce+dice, is for one class
    recipe = recipe_for(args.recipe, args.model)
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not recipe["loss"] and args.loss == papers_loss(args.classes or len(info["classes"])):
        args.loss = None  # the paper's, whether it was named or not
    if args.windows and args.split == "tile":
        parser.error("--windows cuts tiles out of whole images, of which --split tile tests on "
                     "parts: give --windows 0, as BCSS needs in any case, --split image, or "
                     "official if the set came in parts")
    args.out = args.out or default_folder(args, info["split"])
    return args


def default_folder(args, default_split):
    """runs/DATA-MODEL-SKIP-seedK, and before the seed whatever is not the recipe's.

    A file of --weights is not named, as it is mostly the default's by another way.
    """
    changed = [] if args.split == default_split else [args.split]
    changed += ["strong"] if args.recipe.endswith(" strong") else []
    for name, value in recipe_overrides(vars(args)).items():
        changed.append(name.replace("_", "") + ("" if value is True else str(value)))
    changed += ["scratch"] if args.no_pretrained else []
    parts = [args.data, args.model, args.skip, *changed, f"seed{args.seed}"]
    return Path("runs", "-".join(parts).replace(" ", "-"))


def main(args):
    """Train, validate after every epoch, test the best one -> per-tile IoU of the test set, 0..1.

    Raises ValueError or OSError for what the user can mend; last.pt then has the last good state.
    """
    device = pick_device(args.device)
    rank, world_size = setup_processes(device)
    tiles, parts, wholes = load_data(args, device, world_size)
    num_classes = len(tiles.info["classes"])
    loss_fn = loss_for(num_classes, args.ignore_index, args.loss)
    raw_model, eval_model, optimizer, scaler = build_training(args, num_classes, device)
    num_steps = len(parts["train"]) // args.batch_size  # in an epoch
    memory_format = memory_format_for(device, args.bf16)

    # Start, or go on from last.pt.
    on_rank_0(open_folder, args)
    run = new_run(args, tiles, parts, num_steps)
    run |= start_or_resume(args, run, raw_model, eval_model, optimizer, scaler)
    log, losses, total = run["log"], run["losses"].to(device), args.epochs * num_steps
    if run["step"] == total and (scores := on_rank_0(finished_scores, args.out, log)):
        print(f"{args.out} is finished; its scores are in scores.json")
        leave_processes()
        return scores["per_tile"]["iou"]
    model = wrap(raw_model, args.compile, device, world_size)
    print_start(args, raw_model, run["weights"], parts, device)
    start = last_save = last_print = time.time()
    first_step, began = run["step"], start - run["elapsed"]  # began: as if never interrupted

    def save(name, **more):
        if rank == 0:
            run["losses"], run["elapsed"] = losses.cpu(), time.time() - began
            save_checkpoint(args.out / name, run | {"model": eval_model.state_dict()} | more)

    def save_last(epoch, batch_index):
        check_finite(losses[:batch_index + 1], epoch, "step", args.out)
        check_weights(raw_model, epoch, args.out)
        save("last.pt", trained=raw_model.state_dict(), optimizer=optimizer.state_dict(),
             scaler=scaler.state_dict())

    if rank == 0 and log and first_step % num_steps == 0:
        finish_epoch(args.out, log, save)  # a kill may have come between an epoch's writes
    batches = train_batches(tiles, parts["train"], args.batch_size, args.seed, first_step, total,
                            device, rank, world_size, args.augment, wholes, args.windows,
                            args.stain)
    model.train()
    for step, (images, masks) in enumerate(batches, first_step):
        # Forward, backward, step. The scaler does nothing except for float16.
        epoch, batch_index = step // num_steps + 1, step % num_steps  # counted from 1 and from 0
        for group in optimizer.param_groups:
            group["lr"] = args.lr * SCHEDULES[args.schedule](step / total)
        with autocast(device, args.bf16):
            logits = model(normalize(images).contiguous(memory_format=memory_format))
        loss = loss_fn(logits, masks).sum() * world_size / args.batch_size  # DDP averages gradients
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if args.ema:
            update_ema(eval_model, raw_model, step, args.ema)
        losses[batch_index] = loss.detach() / world_size
        if world_size > 1:
            dist.all_reduce(losses[batch_index])  # the sum: the mean over the whole batch
        run["step"], now, last_of_epoch = step + 1, time.time(), batch_index == num_steps - 1

        # Print progress once a second, as reading the loss waits for the GPU. Save now and then.
        if (rank == 0 and now - last_print > 1) or last_of_epoch:
            last_print = now
            check_finite(losses[:batch_index + 1], epoch, "step", args.out)
            speed = args.batch_size * (run["step"] - first_step) / max(now - start, 1e-3)
            eta = timedelta(seconds=round((total - run["step"]) * args.batch_size / speed))
            print_progress(f"epoch {epoch}/{args.epochs} step {batch_index + 1}/{num_steps}: loss "
                           f"{losses[batch_index].item():.4f}, {speed:.1f} images/s, {eta} left")
        if rank == 0 and now - last_save > 60 * args.save_every and not last_of_epoch:
            save_last(epoch, batch_index)
            last_save = now
        if not last_of_epoch:
            continue

        # Validate; write what it takes to go on (see SAVE_GAP), the log, the best epoch's weights.
        row = {"epoch": epoch, "train_loss": losses.mean().item()} | validate(
            args, epoch, eval_model, tiles, parts["val"], loss_fn, device, rank, world_size)
        log.append(row)
        run["seconds"].append(time.time() - began)
        gap = time.time() - last_save
        if is_best(log) or run["step"] == total or (rank == 0 and gap > SAVE_GAP):
            save_last(epoch, batch_index)
            last_save = time.time()
        if rank == 0:
            finish_epoch(args.out, log, save)
        print_progress(f"epoch {epoch}/{args.epochs}: train loss {row['train_loss']:.4f}, val "
                       f"loss {row['val_loss']:.4f}, val IoU {100 * row['val_iou_per_tile']:.2f} "
                       f"F1 {100 * row['val_f1_per_tile']:.2f} per tile, {speed:.1f} images/s, "
                       f"{eta} left\n")
        model.train()

    # Test the best epoch, once.
    metrics = test(args, run, tiles, parts["test"], loss_fn, device, rank, world_size)
    leave_processes()
    return metrics["per_tile"]["iou"]


def load_data(args, device, world_size):
    """The tiles, the split that the flags ask for and, for windows, the whole training images.

    Raises what `read_data` does, in all processes, and ValueError if nodes have different tiles.
    """
    try:
        tiles, parts, wholes = read_data(args, world_size)
        mine = fingerprint(tiles.rows, parts)
    except (ValueError, OSError) as error:  # not raised at once: another node would wait for ever
        mine = error
    found = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(found, mine)
    failed = next((one for one in found if isinstance(one, Exception)), None)
    if not failed and len(set(found)) > 1:
        failed = ValueError(f"{Path(args.data_root, args.data)}: nodes have different tiles: "
                            "prepare the same images on all of them")
    if failed:
        leave_processes()
        raise failed

    # A set that fits goes to the GPU once, any other is read from the memory map as needed.
    size = tiles.images.nbytes + tiles.masks.nbytes
    if device.type == "cuda" and size < torch.cuda.mem_get_info()[0] / 4:
        tiles.images, tiles.masks = tiles.images.to(device), tiles.masks.to(device)
    return tiles, parts, wholes


def read_data(args, world_size):
    """Open the set, split it, and check the flags against both -> what `load_data` returns.

    Raises ValueError for flags that do not fit the data, and what `data.load` and
    `data.whole_images` raise.
    """
    tiles = load(args.data, args.data_root, args.classes or 1)
    parts = split_tiles(args.data, tiles.rows, args.split)
    if not world_size <= args.batch_size <= len(parts["train"]):
        raise ValueError(f"--batch-size {args.batch_size}: give at most the {len(parts['train'])} "
                         f"training tiles, and no fewer than there are processes, {world_size}")
    num_classes = len(tiles.info["classes"])
    ignored = f"--ignore-index {' '.join(map(str, args.ignore_index))}"
    if num_classes == 1 and args.ignore_index:
        raise ValueError(f"{ignored}: {args.data} has one class, and no other label to ignore: "
                         "leave it out")
    if any(not 0 <= label < num_classes for label in args.ignore_index):
        raise ValueError(f"{ignored}: {args.data} has no such label to ignore: give some of 0 to "
                         f"{num_classes - 1}")
    if not scored_labels(max(2, num_classes), args.ignore_index):
        raise ValueError(f"{ignored}: leaves no label to score: name fewer")
    return tiles, parts, whole_images(args.data, tiles, parts["train"]) if args.windows else None


def new_run(args, tiles, parts, num_steps):
    """What a checkpoint holds beside weights and optimizer, before the first step -> dict."""
    return {"args": {name: getattr(args, name) for name in RECORDED},
            "num_classes": len(tiles.info["classes"]), "set": tiles.info,
            "split": fingerprint(tiles.rows, parts), "data_root": args.data_root,
            "recipe_version": RECIPE_VERSION, "weights": "from scratch", "step": 0,
            "losses": torch.zeros(num_steps), "log": [], "seconds": [], "elapsed": 0.0}


def build_training(args, num_classes, device):
    """Build what is trained -> network, `eval_model`, optimizer, gradient scaler.

    What is scored, eval_model, is the moving average of the weights with --ema, else the network
    itself. The scaler is enabled for float16 alone. Raises ValueError for --bf16 on MPS.
    """
    if args.bf16 and device.type == "mps":
        raise ValueError("--bf16: MPS trains in float32: leave it out, or add --device cpu")
    torch.manual_seed(args.seed)
    model = create_model(args.model, args.skip, num_classes, args.width, args.checkpointing,
                         args.skip_depth)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    model.to(device, memory_format=memory_format_for(device, args.bf16))
    # Without weight decay, the default, AdamW is Adam. Fused, it is the same arithmetic in fewer
    # passes. Biases and norms, vectors, never decay; Swin's position bias tables do.
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": args.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}], args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast(device).fast_dtype == torch.float16)
    return model, deepcopy(model) if args.ema else model, optimizer, scaler


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Move `ema`, a copy of the network, a little towards `model`, as it is after this step.

    `step` counts from 0; `decay`, 0..1, is the share of the average that stays. It is smaller at
    first, as early weights are not worth remembering. BatchNorm's statistics are averaged, too.
    """
    decay = min(decay, (step + 1) / (step + 10))
    for mean, value in zip(ema.state_dict().values(), model.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:  # BatchNorm's count of batches
            mean.copy_(value)


def wrap(model, compiled, device, world_size):
    """The network as it is trained, for several processes and compiled where asked for."""
    if world_size > 1:
        if device.type == "cuda":  # statistics of the whole batch, as one process has them
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = nn.parallel.DistributedDataParallel(model)
    return torch.compile(model) if compiled else model


def print_start(args, model, weights, parts, device):
    print(f"{args.model}, {args.skip} skip, {sum(p.numel() for p in model.parameters()):,} "
          f"parameters, {weights}, on {device.type}")
    sizes = ", ".join(f"{len(indices)} {part}" for part, indices in parts.items())
    print(f"{args.data}: {sizes} tiles; writing {args.out}")


def validate(args, epoch, model, tiles, indices, loss_fn, device, rank, world_size):
    """Score the validation tiles -> their entries in a row of the log, {name: value}.

    Raises ValueError for a loss that is not finite.
    """
    if world_size > 1:  # on CPUs each process has its own BatchNorm statistics
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    confusions, losses = evaluate(model, tiles, indices, loss_fn, device, args.batch_size, rank,
                                  world_size, args.bf16)
    check_finite(losses, epoch, "validation tile", args.out)
    metrics = compute_metrics(confusions, args.ignore_index)
    return {"val_loss": losses.mean().item(),
            **{f"val_{name}_{average}": metrics[average][name] or 0.0  # None: no class on any tile
               for average in ("per_tile", "global") for name in ("iou", "f1")}}


def check_finite(losses, epoch, what, out):
    """ValueError if a loss of this epoch is not finite; `what` names what it is of, say, "step"."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        first = bad[0, 0].item()
        raise ValueError(f"the loss is {losses[first].item()} in epoch {epoch}, {what} "
                         f"{first + 1}: {LOWER_RATE.format(out / 'last.pt')}")


def check_weights(model, epoch, out):
    """ValueError if a weight is not finite: saving now would ruin the checkpoint."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"weights are not finite in epoch {epoch}: "
                         f"{LOWER_RATE.format(out / 'last.pt')}")


def finish_epoch(folder, log, save):
    """Write log.csv, curves.png and, if the last epoch is the best one so far, best.pt."""
    lines = [",".join(log[0])] + [",".join(map(repr, row.values())) for row in log]
    with write_atomic(folder / "log.csv") as file:
        file.write(("\n".join(lines) + "\n").encode())
    with write_atomic(folder / "curves.png") as file:
        draw_curves({folder.name: [log]}).save(file)
    if is_best(log):
        save("best.pt")


def is_best(log):
    """Whether the last epoch's validation IoU is the best so far, or equal to it."""
    return log[-1]["val_iou_per_tile"] == max(row["val_iou_per_tile"] for row in log)


def test(args, run, tiles, indices, loss_fn, device, rank, world_size):
    """Score the test tiles with the best epoch's weights; print and write scores -> metrics."""
    checkpoint = on_rank_0(load_checkpoint, args.out / "best.pt")
    model = build_model(checkpoint, args.out / "best.pt").to(device)
    # Without --bf16, as eval.py scores: both print the same digits.
    confusions, _ = evaluate(model, tiles, indices, loss_fn, device, args.batch_size, rank,
                             world_size)
    metrics = compute_metrics(confusions, args.ignore_index)
    print_progress(f"test, {len(indices)} tiles, weights of epoch {len(checkpoint['log'])}, "
                   "percent\n")
    print(metrics_table(metrics, tiles.info["classes"]))
    if rank == 0:
        if checkpoint["args"] != run["args"]:  # the run was lengthened after its best epoch
            save_checkpoint(args.out / "best.pt", checkpoint | {"args": run["args"]})
        names = "args", "set", "recipe_version", "weights", "log", "seconds"
        facts = {name: run[name] for name in names} | {
            "epoch": len(checkpoint["log"]), "images": [tiles.rows[i].image for i in indices],
            "torch": torch.__version__, "device": device_name(device), "processes": world_size}
        write_json(args.out / "scores.json", facts | metrics)
    print(f"in {args.out}: best.pt, last.pt, log.csv, curves.png, scores.json")
    return metrics


if __name__ == "__main__":
    run_cli(main, parse_args, "the same command with --resume goes on from the last save")
