"""When does fusion pay? The paper's open question (4.1), asked of 1 to 22 classes.

    python complexity.py              # draw the sets, train all runs, make the page; hours
    python complexity.py --jobs 4     # four runs at a time
    python complexity.py --report     # the page alone, from results/complexity/*.json

Synthetic tissue (synthetic.py) stays the same while its labels are merged to 1, 3, 6, 12 and 22
classes, or keeps 6 classes while its regions grow. A run, which results/complexity/README.md calls
a cell, is one network trained on one of these sets by train.py. What is compared, and what counts
as a result, was written down there before the first of them. (LONGER is exploratory.) Start it
again after an interruption: runs finished in runs/complexity are skipped (remove them if you change
RECIPE), the others go on, and a run that fails does not stop the rest. Scores replace those in
results/complexity, where a clone has ours.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from plots import draw_error_bars
from raw import TileRow, write_table
from report import (fill_page, markdown, mean_and_error, read_scores, skip_differences, student_t,
                    table_2)
from synthetic import NAMES, merge, tissue_tile
from utils import number, print_progress, run_cli, write_atomic

# The experiment. A set is its number of classes, its grain (the size of its regions in pixels) and,
# where it is trained on for longer than RECIPE says, the number of epochs.
CLASSES = [(1, 40), (3, 40), (6, 40), (12, 40), (22, 40)]
GRAINS = [(6, 20), (6, 40), (6, 80), (6, 160)]
LONGER = [(3, 40, 3), (6, 40, 3), (12, 40, 3), (22, 40, 3)]  # thought of after the first results
SEEDS = range(5)
PAPER_SKIPS, OTHER_SKIPS = ("standard", "conv", "fusion"), ("nested", "fusionunet")
# In the order of their training.
BLOCKS = [(CLASSES, PAPER_SKIPS), (GRAINS, PAPER_SKIPS), (CLASSES, OTHER_SKIPS),
          (LONGER, ("standard", "fusion"))]
TILES = {"train": 480, "val": 40, "test": 240}
RECIPE = "--width 16 --epochs 2 --batch-size 2 --lr 4e-3 --schedule cosine".split()

# Fusion pays where the gain in this average of IoU is at least MIN_GAIN, and p after Holm's
# correction is below LEVEL.
AVERAGE, LEVEL, MIN_GAIN = "per_tile", 0.05, 0.01

DATA, RUNS, RESULTS = Path("data"), Path("runs", "complexity"), Path("results", "complexity")


def set_name(classes, grain):
    return f"tissue-k{classes:02}-grain{grain:03}"


def all_runs():
    """Every run once -> list of (set, skip, seed), block by block, and in a block seed by seed."""
    runs = [(data_set, skip, seed) for sets, skips in BLOCKS for seed in SEEDS for data_set in sets
            for skip in skips]
    return list(dict.fromkeys(runs))  # six classes at grain 40 are on both axes


def run_name(data_set, skip, seed):
    longer = f"-{data_set[2]}epochs" if len(data_set) > 2 else ""
    return f"{set_name(*data_set[:2])}-{skip}{longer}-seed{seed}"


# -----------------------------------------------------------------------------
# Sets and runs


def draw_set(k, grain):
    """Write a set, as data.load reads it, unless it is there already.

    Sets of one grain have the same tiles and parts; only their labels are merged differently.
    """
    final, folder = DATA / set_name(k, grain), DATA / f"{set_name(k, grain)}.partial"
    if final.exists():
        return
    parts = [part for part, count in TILES.items() for _ in range(count)]
    print(f"{final}: drawing {len(parts)} tiles", flush=True)
    images, labels = map(np.stack, zip(*(tissue_tile(np.random.default_rng([2027, tile]), grain)
                                         for tile in range(len(parts)))))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "masks.npy", merge(labels, k))
    info = {"classes": [*NAMES[:k]] if k > 1 else ["nucleus"], "scale": 1.0, "split": "official",
            "recipe": "bcss" if k > 1 else "monuseg"}
    write_table(folder, [TileRow(f"tile-{tile:03}", 0, 0, part)
                         for tile, part in enumerate(parts)], info)
    folder.rename(final)


def train_run(run):
    """Train a run, or go on with it, and copy its scores -> None, or how it failed."""
    (k, grain, *epochs), skip, seed = run
    longer = ["--epochs", str(epochs[0])] if epochs else []
    name = run_name(*run)
    scores, log = RUNS / name / "scores.json", RUNS / f"{name}.log"
    if not scores.exists():
        command = [sys.executable, Path(__file__).with_name("train.py"), "--model", "unet",
                   "--skip", skip, "--data", set_name(k, grain), "--split", "official", "--seed",
                   str(seed), *RECIPE, *longer, "--device", "cpu", "--resume", "--data-root", DATA,
                   "--out", scores.parent]
        with open(log, "w") as output:
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT,
                                    env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if status:
            last = (log.read_text(errors="replace").splitlines() or ["no output"])[-1]
            return f"{name}: exit status {status}, {last}"
    shutil.copy(scores, RESULTS / f"{name}.json")


def train_all(runs, jobs):
    """Train `jobs` runs at a time -> list of how some of them failed."""
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        for done, failure in enumerate(pool.map(train_run, runs), 1):
            if failure:
                failed.append(failure)
                print_progress(f"failed: {failure}\n")
            print_progress(f"{done}/{len(runs)} runs, last {run_name(*runs[done - 1])}")
    return failed


# -----------------------------------------------------------------------------
# Statistics


def p_value(values):
    """Student's t test that the mean of `values` is 0 -> two-sided p."""
    df = len(values) - 1
    angle = math.atan2(abs(statistics.mean(values)) * math.sqrt(len(values)),
                       statistics.stdev(values) * math.sqrt(df))
    return 1 - np.interp(angle, *student_t(df))


