"""Every picture: training curves (the paper's Fig. 2), error bars, tiles (Figs. 3-5, and a sheet).

draw_curves, draw_error_bars, draw_figure and draw_preview take plain numbers and arrays, and return
a Pillow image.
"""

import itertools
import math
import statistics
import textwrap
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# One colour per label. Any two of them differ by at least 17 (CIE76) for normal, protanopic,
# deuteranopic and tritanopic eyes alike; the first, which are the commonest labels, by far more.
PALETTE = np.array([
    (0, 0, 0), (213, 94, 0), (86, 180, 233), (149, 0, 255), (255, 234, 191), (42, 64, 149),
    (149, 85, 85), (170, 255, 0), (128, 0, 0), (149, 170, 170), (85, 42, 85), (234, 149, 106),
    (128, 106, 149), (0, 255, 255), (212, 85, 255), (0, 0, 106), (234, 191, 85), (85, 0, 191),
    (106, 21, 42), (42, 0, 64), (106, 106, 191), (191, 0, 0)], np.uint8)

GREEN = (0, 255, 0)  # shows best on stained tissue
# True positives, false positives, false negatives.
FOUND, FALSE_ALARM, MISSED = (255, 255, 255), (213, 94, 0), (86, 180, 233)
LINE_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
                (86, 180, 233), (0, 0, 0), (136, 0, 255), (102, 51, 17), (17, 34, 136),
                (85, 255, 119), (85, 68, 85))  # any two differ by at least 16, as above


def palette_for(num_classes):
    """A colour for each label, (n, 3) uint8; of one class, for background and foreground."""
    return np.array([(0, 0, 0), GREEN], np.uint8) if num_classes == 1 else PALETTE


