"""report.py: the tables of results/README.md, worked out by hand from made-up runs."""

import copy
import itertools
import json
import math
import re

import numpy as np
import pytest
from conftest import ROOT, fit, refused

import report
import train
from plots import draw_curves
from recipes import RECIPE_VERSION
from utils import ARGS_SCHEMA


def scores(skip, seed, tiles, *flags, ious=(0.3, 0.7), data="monuseg"):
    """What train.py writes after two epochs of 90 s: three test tiles of two images."""
    args = vars(train.parse_args(["--data", data, "--skip", skip, "--seed", str(seed), *flags]))
    iou = sum(tiles) / len(tiles)
    return {"args": {name: args[name] for name in ARGS_SCHEMA}, "recipe_version": RECIPE_VERSION,
            "weights": "from scratch", "epoch": 2, "seconds": [90.0, 180.0],
            "log": [{"epoch": n, "train_loss": 1 / n, "val_loss": 1 / n, "val_iou_per_tile": iou}
                    for n, iou in enumerate(ious, 1)],
            "images": ["A", "A", "B"], "tiles": list(tiles), "torch": "2.15", "device": "abacus",
            "processes": 1, "per_tile": {"iou": iou, "f1": 0.5}, "global": {"iou": 0.4, "f1": 0.6}}


RUNS = [scores("standard", 0, (0.5, 0.7, 0.6)), scores("standard", 1, (0.5, 0.5, 0.5)),
        scores("conv", 0, (0.6, 0.8, 0.7)), scores("conv", 1, (0.6, 0.6, 0.9), ious=(0.2, 0.6)),
        scores("conv", 2, (0.1, 0.1, 0.1)), scores("fusion", 1, (0.5, 0.5, 0.5)),
        scores("fusion", 0, (0.5, 0.7, 0.6), "--width", "8", "--epochs", "2")]
NOTHING = {"iou": None, "f1": None}  # no test tile shows any class
EMPTY = [scores(skip, 0, (0, 0, 0)) | {"tiles": [None] * 3, "per_tile": NOTHING, "global": NOTHING}
         for skip in ("standard", "conv")]


def cells(text):
    """The rows of all tables in a text, each behind the line in bold above its table, if any."""
    rows, title = [], []
    for line, after in itertools.pairwise([*text.splitlines(), ""]):
        if line.startswith("**"):
            title = [line.strip("*")]
        elif line.startswith("| ") and not {*line} <= {*"| -"} and not after.startswith("| ---"):
            rows.append([*title, *(cell.strip() for cell in line.strip("|").split(" | "))])
    return rows


# Tables


def test_the_papers_table_2():
    columns = "bcss", "bcss512", "monuseg"
    rows = [("unet", "standard", (30.44, 53.70), (23.96, 34.04), (66.27, 79.45)),
            ("unet", "conv", (33.78, 47.42), (23.45, 33.70), (67.32, 80.28)),
            ("unet", "fusion", None, None, (65.68, 79.03)),
            ("swin_unet", "standard", (57.55, 64.39), (47.45, 53.84), (63.98, 77.65)),
            ("swin_unet", "conv", (57.23, 64.16), (45.78, 53.12), (64.78, 78)),
            ("swin_unet", "fusion", (56.59, 63.69), (48.11, 55.06), (63.42, 76.96))]
    assert report.PAPER == {(name, model, skip): pair for model, skip, *pairs in rows
                            for name, pair in zip(columns, pairs) if pair}
    assert report.PAPER_HOURS == {(name, model): hours for model, *row in (
        ("unet", 50, 10, 2), ("swin_unet", 10, 2, 1)) for name, hours in zip(columns, row)}


def test_table_1_shows_every_combination_beside_the_papers_two_counts():
    rows = {tuple(row[:2]): row[2:] for row in cells(report.table_1([]))}
    assert rows.keys() == {(model, skip) for model in report.MODELS for skip in report.SKIPS}
    assert rows["unet", "standard"] == ["31,043,521 (31,043,521)", "31,043,651", "31,044,886"]
    assert rows["swin_unet", "conv"] == ["35,383,483 (35,383,483)", "35,383,613", "35,384,848"]
    assert all("(" not in row[0] for network, row in rows.items()
               if network not in report.TABLE_1)


