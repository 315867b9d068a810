"""Rebuild the tables and curves of results/README.md from the JSON of train.py and eval.py.

    python report.py results/runs/*.json results/whole/*.json     # the page as it is committed
    python report.py runs/*/scores.json --page runs/page.md       # your runs, in a page of yours

The words of a page are written by hand, its tables here: each stands between two comments,
<!-- NAME --> and <!-- end -->, with NAME one of TABLES below; a page that is not there yet gets
them all. Scores are in percent. Training curves (the paper's Fig. 2) are drawn beside the page, a
picture for every data set, split and network.
"""

import argparse
import itertools
import math
import re
import statistics
from pathlib import Path

import numpy as np

import related  # noqa: F401, its skips and networks join SKIPS and MODELS
from data import SET_NAME, SPLITS
from models import MODELS, SKIPS, TABLE_1, parameter_counts
from plots import draw_curves
from recipes import RECIPE_VERSION, RECIPE_VERSIONS, RECIPES, recipe_overrides
from utils import ARGS_SCHEMA, LOG_SCHEMA, first_mismatch, read_json, run_cli, write_atomic

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

PAPER_HOURS = {  # 3.2, to train one network on an NVIDIA 3070
    ("monuseg", "unet"): 2, ("monuseg", "swin_unet"): 1, ("bcss", "unet"): 50,
    ("bcss", "swin_unet"): 10, ("bcss512", "unet"): 10, ("bcss512", "swin_unet"): 2}

# -----------------------------------------------------------------------------
# Results: what train.py writes to a scores.json, or `eval.py --whole --json` of each network

AVERAGE_SCHEMA = {"iou": float | None, "f1": float | None}  # None: no test tile shows any class
SCORES_SCHEMA = {"args": ARGS_SCHEMA, "recipe_version": int, "weights": str, "log": LOG_SCHEMA,
                 "seconds": [float], "epoch": int, "images": [str], "tiles": [float | None],
                 "torch": str, "device": str, "processes": int, "per_tile": AVERAGE_SCHEMA,
                 "global": AVERAGE_SCHEMA}
WHOLE_SCHEMA = {"args": ARGS_SCHEMA, "recipe_version": int, "weights": str, "data": str,
                "tta": bool, "global": AVERAGE_SCHEMA, "whole": AVERAGE_SCHEMA,
                "images": {str: float | None}}
KNOWN = {"recipe": RECIPES, "split": SPLITS, "model": MODELS, "skip": SKIPS}
# The averages of a score: a mean over tiles, or all pixels at once; of tiles or of whole images.
AVERAGES = {"per_tile": "per tile", "global": "global", "per_image": "per whole image",
            "whole": "whole images"}


def read_results(paths):
    """Read JSON files of train.py and of eval.py -> results of runs, results of whole images.

    Raises ValueError if one is neither, or if they cannot stand in one table.
    """
    runs, wholes = [], []
    for path in paths:
        content = read_json(path)
        if content and isinstance(content, list):  # an empty one holds no result to check
            wholes += [check(result, WHOLE_SCHEMA, path) for result in content]
        else:
            runs.append(check(content, SCORES_SCHEMA, path))
    check_test_sets(runs)
    check_test_sets(wholes)
    return runs, wholes


def read_scores(path):
    """Read a scores.json -> result; ValueError if the file is not one."""
    return check(read_json(path), SCORES_SCHEMA, path)


def check(result, schema, path):
    """Return a result; ValueError if a part of it is not as `schema` says, or not known here."""
    wrong = first_mismatch(result, schema)
    if not wrong:
        sound = {name: result["args"][name] in known for name, known in KNOWN.items()}
        sound["data"] = SET_NAME.fullmatch(result["args"]["data"])
        sound["args"] = not any(isinstance(value, (list, dict)) for name, value in
                                result["args"].items() if name != "ignore_index")
        sound["ensemble"] = isinstance(result.get("ensemble", []), list)
        sound["set"] = not first_mismatch(result.get("set", {"classes": []}), {"classes": [str]})
        if schema is SCORES_SCHEMA:
            sound["log"] = 0 < len(result["log"]) == len(result["seconds"])
            sound["tiles"] = len(result["tiles"]) == len(result["images"])
        wrong = next((name for name in sound if not sound[name]), None)
    if wrong:
        raise ValueError(f"{path}: not the scores.json of a run, which train.py writes at its end, "
                         f"nor what eval.py --whole --json writes ({wrong} missing or not as it "
                         "should be)")
    return result


