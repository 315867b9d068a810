"""Train the paper's networks (paper 3.2): U-Net or Swin-UNet with one of three skip connections.

    python train.py                                               # synthetic data, two minutes, CPU
    python train.py --model unet --skip conv --data monuseg       # the paper's run
    python train.py --model unet --skip conv --data monuseg --resume
    torchrun --nproc-per-node 8 train.py --model unet --skip conv --data monuseg

Writes runs/DATA-MODEL-SKIP-seedK/: log.csv, curves.png, best.pt (best validation IoU), last.pt (to
resume from) and, at the end, scores.json of the test tiles.
"""

import argparse
import hashlib
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data import (CLASSES, augment, draw_augmentation, fingerprint, live, load, normalize, positive,
                  read_tiles, replace, run, split_tiles, to_batch)
from eval import draw_curves, evaluate, score, table
from losses import loss_for
from models import (MODELS, SKIPS, autocast, build_model, create_model, describe, load_checkpoint,
                    load_encoder, pick_device)

# The paper's recipes (3.2). It writes the rates "10e-3" and "10e-5" and means 1e-3 and 1e-5. The
# synthetic set's recipe is ours, sized for a laptop.
RECIPES = {
    #              epochs       batch            learning rates                       U-Net's width
    "synthetic": {"epochs": 8, "batch_size": 2, "unet": 1e-3, "swin_unet": 1e-4, "width": 16},
    "monuseg": {"epochs": 50, "batch_size": 8, "unet": 1e-3, "swin_unet": 1e-3, "width": 64},
    "bcss": {"epochs": 10, "batch_size": 50, "unet": 1e-3, "swin_unet": 1e-5, "width": 64},
    "bcss512": {"epochs": 10, "batch_size": 50, "unet": 1e-3, "swin_unet": 1e-5, "width": 64},
}

# Raised whenever the same flags train differently. Runs of other versions share no mean.
# 1: the first. 2: brightness of each colour by itself, up to 30 %. 3: one factor a tile again, up
# to 20 %, as in 1, and networks of one seed share the weights that they have in common.
RECIPE_VERSION = 3

RECIPE = ("model", "skip", "data", "split", "seed", "epochs", "batch_size", "lr", "width",
          "ignore_index")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="Where no default is named, it is the paper's.")
    # What to train
    parser.add_argument("--model", choices=MODELS, default="unet", help="network (default: unet)")
    parser.add_argument("--skip", choices=SKIPS, default="standard",
                        help="skip connections (default: standard)")
    parser.add_argument("--data", choices=RECIPES, default="synthetic",
                        help="data set (default: synthetic, drawn on the spot)")
    parser.add_argument("--split", choices=("tile", "image", "official"), default="tile",
                        help="what is drawn for testing: tiles as in the paper (default), whole "
                             "images, or the official test set")
    parser.add_argument("--seed", type=int, default=0, help="of all chance but the split's")
    # The recipe
    parser.add_argument("--epochs", type=positive(int), help="passes over the training tiles")
    parser.add_argument("--batch-size", type=positive(int), help="tiles per step")
    parser.add_argument("--lr", type=positive(float), help="Adam's learning rate")
    parser.add_argument("--width", type=positive(int), help="channels of the U-Net's first level")
    parser.add_argument("--ignore-index", type=int, nargs="+", default=[], metavar="LABEL",
                        help="labels left out of loss and scores (default: none, as the paper)")
    parser.add_argument("--weights", type=Path, help="file for Swin-UNet's encoder: Microsoft's, "
                        "timm's or a checkpoint of ours (default: timm's hub)")
    parser.add_argument("--no-pretrained", action="store_true", help="start Swin-UNet from scratch")
    # Speed and memory
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the network: pays on a GPU, not on a CPU")
    parser.add_argument("--checkpointing", action="store_true",
                        help="recompute the U-Net's largest maps: half the memory, more time")
    # Where
    parser.add_argument("--out", type=Path, help="run folder (default: runs/DATA-MODEL-SKIP-seedK)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt")
    parser.add_argument("--save-every", type=positive(float), default=5, metavar="MINUTES",
                        help="also save within an epoch, so often (default: 5)")
    parser.add_argument("--data-root", default="data", help="folder of the prepared data")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    recipe = RECIPES[args.data]
    args.epochs = args.epochs or recipe["epochs"]
    args.batch_size = args.batch_size or recipe["batch_size"]
    args.lr = args.lr or recipe[args.model]
    if args.width and args.model != "unet":
        parser.error("--width is the U-Net's: Swin-UNet's widths are fixed")
    num_classes = len(CLASSES[args.data])
    if any(num_classes == 1 or not 0 <= label < num_classes for label in args.ignore_index):
        parser.error(f"--ignore-index {args.ignore_index}: {args.data} has no such label to ignore")
    if args.model == "unet" and (args.weights or args.no_pretrained):
        parser.error("--weights and --no-pretrained are Swin-UNet's: the U-Net starts from scratch")
    args.width = args.width or recipe["width"]
    args.out = args.out or Path("runs", f"{args.data}-{args.model}-{args.skip}-seed{args.seed}")
    return args