def result(iou, f1, *flags, skip="standard", data="monuseg", weights="from scratch",
           version=RECIPE_VERSION):
    return scores(skip, 0, (0, 0, 0), *flags, data=data) | {
        "recipe_version": version, "weights": weights, "per_tile": {"iou": iou, "f1": f1},
        "global": {"iou": iou - 0.1, "f1": f1 - 0.1}}


MIXED = [result(0.70, 0.80, skip="conv"), result(0.72, 0.81, "--seed", "1", skip="conv"),
         result(0.74, 0.85, "--seed", "2", skip="conv"), result(0.6543, 0.7654, "--width", "32"),
         result(0.66, 0.77, "--epochs", "5"), result(0.5, 0.6, skip="conv", data="bcss"),
         result(0.4, 0.5, "--model", "swin_unet", weights="encoder weights from hub timm/swin"),
         result(0.45, 0.55, "--model", "swin_unet", weights="encoder weights from a/file.pth"),
         result(0.69, 0.79, skip="conv") | {"data": "monuseg-exact"},
         result(0.3, 0.5, "--model", "swin_unet"), result(0.67, 0.78, version=1),
         result(0.2, 0.5, "--ignore-index", "0", "2", skip="conv", data="bcss"),
         result(0.6, 0.7, "--split", "image")]


def test_table_2_is_mean_and_deviation_over_seeds_of_runs_that_differ_in_nothing_else():
    rows = {tuple(row[:3]): row[3:] for row in cells(report.table_2(MIXED))}
    assert len(rows) == 11
    tile, image, other = "monuseg, tile split", "monuseg, image split", "bcss, tile split"
    assert rows[tile, "unet", "conv"] == [  # deviations: sqrt(8 / 2), sqrt(14 / 2)
        "72.00 ± 2.00 (67.32)", "82.00 ± 2.65 (80.28)", "62.00 ± 2.00", "72.00 ± 2.65", "3"]
    assert rows[other, "unet", "conv"][:2] == ["50.00 (33.78)", "60.00 (47.42)"]
    assert rows[tile, "swin_unet", "standard"][:2] == ["40.00 (63.98)", "50.00 (77.65)"]
    for name, skip, ious in [  # none of them is the paper's
            (tile, "unet --width 32", ("65.43", "76.54")),
            (tile, "unet --epochs 5", ("66.00", "77.00")),
            (tile, "unet (recipe 1)", ("67.00", "78.00")),
            (tile, "swin_unet --no-pretrained", ("30.00", "50.00")),
            (tile, "swin_unet --weights a/file.pth", ("45.00", "55.00")),
            (image, "unet", ("60.00", "70.00"))]:
        assert (*rows[name, skip, "standard"][:2], rows[name, skip, "standard"][4]) == (*ious, "1")
    assert rows[other, "unet --ignore-index 0 2", "conv"][:2] == ["20.00", "50.00"]
    assert rows[f"{tile}, scored on monuseg-exact", "unet", "conv"][:2] == ["69.00", "79.00"]


def test_two_runs_of_one_seed_are_refused():
    with pytest.raises(ValueError, match=r"two runs of monuseg, tile, unet, conv .*\[0, 1, 2, 2\]"):
        report.table_2([*MIXED, MIXED[2]])


def test_skips_stand_in_their_own_order_and_each_is_compared_with_all_before_it():
    runs = [scores(skip, 0, (0.5, 0.5, 0.5)) for skip in reversed(report.SKIPS)]
    assert [row[2] for row in cells(report.table_2(runs))] == [*report.SKIPS]
    told = [row[3] for row in cells(report.skip_differences(runs))]
    assert told[:2] == ["conv - standard", "fusion - standard"] and "fusion - conv" in told
    assert len(told) == len(report.SKIPS) * (len(report.SKIPS) - 1) / 2


@pytest.mark.parametrize("name, value, expected", [
    ("stain", 0.0, "--stain 0"), ("lr", 1e-5, "--lr 1e-05"), ("ema", 0.99, "--ema 0.99"),
    ("skip_depth", 10, "--skip-depth 10"), ("bf16", True, "--bf16")])