def check_test_sets(results):
    """ValueError if results, or checkpoints, of one data set and split differ in what they test on.

    A result names its test images; of a checkpoint, "split" is a fingerprint of the tiles.
    """
    def names(result):
        args = result["args"]
        return args["data"], args["split"], args.get("classes")

    for (data, split, _), group in group_by(results, names).items():
        tests = {(result.get("split"), *result.get("images", ())) for result in group}
        classes = {tuple(result["set"]["classes"]) for result in group if "set" in result}
        if len(tests) > 1 or len(classes) > 1:
            raise ValueError(f"runs of {data}, {split}, have different test images or classes: "
                             "leave out those of other prepared data")


def flags(result):
    """Flags of train.py by which a run differs from the paper's recipe -> list, a text for each."""
    args = result["args"]
    words = ["--recipe strong"] if args["recipe"].endswith(" strong") else []
    words += [flag(name, value) for name, value in recipe_overrides(args).items()]
    if MODELS[args["model"]].pretrained:
        origin = result["weights"].removeprefix("encoder weights from ")
        if origin == "from scratch":
            words.append("--no-pretrained")
        elif not origin.startswith(("hub ", "https:")):  # where they come from by default
            words.append(f"--weights {origin}")
    return words


def flag(name, value):
    """An argument of a run as it is given to train.py."""
    value = "" if value is True else str(value).removesuffix(".0")
    return f"--{name.replace('_', '-')} {value}".strip()


def network_name(result):
    """The network and its flags -> text, the same for all runs that a row averages."""
    version = result["recipe_version"]
    older = "" if version == RECIPE_VERSION else f" (recipe {version})"
    return " ".join([result["args"]["model"], *flags(result)]) + older


def group_by(results, key):
    """{key(result): [results]}, in the order of their first."""
    groups = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def markdown(titles, rows):
    """A Markdown table, without the columns in which no row has anything."""
    kept = [k for k in range(len(titles))
            if not rows or any(row[k] not in ("-", "") for row in rows)]
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(one_cell(line[k]) for k in kept) + " |" for line in lines)


def one_cell(value):
    """A value as the text of a cell, which can neither break a table nor become a comment."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def percent(value):
    """A value, 0..1, as text in percent; - for None."""
    return "-" if value is None else f"{100 * value:.2f}"


# -----------------------------------------------------------------------------
# Statistics


def mean_and_deviation(values):
    """Mean ± standard deviation in percent, without None; a single value has no deviation."""
    values = [value for value in values if value is not None]
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return percent(statistics.mean(values) if values else None) + spread


def mean_and_error(values):
    """Mean difference ± its standard error, in percentage points; a single value has no error."""
    if not values:
        return "-"
    error = (f" ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.2f}"
             if len(values) > 1 else "")
    return f"{100 * statistics.mean(values):+.2f}{error} (n = {len(values)})"


def error_over_images(images, values):
    """Cluster-robust standard error of the mean of `values`, one a tile, clusters being images.

    It is in the unit of the values; `images` names each tile's image. Tiles of one image are alike,
    so what varies independently is the sum of an image's deviations. None and nan, of tiles without
    any class, do not count. Returns None if there is only one image.
    """
    values = np.array(values, float)
    known = ~np.isnan(values)
    names, image = np.unique(np.array(images)[known], return_inverse=True)
    n = len(names)
    if n < 2:
        return None
    sums = np.bincount(image, values[known] - values[known].mean())
    return math.sqrt((sums**2).sum() * n / (n - 1)) / known.sum()


def student_t(df):
    """Student's t with `df` degrees of freedom -> angles, P(|t| < sqrt(df) tan(angle)), arrays.

    The angles go from 0 to pi / 2. In them, the density is cos(angle)^(df - 1), up to a factor.
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    below = (np.cos((angles[1:] + angles[:-1]) / 2)**(df - 1)).cumsum()
    return angles, np.concatenate(([0], below / below[-1]))


