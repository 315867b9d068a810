"""Score trained networks on their test tiles (paper 2.5), and draw training curves (Fig. 2).

    python eval.py runs/monuseg-unet-conv-seed0/best.pt           # one network, in detail
    python eval.py runs/*/best.pt                                 # several: the paper's Table 2
    python eval.py runs/*/best.pt --json scores.json              # the same for programs
    python eval.py runs/*/best.pt --figure fig.png                # tiles, as the paper's Figs. 3-5

Everything comes from one confusion matrix per tile. Its two averages differ by points, so both are
always shown: "per tile" is what the paper's Table 2 holds, "global" is the field's standard.
"""

import argparse
import csv
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from data import (CLASSES, PALETTE, TILE, fingerprint, get_batch, load, normalize, positive,
                  replace, run, split_tiles)
from losses import loss_for
from models import MODELS, SKIPS, autocast, build_model, load_checkpoint, pick_device

# -----------------------------------------------------------------------------
# Metrics


def predict(logits):
    """Labels (N, H, W) int64 of logits (N, C, H, W): probability above 0.5, or the largest."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


def confusion_matrices(logits, masks):
    """Count pixels -> (N, K, K) int64: [n, t, p] of tile n have true label t and prediction p.

    logits (N, C, H, W), masks (N, H, W) int64; K = C, but 2 for one logit.
    """
    n, k = len(logits), max(2, logits.shape[1])
    cells = (masks * k + predict(logits)).flatten(1)
    counts = torch.zeros(n, k * k, dtype=torch.int64, device=logits.device)
    return counts.scatter_add_(1, cells, torch.ones_like(cells)).view(n, k, k)


def score(confusions, ignore=()):
    """IoU, F1, precision and recall from confusion matrices (N, K, K) -> nested dict (paper 2.5).

    IoU = TP / (TP + FP + FN), F1 = 2 TP / (2 TP + FP + FN). "per_tile" divides within each tile,
    then takes the mean over the classes that the tile's mask holds, then over tiles: all tiles
    weigh the same, however little of a class they show. "global" first sums all tiles' pixels and
    takes the mean over the classes that occur in masks or predictions: all pixels of a class weigh
    the same. K = 2 scores label 1 alone. Pixels whose true label is in `ignore` are not counted,
    and those labels not scored. Values are 0..1, None where there is nothing to divide by.
    """
    counts = confusions.cpu().double()  # MPS has no float64
    k = counts.shape[1]
    counts[:, list(ignore)] = 0
    scored = [label for label in range(k) if label not in ignore and (k > 2 or label == 1)]

    def divide(counts):  # (..., K, K) -> each (..., K); 0/0 is nan
        hit = counts.diagonal(dim1=-2, dim2=-1)
        predicted, true = counts.sum(-2), counts.sum(-1)
        ratios = {"iou": hit / (predicted + true - hit), "f1": 2 * hit / (predicted + true),
                  "precision": hit / predicted, "recall": hit / true}
        return {name: ratio[..., scored] for name, ratio in ratios.items()}, true[..., scored]

    tiles, pixels = divide(counts)
    present = pixels > 0
    shown = present.any(dim=1)  # a tile without any class is left out
    per_tile = {name: (tiles[name].where(present, torch.tensor(0.0)).sum(1) / present.sum(1))
                for name in ("iou", "f1")}
    whole, pixels = divide(counts.sum(dim=0))
    return {
        "per_tile": {name: number(values[shown].mean()) for name, values in per_tile.items()},
        "global": {name: number(whole[name].nanmean()) for name in ("iou", "f1")},
        "classes": [{"label": label, "pixels": int(pixels[i]),
                     **{name: number(values[i]) for name, values in whole.items()}}
                    for i, label in enumerate(scored)],
        "tiles": [number(value) for value in per_tile["iou"]],
    }


def number(value):
    """A 0-dim tensor as a float, nan as None, which JSON has."""
    return None if value.isnan() else value.item()


@torch.inference_mode()
def evaluate(model, images, masks, indices, loss_fn, device, batch_size, rank=0, world=1):
    """Run the network over tiles -> confusion matrices (n, K, K) int64 and losses (n,).

    images and masks as `data.load` returns them; each of the n indices counts once. Of `world`
    processes each runs its share, and all return the whole.
    """
    model.eval()
    results = []
    for part in indices[rank::world].split(batch_size):
        batch, labels = get_batch(images, masks, part, device)
        with autocast(device):
            logits = model(normalize(batch))
        results.append((confusion_matrices(logits, labels), loss_fn(logits, labels)))
    whole = []
    for share in map(torch.cat, zip(*results)):
        values = share.new_zeros(len(indices), *share.shape[1:])
        values[rank::world] = share
        if world > 1:
            dist.all_reduce(values)
        whole.append(values)
    return whole


# -----------------------------------------------------------------------------
# Tables

PAPER = {  # Table 2: mIoU and F1 in percent
    ("bcss", "unet", "standard"): (30.44, 53.70), ("bcss", "unet", "conv"): (33.78, 47.42),
    ("bcss", "swin_unet", "standard"): (57.55, 64.39),
    ("bcss", "swin_unet", "conv"): (57.23, 64.16),
    ("bcss", "swin_unet", "fusion"): (56.59, 63.69),
    ("bcss512", "unet", "standard"): (23.96, 34.04), ("bcss512", "unet", "conv"): (23.45, 33.70),
    ("bcss512", "swin_unet", "standard"): (47.45, 53.84),
    ("bcss512", "swin_unet", "conv"): (45.78, 53.12),
    ("bcss512", "swin_unet", "fusion"): (48.11, 55.06),
    ("monuseg", "unet", "standard"): (66.27, 79.45), ("monuseg", "unet", "conv"): (67.32, 80.28),
    ("monuseg", "unet", "fusion"): (65.68, 79.03),
    ("monuseg", "swin_unet", "standard"): (63.98, 77.65),
    ("monuseg", "swin_unet", "conv"): (64.78, 78.00),
    ("monuseg", "swin_unet", "fusion"): (63.42, 76.96),
}


def percent(value):
    return "    -" if value is None else f"{100 * value:5.2f}"


def table(scores, names):
    """One network's scores as lines for people, in percent."""
    lines = ["                          IoU     F1   precision  recall     pixels"]
    for average in ("per_tile", "global"):
        iou, f1 = scores[average].values()
        lines.append(f"{average.replace('_', ' '):24}{percent(iou)}  {percent(f1)}")
    for row in scores["classes"]:
        name = names[row["label"]] if len(names) > 1 else names[0]
        lines.append(f"  {name:22}{percent(row['iou'])}  {percent(row['f1'])}       "
                     f"{percent(row['precision'])}   {percent(row['recall'])} {row['pixels']:>10,}")
    return "\n".join(lines)