def test_a_flag_is_written_as_one_would_type_it(name, value, expected):
    assert report.flag(name, value) == expected


def test_one_flag_more_is_compared_with_the_same_seed_without_it():
    def run(seed, validation, test, *flags):
        return scores("standard", seed, [test] * 3, *flags,
                      ious=(0.1, 0.5, validation, 0.3, 0.26, 0.2))  # the last five but 0.1

    runs = [run(0, 0.60, 0.50), run(1, 0.64, 0.54), run(0, 0.70, 0.45, "--lr", "0.01"),
            run(1, 0.72, 0.51, "--lr", "0.01"), run(2, 0.99, 0.99, "--lr", "0.01"),
            run(1, 0.63, 0.54, "--width", "8"), run(2, 0.5, 0.5, "--batch-size", "4"),
            run(0, 0.80, 0.40, "--lr", "0.01", "--width", "8"), run(0, 0.9, 0.9) | EMPTY[0],
            run(1, 0.9, 0.9, "--epochs", "7") | {"weights": "of elsewhere"},
            RUNS[0] | {"args": RUNS[0]["args"] | {"classes": 3}}]  # other labels, not a flag more
    where = "monuseg, tile"
    assert cells(report.one_flag_more(runs)) == [
        [where, "unet", "standard", "62.00 ± 2.83", "37.60 ± 0.57", "52.00 ± 2.83"],
        ["", "--lr 0.01", "", "+9.00 ± 1.00 (n = 2)", "+1.80 ± 0.20 (n = 2)",
         "-4.00 ± 1.00 (n = 2)"],
        ["", "--width 8", "", "-1.00 (n = 1)", "-0.20 (n = 1)", "+0.00 (n = 1)"],
        [where, "unet --lr 0.01", "standard", "80.33 ± 16.20", "41.27 ± 3.24", "65.00 ± 29.60"],
        ["", "--width 8", "", "+10.00 (n = 1)", "+2.00 (n = 1)", "-5.00 (n = 1)"]]


def test_skips_are_compared_seed_by_seed_and_image_by_image():
    conv, fusion, other = cells(report.skip_differences(RUNS))  # width 8 has none beside it
    assert conv[:4] == ["2 seeds", "monuseg, tile", "unet", "conv - standard"]
    # Seeds: +10 and +20, deviation 7.07. Tiles: +10 and +10 in image A, +25 in B, the mean +15:
    # deviations of -10 and +10, so sqrt(2 * 200) / 3.
    assert conv[4:] == ["+15.00 ± 5.00 (n = 2)", "6.67", "0.00 / 7.07", "+1.05"]
    assert fusion[0] == "1 seed" and fusion[4:] == ["+0.00 (n = 1)", "0.00", "-0.59"]
    # One seed: -10 and -10 in A, -40 in B, the mean -20: deviations of +20 and -20.
    assert other[3:] == ["fusion - conv", "-20.00 (n = 1)", "13.33", "-1.64"]
    # With a third seed of +15 the deviation is 5: the mean lies within 4.303 errors of 2.89 each,
    # and a true point shows with 199 pairs, of which t exceeds 1.972 and 0.843: (2.815 * 5)^2.
    third = [scores("standard", 2, (0.5, 0.5, 0.5)), scores("conv", 2, (0.65, 0.65, 0.65))]
    conv, *_ = cells(report.skip_differences([*RUNS, *third]))
    assert conv[0] == "3 seeds" and conv[5] == "+2.58 to +27.42" and conv[8] == "199"


def read_back(folder, *contents):
    """What report.py reads from files with these contents."""
    for number, content in enumerate(contents):
        (folder / f"{number}.json").write_text(json.dumps(content))
    return report.read_results([folder / f"{number}.json" for number in range(len(contents))])