def main(args):
    """Train, validate after every epoch, test the best one -> per-tile IoU of the test set, 0..1.

    Raises ValueError or OSError for what the user can mend; last.pt then holds the last good state.
    """
    # Where: alone, or as one of torchrun's processes, of which rank 0 prints and writes.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group()

    # Data: a set that fits goes to the GPU once, any other is read from the memory map as needed.
    images, masks, rows = load(args.data, args.data_root)
    parts = split_tiles(args.data, rows, args.split)
    num_classes, num_steps = len(CLASSES[args.data]), len(parts["train"]) // args.batch_size
    if num_steps == 0 or args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size}: give at most the {len(parts['train'])} "
                         f"training tiles, and a multiple of the {world} processes")
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 4:
        images, masks = images.to(device), masks.to(device)

    # Model, loss, optimiser. Fused Adam is the same arithmetic in fewer passes over memory.
    torch.manual_seed(args.seed)
    model = create_model(args.model, args.skip, num_classes, args.width, args.checkpointing)
    memory_format = torch.contiguous_format
    if device.type == "cuda":  # what tensor cores like; on a CPU all of this is slower
        memory_format = torch.channels_last
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    model.to(device, memory_format=memory_format)
    loss_fn = loss_for(num_classes, args.ignore_index)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and
                                  autocast(device).fast_dtype == torch.float16)
    trained = model, optimizer, scaler

    # Start, or go on from last.pt. `state` is what a checkpoint holds beside tensors.
    best, last = args.out / "best.pt", args.out / "last.pt"
    state = {"args": {name: getattr(args, name) for name in RECIPE}, "num_classes": num_classes,
             "recipe_version": RECIPE_VERSION,
             "split": fingerprint(rows, parts), "weights": "from scratch", "epoch": 0, "step": 0,
             "losses": [], "log": [], "seconds": []}  # of training, after each epoch
    if args.resume:
        state = resume(last, state, *trained)
    elif last.exists() or best.exists() or (args.out / "log.csv").exists():
        raise ValueError(f"{args.out} holds a run already: go on with it by --resume, or name "
                         "another folder with --out")
    elif args.model == "swin_unet" and not args.no_pretrained:
        state["weights"] = load_encoder(model.encoder, args.weights)
    network = model
    if world > 1:
        dist.barrier()  # every process has looked for last.pt
        if device.type == "cuda":  # statistics of the whole batch, as one process has them
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        network = nn.parallel.DistributedDataParallel(model)
    if args.compile:
        network = torch.compile(network)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        save(last, state, *trained)
        sizes = ", ".join(f"{len(indices)} {part}" for part, indices in parts.items())
        print(f"{args.model}, {args.skip} skip, {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {state['weights']}, on {device.type}")
        print(f"{args.data}: {sizes} tiles; writing {args.out}")

    log, losses = state["log"], torch.zeros(num_steps, device=device)
    losses[:state["step"]] = torch.tensor(state["losses"])
    steps_done, steps_left = 0, (args.epochs - state["epoch"]) * num_steps - state["step"]
    start = saved = shown = time.time()
    begun = start - (state["seconds"][-1] if state["seconds"] else 0)
    del state["seconds"][state["epoch"]:]  # the time until a save within an epoch
    reader = ThreadPoolExecutor(1)
    for epoch in range(state["epoch"] + 1, args.epochs + 1):
        # Train one epoch: the training tiles in an order of its own, without an incomplete batch.
        model.train()
        order = parts["train"][torch.randperm(len(parts["train"]),
                                              generator=generator(args.seed, epoch))]

        def fetch(step):  # a batch, or this process's share of it
            indices = order[step * args.batch_size:(step + 1) * args.batch_size]
            return read_tiles(images, masks, indices[rank::world], device)

        upcoming = reader.submit(fetch, state["step"])
        for step in range(state["step"], num_steps):
            # Take the batch that was read meanwhile, and warp it. Chance depends on where in the
            # run we are and on nothing else, so that resuming needs no state of generators.
            batch, labels = to_batch(upcoming.result(), device)
            upcoming = reader.submit(fetch, step + 1) if step + 1 < num_steps else None
            chance = generator(args.seed, epoch, step)
            draws = draw_augmentation(args.batch_size, chance)
            batch, labels = augment(batch, labels, {k: v[rank::world] for k, v in draws.items()})
            torch.manual_seed(chance.initial_seed() + rank)  # for Swin's stochastic depth

            # Forward, backward, step. The scaler does nothing except for float16.
            with autocast(device):
                logits = network(normalize(batch).contiguous(memory_format=memory_format))
            loss = loss_fn(logits, labels).mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[step] = loss.detach() / world
            if world > 1:
                dist.all_reduce(losses[step])

            # Once a second: is the loss a number, and how far are we. (Asking halts a GPU's queue.)
            steps_done, steps_left, now = steps_done + 1, steps_left - 1, time.time()
            if now - shown > 1 or step == num_steps - 1:
                shown = now
                check_finite(losses[:step + 1], f"epoch {epoch}, step", last)
                speed = steps_done * args.batch_size / (now - start)
                left = time.strftime("%H:%M:%S", time.gmtime(steps_left * args.batch_size / speed))
                if rank == 0:
                    live(f"epoch {epoch}/{args.epochs} step {step + 1}/{num_steps}: loss "
                         f"{losses[step].item():.4f}, {speed:.1f} images/s, {left} left")
            if rank == 0 and now - saved > 60 * args.save_every and step < num_steps - 1:
                check_finite(losses[:step + 1], f"epoch {epoch}, step", last)
                save(last, state | {"step": step + 1, "losses": losses[:step + 1].tolist(),
                                    "seconds": state["seconds"] + [now - begun]}, *trained)
                saved = now

        # Validate, then write the log, the best epoch's weights, and all that it takes to go on.
        for buffer in model.buffers() if world > 1 else ():
            dist.broadcast(buffer, 0)  # on CPUs each process has its own BatchNorm statistics
        confusions, val_losses = evaluate(model, images, masks, parts["val"], loss_fn, device,
                                          args.batch_size, rank, world)
        check_finite(val_losses, f"epoch {epoch}, validation tile", last)
        scores = score(confusions, args.ignore_index)
        log.append({"epoch": epoch, "train_loss": losses.mean().item(),
                    "val_loss": val_losses.mean().item(),
                    **{f"val_{name}_{average}": scores[average][name] or 0.0
                       for average in ("per_tile", "global") for name in ("iou", "f1")}})
        state["seconds"].append(time.time() - begun)
        state |= {"epoch": epoch, "step": 0, "losses": []}
        if rank == 0:
            live(f"epoch {epoch}/{args.epochs}: train loss {log[-1]['train_loss']:.4f}, val loss "
                 f"{log[-1]['val_loss']:.4f}, val IoU {100 * log[-1]['val_iou_per_tile']:.2f} F1 "
                 f"{100 * log[-1]['val_f1_per_tile']:.2f} per tile, {speed:.1f} images/s, "
                 f"{left} left\n")
            if log[-1]["val_iou_per_tile"] == max(row["val_iou_per_tile"] for row in log):
                save(best, state, model)
            write_log(log, args.out)
            save(last, state, *trained)
            saved = time.time()

    # Test the best epoch, once.
    if world > 1:
        dist.barrier()  # best.pt is there
    checkpoint = load_checkpoint(best)
    model = build_model(checkpoint, best).to(device)
    confusions, _ = evaluate(model, images, masks, parts["test"], loss_fn, device, args.batch_size,
                             rank, world)
    scores = score(confusions, args.ignore_index)
    if rank == 0:
        print(f"test, {len(parts['test'])} tiles, weights of epoch {checkpoint['epoch']}, percent")
        print(table(scores, CLASSES[args.data]))
        run_facts = {name: state[name] for name in ("args", "recipe_version", "weights", "log",
                                                     "seconds")} | {
            "epoch": checkpoint["epoch"], "images": [rows[i][0] for i in parts["test"]],
            "torch": torch.__version__, "device": describe(device), "processes": world}
        replace(args.out / "scores.json", json.dumps(run_facts | scores, indent=1))
        print(f"in {args.out}: best.pt, last.pt, log.csv, curves.png, scores.json")
    if world > 1:
        dist.destroy_process_group()
    return scores["per_tile"]["iou"]


