"""Predict whole images of any size with a trained network: a mask and a picture of each.

    python predict.py runs/monuseg-unet-conv-seed0/best.pt image.tif
    python predict.py runs/.../best.pt slides/ more.png --out predictions/ --tta --probabilities

An image NAME is brought to the scale of the training set and predicted in overlapping tiles, whose
probabilities fade into each other, so that no seam shows. It yields NAME_mask.png (class indices,
shown in colours; 1 is the class, if there is but one) and NAME_overlay.png (outlines on the image),
and on demand NAME_probabilities.npy (float16, at the training scale: height, width, classes). Files
of these names are replaced only if predict.py wrote them (an .npy: if it wrote the mask beside it).
"""

import argparse
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import related  # noqa: F401, its skips and networks join SKIPS and MODELS
from data import normalize, set_of
from models import build_model
from plots import outline, palette_for
from raw import SUFFIXES, TILE, find_files, index_by_stem, read_image, scaled_size
from utils import (autocast, first_line, is_out_of_memory, load_checkpoint, number, output_folder,
                   pick_device, print_progress, run_cli, write_atomic)

# Pillow's modes that `read_rgb` can convert.
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV", "F",
         "I", "I;16", "I;16L", "I;16B")
MARK = PngInfo()  # a text in the pictures that are written here, by which they are recognised
MARK.add_text("Software", "predict.py")


def find_images(images, out):
    """Find the images among files and folders, which may hold predictions -> {name: path}.

    Raises ValueError if there is none, if two have one name, if one lies in the folder `out` or is
    a checkpoint, or if a file there that predict.py has not written would be overwritten.
    """
    for path in images:
        if path.suffix == ".pt":
            raise ValueError(f"{path}: a checkpoint: name one alone, then images")
    folders = [path for path in images if path.is_dir()]
    files = [path.absolute() for path in images if path not in folders]
    paths = index_by_stem(files + [path for path in find_files(folders, SUFFIXES)
                                   if not path.name.endswith(("_mask.png", "_overlay.png"))])
    if not paths:
        raise ValueError(f"{folders[0]}: holds no image ({', '.join(SUFFIXES)}): name "
                         "images, or a folder of some")
    if out.resolve() in {path.parent.resolve() for path in paths.values()}:
        raise ValueError(f"--out {out}: holds the images, and perhaps masks of theirs that must "
                         "not be overwritten: name another folder")
    for name in paths:
        mask, overlay, probs = (out / f"{name}_{kind}" for kind in
                                ("mask.png", "overlay.png", "probabilities.npy"))
        # An .npy holds no such text: the mask's stands for it.
        for path, marked in (mask, mask), (overlay, overlay), (probs, mask):
            if path.exists() and not (marked.is_file() and
                                      b"Software\0predict.py" in marked.read_bytes()):
                raise ValueError(f"{path}: predict.py has not written it and would overwrite it: "
                                 "move it, or name another folder with --out")
    return paths


def read_rgb(path):
    """Read any image -> PIL image, 8-bit RGB, as viewers turn it; ValueError if it is unusable."""
    try:
        image = read_image(path, MODES)
    except OSError as error:
        raise ValueError(error) from None
    if image.mode[0] in "IF":  # grey levels of 16-bit files, and floating-point ones from 0 to 1
        white = 1 if image.mode == "F" else 65535
        image = image.convert("F")
        low, high = np.min(image), np.max(image)  # NaN if one is, which Pillow would pass over
        if not 0 <= low <= high <= white:
            raise ValueError(f"{path}: holds values from {low:g} to {high:g}, not from 0 to "
                             f"{white}: export it again as 8-bit")
        image = image.point(lambda value: value * (255 / white) + 0.5)
    image = image.convert("RGB")
    image.info.clear()  # a transparent colour or a CMYK profile would go into the overlay
    return image