def test_runs_tested_on_other_images_or_classes_do_not_come_into_one_page(tmp_path):
    nucleus, two = ({"set": {"classes": names}} for names in (["nucleus"], ["a", "b"]))
    others = ({"images": ["A", "A", "C"]}, two)
    for changed in others:
        with pytest.raises(ValueError, match="monuseg, tile, have different test images or class"):
            read_back(tmp_path, RUNS[0] | nucleus, RUNS[2], RUNS[3] | changed)
    for change in {"split": "image"}, {"classes": 6}:  # as --split and --classes have it
        args = {"args": RUNS[0]["args"] | change}
        assert len(read_back(tmp_path, RUNS[0] | nucleus, RUNS[2], RUNS[0] | args | two)[0]) == 3
    whole = {"args": RUNS[0]["args"], "recipe_version": 3, "weights": "", "data": "monuseg",
             "tta": False, "global": NOTHING, "whole": NOTHING, "images": {"A": 0.5, "B": None}}
    assert len(read_back(tmp_path, RUNS[0], [whole, whole])[1]) == 2
    with pytest.raises(ValueError, match="monuseg, tile, have different test images"):
        read_back(tmp_path, [whole], [whole | {"images": {"A": 0.5}}])
    with pytest.raises(ValueError, match="0.json: not the scores.json of a run.*set missing"):
        read_back(tmp_path, RUNS[0] | {"set": {"classes": [1]}})


def test_tiles_without_a_class_and_sets_without_the_papers_number():
    runs = [scores("standard", 0, (0.5, 0.5, 0.5), data="bcss"),
            scores("fusion", 0, (0.5, 0.6, 0.7), data="bcss")]
    runs[0]["tiles"][0] = runs[1]["tiles"][0] = None
    row, = cells(report.skip_differences(runs))  # tiles: +10 in image A and +20 in B
    assert row[-2:] == ["+10.00 (n = 1)", "5.00"]
    assert len(cells(report.time_to_paper(runs))) == 1  # the paper could not train the other


def test_runs_of_which_no_test_tile_shows_a_class_have_dashes():
    assert cells(report.table_2(EMPTY))[1][3:] == ["- (67.32)", "- (80.28)", "1"]
    assert cells(report.skip_differences(EMPTY)) == []
    assert [row[1:3] for row in cells(report.commands(EMPTY))] == [["-, -", "-, -"]] * 2
    mixed = cells(report.table_2([EMPTY[0], scores("standard", 1, (0.5, 0.5, 0.5))]))
    assert mixed[0][3:5] == ["50.00 (66.27)", "50.00 (79.45)"] and mixed[0][-1] == "2"


def test_time_to_the_papers_score_ends_with_the_epoch_that_passes_it():
    rows = {tuple(row[1:4]): row[4:] for row in cells(report.time_to_paper(RUNS))}
    assert rows["unet", "conv", "0"] == ["67.32", "3.0 min, epoch 2", "70.00", "3.0 min, 2 epochs",
                                         "2 h"]
    assert rows["unet", "conv", "1"][1:3] == ["not reached", "60.00"]
    assert not cells(report.time_to_paper([scores("conv", 0, (0, 0, 0), "--split", "image")]))


def test_every_run_is_told_by_the_command_that_repeats_it():
    for result, (told, *row) in zip(RUNS, cells(report.commands(RUNS)), strict=True):
        start, flags = told.strip("`").split(" train.py ")
        assert start == "python"
        again = vars(train.parse_args(flags.split()))
        assert {name: again[name] for name in ARGS_SCHEMA} == result["args"]
        iou = result["per_tile"]["iou"]
        error = report.error_over_images(result["images"], result["tiles"])
        assert row == [f"{100 * iou:.2f}, 50.00", f"{100 * error:.2f}", "40.00, 60.00", "2",
                       "3.0 min", str(RECIPE_VERSION)]
    (told, *_), = cells(report.commands([RUNS[0] | {"processes": 8}]))
    assert told.startswith("`torchrun --nproc-per-node 8 train.py --model unet ")
    (*_, version), = cells(report.commands([RUNS[0] | {"recipe_version": 1}]))
    assert version == "1"
    (told, *_), = cells(report.commands([MIXED[7]]))
    assert told.endswith(" --weights a/file.pth`")


