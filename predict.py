"""Predict whole images of any size with a trained network: a mask and a picture of each.

    python predict.py runs/monuseg-unet-conv-seed0/best.pt image.tif
    python predict.py runs/.../best.pt slides/ more.png --out predictions/ --tta --probabilities

An image NAME is brought to the scale of the training set and predicted in overlapping tiles, whose
probabilities fade into each other, so that no seam shows. It yields NAME_mask.png (class indices,
shown in colours; of one class, 1 is a nucleus) and NAME_overlay.png (outlines on the image), and on
demand NAME_probabilities.npy (float16, at the training scale: height, width, classes).
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import (CLASSES, PALETTE, TILE, by_name, find_files, live, normalize, outline, positive,
                  read_image, run)
from models import autocast, build_model, load_checkpoint, pick_device

SCALES = {"monuseg": 4 * TILE / 1000, "bcss512": TILE / 512}  # as data.py resizes; of others, 1
TILINGS = {  # largest side of a tile, what sides are multiples of, overlap, all pixels; batch size
    "unet": (1024, 16, 128, 1), "swin_unet": (TILE, TILE, TILE // 2, 8)}
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}  # what folders are read for
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV", "F",
         "I", "I;16", "I;16L", "I;16B")
GREEN = np.array([(0, 0, 0), (0, 255, 0)], np.uint8)  # of one class: shows best on stained tissue


def read_rgb(path):
    """Read any image as RGB, 8-bit, without transparency; ValueError if it cannot be used."""
    image = read_image(path, MODES)
    if image.mode[0] in "IF":  # grey levels of 16-bit files, and floating-point ones from 0 to 1
        white, image = 1 if image.mode == "F" else 65535, image.convert("F")
        low, high = image.getextrema()
        if not 0 <= low <= high <= white:
            raise ValueError(f"{path}: holds values from {low:g} to {high:g}, not from 0 to "
                             f"{white}: export it again as 8-bit")
        image = image.point(lambda value: value * (255 / white) + 0.5)
    return image.convert("RGB")


def cover(length, side, multiple, overlap):
    """Cover `length` pixels with as few tiles of at most `side` pixels as possible.

    Returns where they start, a list; the pixel that each place shows, mirrored beyond the end; and
    a tile's weights, smooth and above 0 everywhere, float32.
    """
    n = max(1, math.ceil((length - overlap) / (side - overlap)))
    tile = multiple * math.ceil((length + (n - 1) * overlap) / n / multiple)
    starts = [k * (tile - overlap) for k in range(n)]
    places = np.pad(np.arange(length), (0, starts[-1] + tile - length), "reflect")
    return starts, places, torch.sin(torch.pi * (torch.arange(tile) + 0.5) / tile) ** 2


def ask(model, images, tta):
    """Probabilities (N, C, H, W) float32 of images (N, 3, H, W), 0..1; `tta` averages 8 views."""
    views = [(turn, axes) for turn in range(4) for axes in ((), (3,))] if tta else [(0, ())]
    total = 0
    for turn, axes in views:
        view = images.rot90(turn, (2, 3)).flip(axes).contiguous()
        with autocast(images.device):
            logits = model(normalize(view)).float()
        answer = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)
        total = total + answer.flip(axes).rot90(-turn, (2, 3))
    return total / len(views)


@torch.inference_mode()
def predict_bands(model, image, num_classes, tiling, device, tta=False):
    """Predict an RGB image of the training scale -> yields bands of rows, from top to bottom.

    A band is (C, rows, width) float32 probabilities, valid until the next one is asked for. Rows
    leave as soon as no further tile touches them: only one row of tiles is kept.
    """
    *tiling, batch_size = tiling
    tops, rows, fade_y = cover(image.height, *tiling)
    lefts, columns, fade_x = cover(image.width, *tiling)
    height, width = len(fade_y), len(fade_x)
    window = torch.outer(fade_y, fade_x).to(device)
    sums = torch.zeros(num_classes + 1, height, len(columns), device=device)  # last: of weights
    for top, next_top in zip(tops, tops[1:] + [image.height]):
        # Cut one row of tiles.
        y = rows[top:top + height]
        strip = np.asarray(image.crop((0, y.min(), image.width, y.max() + 1)))
        strip = torch.from_numpy(strip[y - y.min()][:, columns]).permute(2, 0, 1)

        # Ask the network, a few tiles at a time, and add up what it says.
        for first in range(0, len(lefts), batch_size):
            some = lefts[first:first + batch_size]
            tiles = torch.stack([strip[:, :, left:left + width] for left in some])
            for left, answer in zip(some, ask(model, tiles.to(device).float() / 255, tta)):
                sums[:-1, :, left:left + width] += window * answer
                sums[-1, :, left:left + width] += window

        # Hand out the rows that no further tile touches, and move the others up.
        done = sums[:, :next_top - top, :image.width]
        yield done[:-1].div_(done[-1])
        rest = sums[:, next_top - top:].clone()
        sums[:, :rest.shape[1]], sums[:, rest.shape[1]:] = rest, 0


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="best.pt of a run")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders: all images "
                        "in them but *_mask.png and *_overlay.png")
    parser.add_argument("--out", type=Path, default="predictions", help="folder to write to")
    parser.add_argument("--scale", type=positive(float), help="factor to resize images by "
                        "(default: as the training set was, monuseg 0.896)")
    parser.add_argument("--tta", action="store_true", help="average over eight flips and turns")
    parser.add_argument("--probabilities", action="store_true", help="also write these, as .npy")
    parser.add_argument("--batch-size", type=positive(int),
                        help="tiles at a time (default: unet 1, as they are large; swin_unet 8)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser.parse_args(argv)


def main(args):
    """Predict images -> {name: share of each label, 0..1}; ValueError if one cannot be used."""
    checkpoint, device = load_checkpoint(args.checkpoint), pick_device(args.device)
    model = build_model(checkpoint, args.checkpoint).to(device).eval()
    trained, num_classes = checkpoint["args"], checkpoint["num_classes"]
    names, palette = CLASSES[trained["data"]], PALETTE
    if num_classes == 1:
        names, palette = ["background", *names], GREEN
    *tiling, batch_size = TILINGS[trained["model"]]
    tiling = *tiling, args.batch_size or batch_size
    scale = args.scale or SCALES.get(trained["data"], 1)

    # Find the images, which their names tell apart. Folders may hold earlier predictions.
    folders = [path for path in args.images if path.is_dir()]
    files = [path.absolute() for path in args.images if path not in folders]
    paths = by_name(files + [path for path in find_files(folders, SUFFIXES)
                             if not path.name.endswith(("_mask.png", "_overlay.png"))])
    if not paths:
        raise ValueError(f"{folders[0]}: holds no image ({', '.join(sorted(SUFFIXES))})")
    if args.out.resolve() in {path.parent.resolve() for path in paths.values()}:
        raise ValueError(f"--out {args.out}: holds the images, and perhaps masks of theirs that "
                         "must not be overwritten: name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    Image.MAX_IMAGE_PIXELS = None  # slides have more than Pillow takes for an attack

    shares = {}
    for name, path in paths.items():
        # Read, and bring to the training scale. A bad image is named, the others are done.
        try:
            image = read_rgb(path)
        except (ValueError, OSError) as error:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            continue
        width, height = (max(1, round(scale * side)) for side in image.size)
        scaled = image if scale == 1 else image.resize((width, height), Image.Resampling.BILINEAR)

        # Predict labels. Of one class, keep the probability, 0..255, until the size is right.
        labels, row = np.empty((height, width), np.uint8), 0
        if args.probabilities:
            file = open(args.out / f"{name}_probabilities.npy", "wb")
            np.lib.format.write_array_header_1_0(file, {
                "descr": "<f2", "fortran_order": False, "shape": (height, width, num_classes)})
        for band in predict_bands(model, scaled, num_classes, tiling, device, args.tta):
            if args.probabilities:
                file.write(band.permute(1, 2, 0).cpu().numpy().astype("<f2").tobytes())
            band = (255 * band[0]).round() if num_classes == 1 else band.argmax(dim=0)
            labels[row:row + len(band)] = band.cpu().numpy()
            row += len(band)
            live(f"{name}: {100 * row // height} %")
        if args.probabilities:
            file.close()

        # Back to the image's own size.
        mask = Image.fromarray(labels)
        if num_classes == 1:
            mask = mask.resize(image.size, Image.Resampling.BILINEAR).point(lambda p: p > 127)
        else:
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
        mask.putpalette(palette.tobytes())
        mask.save(args.out / f"{name}_mask.png")

        # Draw outlines, around tissue 3 pixels wide; in strips, to save memory, that share 6 rows.
        labels = np.asarray(mask)
        for top in range(0, image.height, 1024):
            strip = labels[top:top + 1030]
            border = outline(strip)
            for _ in range(2 if num_classes > 1 else 0):
                border |= outline(np.where(border, 0, strip))
            image.paste(Image.fromarray(palette[strip]), (0, top), Image.fromarray(border))
        image.save(args.out / f"{name}_overlay.png")

        shares[name] = [count / labels.size for count in mask.histogram()[:len(names)]]
        text = ", ".join(f"{n} {100 * s:.1f} %" for n, s in zip(names, shares[name]) if s)
        live(f"{name}: {image.width} x {image.height}, {text}\n")

    if len(shares) < len(paths):
        raise ValueError(f"{len(paths) - len(shares)} of {len(paths)} images could not be used")
    return shares


if __name__ == "__main__":
    run(main, parse_args(), "the images listed above are done")
