"""report.py: the tables of results/README.md, worked out by hand from made-up runs."""

import json
import runpy
import sys

import pytest
from conftest import ROOT

import report
import train
from eval import draw_curves


def scores(skip, seed, tiles, *flags, ious=(0.3, 0.7), data="monuseg"):
    """What train.py writes after two epochs of 90 s: three test tiles of two images."""
    args = vars(train.parse_args(["--data", data, "--skip", skip, "--seed", str(seed), *flags]))
    args = {name: args[name] for name in train.RECIPE}
    iou = sum(tiles) / len(tiles)
    return {"args": args, "weights": "from scratch", "epoch": 2, "seconds": [90.0, 180.0],
            "log": [{"epoch": n, "train_loss": 1 / n, "val_loss": 1 / n, "val_iou_per_tile": iou}
                    for n, iou in enumerate(ious, 1)],
            "images": ["A", "A", "B"], "tiles": list(tiles), "torch": "2.15", "device": "abacus",
            "processes": 1, "per_tile": {"iou": iou, "f1": 0.5}, "global": {"iou": 0.4, "f1": 0.6}}


RUNS = [scores("standard", 0, (0.5, 0.7, 0.6)), scores("standard", 1, (0.5, 0.5, 0.5)),
        scores("conv", 0, (0.6, 0.8, 0.7)), scores("conv", 1, (0.6, 0.6, 0.9), ious=(0.2, 0.6)),
        scores("conv", 2, (0.1, 0.1, 0.1)), scores("fusion", 1, (0.5, 0.5, 0.5)),
        scores("fusion", 0, (0.5, 0.7, 0.6), "--width", "8", "--epochs", "2")]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()[2:]]


def test_skips_are_compared_seed_by_seed_and_image_by_image():
    conv, fusion = cells(report.skip_differences(RUNS))  # width 8 has no standard beside it
    assert conv[:3] == ["unet", "monuseg, tile", "conv - standard"]
    # Seeds: +10 and +20, deviation 7.07. Images: A +10 and +10, B +10 and +40.
    assert conv[3:] == ["+15.00 ± 5.00 (n = 2)", "+17.50 ± 7.50 (n = 2)", "0.00 / 7.07", "+1.05"]
    assert fusion[3:5] == ["+0.00 (n = 1)", "+0.00 ± 0.00 (n = 2)"] and fusion[5] == "-"


def test_tiles_without_a_class_and_sets_without_the_papers_number():
    runs = [scores("standard", 0, (0.5, 0.5, 0.5), data="bcss"),
            scores("fusion", 0, (0.5, 0.6, 0.7), data="bcss")]
    runs[0]["tiles"][0] = runs[1]["tiles"][0] = None
    row, = cells(report.skip_differences(runs))
    assert row[4] == "+15.00 ± 5.00 (n = 2)" and row[-1] == "-"
    assert len(cells(report.time_to_paper(runs))) == 1  # the paper could not train the other


def test_time_to_the_papers_score_ends_with_the_epoch_that_passes_it():
    rows = {(row[0], row[1], row[3]): row[4:] for row in cells(report.time_to_paper(RUNS))}
    assert rows["unet", "conv", "0"] == ["67.32", "3.0 min, epoch 2", "70.00", "3.0 min, 2 epochs",
                                         "abacus", "2 h"]
    assert rows["unet", "conv", "1"][1:3] == ["not reached", "60.00"]
    assert not cells(report.time_to_paper([scores("conv", 0, (0, 0, 0), "--split", "image")]))


def test_every_run_is_told_by_the_command_that_repeats_it():
    for result, (told, *row) in zip(RUNS, cells(report.commands(RUNS)), strict=True):
        start, flags = told.strip("`").split(" train.py ")
        assert start == "python"
        again = vars(train.parse_args(flags.split()))
        assert {name: again[name] for name in train.RECIPE} == result["args"]
        assert row == [f"{100 * result['per_tile']['iou']:.2f}, 50.00", "40.00, 60.00", "2",
                       "3.0 min", "abacus, torch 2.15", "from scratch"]
    (told, *_), = cells(report.commands([RUNS[0] | {"processes": 8}]))
    assert told.startswith("`torchrun --nproc-per-node 8 train.py --model unet ")


def test_a_curve_is_the_mean_over_seeds_of_one_network_on_one_split():
    others = [scores("conv", 0, (0, 0, 0), *flags) for flags in
              (("--split", "image"), ("--model", "swin_unet"))]
    tile, *alone = report.mean_logs([*RUNS, *others]).values()
    assert [[*by_name.values()] for by_name in alone] == [[other["log"]] for other in others]
    assert {*tile} == {"unet, standard skip, mean of 2 seeds", "unet, conv skip, mean of 3 seeds",
                       "unet, fusion skip", "unet --epochs 2 --width 8, fusion skip"}
    first, last = tile["unet, conv skip, mean of 3 seeds"]
    assert first == pytest.approx({"epoch": 1, "train_loss": 1, "val_loss": 1,
                                   "val_iou_per_tile": (0.3 + 0.2 + 0.3) / 3})
    assert last["val_iou_per_tile"] == pytest.approx((0.7 + 0.6 + 0.7) / 3)


def test_tables_are_replaced_and_words_stay(tmp_path, monkeypatch, capsys):
    page, files = tmp_path / "page.md", []
    words = "Mine.\n\n<!-- {} -->\nold | table\n<!-- end -->\n\nMine too.\n"
    page.write_text("".join(words.format(name) for name in report.TABLES))
    for number, result in enumerate(RUNS):
        files.append(str(tmp_path / f"{number}.json"))
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    report.main(report.parse_args([*files, "--page", str(page)]))
    once = page.read_text("utf-8")
    draw_curves(report.mean_logs(RUNS)["monuseg", "tile", "unet"], tmp_path / "same.png")
    drawn = tmp_path / "curves-monuseg-tile-unet.png"
    assert drawn.read_bytes() == (tmp_path / "same.png").read_bytes() and drawn.name in once
    assert "old" not in once and once.count("Mine") == 2 * len(report.TABLES)
    assert all(table(RUNS) in once for table in report.TABLES.values())
    report.main(report.parse_args([*files, "--page", str(page)]))
    assert page.read_text("utf-8") == once

    page.write_text(words.format("no such"))
    (tmp_path / "bad.json").write_text("[1, 2]")
    for given, named in ([files[0]], "no such"), ([str(tmp_path / "bad.json")], "bad.json"):
        monkeypatch.setattr(sys, "argv", ["report.py", *given, "--page", str(page)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "report.py"), run_name="__main__")
        line, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and named in line
    assert page.read_text() == words.format("no such")


def test_the_committed_page_is_what_its_runs_give(tmp_path):
    committed = ROOT / "results/README.md"
    (tmp_path / "page.md").write_bytes(committed.read_bytes())
    report.main(report.parse_args([*map(str, sorted(ROOT.glob("results/runs/*.json"))),
                                   "--page", str(tmp_path / "page.md")]))
    assert (tmp_path / "page.md").read_bytes() == committed.read_bytes()