def test_the_error_over_images_counts_an_images_tiles_together():
    def error(*tiles, images="AABB"):
        return report.error_over_images([*images], tiles)

    assert error(0.4, 0.6, 0.4, 0.6) == pytest.approx(0)  # images alike, whatever their tiles
    assert error(0.4, 0.4, 0.6, 0.6) == pytest.approx(0.1)  # that of the two means 0.4 and 0.6
    assert error(0.4, 0.4, 0.6, 0.6, images="ABCD") == pytest.approx(0.1 / math.sqrt(3))
    assert error(0.4, None, 0.6, 0.6) == error(0.4, 0.6, 0.6, images="ABB")
    assert error(0.4, 0.6, images="AA") is None


def test_what_a_run_was_made_on_is_said_once():
    other = [run | {"device": "a card"} for run in RUNS[:2]]
    text = report.commands([*RUNS, *other])
    assert text.count("On abacus, torch 2.15:\n\n| Command") == 1 == text.count("On a card, ")
    assert len(cells(text)) == len(RUNS) + 2


def test_a_curve_is_drawn_from_all_seeds_of_one_network_on_one_split():
    others = [scores("conv", 0, (0, 0, 0), *flags) for flags in
              (("--split", "image"), ("--model", "swin_unet"))]
    pictures = report.training_curves([*RUNS, *others])
    assert [*pictures] == [f"curves-monuseg-{name}.png" for name in
                           ("tile-unet", "image-unet", "tile-swin_unet")]
    tile, *alone = pictures.values()
    assert [[*by_name.values()] for by_name in alone] == [[[other["log"]]] for other in others]
    assert {*tile} == {"unet, standard skip, 2 seeds", "unet, conv skip, 3 seeds",
                       "unet, fusion skip, 1 seed",
                       "unet --epochs 2 --width 8, fusion skip, 1 seed"}
    assert tile["unet, conv skip, 3 seeds"] == [run["log"] for run in RUNS[2:5]]


# The page


def write_runs(folder, results=RUNS):
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, result in zip(paths, results):
        path.write_text(json.dumps(result))
    return paths


def report_on(folder, results=RUNS, words=None):
    """Run report.py on a page beside the runs, of `words` or a new one -> its text."""
    page = folder / "page.md"
    if words is not None:
        page.write_text(words, "utf-8")
    report.main(report.parse_args([*map(str, write_runs(folder, results)), "--page", str(page)]))
    return page.read_text("utf-8")


def test_tables_are_replaced_and_words_stay(tmp_path):
    names = [name for name in report.TABLES if name != "parameters"]
    words = "".join(f"Mine é.\n\n<!-- {name} -->\nold | table\n<!-- end -->\n" for name in names)
    once = report_on(tmp_path, words=words)
    assert "old" not in once and once.count("Mine é.") == len(names)
    assert all(f"<!-- {name} -->\n{report.TABLES[name](RUNS)}\n<!-- end -->" in once
               for name in names)
    assert report_on(tmp_path) == once


def test_dice_of_whole_images_is_a_mean_over_seeds_by_masks_and_views(tmp_path):
    def whole(seed, dice, **more):
        args = RUNS[0]["args"] | {"seed": seed, "split": "official", "data": "monuseg"}
        return {"args": args, "recipe_version": 3, "weights": "from scratch", "data": "monuseg",
                "tta": False, "whole": {"iou": 0.5, "f1": dice}, "images": {"a": None},
                "global": {"iou": 0.5, "f1": dice - 0.01}} | more

    files = {"one": [whole(0, 0.81), whole(1, 0.83)], "two": [whole(0, 0.84, tta=True)],
             "three": [whole(0, 0.85, data="monuseg-exact", ensemble=["a", "b"])]}
    for name, results in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    page = tmp_path / "page.md"
    report.main(report.parse_args([*map(str, sorted(tmp_path.glob("*.json"))), "--page",
                                   str(page)]))
    table = page.read_text("utf-8").split("<!-- whole images -->\n")[1].splitlines()
    assert table[0].split(" | ")[3:8] == ["monuseg, tiles", "monuseg, 1 view",
                                          "monuseg-exact, tiles", "monuseg-exact, 1 view",
                                          "monuseg, 8 views"]
    assert table[2].split(" | ")[3:] == ["81.00 ± 1.41", "82.00 ± 1.41", "-", "-",
                                         "84.00 (n = 1)", "2 runs |"]
    assert table[3].split(" | ")[3:] == ["-", "-", "84.00", "85.00", "-", "ensemble of 2 |"]
    with pytest.raises(ValueError, match="two results of monuseg, official, .* on monuseg, tiles"):
        report.whole_image_dice([*files["one"], whole(1, 0.9)])
    (tmp_path / "one.json").write_text(json.dumps([whole(0, 0.8) | {
        "args": files["one"][0]["args"] | {"skip": "of another branch"}}]))
    with pytest.raises(ValueError, match="one.json: not the scores.json of a run.*skip missing"):
        report.read_results([tmp_path / "one.json"])


