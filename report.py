"""Rebuild results/README.md's tables and curves from the scores.json that training leaves behind.

    python report.py results/runs/*.json                     # the page as it is committed
    python report.py runs/*/scores.json --page my_page.md    # your runs in a page of yours

The words of a page are written by hand, its tables here: each stands between two comments,
<!-- NAME --> and <!-- end -->, with NAME one of TABLES below. Scores are in percent. Training curves
(the paper's Fig. 2) are drawn beside the page, a picture for every data set, split and model.
"""

import argparse
import json
import math
import re
import statistics
from pathlib import Path

from data import replace, run
from eval import PAPER, changes, draw_curves, table_2
from models import table_1

PAPER_HOURS = {  # 3.2, to train one network on an RTX 3070
    ("monuseg", "unet"): 2, ("monuseg", "swin_unet"): 1, ("bcss", "unet"): 50,
    ("bcss", "swin_unet"): 10, ("bcss512", "unet"): 10, ("bcss512", "swin_unet"): 2}


def flags(result):
    """What `train.py` was told, so that it can be told again."""
    names = " ".join(f"--{name} {result['args'][name]}"
                     for name in ("model", "skip", "data", "split", "seed"))
    return f"{names} {changes(result)}".strip()


def markdown(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_and_error(values):
    """Mean difference +- its standard error, in percent points; of one value there is no error."""
    error = (f" ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.2f}"
             if len(values) > 1 else "")
    return f"{100 * statistics.mean(values):+.2f}{error} (n = {len(values)})"


def skip_differences(runs):
    """Per-tile test IoU of conv and fusion minus that of standard, seed by seed, image by image.

    Over seeds: whether a new run would show it again. Over test images, each the mean of its tiles
    and of all seeds: whether new images would.
    """
    def by_image(result):
        tiles = {}
        for image, iou in zip(result["images"], result["tiles"]):
            if iou is not None:
                tiles.setdefault(image, []).append(iou)
        return {image: statistics.mean(ious) for image, ious in tiles.items()}

    recipes, rows = {}, []  # recipes[what all its runs share][skip][seed]
    for result in runs:
        args = result["args"]
        recipe = args["data"], args["split"], args["model"], changes(result)
        recipes.setdefault(recipe, {}).setdefault(args["skip"], {})[args["seed"]] = result
    for (data, split, model, changed), by_skip in recipes.items():
        for skip in "conv", "fusion":
            standard, other = by_skip.get("standard", {}), by_skip.get(skip, {})
            pairs = [(other[seed], standard[seed]) for seed in sorted(standard.keys() & other)]
            if not pairs:
                continue
            seeds = [one["per_tile"]["iou"] - two["per_tile"]["iou"] for one, two in pairs]
            scores = [(by_image(one), by_image(two)) for one, two in pairs]
            images = [statistics.mean(one[name] - two[name] for one, two in scores)
                      for name in scores[0][0]]
            spread = [statistics.stdev(value["per_tile"]["iou"] for value in values)
                      for values in zip(*pairs)] if len(pairs) > 1 else []
            paper = [PAPER[data, model, name][0] for name in (skip, "standard")
                     if (data, model, name) in PAPER]
            rows.append([f"{model} {changed}", f"{data}, {split}", f"{skip} - standard",
                         mean_and_error(seeds), mean_and_error(images),
                         " / ".join(f"{100 * value:.2f}" for value in spread) or "-",
                         f"{paper[0] - paper[1]:+.2f}" if len(paper) == 2 else "-"])
    return markdown(["Model", "Data, split", "Skips", "Difference over seeds", "over test images",
                     "Deviation between seeds", "The paper's difference"], rows)


def time_to_paper(runs):
    """How long training takes until the validation IoU, per tile, passes the paper's test IoU."""
    rows = []
    for result in runs:
        data, model, skip = (result["args"][name] for name in ("data", "model", "skip"))
        if result["args"]["split"] != "tile" or (data, model, skip) not in PAPER:
            continue
        paper = PAPER[data, model, skip][0]
        ious = [100 * row["val_iou_per_tile"] for row in result["log"]]
        epoch = next((epoch for epoch, iou in enumerate(ious) if iou >= paper), None)
        rows.append([f"{model} {changes(result)}", skip, data, result["args"]["seed"],
                     f"{paper:.2f}", "not reached" if epoch is None else
                     f"{result['seconds'][epoch] / 60:.1f} min, epoch {epoch + 1}",
                     f"{max(ious):.2f}", f"{result['seconds'][-1] / 60:.1f} min, {len(ious)} "
                     "epochs", result["device"], f"{PAPER_HOURS[data, model]} h"])
    return markdown(["Model", "Skip", "Data", "Seed", "The paper's IoU", "Passed after",
                     "Best validation IoU", "Whole run", "Device", "The paper's whole run"], rows)


def mean_logs(runs):
    """Mean over seeds of the runs' logs -> {(data, split, model): {name: log for draw_curves}}."""
    logs = {}
    for result in runs:
        args = result["args"]
        name = f"{args['model']} {changes(result)}".strip() + f", {args['skip']} skip"
        by_name = logs.setdefault((args["data"], args["split"], args["model"]), {})
        by_name.setdefault(name, []).append(result["log"])
    return {key: {f"{name}, mean of {len(group)} seeds" if len(group) > 1 else name:
                  [{column: statistics.mean(row[column] for row in rows) for column in rows[0]}
                   for rows in zip(*group)] for name, group in by_name.items()}
            for key, by_name in logs.items()}


def curves(runs):
    """The pictures that main draws, shown in the page, each under its title."""
    return "\n\n".join(f"{data}, {split} split, {model}:\n\n"
                       f"![loss and validation IoU](curves-{data}-{split}-{model}.png)"
                       for data, split, model in mean_logs(runs))


def commands(runs):
    """Every run: the command that repeats it, what it ran on, and its scores."""
    rows = []
    for result in runs:
        (iou, f1), processes = result["per_tile"].values(), result["processes"]
        start = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
        rows.append([f"`{start} train.py {flags(result)}`",
                     f"{100 * iou:.2f}, {100 * f1:.2f}",
                     ", ".join(f"{100 * value:.2f}" for value in result["global"].values()),
                     result["epoch"], f"{result['seconds'][-1] / 60:.1f} min",
                     f"{result['device']}, torch {result['torch']}",
                     result["weights"]])
    return markdown(["Command", "IoU, F1 per tile", "global", "Best epoch", "Training", "On",
                     "Weights"], rows)


TABLES = {
    "parameters": lambda runs: f"```\n{table_1()}\n```",
    "scores per tile": lambda runs: table_2(runs, "per_tile"),
    "scores global": lambda runs: table_2(runs, "global"),
    "skip differences": skip_differences,
    "time to the paper's score": time_to_paper,
    "curves": curves,
    "commands": commands,
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", nargs="+", type=Path, help="scores.json of finished runs")
    parser.add_argument("--page", type=Path, default=Path("results/README.md"),
                        help="Markdown file whose tables are replaced")
    return parser.parse_args(argv)


def main(args):
    runs = []
    for path in args.scores:
        try:
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            runs[-1]["args"], runs[-1]["seconds"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path}: not the scores.json of a run: train.py writes one at the "
                             "end of a run") from None

    def table(match):
        if match[1] not in TABLES:
            raise ValueError(f"{args.page}: has no table called {match[1]!r} to fill; there are "
                             f"{', '.join(TABLES)}")
        return f"<!-- {match[1]} -->\n{TABLES[match[1]](runs)}\n<!-- end -->"

    words = args.page.read_text(encoding="utf-8")
    replace(args.page, re.sub(r"<!-- (.+?) -->\n.*?<!-- end -->", table, words, flags=re.S))
    for (data, split, model), logs in mean_logs(runs).items():
        draw_curves(logs, args.page.with_name(f"curves-{data}-{split}-{model}.png"))
    print(f"{args.page} and its curves: {len(runs)} runs")


if __name__ == "__main__":
    run(main, parse_args())