def outline(mask, width=1):
    """Borders of the regions of each label but 0, the outermost `width` pixels inside them.

    mask (H, W) -> bool (H, W). The edge of the image is no border.
    """
    padded = np.pad(mask, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    border = np.any([mask != neighbour for neighbour in neighbours], axis=0) & (mask > 0)
    return border if width == 1 else border | outline(np.where(border, 0, mask), width - 1)


def drawable(text):
    """A text in ASCII, as Pillow's font has little else: without accents, ? for what remains."""
    parts = unicodedata.normalize("NFKD", text.translate({ord("ß"): "ss", ord("µ"): "u"}))
    return "".join(part if part.isascii() else "?" for part in parts
                   if not unicodedata.combining(part))


# -----------------------------------------------------------------------------
# Charts of two panels: training curves, and means with error bars


def round_ticks(low, high):
    """A few round numbers, evenly spaced, from `low` or below to `high` or above."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= (high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, last + 1)]


def draw_axes(draw, font, left, heading, label, ticks, zero="#dddddd"):
    """Draw a panel's heading, the name of its x axis and a line for each tick -> y_of(value).

    `left` is its left edge in pixels, `zero` the colour of the line at 0. `y_of` turns a value into
    pixels from the top of the picture.
    """
    right, top, bottom = left + 500, 60, 400

    def y_of(value):
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    draw.text(((left + right) / 2, 32), heading, "black", font, anchor="mm")
    draw.text(((left + right) / 2, bottom + 38), label, "black", font, anchor="mm")
    for value in ticks:
        y = y_of(value)
        draw.line((left, y, right, y), "#dddddd" if abs(value) > 1e-9 else zero)
        draw.text((left - 8, y), f"{value:.3g}", "black", font, anchor="rm")
    return y_of


def draw_legend(draw, font, names):
    """Draw a line of each colour with its name, one below the other, under the panels."""
    for i, (name, colour) in enumerate(zip(names, itertools.cycle(LINE_COLOURS))):
        y = 470 + 24 * i
        draw.line((70, y, 110, y), colour, 3)
        draw.text((120, y), drawable(name), "black", font, anchor="lm")


def draw_curves(runs):
    """Draw training curves as the paper's Fig. 2: loss, and validation IoU.

    runs: {name: logs}, a log for each seed. A log is a list of dicts, one per epoch, with
    train_loss, val_loss and val_iou_per_tile (0..1). Lines are means over seeds, bands reach from
    the lowest to the highest seed. The axes show all values but those of the first twentieth of the
    epochs, in which curves fall or rise so far that the rest would look flat: what lies beyond an
    axis is drawn at its end.
    """
    font = ImageFont.load_default(size=15)
    epochs = max(len(log) for logs in runs.values() for log in logs)
    width = max([1200, *(math.ceil(140 + font.getlength(drawable(name))) for name in runs)])
    picture = Image.new("RGB", (width, 460 + 24 * len(runs)), "white")
    draw = ImageDraw.Draw(picture, "RGBA")  # so that bands show what is below them

    def values_of(key):
        return [row[key] for logs in runs.values() for log in logs for row in log[epochs // 20:]]

    ious = values_of("val_iou_per_tile")
    every = math.ceil(epochs / 10)  # epochs between two labels
    panels = [("loss: training thin, validation thick", {"train_loss": 1, "val_loss": 3},
               round_ticks(0, max(*values_of("train_loss"), *values_of("val_loss"), 1e-9))),
              ("validation IoU, per tile", {"val_iou_per_tile": 3},
               round_ticks(min(*ious, 0.99), max(*ious, min(ious) + 0.01)))]
    for panel, (title, series, ticks) in enumerate(panels):
        left = 600 * panel + 70
        y_of = draw_axes(draw, font, left, title, "epoch", ticks)

        def place(epoch, value):
            return left + 500 * (epoch - 0.5) / epochs, y_of(min(max(value, ticks[0]), ticks[-1]))

        for epoch in sorted({1, *range(every, epochs + 1, every)}):
            draw.text((place(epoch, 0)[0], 414), str(epoch), "black", font, anchor="mm")
        lines = []
        for logs, colour in zip(runs.values(), itertools.cycle(LINE_COLOURS)):
            for key, width in series.items():
                by_epoch = [*zip(*([row[key] for row in log] for log in logs))]
                lowest, mean, highest = (
                    [place(epoch, function(values)) for epoch, values in enumerate(by_epoch, 1)]
                    for function in (min, statistics.mean, max))
                if len(logs) > 1 and len(by_epoch) > 1:
                    draw.polygon(highest + lowest[::-1], (*colour, 40))
                lines.append((mean, colour, width))
        for points, colour, width in lines:  # above all bands, which would tint them
            draw.line(points, colour, width, "curve")
            if epochs <= 20:
                for x, y in points:
                    draw.ellipse((x - width, y - width, x + width, y + width), colour)
    draw_legend(draw, font, runs)
    return picture


def draw_error_bars(heading, panels):
    """Draw means, with bars of one standard error up and down, over a logarithmic axis.

    panels: {what the axis shows: {name of a line: {place on the axis: values}}}, the same names and
    at least two places in each. A place without values is left out; a single value has no bar.
    """
    font, names = ImageFont.load_default(size=15), [*next(iter(panels.values()))]
    picture = Image.new("RGB", (600 * len(panels), 460 + 24 * len(names)), "white")
    draw = ImageDraw.Draw(picture)
    for panel, (title, lines) in enumerate(panels.items()):
        left = 600 * panel + 70
        bars = {name: [(at, statistics.mean(values),
                        statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0)
                       for at, values in line.items() if values] for name, line in lines.items()}
        ends = [mean + sign * error for line in bars.values() for _, mean, error in line
                for sign in (-1, 1)]
        places = [*lines[names[0]]]
        ticks = round_ticks(min([-1, *ends]), max([1, *ends]))
        y_of = draw_axes(draw, font, left, heading, title, ticks, zero="black")

        def x_of(at):
            return left + 40 + 420 * math.log(at / places[0]) / math.log(places[-1] / places[0])

        for at in places:
            draw.text((x_of(at), 414), str(at), "black", font, anchor="mm")
        for i, (line, colour) in enumerate(zip(bars.values(), itertools.cycle(LINE_COLOURS))):
            aside = 8 * (i - (len(names) - 1) / 2)  # pixels, so that no bar hides another
            draw.line([(x_of(at) + aside, y_of(mean)) for at, mean, _ in line], colour, 2)
            for at, mean, error in line:
                x, y = x_of(at) + aside, y_of(mean)
                draw.line((x, y_of(mean - error), x, y_of(mean + error)), colour, 2)
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    draw_legend(draw, font, names)
    return picture


# -----------------------------------------------------------------------------
# Tiles


def paint(prediction, mask, num_classes):
    """Labels (H, W) as colours (H, W, 3), uint8; of one class: found, missed and false alarm."""
    if num_classes > 1:
        return PALETTE[prediction]
    colours = np.zeros((*mask.shape, 3), np.uint8)
    colours[(prediction == 1) & (mask == 1)] = FOUND
    colours[(prediction == 1) & (mask == 0)] = FALSE_ALARM
    colours[(prediction == 0) & (mask == 1)] = MISSED
    return colours


def draw_figure(titles, rows, names):
    """Draw tiles as the paper's Figs. 3-5: image, ground truth, one column per network.

    titles: one per network; rows: (caption, image (H, W, 3), mask (H, W), predictions, captions of
    those), all uint8; names: of the classes.
    """
    font, side = ImageFont.load_default(size=14), len(rows[0][2])
    cell, line = side + 10, 22
    titles = ["\n".join(part for words in drawable(title).splitlines()
                        for part in textwrap.wrap(words, 28))
              for title in ["image", "ground truth", *titles]]
    head = 22 + 18 * max(title.count("\n") + 1 for title in titles)
    size = len(titles) * cell + 10, head + (cell + line) * len(rows)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((10 + cell * column + side / 2, head / 2), title, "black", font, anchor="mm",
                  align="center")
    for row, (caption, image, mask, predictions, captions) in enumerate(rows):
        y = head + (cell + line) * row
        caption = drawable(caption)
        while font.getlength(caption) > 2 * cell - 10:  # the first network's score stands beside it
            caption = caption[1:]
        panels = [image, *(paint(labels, mask, len(names)) for labels in [mask, *predictions])]
        for column, (panel, text) in enumerate(zip(panels, [caption, "", *captions])):
            picture.paste(Image.fromarray(panel), (10 + cell * column, y))
            draw.text((10 + cell * column, y + side + 4), text, "black", font)
    if len(names) == 1:
        return add_legend(picture, [(f"{names[0]}, found", FOUND), ("missed", MISSED),
                                    ("false alarm", FALSE_ALARM)])
    shown = np.unique([[mask, *predictions] for _, _, mask, predictions, _ in rows])
    return add_legend(picture, [(names[label], PALETTE[label]) for label in shown])


def add_legend(picture, legend):
    """A picture, and below it a square of each colour with its name, as many in a line as fit."""
    font = ImageFont.load_default(size=14)
    width = max([190, *(math.ceil(40 + font.getlength(drawable(name))) for name, _ in legend)])
    per_line = max(1, picture.width // width)
    height = 22 * math.ceil(len(legend) / per_line)
    extended = ImageOps.expand(picture, (0, 0, 0, height), "white")
    draw = ImageDraw.Draw(extended)
    for i, (name, colour) in enumerate(legend):
        x, y = 10 + width * (i % per_line), picture.height + 22 * (i // per_line)
        draw.rectangle((x, y, x + 14, y + 14), tuple(map(int, colour)), "black")
        draw.text((x + 20, y - 1), drawable(name), "black", font)
    return extended


def draw_preview(rows, names):
    """A sheet of tiles, each with the outlines of its mask; of several classes in their colours.

    rows: pairs of images (n, H, W, 3) and masks (n, H, W), uint8; one pair fills one row. names: of
    the classes. What has the label 0 has no outline.
    """
    colours = palette_for(len(names))
    n, height, width = rows[0][1].shape
    height, width = height + 4, width + 4  # with a gap between tiles
    picture = Image.new("RGB", (n * width, len(rows) * height), "white")
    for row, (images, masks) in enumerate(rows):
        for column, (image, mask) in enumerate(zip(images, masks)):
            border = outline(mask, 1 if len(names) == 1 else 3)
            tile = np.where(border[..., None], colours[mask], image)
            picture.paste(Image.fromarray(tile), (column * width, row * height))
    if len(names) == 1:
        return picture
    shown = np.unique([masks for _, masks in rows])
    return add_legend(picture, [(names[label], PALETTE[label]) for label in shown if label])