def test_curves_are_drawn_beside_the_page_that_shows_them(tmp_path):
    page = report_on(tmp_path, words="<!-- curves -->\n<!-- end -->")
    drawn, = tmp_path.glob("*.png")
    draw_curves(report.training_curves(RUNS)[drawn.name]).save(tmp_path / "same.png")
    assert drawn.read_bytes() == (tmp_path / "same.png").read_bytes()
    assert f"]({drawn.name})" in page


def test_a_page_that_is_not_there_yet_gets_all_tables(tmp_path):
    page = report_on(tmp_path)
    assert page.startswith("# ") and "| swin_unet | fusion | 36,418,363 |" in page
    for name, table in report.TABLES.items():
        assert f"\n<!-- {name} -->\n" in page
        assert name == "parameters" or f"-->\n{table(RUNS)}\n<!-- end -->\n" in page


EVIL = "a|b <!-- end --> <!-- parameters -->\nc\r\n\n| d"


def test_texts_out_of_a_file_cannot_break_the_page(tmp_path):
    runs = [scores("conv", 0, (0.5, 0.5, 0.5)) | {"weights": EVIL, "device": EVIL, "torch": EVIL}]
    words = "Mine.\n\n<!-- commands -->\n<!-- end -->\n\nMine too.\n"
    page = report_on(tmp_path, runs, words)
    assert page.startswith("Mine.\n\n<!-- commands -->\nOn a\\|b &lt;!-- end")
    assert page.endswith(" |\n<!-- end -->\n\nMine too.\n") and page.count("<!--") == 2
    lines = page.splitlines()[5:-3]
    assert {line.replace("\\|", "").count("|") for line in lines} == {8} and len(lines) == 3
    assert report_on(tmp_path, runs) == page


def test_a_page_with_an_unknown_table_or_one_without_end_is_refused_and_stays(tmp_path, capsys):
    paths, page = write_runs(tmp_path), tmp_path / "page.md"
    for words, named in [("<!-- no such -->\n<!-- end -->", "no such"),
                         ("<!-- curves -->\nMine.\n<!-- commands -->\n<!-- end -->", "'curves'"),
                         ("<!-- curves -->\n<!-- end -->\n<!-- commands -->\n", "'commands' lacks"),
                         ("No tables.\n", "asks for no table")]:
        page.write_text(words)
        line = refused(capsys, report, *paths, "--page", page)
        assert str(page) in line and named in line and page.read_text() == words
    page.write_bytes("é".encode("latin-1"))
    assert f"{page}: not UTF-8" in refused(capsys, report, *paths, "--page", page)


def test_a_picture_that_cannot_be_written_leaves_the_page_alone(tmp_path, capsys):
    paths, page = write_runs(tmp_path), tmp_path / "page.md"
    page.write_text("<!-- commands -->\nold\n<!-- end -->\n")
    (tmp_path / "curves-monuseg-tile-unet.png").mkdir()
    line = refused(capsys, report, *paths, "--page", page)
    assert "curves-monuseg-tile-unet.png: cannot be written" in line
    assert page.read_text() == "<!-- commands -->\nold\n<!-- end -->\n"