def tile_positions(length, side, multiple, overlap):
    """Cover an axis of `length` pixels with as few tiles as possible, neighbours sharing `overlap`.

    A tile has at most `side` pixels, a multiple of `multiple`. Returns where tiles start, a list;
    for each pixel that they cover, which pixel of the image it shows (mirrored beyond the end); and
    a tile's blending weights, float32, smooth and above 0 everywhere.
    """
    n = max(1, math.ceil((length - overlap) / (side - overlap)))
    tile = multiple * math.ceil((length + (n - 1) * overlap) / n / multiple)
    starts = [k * (tile - overlap) for k in range(n)]
    pixels = np.pad(np.arange(length), (0, starts[-1] + tile - length), "reflect")
    return starts, pixels, torch.sin(torch.pi * (torch.arange(tile) + 0.5) / tile) ** 2


def predict_probs(model, images, tta):
    """Probabilities (N, C, H, W) float32 of images (N, 3, H, W), 0..1; `tta` averages 8 views."""
    views = [(turn, axes) for turn in range(4) for axes in ((), (3,))] if tta else [(0, ())]
    total = 0
    for turn, axes in views:
        view = images.rot90(turn, (2, 3)).flip(axes).contiguous()
        with autocast(images.device):
            logits = model(normalize(view)).float()
        probs = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)
        total = total + probs.flip(axes).rot90(-turn, (2, 3))
    return total / len(views)


