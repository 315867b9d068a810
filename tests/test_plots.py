"""plots.py: colours, outlines, training curves and figures, read back pixel by pixel."""

import numpy as np
import pytest

from data import SETS
from plots import (FALSE_ALARM, FOUND, GREEN, LINE_COLOURS, MISSED, PALETTE, drawable, draw_curves,
                   draw_figure, draw_preview, outline, paint, round_ticks)


def log_of(epochs, train, val, iou):
    return [{"train_loss": train, "val_loss": val, "val_iou_per_tile": iou}] * epochs


def heights(panel, colour):
    """Rows of a picture in which a colour occurs, once for each of its pixels."""
    return np.nonzero((panel == colour).all(axis=2))[0]


def panels(runs):
    """The drawn losses and scores, without the legend below."""
    picture = np.asarray(draw_curves(runs))
    assert picture.shape == (460 + 24 * len(runs), 1200, 3)
    return picture[:420, :600], picture[:420, 600:]


# Training curves


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_curves_show_every_run_in_its_colour_in_both_panels(epochs):
    runs = {f"run {i}": [log_of(epochs, 0.9 - 0.2 * i, 1.0 - 0.2 * i, 0.2 + 0.2 * i)]
            for i in range(3)}
    for panel in panels(runs):
        found = [heights(panel, colour) for colour in LINE_COLOURS[:3]]
        assert all(len(rows) > (20 if epochs == 1 else 500) for rows in found)
    assert found[0].mean() > found[1].mean() > found[2].mean()  # by IoU, from below


def test_more_runs_than_colours_are_all_drawn():
    runs = {f"run {i}": [log_of(2, 1, 1, i / 10)] for i in range(len(LINE_COLOURS) + 2)}
    legend = np.asarray(draw_curves(runs))[450:]
    for i, colour in enumerate([*LINE_COLOURS, *LINE_COLOURS[:2]]):
        assert len(heights(legend[24 * i:24 * (i + 1), 60:115], colour)) > 100


@pytest.mark.parametrize("iou", [0.0, 0.3, 1.0])
def test_a_score_that_never_moves_lies_between_the_axes(iou):
    for panel in panels({"run": [log_of(3, 0.5, 0.0, iou)]}):
        rows = heights(panel, LINE_COLOURS[0])
        assert 50 < rows.min() and rows.max() < 410


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 0.21, [0, 0.05, 0.1, 0.15, 0.2, 0.25]),
    (0.31, 0.48, [0.3, 0.35, 0.4, 0.45, 0.5]), (0.99, 1.01, [0.99, 0.995, 1, 1.005, 1.01]),
    (0, 7.3, [0, 2, 4, 6, 8]), (0, 1e-9, [0, 2e-10, 4e-10, 6e-10, 8e-10, 1e-9])])
def test_ticks_are_round(low, high, expected):
    assert round_ticks(low, high) == pytest.approx(expected, abs=1e-12)


def test_ticks_are_few_and_enclose_what_is_drawn():
    chance = np.random.default_rng(0)
    for low, width in zip(10 ** chance.uniform(-3, 3, 500), 10 ** chance.uniform(-3, 3, 500)):
        ticks = round_ticks(low, low + width)
        step = ticks[1] - ticks[0]
        assert low - step < ticks[0] < low * (1 + 1e-6) and 3 <= len(ticks) <= 8
        assert (low + width) * (1 - 1e-6) < ticks[-1] < low + width + step
        assert float(f"{step:.3g}") == pytest.approx(step) and f"{step:.0e}"[0] in "125"


def test_several_seeds_give_a_mean_line_and_a_band_from_lowest_to_highest():
    ious = 0.2, 0.3, 0.7
    _, panel = panels({"network": [log_of(3, 1, 1, iou) for iou in ious]})
    ticks = round_ticks(0.2, 0.7)
    low, mean, high = (400 - 340 * (value - ticks[0]) / (ticks[-1] - ticks[0])
                       for value in (0.2, 0.4, 0.7))
    middle = panel[:, 310]  # between two epochs' dots
    line = np.nonzero((middle == LINE_COLOURS[0]).all(axis=1))[0]
    assert abs(line.mean() - mean) < 1.5 and len(line) <= 4
    band = np.nonzero((middle != 255).any(axis=1) & (np.ptp(middle, axis=1) > 10))[0]
    assert band.min() == pytest.approx(high, abs=2) and band.max() == pytest.approx(low, abs=2)
    assert len(band) == band.max() - band.min() + 1  # without a gap