NOT_SCORES = {  # what is changed in the scores.json of a run -> what its text is then
    "no JSON": lambda run: "nucleus", "half a file": lambda run: json.dumps(run)[:400],
    "no dict": lambda run: [run], "no results": lambda run: [], "empty": lambda run: "",
    "nested": lambda run: "[" * 100_000,
    "args missing": lambda run: run.pop("args") and run,
    "args a list": lambda run: run | {"args": [*run["args"].items()]},
    "an arg missing": lambda run: run["args"].pop("lr") and run,
    "log of texts": lambda run: run | {"log": ["epoch 1", "epoch 2"]},
    "log empty": lambda run: run | {"log": [], "seconds": []},
    "loss not a number": lambda run: run["log"][0].update(val_loss=float("nan")) or run,
    "a second missing": lambda run: run | {"seconds": [90.0]},
    "a number for a list": lambda run: run | {"images": 3},
    "a tile missing": lambda run: run | {"tiles": run["tiles"][1:]},
    "a text for a score": lambda run: run | {"per_tile": {"iou": "high", "f1": 0.5}},
    "no recipe version": lambda run: run.pop("recipe_version") and run,
    "data unknown": lambda run: run["args"].update(data="../../data") or run,
    "split unknown": lambda run: run["args"].update(split="../tile") or run,
    "a flag with a list": lambda run: run["args"].update(augment=["flip"]) or run,
    "ensemble no list": lambda run: run | {"ensemble": 2},
    "skip unknown": lambda run: run["args"].update(skip="no skip") or run,
    "model unknown": lambda run: run["args"].update(model="no network") or run}


@pytest.mark.parametrize("kind", NOT_SCORES)
def test_what_is_no_scores_json_is_refused_by_name(tmp_path, capsys, kind):
    path, content = tmp_path / "bad.json", NOT_SCORES[kind](copy.deepcopy(RUNS[0]))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    line = refused(capsys, report, *write_runs(tmp_path), path, "--page", tmp_path / "page.md")
    assert f"{path}: not the scores.json of a run" in line
    assert not (tmp_path / "page.md").exists()


@pytest.mark.usefixtures("tiny_set")
def test_scores_of_a_run_are_as_a_report_takes_them(whole, tmp_path):
    fit(tmp_path / "run", "--seed", "1", "--epochs", "1", "--skip", "fusion")
    results = [report.read_scores(out / "scores.json") for out in (whole.out, tmp_path / "run")]
    page = report_on(tmp_path, results, "<!-- commands -->\n<!-- end -->\n")
    assert f"| {100 * whole.score:.2f}, " in page


def test_the_committed_page_is_what_its_runs_give(tmp_path):
    committed = ROOT / "results/README.md"
    (tmp_path / "page.md").write_bytes(committed.read_bytes())
    paths = [path for folder in ("runs", "whole")
             for path in sorted(ROOT.glob(f"results/{folder}/*.json"))]
    report.main(report.parse_args([*map(str, paths), "--page", str(tmp_path / "page.md")]))
    assert (tmp_path / "page.md").read_bytes() == committed.read_bytes()


def test_the_readmes_scores_are_those_of_the_committed_page():
    page, readme = ((ROOT / name).read_text("utf-8") for name in ("results/README.md", "README.md"))
    table = readme.split("| | skip | the paper | here |\n")[1].split("\n\n")[0]
    scores = page.split("**monuseg, tile split**\n\n")[1].split("\n\n")[0]
    names = {"U-Net": "unet", "Swin-UNet, from scratch (the paper: pretrained)":
             "swin_unet --no-pretrained"}
    for line in table.splitlines()[1:]:
        network, skip, paper, here = (cell.strip() for cell in line.split("|")[1:-1])
        name = names[network] if network else name
        iou, f1 = here.split(", ")
        assert re.search(rf"^\| {name} \| {skip} \| {iou}(?: \(.*?\))? \| {f1}(?: \(.*?\))? \|",
                         scores, re.M)
        assert tuple(map(float, paper.split(", "))) == report.PAPER["monuseg", name.split()[0],
                                                                    skip]