def t_quantile(df, probability):
    """Two-sided quantile of Student's t: |t| stays below it with this probability."""
    angles, below = student_t(df)
    return math.sqrt(df) * math.tan(np.interp(probability, below, angles))


def confidence_interval(differences):
    """95 % confidence interval of the mean difference -> text, in points."""
    n, mean = len(differences), statistics.mean(differences)
    half = t_quantile(n - 1, 0.95) * statistics.stdev(differences) / math.sqrt(n)
    return f"{100 * (mean - half):+.2f} to {100 * (mean + half):+.2f}"


def pairs_needed(differences):
    """How many pairs of runs a paired t test needs to detect a true difference of 1 point.

    Two-sided level of 5 %, power of 80 %, the spread as found. As usual, the mean difference must
    be t(97.5 %) + t(80 %) times its standard error.
    """
    deviation = 100 * statistics.stdev(differences)
    fewest = max(2, int((2.8 * deviation)**2))  # 2.8 is the limit of their sum, 1.96 + 0.84
    return next(n for n in itertools.count(fewest)
                if n >= ((t_quantile(n - 1, 0.95) + t_quantile(n - 1, 0.6)) * deviation)**2)


# -----------------------------------------------------------------------------
# Tables


def table_1(_):  # counts depend on no result
    """The paper's Table 1: parameters of every combination, in brackets the paper's two numbers."""
    rows = [[*network, *(f"{count:,}" for count in counts)]
            for network, counts in parameter_counts().items()]
    for row in rows:
        if paper := TABLE_1.get((row[0], row[1])):
            row[2] += f" ({paper:,})"
    return markdown(["Model", "Skip", "1 class", "3 classes", "22 classes"], rows)


def row_of(result):
    """The row of table_2 that a result belongs to: data, split, data scored on, network, skip."""
    args = result["args"]
    return (args["data"], args["split"], result.get("data", args["data"]), network_name(result),
            args["skip"])


def check_seeds(results):
    """ValueError if two results, or checkpoints, of one row have the same seed."""
    for (data, split, _, name, skip), group in group_by(results, row_of).items():
        seeds = [result["args"]["seed"] for result in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"two runs of {data}, {split}, {name}, {skip} have one seed, of "
                             f"{seeds}: leave out one of them")


def table_2(results):
    """The paper's Table 2, one for every data set and split: mean ± standard deviation over seeds.

    In brackets the paper's, beside scores per tile of its recipe and kind of split. A row holds the
    runs that differ in the seed alone; ValueError for two that differ in nothing.
    """
    check_seeds(results)
    averages = [average for average in AVERAGES if all(average in one for one in results)]
    titles = [f"{metric} {AVERAGES[average]}" for average in averages for metric in ("mIoU", "F1")]
    rows = {}
    for (data, split, scored_on, name, skip), group in sorted(
            group_by(results, row_of).items(),
            key=lambda item: (item[0][:-1], [*SKIPS].index(item[0][-1]))):
        is_papers = split == "tile" and scored_on == data and name == group[0]["args"]["model"]
        paper = PAPER.get((data, name, skip)) if is_papers else None
        cells = []
        for average in averages:
            for k, metric in enumerate(("iou", "f1")):
                cell = mean_and_deviation([result[average][metric] for result in group])
                note = f" ({paper[k]:.2f})" if paper and average == "per_tile" else ""
                cells.append(cell + note)
        title = f"{data}, {split} split" + ("" if scored_on == data else f", scored on {scored_on}")
        rows.setdefault(f"**{title}**", []).append([name, skip, *cells, len(group)])
    return "\n\n".join(f"{title}\n\n{markdown(['Model', 'Skip', *titles, 'Runs'], lines)}"
                       for title, lines in rows.items())