def holm(p_values):
    """Holm's correction: p values of several comparisons -> adjusted p values, in that order."""
    # Indexing by rank, at the end, restores the original order.
    rising = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    return np.maximum.accumulate(rising).clip(max=1)[np.argsort(np.argsort(p_values))]


def differences(results, data_set, skip):
    """{seed: IoU of a skip minus that of the standard one, 0..1} of the seeds that have both."""
    return {seed: results[data_set, skip, seed][AVERAGE]["iou"]
            - results[data_set, "standard", seed][AVERAGE]["iou"] for seed in SEEDS
            if {(data_set, skip, seed), (data_set, "standard", seed)} <= results.keys()}


# -----------------------------------------------------------------------------
# The page. `results` are {run: content of its scores.json}.


def are_complete(compared):
    """Whether each comparison has all seeds: a p value before that could tempt to stop early."""
    return all(len(values) == len(SEEDS) for values in compared)


def fusion_pays(results):
    """The primary comparison: fusion minus standard with each number of classes."""
    compared = [[*differences(results, data_set, "fusion").values()] for data_set in CLASSES]
    columns = [["-"] * len(CLASSES)] * 3
    if are_complete(compared):
        p_values = [p_value(values) for values in compared]
        corrected = holm(p_values)
        pays = ["yes" if p < LEVEL and statistics.mean(values) >= MIN_GAIN else "no"
                for p, values in zip(corrected, compared)]
        columns = [[f"{p:.4f}" for p in p_values], [f"{p:.4f}" for p in corrected], pays]
    return markdown(["Classes", "fusion - standard", "p", "p after Holm", "Fusion pays"], [
        [k, mean_and_error(values), *row]
        for (k, _), values, *row in zip(CLASSES, compared, *columns)])


