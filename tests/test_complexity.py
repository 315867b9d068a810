"""complexity.py: the sets, a small experiment from end to end, the statistics, page and picture."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import complexity
import train
from complexity import differences, fusion_pays, holm, p_value
from data import load, split_tiles
from plots import LINE_COLOURS, draw_error_bars
from report import fill_page, read_scores
from synthetic import merge

SMALL = {"CLASSES": [(1, 40), (3, 40)], "GRAINS": [(3, 40), (3, 80)], "SEEDS": range(2),
         "PAPER_SKIPS": ("standard", "fusion"), "OTHER_SKIPS": (),
         "LONGER": [(3, 40, 2)], "BLOCKS": [([(1, 40), (3, 40)], ("standard", "fusion")),
                                            ([(3, 40, 2)], ("standard", "fusion"))],
         "TILES": {"train": 2, "val": 1, "test": 2},
         "RECIPE": "--width 2 --epochs 1 --batch-size 2".split()}


def experiment(*flags):
    """Run the experiment in the current folder, its trainings in this very process -> calls."""
    calls = []

    def run(command, stdout, **_):
        calls.append(" ".join(map(str, command[2:])))
        try:
            train.main(train.parse_args([*map(str, command[2:])]))
        except ValueError as error:
            stdout.write(f"epoch 1\n{error}\n")
            return SimpleNamespace(returncode=2)
        return SimpleNamespace(returncode=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(complexity.subprocess, "run", run)
        complexity.main(complexity.parse_args(["--jobs", "1", *flags]))
    return calls


def make_small(patch, folder):
    patch.chdir(folder)
    for name, value in SMALL.items():
        patch.setattr(complexity, name, value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small experiment, finished -> the folder that it ran in, what train.py was called with."""
    folder = tmp_path_factory.mktemp("complexity")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch, folder)
        return SimpleNamespace(folder=folder, calls=experiment())


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of the finished experiment, which a test may damage, as the current folder."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    make_small(monkeypatch, tmp_path / "copy")
    return tmp_path / "copy"


def forget(folder, name):
    """Remove a run and its scores."""
    shutil.rmtree(folder / "runs/complexity" / name)
    (folder / f"results/complexity/{name}.json").unlink()


# Sets


def test_sets_of_all_numbers_of_classes_differ_in_their_labels_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(complexity, "TILES", SMALL["TILES"])
    for k in (22, 1, 3, 6, 12):
        complexity.draw_set(k, 40)
    whole = load("tissue-k22-grain040", "data")
    first = (whole.masks[0] == 1).sum().item()
    assert first == pytest.approx(6836, rel=0.01)  # as in earlier versions, or results do not mix
    for k in (1, 3, 6, 12):
        tiles = load(f"tissue-k{k:02}-grain040", "data")
        assert tiles.images.equal(whole.images) and tiles.rows == whole.rows
        assert np.array_equal(tiles.masks, merge(whole.masks.numpy(), k))
        assert len(tiles.info["classes"]) == k and tiles.masks.max() <= max(1, k - 1)
        assert tiles.info["recipe"] == ("monuseg" if k == 1 else "bcss")


def test_sets_come_in_the_parts_that_are_asked_for(finished):
    rows = load("tissue-k03-grain040", finished.folder / "data").rows
    parts = split_tiles("tissue-k03-grain040", rows, "official")
    assert {part: len(tiles) for part, tiles in parts.items()} == SMALL["TILES"]