def test_the_readmes_scores_by_the_strong_recipe_are_those_of_the_committed_page():
    page, readme = ((ROOT / name).read_text("utf-8") for name in ("results/README.md", "README.md"))
    rows = {}  # {(trained on, model, of how many): scores with eight views, exact and paper's}
    for row in cells(page.split("<!-- whole images -->\n")[1].split("<!-- end -->")[0]):
        if row[2] == "standard":
            rows[row[0], row[1], row[-1].rstrip("s")] = [row[8], row[5]]
    strong = "unet --recipe strong --bf16 {}--width {}".format
    networks = {"U-Net by the paper's recipe: width 16, 50 epochs": "unet --width 16",
                "U-Net, width 64, 60 epochs": "unet --recipe strong --epochs 60",
                "U-Net, width 32, 60 epochs": strong("--epochs 60 ", 32),
                "U-Net, width 16, 200 epochs": strong("", 16),
                "U-Net, width 16, 60 epochs": strong("--epochs 60 ", 16),
                "U-Net, width 16, 48 epochs, all 30 training images": strong("--epochs 48 ", 16),
                "Swin-UNet from scratch, 60 epochs":
                    "swin_unet --recipe strong --bf16 --epochs 60 --no-pretrained"}
    sets = {"the paper's masks": "monuseg", "exact masks": "monuseg-exact",
            "mixed masks": "monuseg-mixed"}
    table = readme.split("| with the standard skip |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        title, masks, seeds, *scores = (cell.strip() for cell in line.split("|")[1:-1])
        if seeds:
            split = "official-all" if "all 30" in title else "official"
            trained, network, of = f"{sets[masks]}, {split}", networks[title], f"{seeds} run"
        else:  # of the networks in the line above
            assert title == "the ensemble of these three"
            of = "ensemble of 3"
        assert rows[trained, network, of] == scores


def whole_differences(one, other, data, views, seeds=(0, 1, 2)):
    """How far two networks' Dice on whole images differs: over seeds, and per image over images.

    Each is "mean ± standard error" in points, without a sign. `seeds` are those of `one`, `other`
    has three.
    """
    def score(name, seed):
        result, = json.loads((ROOT / f"results/whole/strong-{name}-{seed}-{data}-{views}views.json")
                             .read_text())
        return result["whole"]["f1"], [2 * iou / (1 + iou) for iou in result["images"].values()]

    ones = [score(one, seed) for seed in seeds]
    others = [score(other, seed) for seed in (0, 1, 2)]
    over_seeds = [first[0] - second[0] for first, second in zip(ones, others)]
    over_images = (np.mean([images for _, images in ones], axis=0)
                   - np.mean([images for _, images in others], axis=0))
    return [f"{100 * abs(np.mean(values)):.2f} ± "
            f"{100 * np.std(values, ddof=1) / math.sqrt(len(values)):.2f}"
            for values in (over_seeds, over_images)]


def test_means_and_differences_in_the_words_of_both_pages_stand_in_the_tables():
    page, readme = ((ROOT / name).read_text("utf-8") for name in ("results/README.md", "README.md"))
    tables = "".join(re.findall(r"<!-- [^>]+ -->\n(.*?)<!-- end -->", page, re.S))
    words = readme + re.sub(r"<!-- [^>]+ -->\n.*?<!-- end -->", "", page, flags=re.S)
    told = re.findall(r"(?<![\d.])[+-]?\d+\.\d\d ± \d\.\d\d|[+-]\d\.\d\d\b",
                      " ".join(words.split()))
    # Over tiles that both splits test, ten epochs of validation tiles, and two of three seeds.
    by_hand = {"0.64 ± 0.87", "0.16 ± 0.01", "0.66 ± 0.03"}
    for pair in ("standard-200epochs", "standard"), ("exact-standard", "standard"):
        for data in "monuseg-exact", "monuseg":
            by_hand |= {*whole_differences(*pair, data, 8)}
    for data, views in ("monuseg-exact", 1), ("monuseg-exact", 8), ("monuseg", 8):
        by_hand.add(whole_differences("width64-standard", "exact-standard", data, views, (0, 1))[1])
    assert len(told) > 20 and {number for number in told if number not in tables} == by_hand
