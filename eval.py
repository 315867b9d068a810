"""Score trained networks on their test tiles (paper 2.5).

    python eval.py runs/monuseg-unet-conv-seed0/best.pt           # one network, in detail
    python eval.py runs/*/best.pt                                 # several: the paper's Table 2
    python eval.py runs/*/best.pt --json scores.json              # the same for programs
    python eval.py runs/*-official-*/best.pt --whole --tta        # whole images beside tiles
    python eval.py runs/lung-unet-conv-seed*/best.pt --ensemble   # networks of all seeds as one
    python eval.py runs/lung-*/best.pt --figure fig.png           # tiles, as the paper's Figs. 3-5
    python eval.py runs/*/best.pt --curves curves.png             # training, as the paper's Fig. 2

Everything comes from one confusion matrix per tile, or per whole image. Its two averages differ, by
half a point to a point on MoNuSeg and by more with many classes, so both are always shown: "per
tile" is what the paper's Table 2 seems to hold, "global" is usual in semantic segmentation.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import related  # noqa: F401, its skips and networks join SKIPS and MODELS
from data import (crop, fingerprint, get_batch, load, normalize, set_of, split_tiles,
                  whole_images)
from losses import loss_for
from models import build_model
from plots import draw_curves, draw_figure
from predict import predict_bands
from report import AVERAGES, check_seeds, check_test_sets, flags, percent, table_2
from utils import (LOG_SCHEMA, autocast, first_mismatch, load_checkpoint, number, output_file,
                   output_picture, pick_device, print_progress, run_cli, write_atomic,
                   write_json)

# -----------------------------------------------------------------------------
# Metrics


def logits_to_labels(logits):
    """Labels (N, H, W) int64 of logits (N, C, H, W): probability above 0.5, or the largest."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


def confusion_matrices(logits, masks):
    """Count pixels -> (N, K, K) int64: [n, t, p] of tile n have true label t and prediction p.

    logits (N, C, H, W), masks (N, H, W) int64; K = C, but 2 for one logit.
    """
    n, k = len(logits), max(2, logits.shape[1])
    cells = (masks * k + logits_to_labels(logits)).flatten(1)
    counts = torch.zeros(n, k * k, dtype=torch.int64, device=logits.device)
    return counts.scatter_add_(1, cells, torch.ones_like(cells)).view(n, k, k)


def scored_labels(k, ignore=()):
    """Those of k labels that are scored -> list; of two, label 1 alone, the foreground."""
    return [label for label in range(k) if label not in ignore and (k > 2 or label == 1)]


def compute_metrics(confusions, ignore=()):
    """IoU, F1, precision and recall from confusion matrices (N, K, K) -> nested dict (paper 2.5).

    IoU = TP / (TP + FP + FN), F1 = 2 TP / (2 TP + FP + FN). "per_tile" divides within each tile,
    then takes the mean over the classes that the tile's mask holds, then over the tiles that hold
    any: these weigh the same, however little of a class they show. "global" first sums all tiles'
    pixels and takes the mean over the classes that occur in masks or predictions: all pixels of a
    class weigh the same, those of overlapping tiles once for each. K = 2 scores label 1 alone, as
    the paper's pairs of IoU and F1 for MoNuSeg suggest. "classes" has the global scores of each
    label, "tiles" the IoU of each tile. Pixels whose true label is in `ignore` are not counted, and
    those labels not scored. Values are 0..1, None where there is nothing to divide by.
    """
    counts = confusions.cpu().double()  # MPS has no float64
    k = counts.shape[1]
    counts[:, list(ignore)] = 0
    scored = scored_labels(k, ignore)

    def divide(counts):  # (..., K, K) -> {metric: (..., S)}, pixels (..., S); S = len(scored)
        tp = counts.diagonal(dim1=-2, dim2=-1)
        predicted, true = counts.sum(-2), counts.sum(-1)
        ratios = {"iou": tp / (predicted + true - tp), "f1": 2 * tp / (predicted + true),
                  "precision": tp / predicted, "recall": tp / true}  # 0/0 is nan
        return {name: ratio[..., scored] for name, ratio in ratios.items()}, true[..., scored]

    tiles, pixels = divide(counts)
    per_tile = {name: tiles[name].where(pixels > 0, torch.nan).nanmean(dim=1)
                for name in ("iou", "f1")}  # nan: a tile without any scored class
    overall, pixels = divide(counts.sum(dim=0))
    return {
        "per_tile": {name: nan_to_none(values.nanmean()) for name, values in per_tile.items()},
        "global": {name: nan_to_none(overall[name].nanmean()) for name in ("iou", "f1")},
        "classes": [{"label": label, "pixels": int(pixels[i]),
                     **{name: nan_to_none(values[i]) for name, values in overall.items()}}
                    for i, label in enumerate(scored)],
        "tiles": [nan_to_none(value) for value in per_tile["iou"]],
    }