def skip_differences(results):
    """Per-tile test IoU of every skip minus that of each skip before it, seed by seed.

    The error over seeds tells whether new runs would show the difference again; the error over test
    images, of each tile's mean over all seeds, whether new images would. There is a table for every
    number of seeds.
    """
    tables = {}
    groups = group_by(results, lambda result: (result["args"]["data"], result["args"]["split"],
                                               network_name(result)))
    for (data, split, name), group in groups.items():
        by_seed = {(result["args"]["skip"], result["args"]["seed"]): result for result in group
                   if result["per_tile"]["iou"] is not None}
        for first, skip in itertools.combinations(SKIPS, 2):
            seeds = sorted(seed for other, seed in by_seed
                           if other == skip and (first, seed) in by_seed)
            pairs = [(by_seed[skip, seed], by_seed[first, seed]) for seed in seeds]
            if not pairs:
                continue
            over_seeds = [one["per_tile"]["iou"] - two["per_tile"]["iou"] for one, two in pairs]
            tiles = np.array([[run["tiles"] for run in pair] for pair in pairs], float)
            per_tile = (tiles[:, 0] - tiles[:, 1]).mean(axis=0)  # the mean of all seeds
            deviations, interval, needed = "-", "-", "-"
            if len(pairs) > 1:
                deviations = " / ".join(
                    f"{100 * statistics.stdev(result['per_tile']['iou'] for result in column):.2f}"
                    for column in zip(*pairs))
            if len(pairs) > 2:  # two hardly tell how much differences scatter
                interval, needed = confidence_interval(over_seeds), pairs_needed(over_seeds)
            model = group[0]["args"]["model"]
            papers = [PAPER.get((data, model, which)) for which in (skip, first)]
            paper = f"{papers[0][0] - papers[1][0]:+.2f}" if all(papers) else ""
            tables.setdefault(len(pairs), []).append([
                f"{data}, {split}", name, f"{skip} - {first}", mean_and_error(over_seeds),
                interval, percent(error_over_images(group[0]["images"], per_tile)),
                deviations, needed, paper])
    titles = ["Data, split", "Model", "Skips", "Difference over seeds", "at 95 %",
              "Error over test images", "Deviation between seeds", "Seeds to see 1 point",
              "The paper's difference"]
    return "\n\n".join(f"**{n} seed{'s' if n > 1 else ''}**\n\n{markdown(titles, rows)}"
                       for n, rows in sorted(tables.items(), reverse=True))


def one_flag_more(results):
    """Ablations: what one flag more changes in the IoU per tile, of validation and test tiles.

    Each group of runs has a row with its scores. Below it stands a row for each single flag with
    which these runs were repeated: the differences that it makes, all else being the same. The best
    epoch's IoU is a maximum, which chance raises for curves that jump about; the last epochs' mean
    is not.
    """
    def changed(result):
        return frozenset(recipe_overrides(result["args"]).items())

    rows, ious = [], (best_validation_iou, late_validation_iou,
                      lambda result: result["per_tile"]["iou"])
    groups = group_by((result for result in results if result["per_tile"]["iou"] is not None),
                      lambda result: (result["args"]["data"], result["args"]["split"],
                                      result["args"]["skip"], result["args"].get("classes"),
                                      result["args"]["recipe"], result["args"]["model"],
                                      result["recipe_version"], result["weights"]))
    for (data, split, skip, *_), group in groups.items():
        runs = group_by(group, changed)
        for flags_without, without in runs.items():
            changes = []
            for flags_with, repeated in runs.items():
                pairs = [(one, other) for one in repeated for other in without
                         if one["args"]["seed"] == other["args"]["seed"]]
                if flags_without < flags_with and len(flags_with - flags_without) == 1 and pairs:
                    (added,) = flags_with - flags_without
                    differences = ([iou(one) - iou(other) for one, other in pairs] for iou in ious)
                    changes.append(["", flag(*added), "", *map(mean_and_error, differences)])
            if changes:
                rows += [[f"{data}, {split}", network_name(without[0]), skip,
                          *(mean_and_deviation(map(iou, without)) for iou in ious)], *changes]
    return markdown(["Data, split", "Model; one flag more", "Skip", "Validation IoU, best epoch",
                     "its last five epochs", "Test IoU"], rows)