def generator(*numbers):
    """A random generator for, say, (seed, epoch, step): what it yields depends on these alone."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 2)


def check_finite(losses, place, last):
    """ValueError if one of the losses is not a number: saving now would ruin the checkpoint."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        first = bad[0, 0].item()
        raise ValueError(f"the loss is {losses[first].item()} in {place} {first + 1}: try a "
                         f"smaller --lr in another --out; {last} holds the last good state")


def save(path, state, model, optimizer=None, scaler=None):
    """Write a checkpoint, weights or all that --resume needs; there is a whole one at any time."""
    tensors = {"model": model.state_dict()}
    if optimizer:
        tensors |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    buffer = io.BytesIO()
    torch.save(state | tensors, buffer)
    replace(path, buffer.getbuffer())


def resume(path, state, model, optimizer, scaler):
    """Load a checkpoint into model, optimizer and scaler, and return its state.

    Raises ValueError if this command's recipe, in `state`, contradicts the checkpoint's.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no run to go on with: start it without --resume")
    checkpoint = load_checkpoint(path)
    missing = [name for name in (*state, "optimizer", "scaler") if name not in checkpoint]
    if missing:
        raise ValueError(f"{path}: holds no {missing[0]}, nothing to go on with: a best.pt, or of "
                         "an older version? Start anew, in another --out")
    for name, value in state["args"].items():
        if checkpoint["args"].get(name) != value and name != "epochs":
            raise ValueError(f"--{name.replace('_', '-')} {value}: {path} was trained with "
                             f"{checkpoint['args'].get(name)}; give the same, or another --out")
    if checkpoint["recipe_version"] != RECIPE_VERSION:
        raise ValueError(f"{path}: was trained by version {checkpoint['recipe_version']} of the "
                         f"recipe, and this is version {RECIPE_VERSION}: start anew, in another "
                         "--out")
    if checkpoint["split"] != state["split"]:
        raise ValueError(f"{path}: was trained on other tiles: prepare the same images again")
    build_model(checkpoint, path)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return {name: checkpoint[name] for name in state} | {"args": state["args"]}


def write_log(log, folder):
    """Write log.csv and draw curves.png."""
    lines = [",".join(log[0])] + [",".join(map(repr, row.values())) for row in log]
    replace(folder / "log.csv", "\n".join(lines) + "\n")
    draw_curves({folder.name: log}, folder / "curves.png")


if __name__ == "__main__":
    run(main, parse_args(), "the same command with --resume goes on from the last save")