def nan_to_none(value):
    """A 0-dim tensor as a float, nan as None, which JSON has."""
    return None if value.isnan() else value.item()


@torch.inference_mode()
def evaluate(model, tiles, indices, loss_fn, device, batch_size, rank=0, world_size=1, bf16=False):
    """Run the network over tiles -> confusion matrices (n, K, K) int64 and losses (n,).

    tiles as `data.load` returns them; each of the n indices counts once. Of several processes each
    runs its share, and all return the whole. `bf16` computes in bfloat16 on a CPU, too.
    """
    model.eval()
    if len(indices) < world_size:  # each runs them all, as not every network takes an empty batch
        rank, world_size = 0, 1
    results, done, total = [], 0, len(indices[rank::world_size])
    for part in indices[rank::world_size].split(batch_size):
        images, masks = get_batch(tiles, part, device)
        with autocast(device, bf16):
            logits = model(normalize(images))
        results.append((confusion_matrices(logits, masks), loss_fn(logits, masks)))
        done += len(part)
        print_progress(f"scored {done * world_size} of {total * world_size} tiles")
    gathered = []
    for share in map(torch.cat, zip(*results)):
        full = share.new_zeros(len(indices), *share.shape[1:])
        full[rank::world_size] = share
        if world_size > 1:
            dist.all_reduce(full)
        gathered.append(full)
    return gathered


@torch.inference_mode()
def evaluate_whole(model, tiles, wholes, num_classes, device, tta):
    """Predict whole images as predict.py does -> confusion matrices (n, K, K) int64, one an image.

    tiles as `data.load` returns them, wholes as `data.whole_images`; `tta` averages eight views.
    """
    model.eval()
    confusions = []
    for whole in wholes.values():
        image, mask = crop(tiles, whole, 0, 0, *whole.shape)
        bands = predict_bands(model, Image.fromarray(image.cpu().numpy()), num_classes, device,
                              tta=tta)
        probs = torch.cat([band.clone() for band in bands], dim=1)[None]
        logits = probs - 0.5 if num_classes == 1 else probs  # the sign, or the largest, decides
        confusions.append(confusion_matrices(logits, mask[None].to(device).long()))
        print_progress(f"scored {len(confusions)} of {len(wholes)} images")
    return torch.cat(confusions)


def metrics_table(metrics, names):
    """One network's metrics as lines for people, in percent; names are the classes'."""
    width = max(24, *(len(name) + 3 for name in names))  # of the first column
    lines = [" " * width + "  IoU     F1   precision  recall     pixels"]
    for average, title in AVERAGES.items():
        if average in metrics:
            iou, f1 = (metrics[average][name] for name in ("iou", "f1"))
            lines.append(f"{title:{width}}{percent(iou):>5}  {percent(f1):>5}")
    for row in metrics["classes"]:
        name = "  " + (names[row["label"]] if len(names) > 1 else names[0])
        iou, f1, precision, recall = (f"{percent(row[metric]):>5}"
                                      for metric in ("iou", "f1", "precision", "recall"))
        lines.append(f"{name:{width}}{iou}  {f1}       {precision}   {recall} {row['pixels']:>10,}")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# The command


def open_data(checkpoint, path, data_root, data):
    """The tiles that a network was trained on, and the split -> Tiles, {part: indices}.

    `data` may be another set of the same tiles. `data_root` defaults to where training found them.
    Raises ValueError if tiles, classes or scale differ.
    """
    args, root = checkpoint["args"], data_root or checkpoint["data_root"]
    tiles = load(data, root, checkpoint["num_classes"])
    parts = split_tiles(data, tiles.rows, args["split"])
    if checkpoint["split"] != fingerprint(tiles.rows, parts):
        raise ValueError(f"{path}: was trained on other tiles than {Path(root, data)} holds, and "
                         "may have seen these test tiles: prepare the same images again")
    known = set_of(checkpoint, path)
    if known["classes"] != tiles.info["classes"]:
        raise ValueError(f"{path}: knows the classes {', '.join(known['classes'])}, but {data} was "
                         f"prepared with {', '.join(tiles.info['classes'])}: prepare it again, "
                         "with the same --classes")
    if known["scale"] != tiles.info["scale"]:
        raise ValueError(f"{path}: was trained at --scale {known['scale']:g}, but {data} was "
                         f"prepared with {tiles.info['scale']:g}: prepare it again, as before")
    return tiles, parts


class Ensemble(nn.Module):
    """Several networks of one kind as one: the mean of their logits.

    images (N, 3, H, W) float -> logits (N, num_classes, H, W), as each of them takes and gives.
    """

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.max_side, self.side_multiple = models[0].max_side, models[0].side_multiple

    def forward(self, images):
        return sum(model(images) for model in self.models) / len(self.models)