def best_validation_iou(result):
    """Per tile, of the epoch that is tested, 0..1."""
    return max(row["val_iou_per_tile"] for row in result["log"])


def late_validation_iou(result):
    """Per tile, the mean of the last five epochs, 0..1."""
    return statistics.mean(row["val_iou_per_tile"] for row in result["log"][-5:])


def time_to_paper(results):
    """How long training takes until the validation IoU, per tile, passes the paper's test IoU."""
    rows = []
    for result in results:
        data, model, skip = (result["args"][name] for name in ("data", "model", "skip"))
        if result["args"]["split"] != "tile" or (data, model, skip) not in PAPER:
            continue
        paper = PAPER[data, model, skip][0]
        ious = [100 * row["val_iou_per_tile"] for row in result["log"]]
        epoch = next((epoch for epoch, iou in enumerate(ious) if iou >= paper), None)
        rows.append([data, network_name(result), skip, result["args"]["seed"], f"{paper:.2f}",
                     "not reached" if epoch is None else
                     f"{result['seconds'][epoch] / 60:.1f} min, epoch {epoch + 1}",
                     percent(best_validation_iou(result)),
                     f"{result['seconds'][-1] / 60:.1f} min, {len(ious)} epochs",
                     f"{PAPER_HOURS[data, model]} h"])
    return markdown(["Data", "Model", "Skip", "Seed", "The paper's IoU", "Passed after",
                     "Best validation IoU", "Whole run", "The paper's whole run"], rows)


def whole_image_dice(results):
    """Dice of whole test images, and of all their tiles, mean ± standard deviation over seeds.

    Columns are the masks, and tiles or whole images by one view or eight. A cell says its number of
    runs if that is not all of its row's; ValueError for two of one seed.
    """
    def row(result):
        return ("{data}, {split}".format(**result["args"]), network_name(result),
                result["args"]["skip"], len(result["ensemble"]) if "ensemble" in result else 1)

    def dice(result):  # -> {title of a column: Dice, 0..1}; tiles always have one view
        whole = f"{result['data']}, {'8 views' if result['tta'] else '1 view'}"
        tiles = {} if result["tta"] else {f"{result['data']}, tiles": result["global"]["f1"]}
        return tiles | {whole: result["whole"]["f1"]}

    results = [result for result in results if "whole" in result]
    rows = []
    columns = [*dict.fromkeys(title for result in results for title in dice(result))]
    for (trained, name, skip, networks), group in group_by(results, row).items():
        runs, cells = len({result["args"]["seed"] for result in group}), []
        for title in columns:
            scored = [result for result in group if title in dice(result)]
            if len({result["args"]["seed"] for result in scored}) < len(scored):
                raise ValueError(f"two results of {trained}, {name}, {skip} have one seed on "
                                 f"{title}: leave out one of them")
            note = f" (n = {len(scored)})" if 0 < len(scored) < runs else ""
            cells.append(mean_and_deviation([dice(result)[title] for result in scored]) + note)
        rows.append([trained, name, skip, *cells,
                     f"ensemble of {networks}" if networks > 1 else
                     f"{runs} run{'s' if runs > 1 else ''}"])
    return markdown(["Trained on", "Model", "Skip", *columns, "Of"], rows)


def training_curves(results):
    """{name of a picture: {name of a line: logs of its seeds}}, as draw_curves takes them."""
    pictures = {}
    for result in results:
        picture = "curves-{data}-{split}-{model}.png".format(**result["args"])
        line = f"{network_name(result)}, {result['args']['skip']} skip"
        pictures.setdefault(picture, {}).setdefault(line, []).append(result["log"])
    return {picture: {f"{line}, {len(logs)} seed{'s' if len(logs) > 1 else ''}": logs
                      for line, logs in lines.items()} for picture, lines in pictures.items()}