def test_the_first_epochs_of_a_long_run_do_not_flatten_the_rest():
    later = log_of(18, 0.5, 0.5, 0.70) + log_of(20, 0.4, 0.4, 0.72)
    for panel in panels({"network": [log_of(2, 9, 9, 0.1) + later]}):
        rows = heights(panel, LINE_COLOURS[0])
        assert rows.min() >= 57 and rows.max() <= 403  # within the axes, or at their ends
        at_20, at_40 = (heights(panel[:, 70 + 500 * epoch // 40 - 9:][:, :4], LINE_COLOURS[0])
                        for epoch in (20, 40))
        assert abs(at_20.mean() - at_40.mean()) > 50


def test_no_band_tints_a_line():
    runs = {f"run {i}": [log_of(30, 0.5 + i / 10, 0.2, 0.3), log_of(30, 0.9, 0.2, 0.5 + i / 10)]
            for i in range(3)}
    for panel in panels(runs):
        assert all(len(heights(panel, colour)) > 400 for colour in LINE_COLOURS[:3])


def test_runs_of_different_lengths_have_a_mean_as_far_as_all_reach():
    _, panel = panels({"network": [log_of(10, 1, 1, 0.4), log_of(4, 1, 1, 0.6)]})
    columns = np.nonzero((panel == LINE_COLOURS[0]).all(axis=2))[1]
    assert columns.min() < 100 < 70 + 500 * 3.4 / 10 < columns.max() < 70 + 500 * 3.7 / 10


def test_a_long_name_widens_the_curves_picture():
    drawn = np.asarray(draw_curves({"x" * 300: [log_of(3, 1, 1, 0.5)]}))
    dark = np.nonzero((drawn[460:] < 128).all(axis=2))[1]
    assert 1200 < dark.max() < drawn.shape[1] - 5


# Figures


def test_names_are_drawn_in_letters_that_the_font_has():
    assert drawable("Größe α/2 µm\nnaïve") == "Grosse ?/2 um\nnaive"


def test_long_names_and_captions_run_into_nothing():
    image, labels = np.zeros((224, 224, 3), np.uint8), np.zeros((224, 224), np.uint8)
    short, long = (np.asarray(draw_figure(["one"], [(caption, image, labels, [labels], [""])],
                                          [name]))
                   for caption, name in (("a", "b"), (99 * "long", 60 * "m")))
    assert (short[264:286, 478:] == 255).all() and (long[264:286, 478:] == 255).all()
    assert (long[264:286, 244:460] < 128).any()  # the end of the caption
    rows = [heights(long[286:], colour) for colour in (FALSE_ALARM, MISSED)]
    assert rows[0].min() > rows[1].max() > 22  # each entry has a line of its own


def test_one_class_shows_found_missed_and_mistaken_pixels_apart():
    mask, found = np.array([[1, 1, 0, 0]], np.uint8), np.array([[1, 0, 1, 0]], np.uint8)
    assert [tuple(colour) for colour in paint(found, mask, 1)[0].tolist()] == [
        FOUND, MISSED, FALSE_ALARM, (0, 0, 0)]


def colours_of(picture):
    return {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}


def test_more_classes_show_their_palette_colour_and_a_legend():
    labels = np.repeat(np.arange(22, dtype=np.uint8), 11)[:224][None].repeat(224, 0)
    image = np.full((224, 224, 3), 77, np.uint8)
    drawn = np.asarray(draw_figure(["one", "two"], [("tile", image, labels, [labels, labels],
                                                     ["", ""])], SETS["bcss512"]["classes"]))
    assert drawn.shape[1] == 4 * 234 + 10 and (drawn[40:264, 10:234] == 77).all()
    shown = colours_of(PALETTE[labels])
    for column in 1, 2, 3:
        left = 10 + 234 * column
        assert colours_of(drawn[40:264, left:left + 224]) == shown
    assert shown <= colours_of(drawn[290:])


def test_a_figure_holds_every_tile_beside_all_predictions():
    chance = np.random.default_rng(0)
    images = chance.integers(0, 256, (2, 32, 32, 3), np.uint8)
    masks = chance.integers(0, 2, (4, 32, 32), np.uint8)
    drawn = np.asarray(draw_figure(["network"], [
        (f"tile {n}", images[n], masks[n], [masks[2 + n]], ["IoU 50"]) for n in range(2)],
        ["nucleus"]))
    for n, top in enumerate((40, 40 + 42 + 22)):
        columns = [drawn[top:top + 32, left:left + 32] for left in (10, 52, 94)]
        assert np.array_equal(columns[0], images[n])
        assert np.array_equal(columns[1], paint(masks[n], masks[n], 1))
        assert np.array_equal(columns[2], paint(masks[2 + n], masks[n], 1))
    assert {FOUND, MISSED, FALSE_ALARM} <= colours_of(drawn[40 + 2 * 64:])


def test_a_long_title_stays_above_its_own_column():
    image, labels = np.zeros((224, 224, 3), np.uint8), np.zeros((224, 224), np.uint8)
    rows = [("tile", image, labels, [labels, labels], ["IoU 1", "IoU 2"])]
    long = "unet, standard\n--recipe strong --schedule constant --batch-size 16 --windows 0.25"
    short, drawn = (draw_figure(titles, rows, ["nucleus"])
                    for titles in (["one", "two"], [long, "two"]))
    head = np.asarray(drawn)[:drawn.height - short.height + 40]
    for column in range(4):  # ten pixels between a column and the next
        assert (head[:, 10 + 234 * column + 224:10 + 234 * (column + 1)] == 255).all()
    assert (head[:, 478:702] < 128).any(axis=(1, 2)).sum() > 3 * 8  # three lines at least


def test_a_preview_outlines_masks_and_leaves_its_images_as_they_were():
    images, masks = np.full((3, 8, 8, 3), 90, np.uint8), np.zeros((3, 8, 8), np.uint8)
    masks[1, 2:6, 2:6] = 1
    sheet = np.asarray(draw_preview([(images, masks), (images[:, :, ::-1], masks)], ["nucleus"]))
    assert sheet.shape == (24, 36, 3) and (images == 90).all()
    green = (sheet == GREEN).all(axis=2)
    assert green.sum() == 2 * 12 and green[2:6, 14:18].sum() == green[14:18, 14:18].sum() == 12


def test_a_preview_of_several_classes_outlines_each_in_the_colour_that_its_key_names():
    images, masks = np.full((1, 40, 230, 3), 90, np.uint8), np.zeros((1, 40, 230), np.uint8)
    masks[0, 2:12, 2:12], masks[0, 2:12, 12:22] = 1, 2
    sheet = np.asarray(draw_preview([(images, masks)], ["ground", "one", "two", "absent"]))
    of_label = [(sheet == PALETTE[label]).all(axis=2) for label in range(4)]
    assert of_label[1][2:12, 2:12].sum() == of_label[2][2:12, 12:22].sum() == 100 - 4 * 4
    assert of_label[1][44:].sum() > 100 < of_label[2][44:].sum()  # squares below the tile
    assert not of_label[3].any()


# Colours and outlines

# Machado et al. 2009, complete protanopia, deuteranopia, tritanopia; on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}


def cielab(rgb, sight):
    """Colours (n, 3), 0..1, as an eye of this sight sees them -> L*, a*, b* (n, 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055)**2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                       [0.0193, 0.1192, 0.9505]])
    xyz = (linear @ np.transpose(sight)).clip(0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), 1)


@pytest.mark.parametrize("sight", SIGHT.values(), ids=SIGHT)
def test_colours_are_told_apart_by_every_eye(sight):
    lab = cielab(PALETTE / 255, sight)
    distance = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(len(lab))
    assert len(lab) == 22 and distance.min() > 17 and distance[:3, :3].min() > 70
    lines = cielab(np.array(LINE_COLOURS) / 255, sight)
    distance = np.linalg.norm(lines[:, None] - lines, axis=2) + 1000 * np.eye(len(lines))
    assert len(lines) == 12 and distance.min() > 16


def test_outline_is_the_inner_border_of_each_region():
    mask = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [0, 0, 0, 0, 0]])
    assert outline(mask).tolist() == [
        [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