def build_ensemble(checkpoints, models):
    """Networks, of {path: checkpoint}, as one; ValueError if more than their seeds differ."""
    (first, one), *others = checkpoints.items()
    for path, other in others:
        if (any(other[name] != one[name]
                for name in ("split", "num_classes", "weights", "recipe_version")) or
                other["args"] | {"seed": 0} != one["args"] | {"seed": 0}):
            raise ValueError(f"{path}: was trained on other tiles than {first}, or with other "
                             "flags: an ensemble is of runs that differ in their seed alone")
    return Ensemble(models)


def open_test(checkpoint, path, options):
    """What a network is tested on -> Tiles, indices of the test tiles, {image: WholeImage}.

    The last is empty without --whole. `options` are the command's flags. Raises as `open_data` and
    `data.whole_images` do.
    """
    data = options.data or checkpoint["args"]["data"]
    tiles, parts = open_data(checkpoint, path, options.data_root, data)
    return tiles, parts["test"], whole_images(data, tiles, parts["test"]) if options.whole else {}


def score(model, checkpoint, path, test, device, options):
    """Score a network -> dict, as report.py takes it; `test` is what `open_test` returns."""
    args, model = checkpoint["args"], model.to(device)
    tiles, indices, wholes = test
    loss_fn = loss_for(checkpoint["num_classes"], args["ignore_index"])  # no score depends on it
    confusions, _ = evaluate(model, tiles, indices, loss_fn, device, options.batch_size)
    result = {"checkpoint": str(path), "epoch": len(checkpoint["log"]), "args": args,
              "recipe_version": checkpoint["recipe_version"], "weights": checkpoint["weights"],
              "set": tiles.info, "data": options.data or args["data"],
              **compute_metrics(confusions, args["ignore_index"]),
              "confusion": confusions.sum(0).tolist()}
    if wholes:
        metrics = compute_metrics(
            evaluate_whole(model, tiles, wholes, checkpoint["num_classes"], device, options.tta),
            args["ignore_index"])
        result |= {"tta": options.tta, "per_image": metrics["per_tile"], "whole": metrics["global"],
                   "images": dict(zip(wholes, metrics["tiles"]))}
    return result


def titles(results):
    """A title for each network of a figure: what it is, and the flags that not all of them have."""
    flag_lists = [[*flags(result), f"--seed {result['args']['seed']}"] for result in results]
    shared = set.intersection(*map(set, flag_lists))
    names = ["{model}, {skip}".format(**result["args"]) for result in results]
    others = [" ".join(flag for flag in own if flag not in shared) for own in flag_lists]
    return [f"{name}\n{own}".strip() for name, own in zip(names, others)]


def tile_names(tiles, indices):
    """What tiles are called in figures and by --tiles: IMAGE/ROW/COLUMN."""
    return ["{}/{}/{}".format(*tiles.rows[i][:3]) for i in indices]


def figure(models, results, tiles, indices, names, device):
    """Draw test tiles, those named or five from the worst to the best -> PIL image, how many.

    The networks, all of one data set and split, are on `device` and in evaluation mode; `results`
    are theirs, of `score`; `indices` are the test tiles'.
    """
    ious = [result["tiles"] for result in results]  # None for a tile without any class
    known = tile_names(tiles, indices)
    if names:
        chosen = [known.index(name) for name in names]
    else:
        order = sorted(range(len(known)), key=lambda k: sum(scores[k] or 0.0 for scores in ious))
        spread = np.unique(np.linspace(0, len(order) - 1, 5).round().astype(int))
        chosen = [order[k] for k in spread]
    images, _ = get_batch(tiles, indices[chosen], device)
    with torch.inference_mode():
        predictions = [logits_to_labels(model(normalize(images))).cpu().numpy().astype(np.uint8)
                       for model in models]
    rows = []
    for k, *labels in zip(chosen, *predictions):
        captions = ["IoU -" if scores[k] is None else f"IoU {100 * scores[k]:.1f}"
                    for scores in ious]
        rows.append((known[k], tiles.images[indices[k]].numpy(), tiles.masks[indices[k]].numpy(),
                     labels, captions))
    return draw_figure(titles(results), rows, tiles.info["classes"]), len(chosen)