@torch.inference_mode()
def predict_bands(model, image, num_classes, device, batch_size=None, tta=False):
    """Predict a PIL image, RGB, at the training scale -> yields bands of rows, top to bottom.

    A band is (C, rows, width) float32 probabilities, valid until the next one is asked for. Rows
    leave as soon as no further tile touches them: only one row of tiles is kept. The network says
    how large tiles can be, by its `max_side` and `side_multiple`.
    """
    side = model.max_side or 1024  # pixels
    batch_size = batch_size or max(1, 8 * TILE**2 // side**2)  # large tiles one by one, else 8
    tiling = side, model.side_multiple, min(128, side // 2)
    tops, rows, weights_y = tile_positions(image.height, *tiling)
    lefts, columns, weights_x = tile_positions(image.width, *tiling)
    height, width = len(weights_y), len(weights_x)
    window = torch.outer(weights_y, weights_x).to(device)
    sums = torch.zeros(num_classes + 1, height, len(columns), device=device)  # last: of weights
    for top, next_top in zip(tops, tops[1:] + [image.height]):
        # Cut one row of tiles.
        y = rows[top:top + height]
        strip = np.asarray(image.crop((0, y.min(), image.width, y.max() + 1)))
        strip = torch.from_numpy(strip[y - y.min()][:, columns]).permute(2, 0, 1)

        # Predict it, a few tiles at a time, and add up the weighted probabilities.
        for first in range(0, len(lefts), batch_size):
            some = lefts[first:first + batch_size]
            tiles = torch.stack([strip[:, :, left:left + width] for left in some])
            probs = predict_probs(model, tiles.to(device).float() / 255, tta)
            for left, tile_probs in zip(some, probs):
                sums[:-1, :, left:left + width] += window * tile_probs
                sums[-1, :, left:left + width] += window

        # Hand out the rows that no further tile touches, and move the others up.
        done = sums[:, :next_top - top, :image.width]
        yield done[:-1].div_(done[-1])
        rest = sums[:, next_top - top:].clone()
        sums[:, :rest.shape[1]], sums[:, rest.shape[1]:] = rest, 0


def predict_labels(bands, size, num_classes, name, file):
    """Turn the bands of an image of `size` (width, height) into labels -> image, mode L.

    With one class they are probabilities, 0..255: `write_mask` resizes before it decides. If there
    is a `file`, the bands also go there, as .npy.
    """
    (width, height), row = size, 0
    labels = np.empty((height, width), np.uint8)
    if file:
        np.lib.format.write_array_header_1_0(file, {
            "descr": "<f2", "fortran_order": False, "shape": (height, width, num_classes)})
    for band in bands:
        if file:
            file.write(band.permute(1, 2, 0).cpu().numpy().astype("<f2").tobytes())
        band = (255 * band[0]).round() if num_classes == 1 else band.argmax(dim=0)
        labels[row:row + len(band)] = band.cpu().numpy()
        row += len(band)
        print_progress(f"{name}: {100 * row // height} %")
    return Image.fromarray(labels)


def write_mask(path, labels, size, num_classes):
    """Bring labels to the image's own size (width, height) and write them -> mask, mode P."""
    if num_classes == 1:
        mask = labels.resize(size, Image.Resampling.BILINEAR).point(lambda p: p > 127)
    else:
        mask = labels.resize(size, Image.Resampling.NEAREST)
    mask.putpalette(palette_for(num_classes).tobytes())
    with write_atomic(path) as file:
        mask.save(file, pnginfo=MARK)
    return mask


def write_overlay(path, image, mask, num_classes):
    """Draw a mask's outlines on an image, 1 pixel wide around nuclei, 3 around tissue; write it."""
    labels, palette = np.asarray(mask), palette_for(num_classes)
    for top in range(0, image.height, 1024):  # in strips, to save memory, that share 6 rows
        strip = labels[top:top + 1030]
        border = outline(strip, 1 if num_classes == 1 else 3)
        image.paste(Image.fromarray(palette[strip]), (0, top), Image.fromarray(border))
    with write_atomic(path) as file:
        image.save(file, pnginfo=MARK)


def predict_image(path, name, model, num_classes, scale, device, args):
    """Predict an image file; write its mask, its overlay and, on demand, probabilities -> mask."""
    image = read_rgb(path)
    size = scaled_size(image.size, scale)
    scaled = image if scale == 1 else image.resize(size, Image.Resampling.BILINEAR)
    bands = predict_bands(model, scaled, num_classes, device, args.batch_size, args.tta)
    # The mask gets its name before the probabilities do, because its mark counts for them, too.
    with (write_atomic(args.out / f"{name}_probabilities.npy") if args.probabilities
          else nullcontext()) as file:
        labels = predict_labels(bands, size, num_classes, name, file)
        mask = write_mask(args.out / f"{name}_mask.png", labels, image.size, num_classes)
    write_overlay(args.out / f"{name}_overlay.png", image, mask, num_classes)
    return mask


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="best.pt of a run")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders: all images "
                        "in them and below, but *_mask.png and *_overlay.png")
    parser.add_argument("--out", type=output_folder, default="predictions",
                        help="folder to write to (default: predictions)")
    parser.add_argument("--scale", type=number(float, maximum=10), help="factor to resize images "
                        "by (default: as the training set was, monuseg 0.896)")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation: average "
                        "over eight flips and turns")
    parser.add_argument("--probabilities", action="store_true", help="also write these, as .npy")
    parser.add_argument("--batch-size", type=number(int),
                        help="tiles at a time (default: swin_unet 8; others 1, as tiles are large)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    return parser.parse_args(argv)


def main(args):
    """Predict images -> {name: share of each label, 0..1}; ValueError if one cannot be used."""
    checkpoint, device = load_checkpoint(args.checkpoint), pick_device(args.device)
    info, num_classes = set_of(checkpoint, args.checkpoint), checkpoint["num_classes"]
    names = ["background", *info["classes"]] if num_classes == 1 else info["classes"]
    paths = find_images(args.images, args.out)
    model = build_model(checkpoint, args.checkpoint).to(device).eval()
    scale = args.scale or info["scale"]
    args.out.mkdir(parents=True, exist_ok=True)

    shares = {}
    for name, path in paths.items():
        try:
            mask = predict_image(path, name, model, num_classes, scale, device, args)
        except (ValueError, MemoryError, RuntimeError) as error:  # name it, and do the others
            text = first_line(error)
            if is_out_of_memory(error):
                text = f"{path}: out of memory ({text}): cut it, or give a smaller --scale"
            elif isinstance(error, RuntimeError):
                raise  # a bug: show the traceback
            print_progress("")
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
            continue
        shares[name] = [n / (mask.width * mask.height) for n in mask.histogram()[:len(names)]]
        text = ", ".join(f"{n} {100 * s:.1f} %" for n, s in zip(names, shares[name]) if s)
        print_progress(f"{name}: {mask.width} x {mask.height}, {text}\n")
    if len(shares) < len(paths):
        raise ValueError(f"{len(paths) - len(shares)} of {len(paths)} images could not be used")
    return shares


if __name__ == "__main__":
    run_cli(main, parse_args, "the images listed above are done")