def third_pass(results):
    """Does fusion's lead on standard last? After two passes, after three, and two against three."""
    compared = []  # of each set, of each seed
    for longer in LONGER:
        runs = [(which, skip) for which in (longer[:2], longer) for skip in ("fusion", "standard")]
        scores = [[results[(*run, seed)][AVERAGE]["iou"] for run in runs] for seed in SEEDS
                  if all((*run, seed) in results for run in runs)]
        compared.append([(fusion2 - standard2, fusion3 - standard3,
                          fusion3 - standard3 - fusion2 + standard2, fusion2 - standard3)
                         for fusion2, standard2, fusion3, standard3 in scores])
    titles, columns = ["Classes"], [[k for k, *_ in LONGER]]
    for i, title in enumerate(("Lead after two passes", "after three", "change",
                               "fusion's two - standard's three")):
        values = [[row[i] for row in rows] for rows in compared]
        titles += [title, "p after Holm"]
        columns += [[mean_and_error(one) for one in values], ["-"] * len(LONGER)]
        if are_complete(values):
            columns[-1] = [f"{p:.4f}" for p in holm([p_value(one) for one in values])]
    return markdown(titles, [*zip(*columns)])


def trend(results):
    """Slope of a skip's difference for every doubling of the number of classes, seed by seed."""
    rows = []
    for skip in (*PAPER_SKIPS[1:], *OTHER_SKIPS):
        by_seed = [differences(results, data_set, skip) for data_set in CLASSES]
        slopes = [np.polyfit(np.log2([k for k, _ in CLASSES]), [one[seed] for one in by_seed], 1)[0]
                  for seed in SEEDS if all(seed in one for one in by_seed)]
        if slopes:
            rows.append([f"{skip} - standard", mean_and_error(slopes),
                         f"{p_value(slopes):.4f}" if len(slopes) == len(SEEDS) else "-"])
    return markdown(["Skips", "Slope for a doubling of the classes", "p"], rows)


def draw_picture(results):
    """Differences to the standard skip, over the number of classes and the size of the regions."""
    others = [skip for skip in OTHER_SKIPS if any(trained == skip for _, trained, _ in results)]
    panels = {}
    for title, sets, axis in (("classes (regions of 40 pixels)", CLASSES, 0),
                              ("size of the regions in pixels (6 classes)", GRAINS, 1)):
        panels[title] = {f"{skip} - standard": {
            data_set[axis]: [100 * value for value in differences(results, data_set, skip).values()]
            for data_set in sets} for skip in (*PAPER_SKIPS[1:], *others)}
    return draw_error_bars(f"difference in IoU {AVERAGE.replace('_', ' ')}, points", panels)


TABLES = {
    "fusion pays": fusion_pays,
    "trend": trend,
    "third pass": third_pass,
    "picture": lambda results: "![difference to the standard skip](differences.png)",
    "all differences": lambda results: skip_differences(results.values()),
    "scores": lambda results: table_2(results.values()),
}


def make_page():
    """Write the page and its picture from the finished runs."""
    paths = {run: RESULTS / f"{run_name(*run)}.json" for run in all_runs()}
    results = {run: read_scores(path) for run, path in paths.items() if path.exists()}
    page = RESULTS / "README.md"
    text = fill_page(page, TABLES, results)
    with write_atomic(RESULTS / "differences.png") as file:
        draw_picture(results).save(file)
    with write_atomic(page) as file:
        file.write(text.encode())
    print_progress(f"{page}: {len(results)} of {len(paths)} runs\n")


# -----------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=number(int), default=os.cpu_count(), metavar="N",
                        help="runs at a time, one thread each (default: as many as CPU cores)")
    parser.add_argument("--report", action="store_true", help="train nothing, make the page anew")
    return parser.parse_args(argv)


def main(args):
    """Train what is missing and make the page; ValueError if a run has failed."""
    failed = []
    if not args.report:
        for folder in RUNS, RESULTS:
            folder.mkdir(parents=True, exist_ok=True)
        for data_set in dict.fromkeys(data_set[:2] for data_set, _, _ in all_runs()):
            draw_set(*data_set)
        failed = train_all(all_runs(), args.jobs)
    make_page()
    if failed:
        raise ValueError(f"{len(failed)} runs failed, first {failed[0]}; the same command tries "
                         "them again")


if __name__ == "__main__":
    run_cli(main, parse_args, "the same command goes on where it was")