def read_log(path):
    """Read a run's log.csv -> list of dicts of floats, one per epoch; ValueError if damaged."""
    try:
        with open(path, newline="") as file:
            log = [{name: float(value) for name, value in row.items()}
                   for row in csv.DictReader(file)]
    except (ValueError, TypeError, csv.Error):
        log = []
    if not log or first_mismatch(log, LOG_SCHEMA):
        raise ValueError(f"{path}: not the log of a run, or damaged: leave out the run or --curves")
    return log


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score trained networks on their test tiles.")
    parser.add_argument("checkpoints", nargs="+", help="best.pt of one run or of several")
    parser.add_argument("--json", type=output_file, metavar="FILE",
                        help="also write all scores to FILE")
    parser.add_argument("--figure", type=output_picture, metavar="PICTURE",
                        help="draw test tiles and their predictions")
    parser.add_argument("--tiles", nargs="+", metavar="IMAGE/ROW/COLUMN",
                        help="test tiles to draw (default: five over the range of scores)")
    parser.add_argument("--curves", type=output_picture, metavar="PICTURE",
                        help="draw the runs' training curves in one picture")
    parser.add_argument("--whole", action="store_true", help="also predict the test images as "
                        "wholes, as predict.py does, and score these (not for --split tile)")
    parser.add_argument("--tta", action="store_true",
                        help="with --whole: test-time augmentation, the average over eight flips "
                        "and turns")
    parser.add_argument("--ensemble", action="store_true",
                        help="score all checkpoints as one network, by the mean of their logits")
    parser.add_argument("--data", help="score on the masks of another prepared set of the same "
                        "tiles, as monuseg and monuseg-exact are (default: as in training)")
    parser.add_argument("--data-root", help="folder of the prepared data (default: as in training)")
    parser.add_argument("--batch-size", type=number(int), default=8,
                        help="tiles at a time; no score depends on it (default: 8)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    if args.tiles and not args.figure:
        parser.error("--tiles is for --figure: name the picture to draw")
    if args.ensemble and args.figure:
        parser.error("--figure draws each network by itself: leave out --ensemble")
    if args.tta and not args.whole:
        parser.error("--tta is for --whole: tiles are scored as they are")
    return args


def main(args):
    """Score the checkpoints -> list of results; ValueError if one cannot be used."""
    # Read and check first, so that what is wrong stops this before hours of scoring.
    device = pick_device(args.device)
    checkpoints = {Path(path): load_checkpoint(path) for path in args.checkpoints}
    sets = {(checkpoint["args"]["data"], checkpoint["args"]["split"], checkpoint["num_classes"])
            for checkpoint in checkpoints.values()}
    if args.figure and len(sets) > 1:
        raise ValueError("--figure compares networks of one data set, split and number of classes, "
                         f"and these are of {len(sets)}: name fewer checkpoints")
    models = [build_model(checkpoint, path) for path, checkpoint in checkpoints.items()]
    for path, checkpoint in checkpoints.items():
        if args.whole and checkpoint["args"]["split"] == "tile":
            raise ValueError(f"{path}: was trained with --split tile and has seen parts of all "
                             "images: --whole is for --split image or official")
    networks = [*zip(models, checkpoints.items())]
    if args.ensemble:
        networks = [(build_ensemble(checkpoints, models), next(iter(checkpoints.items())))]
        seeds = {one["args"]["seed"] for one in checkpoints.values()}
        if len(seeds) < max(2, len(args.checkpoints)):
            raise ValueError("--ensemble takes two runs or more, each of another seed: name each "
                             "once")
    else:
        check_seeds(checkpoints.values())
    tests = [open_test(checkpoint, path, args) for _, (path, checkpoint) in networks]
    check_test_sets(checkpoints.values())
    if args.tiles:
        known = tile_names(*tests[0][:2])
        if unknown := [name for name in args.tiles if name not in known]:
            raise ValueError(f"--tiles {unknown[0]}: no such test tile: give names such as "
                             f"{known[0]}")
    if args.curves:
        logs = {str(path.parent): [read_log(path.with_name("log.csv"))] for path in checkpoints}

    # Score.
    results = [score(model, checkpoint, path, test, device, args)
               for (model, (path, checkpoint)), test in zip(networks, tests)]
    if args.ensemble:
        results[0]["ensemble"] = args.checkpoints

    # Write and print.
    if args.json:
        write_json(args.json, results)
    if len(results) == 1:
        trained = results[0]["args"]
        print_progress(f"{trained['model']}, {trained['skip']} skip, {results[0]['data']}: "
                       f"{len(results[0]['tiles'])} test tiles of the {trained['split']} split, "
                       "percent\n")
        print(metrics_table(results[0], results[0]["set"]["classes"]))
    else:
        print_progress("\n")
        print("\nPercent: mean ± standard deviation over runs (in brackets: the paper's)\n")
        print(table_2(results))
    if args.figure:
        image, n = figure(models, results, *tests[0][:2], args.tiles, device)
        with write_atomic(args.figure) as file:
            image.save(file)
        print(f"{args.figure}: {n} test tiles")
    if args.curves:
        with write_atomic(args.curves) as file:
            draw_curves(logs).save(file)
    return results


if __name__ == "__main__":
    run_cli(main, parse_args)