def curves(results):
    """Markdown that shows the pictures that main draws."""
    return "\n\n".join(f"![loss and validation IoU, {picture}]({picture})"
                       for picture in training_curves(results))


def commands(results):
    """Every run, by what it ran on: the command that repeats it, and its scores."""
    machines = {}
    for result in results:
        args, processes = result["args"], result["processes"]
        start = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
        names = " ".join(f"--{name} {args[name]}"
                         for name in ("model", "skip", "data", "split", "seed"))
        command = " ".join([start, "train.py", names, *flags(result)])
        machines.setdefault(f"{result['device']}, torch {result['torch']}", []).append(
            [f"`{command}`",
             ", ".join(map(percent, result["per_tile"].values())),
             percent(error_over_images(result["images"], result["tiles"])),
             ", ".join(map(percent, result["global"].values())), result["epoch"],
             f"{result['seconds'][-1] / 60:.1f} min", result["recipe_version"]])
    titles = ["Command", "IoU, F1 per tile", "Error over images", "global", "Best epoch",
              "Training", "Recipe"]
    return "\n\n".join(f"On {one_cell(machine)}:\n\n{markdown(titles, rows)}"
                       for machine, rows in machines.items())


TABLES = {
    "parameters": table_1,
    "scores": table_2,
    "skip differences": skip_differences,
    "one flag more": one_flag_more,
    "time to the paper's score": time_to_paper,
    "curves": curves,
    "recipes": lambda results: markdown(["Recipe", "What it is"], RECIPE_VERSIONS.items()),
    "commands": commands,
    "whole images": whole_image_dice,  # of results of eval.py --whole
}


def fill_page(path, tables, results):
    """The text of a page with its tables made anew -> text; nothing is written.

    tables: {name: function of the results -> text}. Raises ValueError if the page asks for none, or
    for one that is not among them, or lacks the end of one.
    """
    def table(match):
        if match[1] not in tables:
            raise ValueError(f"{path}: asks for a table {match[1]!r}, but there are only "
                             f"{', '.join(tables)}: rename or remove it")
        if not match[2]:
            raise ValueError(f"{path}: the table {match[1]!r} lacks its <!-- end -->: add it")
        return f"<!-- {match[1]} -->\n{tables[match[1]](results)}\n<!-- end -->"

    if path.exists():
        try:
            words = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8: save it as that") from None
    else:
        words = "# Runs\n" + "".join(f"\n## {name.capitalize()}\n\n<!-- {name} -->\n"
                                     "<!-- end -->\n" for name in tables)
    # A table's name; everything up to the next comment; and that comment, if it is an end.
    page, filled = re.subn(r"<!-- (?!end -->)(.+?) -->\n(?:(?!<!-- ).)*(<!-- end -->)?", table,
                           words, flags=re.S)
    if not filled:
        raise ValueError(f"{path}: asks for no table: write <!-- scores --> and <!-- end -->, for "
                         "one, in lines of their own")
    return page


# -----------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", nargs="+", type=Path, help="scores.json of finished runs, and "
                        "what eval.py --whole --json wrote")
    parser.add_argument("--page", type=Path, default=Path("results/README.md"),
                        help="Markdown file whose tables are replaced (default: results/README.md)")
    return parser.parse_args(argv)


def main(args):
    """Draw the curves, then write the page; ValueError if a file or the page cannot be used."""
    results, wholes = read_results(args.scores)
    tables = TABLES | {"whole images": lambda _: whole_image_dice(wholes)}
    page = fill_page(args.page, tables, results)
    for picture, runs in training_curves(results).items():
        with write_atomic(args.page.with_name(picture)) as file:
            draw_curves(runs).save(file)
    with write_atomic(args.page) as file:
        file.write(page.encode())
    print(f"{args.page} and its curves: {len(results)} runs, {len(wholes)} results of whole images")


if __name__ == "__main__":
    run_cli(main, parse_args)
