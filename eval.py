"""Score trained networks on their test tiles (paper 2.5), and draw training curves (Fig. 2).

    python eval.py runs/monuseg-unet-conv-seed0/best.pt           # one network, in detail
    python eval.py runs/*/best.pt                                 # several: the paper's Table 2
    python eval.py runs/*/best.pt --json scores.json              # the same for programs

Everything comes from one confusion matrix per tile. Its two averages differ by points, so both are
always shown: "per tile" is what the paper's Table 2 holds, "global" is the field's standard.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from data import (CLASSES, fingerprint, get_batch, load, normalize, positive, replace, run,
                  split_tiles)
from losses import loss_for
from models import autocast, build_model, load_checkpoint, pick_device

# -----------------------------------------------------------------------------
# Metrics


def confusion_matrices(logits, masks):
    """Count pixels -> (N, K, K) int64: [n, t, p] of tile n have true label t and prediction p.

    logits (N, C, H, W), masks (N, H, W) int64. One logit is thresholded at probability 0.5 (K = 2),
    of more the largest wins (K = C).
    """
    n, k = len(logits), max(2, logits.shape[1])
    predictions = (logits[:, 0] > 0).long() if k > logits.shape[1] else logits.argmax(dim=1)
    cells = (masks * k + predictions).flatten(1)
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
    counts = confusions.double()
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


def table_2(results):
    """The paper's Table 2 as Markdown: mean +- standard deviation over seeds, (the paper's)."""
    groups, columns = {}, []
    for result in results:
        args = result["args"]
        name = args["model"] + (f" (width {args['width']})" if args["width"] != 64 else "")
        column = (args["data"], args["split"])
        columns += [column] if column not in columns else []
        groups.setdefault((name, args["model"], args["skip"]), {}).setdefault(
            column, []).append(result["per_tile"])

    def cell(runs, name, paper):
        values = [100 * run[name] for run in runs]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}" + (f" ({paper:.2f})" if paper else "")

    lines = ["| Model | Skip |" + "".join(f" {data}, {split} split: mIoU | F1 | Runs |"
                                          for data, split in columns),
             "|---|---|" + "--:|--:|--:|" * len(columns)]
    for (name, model, skip), runs in sorted(groups.items(), reverse=True):
        line = f"| {name} | {skip} |"
        for column in columns:
            paper = PAPER.get((column[0], model, skip), (None, None))
            values = runs.get(column)
            line += (f" {cell(values, 'iou', paper[0])} | {cell(values, 'f1', paper[1])} | "
                     f"{len(values)} |" if values else " - | - | - |")
        lines.append(line)
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Curves

def draw_curves(log, path, title):
    """Draw a run's log, a list of dicts with one row per epoch, as the paper's Fig. 2 does."""
    font, small = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    picture = Image.new("RGB", (1200, 480), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((600, 20), title, "black", font, anchor="mm")
    panels = [("loss", [("train_loss", "training", "#0072b2"),
                        ("val_loss", "validation", "#d55e00")]),
              ("validation scores, per tile", [("val_iou_per_tile", "IoU", "#009e73"),
                                               ("val_f1_per_tile", "F1", "#cc79a7")])]
    for panel, (heading, series) in enumerate(panels):
        left, top, right, bottom = 600 * panel + 70, 80, 600 * panel + 570, 420
        lines = [(name, colour, [row[key] for row in log]) for key, name, colour in series]
        values = [value for _, _, line in lines for value in line]
        low, high = (0, 1) if panel else (0, 1.05 * max(values))

        def place(epoch, value):
            return (left + (right - left) * (epoch - 0.5) / len(log),
                    bottom - (bottom - top) * (value - low) / (high - low))

        # Axes: five marks up, at most ten epochs across.
        draw.text(((left + right) / 2, top - 18), heading, "black", small, anchor="mm")
        for mark in range(6):
            value = low + (high - low) * mark / 5
            y = place(1, value)[1]
            draw.line((left, y, right, y), "#dddddd")
            draw.text((left - 8, y), f"{value:.2f}", "black", small, anchor="rm")
        for epoch in range(1, len(log) + 1, -(-len(log) // 10)):
            draw.text((place(epoch, low)[0], bottom + 14), str(epoch), "black", small, anchor="mm")
        draw.text(((left + right) / 2, bottom + 38), "epoch", "black", small, anchor="mm")
        for i, (name, colour, line) in enumerate(lines):
            points = [place(epoch, value) for epoch, value in enumerate(line, 1)]
            draw.line(points, colour, 3, "curve")
            for x, y in points if len(log) < 30 else []:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
            x, y = right - 110, (top + 14 if not panel else bottom - 50) + 20 * i
            draw.line((x - 30, y, x - 8, y), colour, 3)
            draw.text((x, y), name, "black", small, anchor="lm")
    picture.save(path)


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
    return {"checkpoint": str(path), "args": trained, "epoch": checkpoint["epoch"],
            **score(confusions, trained["ignore_index"]), "confusion": confusions.sum(0).tolist()}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score trained networks on their test tiles.")
    parser.add_argument("checkpoints", nargs="+", help="best.pt of one run or of several")
    parser.add_argument("--json", metavar="FILE", help="also write all scores to FILE")
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
        print(table_2(results))
        print("\nPercent, per tile: mean ± standard deviation over runs (the paper's number)")
    if args.json:
        replace(Path(args.json), json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    run(main, parse_args())