def changes(result):
    """The flags by which a run's recipe differs from the paper's; empty where it does not."""
    from train import RECIPES  # here, as train.py imports this file
    args, recipe = result["args"], RECIPES[result["args"]["data"]]
    flags = [f"--{name.replace('_', '-')} {args[name]}" for name, paper in
             (("epochs", recipe["epochs"]), ("batch_size", recipe["batch_size"]),
              ("lr", recipe[args["model"]]), ("width", recipe["width"])) if args[name] != paper]
    if args["ignore_index"]:
        flags.append(f"--ignore-index {' '.join(map(str, args['ignore_index']))}")
    if args["model"] == "swin_unet" and result["weights"] == "from scratch":
        flags.append("--no-pretrained")
    return " ".join(flags)


def table_2(results, average):
    """The paper's Table 2 as Markdown: mean +- standard deviation over seeds, (the paper's).

    average: "per_tile", as the paper's, or "global". A result holds a run's args, weights and
    scores. Runs share a cell if they differ in the seed alone; ValueError if in nothing.
    """
    cells, columns = {}, []
    for result in results:
        args = result["args"]
        column, row = (args["data"], args["split"]), (args["model"], args["skip"], changes(result))
        columns += [column] if column not in columns else []
        cells.setdefault(row, {}).setdefault(column, {})
        if cells[row][column].setdefault(args["seed"], result[average]) is not result[average]:
            raise ValueError(f"two runs of {' '.join(row + column)} have seed {args['seed']}: a "
                             "mean over seeds takes each once")

    def cell(runs, metric, paper):
        values = [100 * run[metric] for run in runs.values()]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}" + (f" ({paper:.2f})" if paper else "")

    lines = ["| Model | Skip |" + "".join(f" {data}, {split} split: mIoU | F1 | Runs |"
                                          for data, split in columns),
             "|---|---|" + "--:|--:|--:|" * len(columns)]
    for row in sorted(cells, key=lambda row: ([*MODELS].index(row[0]), row[2],
                                              [*SKIPS].index(row[1]))):
        model, skip, changed = row
        line = f"| {model} {changed} | {skip} |"
        for column in columns:
            same = (average, column[1], changed) == ("per_tile", "tile", "")  # as in the paper
            paper = PAPER.get((column[0], model, skip) if same else None, (None, None))
            runs = cells[row].get(column)
            line += (f" {cell(runs, 'iou', paper[0])} | {cell(runs, 'f1', paper[1])} | "
                     f"{len(runs)} |" if runs else " - | - | - |")
        lines.append(line)
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Pictures

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def draw_curves(logs, path):
    """Draw {name: log} of one run or several as the paper's Fig. 2: loss and validation IoU.

    A log is a list of dicts, one per epoch, with at least train_loss, val_loss, val_iou_per_tile.
    """
    font = ImageFont.load_default(size=15)
    height, epochs = 460 + 24 * len(logs), max(len(log) for log in logs.values())
    picture = Image.new("RGB", (1200, height), "white")
    draw = ImageDraw.Draw(picture)
    top_loss = max(row[key] for log in logs.values() for row in log
                   for key in ("train_loss", "val_loss"))
    tenths = [10 * row["val_iou_per_tile"] for log in logs.values() for row in log]
    low_iou = min(9, math.floor(min(tenths))) / 10
    high_iou = max(low_iou + 0.1, math.ceil(max(tenths)) / 10)
    panels = [("loss: training thin, validation thick", 0, 1.05 * top_loss,
               [("train_loss", 1), ("val_loss", 3)]),
              ("validation IoU, per tile", low_iou, high_iou, [("val_iou_per_tile", 3)])]
    for panel, (title, low, high, series) in enumerate(panels):
        left, top, right, bottom = 600 * panel + 70, 60, 600 * panel + 570, 400

        def place(epoch, value):
            return (left + (right - left) * (epoch - 0.5) / epochs,
                    bottom - (bottom - top) * (value - low) / (high - low))

        # Axes: six marks up, at most ten epochs across.
        draw.text(((left + right) / 2, 32), title, "black", font, anchor="mm")
        draw.text(((left + right) / 2, bottom + 38), "epoch", "black", font, anchor="mm")
        for value in (low + (high - low) * mark / 5 for mark in range(6)):
            y = place(1, value)[1]
            draw.line((left, y, right, y), "#dddddd")
            draw.text((left - 8, y), f"{value:.2f}", "black", font, anchor="rm")
        for epoch in range(1, epochs + 1, -(-epochs // 10)):
            draw.text((place(epoch, low)[0], bottom + 14), str(epoch), "black", font, anchor="mm")
        for log, colour in zip(logs.values(), COLOURS * len(logs)):
            for key, width in series:
                points = [place(epoch, row[key]) for epoch, row in enumerate(log, 1)]
                draw.line(points, colour, width, "curve")
                for x, y in points:
                    draw.ellipse((x - width, y - width, x + width, y + width), colour)
    for i, (name, colour) in enumerate(zip(logs, COLOURS * len(logs))):
        draw.line((70, 460 + 24 * i, 110, 460 + 24 * i), colour, 3)
        draw.text((120, 460 + 24 * i), name, "black", font, anchor="lm")
    picture.save(path)


def read_log(path):
    """Read a run's log.csv -> list of dicts of floats, one per epoch."""
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


FOUND, FALSE_ALARM, MISSED = (255, 255, 255), (213, 94, 0), (86, 180, 233)


def paint(prediction, mask, num_classes):
    """Labels as colours -> (H, W, 3) uint8; of one class, what was found, missed and mistaken."""
    if num_classes > 1:
        return PALETTE[prediction]
    colours = np.zeros((*mask.shape, 3), np.uint8)
    colours[(prediction == 1) & (mask == 1)] = FOUND
    colours[(prediction == 1) & (mask == 0)] = FALSE_ALARM
    colours[(prediction == 0) & (mask == 1)] = MISSED
    return colours


def draw_figure(titles, rows, names, path):
    """Draw tiles as the paper's Figs. 3-5: image, ground truth, one column per network.

    titles: one per network; rows: (caption, image (H, W, 3), mask (H, W), predictions, captions of
    those), all uint8; names: of the classes.
    """
    font, cell, line = ImageFont.load_default(size=14), TILE + 10, 22
    if len(names) == 1:
        legend = [(f"{names[0]}, found", FOUND), ("missed", MISSED), ("false alarm", FALSE_ALARM)]
    else:
        shown = np.unique([[mask, *predictions] for _, _, mask, predictions, _ in rows])
        legend = [(names[label], tuple(PALETTE[label].tolist())) for label in shown]
    per_line = max(1, (len(titles) + 2) * cell // 190)
    height = 40 + (cell + line) * len(rows) + line * -(-len(legend) // per_line) + 10
    picture = Image.new("RGB", ((len(titles) + 2) * cell + 10, height), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(["image", "ground truth", *titles]):
        draw.text((10 + cell * column + TILE / 2, 20), title, "black", font, anchor="mm")
    for row, (caption, image, mask, predictions, captions) in enumerate(rows):
        y = 40 + (cell + line) * row
        panels = [image, *(paint(labels, mask, len(names)) for labels in [mask, *predictions])]
        for column, (panel, text) in enumerate(zip(panels, [caption, "", *captions])):
            picture.paste(Image.fromarray(panel), (10 + cell * column, y))
            draw.text((10 + cell * column, y + TILE + 4), text, "black", font)
    for i, (name, colour) in enumerate(legend):
        x, y = 10 + 190 * (i % per_line), height - 10 - line * (-(-len(legend) // per_line) -
                                                                i // per_line)
        draw.rectangle((x, y, x + 14, y + 14), colour, "black")
        draw.text((x + 20, y - 1), name, "black", font)
    picture.save(path)


def figure(args, results):
    """Draw five test tiles, from the worst to the best scored, or those named by --tiles."""
    data, split = {(result["args"]["data"], result["args"]["split"]) for result in results}.pop()
    images, masks, rows = load(data, args.data_root)
    test = split_tiles(data, rows, split)["test"]
    if any(len(result["tiles"]) != len(test) or (result["args"]["data"], result["args"]["split"])
           != (data, split) for result in results):
        raise ValueError("--figure compares networks of one data set and split: give only those")
    called = ["{}/{}/{}".format(*rows[i][:3]) for i in test]
    unknown = [name for name in args.tiles or [] if name not in called]
    if unknown:
        raise ValueError(f"--tiles {unknown[0]}: no such test tile; they are called, for one, "
                         f"{called[0]}")
    score_of = [[value or 0.0 for value in result["tiles"]] for result in results]
    order = sorted(range(len(test)), key=lambda k: sum(scores[k] for scores in score_of))
    chosen = ([called.index(name) for name in args.tiles] if args.tiles else
              [order[k] for k in sorted({round(i * (len(order) - 1) / 4) for i in range(5)})])
    batch, labels = get_batch(images, masks, test[chosen], "cpu")
    predictions = []
    for result in results:
        checkpoint = load_checkpoint(result["checkpoint"])
        model = build_model(checkpoint, result["checkpoint"]).eval()
        with torch.inference_mode():
            predictions.append(predict(model(normalize(batch))).numpy().astype(np.uint8))
    lines = [(called[k], images[test[k]].numpy(), labels[n].numpy().astype(np.uint8),
              [prediction[n] for prediction in predictions],
              [f"IoU {100 * scores[k]:.1f}" for scores in score_of])
             for n, k in enumerate(chosen)]
    titles = [f"{result['args']['model']}, {result['args']['skip']}" for result in results]
    draw_figure(titles, lines, CLASSES[data], args.figure)
    print(f"{args.figure}: {len(chosen)} test tiles")


# -----------------------------------------------------------------------------


def score_checkpoint(path, args):
    """Rebuild a checkpoint's network, data and split, and score its test tiles -> dict."""
    checkpoint = load_checkpoint(path)
    trained, device = checkpoint["args"], pick_device(args.device)
    model = build_model(checkpoint, path).to(device)
    images, masks, rows = load(trained["data"], args.data_root)
    parts = split_tiles(trained["data"], rows, trained["split"])
    if checkpoint["split"] != fingerprint(rows, parts):
        raise ValueError(f"{path}: was trained on other tiles than {args.data_root} holds, and may "
                         "have seen these test tiles: prepare the same images again")
    loss_fn = loss_for(checkpoint["num_classes"], trained["ignore_index"])
    confusions, _ = evaluate(model, images, masks, parts["test"], loss_fn, device, args.batch_size)
    return {"checkpoint": str(path), "epoch": checkpoint["epoch"], "args": trained,
            "weights": checkpoint["weights"], **score(confusions, trained["ignore_index"]),
            "confusion": confusions.sum(0).tolist()}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score trained networks on their test tiles.")
    parser.add_argument("checkpoints", nargs="+", help="best.pt of one run or of several")
    parser.add_argument("--json", metavar="FILE", help="also write all scores to FILE")
    parser.add_argument("--figure", metavar="PNG", help="draw test tiles and their predictions")
    parser.add_argument("--tiles", nargs="+", metavar="IMAGE/ROW/COLUMN",
                        help="test tiles to draw (default: five over the range of scores)")
    parser.add_argument("--curves", metavar="PNG", help="draw the runs' training curves in one")
    parser.add_argument("--data-root", default="data", help="folder of the prepared data")
    parser.add_argument("--batch-size", type=positive(int), default=8,
                        help="tiles at a time; no score depends on it")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return parser.parse_args(argv)


def main(args):
    results = [score_checkpoint(Path(path), args) for path in args.checkpoints]
    if len(results) == 1:
        trained = results[0]["args"]
        print(f"{trained['model']}, {trained['skip']} skip, {trained['data']}: "
              f"{len(results[0]['tiles'])} test tiles of the {trained['split']} split, percent")
        print(table(results[0], CLASSES[trained["data"]]))
    else:
        for average in "per_tile", "global":
            print(f"\n{average.replace('_', ' ')}, percent: mean ± standard deviation over runs"
                  f"{' (the number of the paper)' if average == 'per_tile' else ''}\n")
            print(table_2(results, average))
    if args.json:
        replace(args.json, json.dumps(results, indent=1))
    if args.figure:
        figure(args, results)
    if args.curves:
        draw_curves({path.parent.name: read_log(path.with_name("log.csv"))
                     for path in map(Path, args.checkpoints)}, args.curves)
    return results


if __name__ == "__main__":
    run(main, parse_args())