def test_the_grain_changes_the_tiles_and_a_set_that_is_there_is_not_drawn_again(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(complexity, "TILES", {"train": 1})
    for grain in 20, 80:
        complexity.draw_set(6, grain)
    one, two = (load(f"tissue-k06-grain{grain}", "data").images for grain in ("020", "080"))
    assert not one.equal(two)
    monkeypatch.setattr(complexity, "tissue_tile", None)
    complexity.draw_set(6, 20)


# Cells


def test_the_plan_is_seed_by_seed_within_each_block():
    runs = complexity.all_runs()
    assert len(runs) == len(set(runs)) == 5 * 5 * 3 + 3 * 5 * 3 + 5 * 5 * 2 + 4 * 5 * 2
    blocks = runs[:75], runs[75:120], runs[120:170], runs[170:]
    for block in blocks:
        seeds = [seed for _, _, seed in block]
        assert seeds == sorted(seeds) and {seeds.count(seed) for seed in range(5)} == {
            len(block) // 5}
    assert {skip for _, skip, _ in blocks[2]} == {"nested", "fusionunet"}
    assert {which for which, _, _ in blocks[1]} == {(6, 20), (6, 80), (6, 160)}
    assert {which for which, _, _ in blocks[3]} == {(k, 40, 3) for k in (3, 6, 12, 22)}


def test_every_run_is_trained_once_and_alike(finished):
    runs = [(k, skip, seed, "", "") for seed in (0, 1) for k in (1, 3)
            for skip in ("standard", "fusion")]
    runs += [(3, skip, seed, " --epochs 2", "-2epochs") for seed in (0, 1)
             for skip in ("standard", "fusion")]
    assert [call.replace(os.sep, "/") for call in finished.calls] == [
        f"--model unet --skip {skip} --data tissue-k{k:02}-grain040 --split official --seed {seed} "
        f"--width 2 --epochs 1 --batch-size 2{longer} --device cpu --resume --data-root data --out "
        f"runs/complexity/tissue-k{k:02}-grain040-{skip}{name}-seed{seed}"
        for k, skip, seed, longer, name in runs]
    assert len(list((finished.folder / "results/complexity").glob("*.json"))) == len(runs)


def test_a_run_is_trained_by_a_process_of_one_thread(copied):
    path = copied / "results/complexity/tissue-k01-grain040-fusion-seed1.json"
    before = json.loads(path.read_text())
    forget(copied, path.stem)
    complexity.main(complexity.parse_args(["--jobs", "2"]))
    after = json.loads(path.read_text())
    assert "1 thread" in after["device"]
    assert after["tiles"] == before["tiles"]
    assert "test, 2 tiles" in (copied / f"runs/complexity/{path.stem}.log").read_text()


def test_what_is_finished_is_not_trained_again(copied):
    shutil.rmtree(copied / "runs/complexity/tissue-k03-grain040-standard-seed1")
    call, = experiment()
    assert "--skip standard --data tissue-k03-grain040 --split official --seed 1" in call


def test_a_run_that_fails_stops_no_other(copied):
    failing, other = "tissue-k03-grain040-fusion-seed0", "tissue-k01-grain040-standard-seed1"
    forget(copied, failing), forget(copied, other)
    (copied / "data/tissue-k03-grain040/masks.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"1 runs failed, first {failing}: exit status 2, .*dama"):
        experiment()
    page = (copied / "results/complexity/README.md").read_text("utf-8")
    assert (copied / f"results/complexity/{other}.json").exists()
    first, second = cells(page.split("<!-- fusion pays -->")[1].split("<!-- end -->")[0].strip())
    assert "(n = 2)" in first[1] and "(n = 1)" in second[1]


# The page


def test_the_page_compares_seed_by_seed(finished):
    folder, rows = finished.folder / "results/complexity", {}
    for skip in "standard", "fusion":
        for seed in 0, 1:
            text = (folder / f"tissue-k01-grain040-{skip}-seed{seed}.json").read_text()
            rows[skip, seed] = json.loads(text)["per_tile"]["iou"]
    difference = np.array([rows["fusion", seed] - rows["standard", seed] for seed in (0, 1)]) * 100
    page = (folder / "README.md").read_text("utf-8")
    assert page.count(f"| {difference.mean():+.2f} ± {abs(np.diff(difference))[0] / 2:.2f} (n = 2)"
                      ) == 2
    assert "![difference to the standard skip](differences.png)" in page
    assert all(f"<!-- {name} -->\n" in page for name in complexity.TABLES)


def test_whether_the_lead_lasts_is_told_seed_by_seed(monkeypatch):
    monkeypatch.setattr(complexity, "LONGER", [(3, 40, 3)])
    scores = {(3, 40): [(0.5, 0.6)] * 5, (3, 40, 3): [(0.7, 0.75), (0.7, 0.85)] * 2 + [(0.7, 0.8)]}
    results = {(which, skip, seed): {"per_tile": {"iou": iou}} for which, pairs in scores.items()
               for seed, pair in enumerate(pairs)
               for skip, iou in zip(("standard", "fusion"), pair)}
    results[(3, 40), "fusion", 4]["per_tile"]["iou"] = 0.65  # of which standard has 0.5
    (k, two, _, three, _, change, _, unequal, _), = cells(complexity.third_pass(results))
    assert (k, two, three) == ("3", "+11.00 ± 1.00 (n = 5)", "+10.00 ± 2.24 (n = 5)")
    assert change == "-1.00 ± 2.45 (n = 5)" and unequal == "-9.00 ± 1.00 (n = 5)"
    del results[(3, 40), "fusion", 4]
    assert cells(complexity.third_pass(results)) == [[
        "3", "+10.00 ± 0.00 (n = 4)", "+10.00 ± 2.89 (n = 4)", "+0.00 ± 2.89 (n = 4)",
        "-10.00 ± 0.00 (n = 4)"]]


def test_report_trains_nothing_and_keeps_the_words_of_the_page(copied):
    page = Path("results/complexity/README.md")
    page.write_text("Words.\n\n<!-- trend -->\n<!-- end -->\n")
    Path("results/complexity/differences.png").unlink()
    assert experiment("--report") == []
    assert page.read_text("utf-8").startswith("Words.\n\n<!-- trend -->\n| Skips | Slope ")
    assert Path("results/complexity/differences.png").stat().st_size > 1000


def test_the_committed_page_is_what_its_runs_give():
    page = ROOT / "results/complexity/README.md"
    paths = {run: page.with_name(f"{complexity.run_name(*run)}.json")
             for run in complexity.all_runs()}
    results = {run: read_scores(path) for run, path in paths.items() if path.exists()}
    for flag, text in zip(complexity.RECIPE[::2], complexity.RECIPE[1::2]):
        values = {result["args"][flag[2:].replace("-", "_")]
                  for (data_set, _, _), result in results.items() if len(data_set) == 2}
        assert [type(value)(text) for value in values] == [*values]  # the page's runs are of it
    assert fill_page(page, complexity.TABLES, results) == page.read_text("utf-8")


def test_the_page_names_every_table_and_the_numbers_of_tiles():
    page = ROOT / "results/complexity/README.md"
    filled = fill_page(page, complexity.TABLES, {})
    assert all(f"<!-- {name} -->\n" in filled for name in complexity.TABLES)
    assert "480 tiles to train on, 40 to validate, 240 to test" in " ".join(filled.split())
    assert complexity.TILES == {"train": 480, "val": 40, "test": 240}


def made_up(gains, seeds=range(5), classes=complexity.CLASSES):
    """Results in which fusion is better than standard by a gain for each set and seed."""
    return {(which, skip, seed): {"per_tile": {"iou": 0.5 + 0.1 * seed + (skip == "fusion") * gain}}
            for which, gain_of in zip(classes, gains) for seed, gain in zip(seeds, gain_of)
            for skip in ("standard", "fusion")}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split(" | ")]
            for line in table.splitlines()[2:]]


SURE, SMALL_GAIN = [0.02, 0.021, 0.019, 0.022, 0.018], [0.005, 0.0051, 0.0049, 0.0052, 0.0048]
UNSURE = [0.01, 0.05, -0.02, 0.03, 0.0]


def test_fusion_pays_where_it_is_sure_and_worth_it():
    rows = cells(fusion_pays(made_up([SURE, SMALL_GAIN, UNSURE, [-g for g in SURE], SURE])))
    assert [row[0] for row in rows] == ["1", "3", "6", "12", "22"]
    assert [row[-1] for row in rows] == ["yes", "no", "no", "no", "yes"]
    assert rows[0][1] == "+2.00 ± 0.07 (n = 5)" and rows[2][1] == "+1.40 ± 1.21 (n = 5)"
    assert rows[2][2] == rows[2][3] == "0.3111"  # t = 1.1586; the largest p stays


def test_there_is_no_verdict_before_the_last_seed():
    results = made_up([SURE] * 5)
    del results[(22, 40), "fusion", 4]
    rows = cells(fusion_pays(results))
    assert all(len(row) == 2 for row in rows) and "(n = 4)" in rows[4][1]


def test_the_trend_is_the_slope_for_a_doubling_of_the_classes():
    gains = [[0.01 * np.log2(k) + 0.003 * seed for seed in range(5)]
             for k, _ in complexity.CLASSES]
    rows = {row[0]: row[1:] for row in cells(complexity.trend(made_up(gains)))}
    assert rows["fusion - standard"][0] == "+1.00 ± 0.00 (n = 5)"
    assert float(rows["fusion - standard"][1]) < 1e-4
    assert [*rows] == ["fusion - standard"]  # the others have not been trained


def test_a_seed_without_its_partner_is_in_no_difference():
    results = made_up([SURE] * 5)
    del results[(3, 40), "standard", 2]
    assert sorted(differences(results, (3, 40), "fusion")) == [0, 1, 3, 4]
    assert differences(results, (1, 40), "fusion")[3] == pytest.approx(0.022)


def spread(mean, t):
    """Five gains of this mean, of which Student's t is that."""
    z = np.arange(5.0) - 2
    return (mean + z / z.std(ddof=1) * mean * np.sqrt(5) / t).tolist()


def test_the_verdict_takes_holms_p_and_the_level_and_least_gain_that_were_written_down():
    def verdicts(*gains):
        return [row[-1] for row in cells(fusion_pays(made_up(gains)))]

    below, above = spread(0.02, 2.9), spread(0.02, 2.7)  # p 0.044 and 0.054; 2.776 is 0.05
    assert verdicts(SURE, SURE, SURE, SURE, below)[-1] == "yes"
    assert verdicts(SURE, SURE, SURE, SURE, above)[-1] == "no"
    assert verdicts(*[below] * 5) == ["no"] * 5  # 0.044 times 5
    assert verdicts(spread(0.0102, 99), spread(0.0098, 99), SURE, SURE, SURE)[:2] == ["yes", "no"]


# Statistics


@pytest.mark.parametrize("df, t, p", [  # any table of Student's t
    (1, 12.706, 0.05), (2, 4.303, 0.05), (4, 2.776, 0.05), (4, 4.604, 0.01), (4, 2.132, 0.10),
    (9, 2.262, 0.05), (30, 2.750, 0.01), (4, 0.0, 1.0)])
def test_p_values_are_those_of_the_tables(df, t, p):
    values = np.arange(df + 1.0)
    values = (values - values.mean()) / values.std(ddof=1)  # mean 0, deviation 1
    for sign in 1, -1:
        assert p_value((values + sign * t / np.sqrt(df + 1)).tolist()) == pytest.approx(p, abs=2e-4)


def test_p_is_0_for_equal_values_and_1_for_zeros():
    assert p_value([0.5] * 5) == pytest.approx(0, abs=1e-9) and p_value([0.0] * 5) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == pytest.approx([1, 1]) and holm([0.04]) == pytest.approx([0.04])


# The picture


def panel_of(values, panel=0):
    lines = {"one": {1: [0.0, 0.0], 22: values}, "two": {1: [], 22: []}}
    return np.asarray(draw_error_bars("points", {"classes": lines, "pixels": lines}))[
        :420, 600 * panel:600 * (panel + 1)]


def rows_of(picture, colour):
    return np.nonzero((picture == colour).all(axis=2).any(axis=1))[0]


@pytest.mark.parametrize("panel", [0, 1])
def test_bars_reach_one_standard_error_up_and_down(panel):
    picture = panel_of([2.0, 4.0], panel)  # 3 ± 1, on an axis from 0 or below to 4
    rows = rows_of(picture[:, 300:], LINE_COLOURS[0])
    zero = rows_of(picture[:405, 80:120], (0, 0, 0))
    scale = (zero.max() - rows.min()) / 4  # pixels a point
    middle = (picture[:, 500:] == LINE_COLOURS[0]).all(axis=2)
    widest = middle.sum(axis=1).argmax()
    assert (zero.max() - widest) / scale == pytest.approx(3, abs=0.05)
    lowest = np.nonzero(middle.any(axis=1))[0].max()
    assert (zero.max() - lowest) / scale == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("end, share", [(1.0, 1 / 2), (3.0, 3 / 4), (-3.0, 3 / 4)])
def test_a_line_spans_its_values_on_the_axis_and_one_without_values_is_not_drawn(end, share):
    panel = panel_of([end, end])  # on axes of -1..1, -1..3 and -3..1, 340 pixels high
    assert len(rows_of(panel, LINE_COLOURS[0])) == pytest.approx(340 * share, abs=10)
    assert len(rows_of(panel[:, 70:570], LINE_COLOURS[1])) == 0


def test_the_picture_shows_points_over_classes_and_over_grains(monkeypatch):
    monkeypatch.setattr(complexity, "draw_error_bars", lambda heading, panels: panels.values())
    by_class = [[0.01 * k + 0.001 * seed for seed in range(5)] for k, _ in complexity.CLASSES]
    by_grain = [[0.001 * grain] * 5 for _, grain in complexity.GRAINS]
    results = made_up(by_class) | made_up(by_grain, classes=complexity.GRAINS)
    classes, grains = (panel["fusion - standard"] for panel in complexity.draw_picture(results))
    assert grains == {grain: pytest.approx([0.1 * grain] * 5) for _, grain in complexity.GRAINS}
    assert {**classes, 6: None} == {1: pytest.approx([1, 1.1, 1.2, 1.3, 1.4]), 6: None} | {
        k: pytest.approx([k + 0.1 * seed for seed in range(5)]) for k in (3, 12, 22)}
