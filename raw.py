"""Raw files to tiles (paper 2.3): what is known about each data set, reading, finding, preparing.

`python data.py prepare` is the command. Whatever is wrong with a raw file raises a ValueError that
names it; one that the system cannot open raises an OSError.
"""

import csv
import hashlib
import json
import math
import os
import re
import struct
import time
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from plots import PALETTE
from utils import lock_folder, print_progress, write_atomic

warnings.filterwarnings("ignore", module="PIL")  # of damaged files, what we say is enough
TILE = 224  # pixels, the side of a tile

# What is known about a set. `classes` names its labels: one class means a foreground against a
# background, which takes one logit and BCE; several take a logit each. `scale` is the factor by
# which raw images are resized before they are cut, `split` the default of --split, and `recipe` a
# row of RECIPES in recipes.py.
SETS = {
    "synthetic": {"classes": ["nucleus"], "scale": 1.0, "split": "tile", "recipe": "synthetic"},
    "monuseg": {"classes": ["nucleus"], "scale": 4 * TILE / 1000, "split": "tile",
                "recipe": "monuseg"},
    "bcss": {"classes": ["outside", "tumor", "stroma"], "scale": 1.0, "split": "tile",
             "recipe": "bcss"},
    "bcss512": {"classes": [
        "outside_roi", "tumor", "stroma", "lymphocytic_infiltrate", "necrosis_or_debris",
        "glandular_secretions", "blood", "exclude", "metaplasia_NOS", "fat", "plasma_cells",
        "other_immune_infiltrate", "mucoid_material", "normal_acinus_or_duct", "lymphatics",
        "undetermined", "nerve", "skin_adnexa", "blood_vessel", "angioinvasion", "dcis", "other"],
        "scale": TILE / 512, "split": "tile", "recipe": "bcss512"},
}
SETS["monuseg-exact"] = SETS["monuseg"]  # the same tiles, their nuclei drawn by `fill_by_centres`

# -----------------------------------------------------------------------------
# A prepared set is a folder with images.npy (n, 224, 224, 3) and masks.npy (n, 224, 224), both
# uint8; tiles.csv, which has a line for each tile; and set.json, what is known about the set. The
# arrays are memory-mapped, so that a batch is one indexing operation and no loader is needed.

ARRAYS = {"images": (TILE, TILE, 3), "masks": (TILE, TILE)}  # shape of a tile in each


class TileRow(NamedTuple):
    """A line of tiles.csv: where a tile comes from. The first three name it."""

    image: str     # the source image
    row: int       # of the image's tiles
    column: int
    official: str  # the part of the official split that it belongs to: train, val or test
    top: int = 0   # where in the image it starts, in pixels
    left: int = 0


def write_table(folder, rows, info):
    """Write tiles.csv, a line for each of `rows`, and set.json, what is known about the set."""
    (folder / "set.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    with open(folder / "tiles.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([TileRow._fields, *rows])


# -----------------------------------------------------------------------------
# Reading raw files

FORMATS = ("TIFF", "PNG", "JPEG", "BMP", "WEBP")  # the only ones that Pillow may try
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# MoNuSeg's challenge had 30 images for training and these 14 for testing: the 44 of which the paper
# must have cut its 704 tiles.
MONUSEG_TEST = """TCGA-2Z-A9J9-01A-01-TS1 TCGA-44-2665-01B-06-BS6 TCGA-69-7764-01A-01-TS1
    TCGA-A6-6782-01A-01-BS1 TCGA-AC-A2FO-01A-01-TS1 TCGA-AO-A0J2-01A-01-BSA TCGA-CU-A0YN-01A-02-BSB
    TCGA-EJ-A46H-01A-03-TSC TCGA-FG-A4MU-01B-01-TS1 TCGA-GL-6846-01A-01-BS1 TCGA-HC-7209-01A-01-TS1
    TCGA-HT-8564-01Z-00-DX1 TCGA-IZ-8196-01A-01-BS1 TCGA-ZF-A9R5-01A-01-TS1""".split()
# Later training archives hold seven more, which the paper did not have.
MONUSEG_LATER = """TCGA-BC-A217-01Z-00-DX1 TCGA-F9-A8NY-01Z-00-DX1 TCGA-FG-A87N-01Z-00-DX1
    TCGA-MH-A561-01Z-00-DX1 TCGA-UZ-A9PJ-01Z-00-DX1 TCGA-UZ-A9PN-01Z-00-DX1
    TCGA-XS-A8TJ-01Z-00-DX1""".split()


def depth_and_pages(image):
    """Bits per channel, and how many pages or frames there are.

    Smaller copies of a slide do not count, nor do those that cameras put into a JPEG (MPO).
    """
    pages, size = getattr(image, "n_frames", 1), image.size
    if image.format != "TIFF":
        bits = 16 if ";16B" in str(image.tile) else 8  # Pillow's raw mode of a PNG, as RGB;16B
        return bits, 1 if image.format == "MPO" else pages
    if pages > 1:
        image.seek(1)
        pages = pages if max(image.size) >= max(size) else 1
        image.seek(0)
    return max(image.tag_v2.get(258, (8,))), pages  # the tag is called bits per sample


def is_misread_bitmap(image):
    """Whether an open image is a BMP that Pillow would take for one of fewer or more bits a pixel.

    It takes a BMP with a palette of two greys for 1-bit, and of more greys for 8-bit.
    """
    if image.format != "BMP" or image.mode not in ("1", "L"):
        return False
    image.fp.seek(14)
    header = image.fp.read(16)
    return header[10 if header[0] == 12 else 14] != (1 if image.mode == "1" else 8)  # bits a pixel


def check_is_file(path):
    """Refuse folders and pipes: reading a pipe would wait for a writer."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file: remove it, or put the file in its place")


def read_image(path, modes):
    """Read an image file whose Pillow mode is in `modes` -> PIL image, turned as viewers show it.

    Raises ValueError if it cannot be used, OSError if the system cannot open it.
    """
    check_is_file(path)
    Image.MAX_IMAGE_PIXELS = 2**30  # Pillow refuses what claims more than twice as many
    try:
        with Image.open(path, formats=FORMATS) as image:
            depth, pages = depth_and_pages(image)
            misread = is_misread_bitmap(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except (OSError, SyntaxError, TypeError, ValueError, LookupError, struct.error, MemoryError,
            Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's: the file may be sound
            raise OSError(f"{path}: cannot be opened ({error.strerror})") from None
        raise ValueError(f"{path}: not a readable image ({error or 'out of memory'}): fetch or "
                         "export it again") from None
    if image.mode not in modes:
        raise ValueError(f"{path}: Pillow mode {image.mode}, not {' or '.join(modes)}: export it "
                         "again, as 8-bit and without transparency")
    if misread:
        raise ValueError(f"{path}: a BMP with a grey palette, which Pillow would misread: export "
                         "it again as PNG")
    if pages > 1:
        raise ValueError(f"{path}: holds {pages} pages or frames, of which only the first would be "
                         "read: save each as a file, or channels as one page")
    if image.mode[0] not in "IF" and depth > 8:
        raise ValueError(f"{path}: {depth} bits per channel, of which Pillow keeps only the upper "
                         "8: export it again as 8-bit")
    return image


def fill_by_centres(mask, vertices):
    """Fill a polygon in a mask image: the pixels whose centre, (x + 0.5, y + 0.5), is inside.

    `vertices` is (n, 2), x and y. Inside is what the outline winds around (the non-zero rule), so
    that going around twice makes no hole. Of centres on the outline itself, those at the left and
    at the top are inside: of two polygons that share an edge, one gets them.
    """
    (x0, y0), (x1, y1) = vertices.T, np.roll(vertices, -1, axis=0).T  # edges from 0 to 1
    top, bottom = max(0, math.floor(y0.min())), min(mask.height, math.ceil(y0.max()))
    y = np.arange(top, bottom) + 0.5
    row, edge = ((y0 <= y[:, None]) != (y1 <= y[:, None])).nonzero()  # which edges cross which row
    x = x0[edge] + (y[row] - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    column = np.ceil(x - 0.5).clip(0, mask.width).astype(int)  # the first centre at or right of x
    turns = np.zeros((len(y), mask.width + 1), np.int16)
    np.add.at(turns, (row, column), np.where(y0 < y1, 1, -1)[edge])
    inside = turns.cumsum(axis=1)[:, :-1] != 0
    mask.paste(1, (0, top), Image.fromarray(inside.astype(np.uint8) * 255))


def read_polygons(path, size, raster="paper"):
    """Rasterise MoNuSeg's XML: the union of all its filled polygons -> mask image, 0 or 1.

    `size` is (width, height) in pixels. Vertices just outside are clipped, as nuclei at the border
    have them. The raster "paper" is Pillow's, which fills the pixels of the outline, too, as is
    usual; "exact" is that of `fill_by_centres`. Raises ValueError if the file is broken or none of
    a polygon lies in the image.
    """
    check_is_file(path)
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError(f"{path}: declares entities, which no annotation does: fetch it again")
    try:
        regions = [np.array([(v.attrib["X"], v.attrib["Y"]) for v in region.iter("Vertex")], float)
                   for region in ET.fromstring(text).iter("Region")]
    except (ET.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: not a readable annotation ({error}): fetch it again") from None
    if not regions:
        raise ValueError(f"{path}: holds no Region: fetch it again")
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for region, vertices in enumerate(regions, 1):
        if len(vertices) < 3:  # two of the 44 images have such a slip of the mouse
            print_progress(f"{path.name}: left out region {region}, {len(vertices)} points enclose "
                           "nothing\n")
            continue
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        if not (np.isfinite(vertices).all() and (high >= 0).all() and (low < size).all()
                and np.abs(vertices).max() < 10 * max(size)):
            raise ValueError(f"{path}: region {region} lies outside its {size[0]} x {size[1]} "
                             "image: the annotation is of another image or scale")
        if raster == "exact":
            fill_by_centres(mask, vertices)
        else:
            draw.polygon([tuple(vertex) for vertex in vertices], fill=1, outline=1)
    return mask


def read_mask(path):
    """Read a nucleus mask stored as a picture, 0 and one other value -> mask image, 0 or 1.

    Raises ValueError for more values, for more than 8 bits, and for modes but L, LA, P, 1 and RGB.
    """
    mask = np.asarray(read_image(path, ("L", "LA", "P", "1", "RGB")).convert("RGB")).max(axis=2)
    values = np.unique(mask)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise ValueError(f"{path}: holds the values {values[:9].tolist()}, but a nucleus mask "
                         "holds 0 and one other: export it again, uncompressed")
    return Image.fromarray((mask > 0).astype(np.uint8))


def resize_thinner(mask, side):
    """Resize a square mask of the paper's raster, by nearest neighbour, half a pixel thinner.

    mask (S, S) uint8, 0 or 1 -> (side, side). Around polygons of about one vertex per pixel, as
    MoNuSeg's are, Pillow's outline reaches half a pixel too far. So a pixel stays set only if the
    mask is set half a pixel above, below, left and right of its centre. (At an unchanged size,
    these four points would lie exactly on the edges of pixels.) Over the 13 training images whose
    polygons we had, the result has 1.001 times the area of the exact raster and a Dice of 0.968
    with it; nearest neighbour alone has 1.085 and 0.959.
    """
    centres = (np.arange(side) + 0.5) * len(mask) / side
    before, at, after = ((centres + shift).clip(0, len(mask) - 1).astype(int)
                         for shift in (-0.5, 0, 0.5))
    return (mask[np.ix_(before, at)] & mask[np.ix_(after, at)] &
            mask[np.ix_(at, before)] & mask[np.ix_(at, after)])


def read_monuseg(image_path, mask_path, raster="paper"):
    """One MoNuSeg image and its annotation -> 16 tiles: 1000 -> 896 -> 4 x 4 x 224 (paper 2.3).

    Returns images (16, 224, 224, 3) and masks (16, 224, 224), uint8. A mask picture has the paper's
    raster; for the exact one it is made thinner. Raises ValueError for what is not MoNuSeg's.
    """
    image = read_image(image_path, ("RGB",))
    if image.size != (1000, 1000):
        raise ValueError(f"{image_path}: {image.width} x {image.height} pixels, but every MoNuSeg "
                         "image is 1000 x 1000: fetch it again")
    side = 4 * TILE
    if mask_path.suffix.lower() == ".xml":
        mask = read_polygons(mask_path, image.size, raster)
    else:
        mask = read_mask(mask_path)
        check_size(image_path, image, mask_path, mask)
        if raster == "exact":
            mask = Image.fromarray(resize_thinner(np.asarray(mask), side))
    return cut_into_tiles(*resize_pair(image, mask, (side, side)))


def read_bcss(image_path, mask_path, size, num_classes):
    """Read one BCSS tile and its labels -> image (224, 224, 3), mask (224, 224), uint8 (paper 2.3).

    Raises ValueError unless both are size x size and all labels below `num_classes`.
    """
    image, mask = read_image(image_path, ("RGB",)), read_image(mask_path, ("L", "P"))
    check_size(image_path, image, mask_path, mask)
    if image.size != (size, size):
        raise ValueError(f"{image_path}: {image.width} x {image.height} pixels, but tiles of this "
                         f"set are {size} x {size}: fetch it again")
    highest = np.asarray(mask).max()
    if highest >= num_classes:
        raise ValueError(f"{mask_path}: holds the label {highest}, but the {num_classes} classes "
                         f"are 0 to {num_classes - 1}: store class indices, not grey levels")
    return resize_pair(image, mask, (TILE, TILE))


def read_labels(path):
    """Read a mask of a user's set -> PIL image, mode L: its labels, 0..255; of a palette, indices.

    Raises ValueError unless it has one channel, of 8 bits, 1 bit or a palette, and is no JPEG.
    """
    # Of these modes, all but the first three are read only to be named in an error below.
    image = read_image(path, ("L", "P", "1", "RGB", "RGBA", "LA", "I;16", "I"))
    if image.format == "JPEG" or "jpeg" in str(image.info.get("compression")):  # of a TIFF
        raise ValueError(f"{path}: a JPEG, which does not keep labels as they are: export masks as "
                         "PNG")
    with Image.open(path, formats=FORMATS) as stored:
        if re.search("L;[24]", str(stored.tile)):  # raw modes that Pillow stretches to 0..255
            raise ValueError(f"{path}: fewer than 8 bits per pixel, which Pillow would rescale: "
                             "export it again as 8-bit")
    if image.mode not in ("L", "P", "1"):
        raise ValueError(f"{path}: Pillow mode {image.mode}, but a mask stores one class index per "
                         "pixel, 0 to 255: export it as 8-bit, with indices instead of colours")
    return Image.fromarray(np.asarray(image).astype(np.uint8))


def read_own(image_path, mask_path, scale, is_binary):
    """Read one image of a user's set and its mask -> images (n, 224, 224, 3), masks (n, 224, 224).

    The n tiles, uint8, cover the image; the last of a row or column may overlap the one before.
    Raises ValueError for files that cannot be used.
    """
    image, mask = read_image(image_path, ("RGB", "L")).convert("RGB"), read_labels(mask_path)
    check_size(image_path, image, mask_path, mask)
    if is_binary:
        mask = mask.point(lambda value: value > 0)
    return cut_into_tiles(*resize_pair(image, mask, scaled_size(image.size, scale)))


def scaled_size(size, scale):
    """(width, height) in pixels after resizing by `scale`, at least 1 each."""
    return tuple(max(1, round(scale * side)) for side in size)


def tile_starts(length):
    """Starts of the tiles that cover `length` pixels, 224 or more; the last ends at the border."""
    return [min(start, length - TILE) for start in range(0, length, TILE)]


def cut_into_tiles(image, mask):
    """Arrays of one image and its mask -> their tiles, (n, 224, 224, 3) and (n, 224, 224)."""
    places = [(y, x) for y in tile_starts(len(mask)) for x in tile_starts(mask.shape[1])]
    return tuple(np.stack([array[y:y + TILE, x:x + TILE] for y, x in places])
                 for array in (image, mask))


def resize_pair(image, mask, size):
    """Resize PIL images to (width, height), a mask by nearest neighbour -> arrays."""
    return (np.asarray(image.resize(size, Image.Resampling.BILINEAR)),
            np.asarray(mask.resize(size, Image.Resampling.NEAREST)))


def check_size(image_path, image, mask_path, mask):
    """ValueError unless an image and its mask are of one size."""
    if image.size != mask.size:
        raise ValueError(f"{mask_path}: {mask.width} x {mask.height} pixels, but {image_path.name} "
                         f"has {image.width} x {image.height}: fetch or export both again, at "
                         "one size")


# -----------------------------------------------------------------------------
# Finding raw files: lists of (image path, annotation path, the TileRow of each of its tiles)


def walk(folders):
    """Yield (folder, names of its files) for `folders` and all below, each once, following links.

    Hidden files and folders, and the __MACOSX of archives, are left out. Raises FileNotFoundError
    for a folder that does not exist.
    """
    seen = set()
    for top in folders:
        if not Path(top).is_dir():
            raise FileNotFoundError(f"{top}: no such folder: give that of the unpacked archives")
        for folder, below, names in os.walk(Path(top).absolute(), followlinks=True):
            real = os.path.realpath(folder)
            below[:] = [] if real in seen else sorted(
                name for name in below if name != "__MACOSX" and not name.startswith("."))
            if real not in seen:
                yield Path(folder), [name for name in names if not name.startswith(".")]
            seen.add(real)


def find_files(folders, suffixes):
    """All files below the folders whose suffix is one of `suffixes`, sorted by their paths."""
    return sorted(folder / name for folder, names in walk(folders) for name in names
                  if Path(name).suffix.lower() in suffixes)


def match_masks(images, masks):
    """Match {name: path} of images and of masks -> list of (image path, mask path), by name.

    Raises ValueError naming a file without a partner.
    """
    for one, other, missing in (images, masks, "mask or annotation"), (masks, images, "image"):
        for name in one:
            if name not in other:
                raise ValueError(f"{one[name]}: no {missing} of the same name: add it, or remove "
                                 "this file")
    return [(images[name], masks[name]) for name in sorted(images)]


def stem(path):
    """A file's name without suffix; in one spelling, as some systems store an accent by itself."""
    return unicodedata.normalize("NFC", path.stem)


def index_by_stem(paths):
    """{name without suffix: path}; ValueError for two files of one name."""
    named = {}
    for path in paths:
        if named.setdefault(stem(path), path) != path:
            raise ValueError(f"{path}: {named[stem(path)]} has the same name: keep one of them")
    return named


def find_monuseg(folders, later_images=False, raster="paper"):
    """List MoNuSeg's official layout: *.tif, each with an *.xml or a mask *.png of its name."""
    images = index_by_stem(find_files(folders, {".tif", ".tiff"}))
    if not images:
        raise ValueError(f"{folders[0]}: holds no *.tif: give the folder of the unpacked archives")
    masks = (index_by_stem(find_files(folders, {".png"})) |
             index_by_stem(find_files(folders, {".xml"})))
    later = sorted(set(images) & set(MONUSEG_LATER))
    if later and not later_images:
        print(f"left out {len(later)} images that the paper did not have (--later-images keeps "
              f"them): {' '.join(later)}")
        for name in later:
            images.pop(name)
            masks.pop(name, None)
    found = len(images.keys() - {*MONUSEG_LATER})
    if found < 44:
        print(f"found {found} of the paper's 44 images")
    pictures = sum(path.suffix.lower() == ".png" for path in masks.values())
    if raster == "exact" and pictures:
        print(f"{pictures} images have only a mask picture, which is made half a pixel thinner")
    return [(image, mask, [TileRow(image.stem, row, column,
                                   "test" if image.stem in MONUSEG_TEST else "train",
                                   TILE * row, TILE * column)
                           for row in range(4) for column in range(4)])
            for image, mask in match_masks(images, masks)]


def find_bcss(folders, suffix):
    """List BCSS's layout: folders train, val and train_mask, val_mask, or all with _512 behind.

    A tile is named after slide, region of interest and offset; its region counts as source image.
    Where the tile starts in it is not known in the tile's own pixels, so top and left stay 0.
    """
    layout = {}
    for folder, _ in walk(folders):
        name = folder.name
        if name in [part + suffix for part in ("train", "val", "train_mask", "val_mask")]:
            if not layout.setdefault(name, folder).samefile(folder):
                raise ValueError(f"{folder}: {layout[name]} has the same name: keep one of them")
    items = []
    for part in "train", "val":
        names = part + suffix, f"{part}_mask{suffix}"
        for name in names:
            if name not in layout:
                raise ValueError(f"{folders[0]}: holds no folder {name}: give the folder of the "
                                 "unpacked archive")
        for image, mask in match_masks(*(index_by_stem(find_files([layout[name]], {".png"}))
                                         for name in names)):
            match = re.fullmatch(r"(.+)_(\d+)_(\d+)_size\d+", image.stem)
            region, row, column = match.groups() if match else (image.stem, 0, 0)
            items.append((image, mask, [TileRow(region, int(row), int(column), part)]))
    return items


def find_own(folders, classes=None, scale=1.0):
    """List a user's set -> items as above, and what is known about it.

    A folder with images/* and masks/* of the same names, or with these in train, val and test.
    `classes`, their names, may be given; else two values in all masks, 0 and any other, are one
    class, and labels 0 to K - 1 are K. Raises ValueError naming the file that does not fit.
    """
    if len(folders) > 1:
        raise ValueError(f"--from {folders[1]}: one folder holds all of a set, in images and masks")
    root, items, images, left_out = Path(folders[0]), [], [], []
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder: give the one that holds images and masks")
    parts = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    for other in sorted([root / "images", *root.glob("*/images")] if parts else []):
        if other.parent.name not in parts and other.is_dir():
            raise ValueError(f"{other}: would be left out, as there is a folder {parts[0]}: only "
                             "train, val and test may stand beside each other: rename or remove it")
    if parts and not {"train", "test"} <= {*parts}:
        raise ValueError(f"{root}: has a folder {parts[0]}, but none to "
                         f"{'test on' if 'train' in parts else 'train on'}: add it, or put all "
                         "files in one images and one masks, of which parts are then drawn")
    for part in "train", "val", "test":
        if (root / "images" / part).is_dir():
            raise ValueError(f"{root / 'images' / part}: a part of a set has its files in "
                             f"{root / part / 'images'} and {root / part / 'masks'}: move them")
    for folder, part in [(root / part, part) for part in parts] or [(root, "train")]:
        for name in "images", "masks":
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"{folder / name}: no such folder: a set of your own has "
                                        "its files in images and masks, or in train/images, "
                                        "train/masks and so on")
        found = find_files([folder / "images"], SUFFIXES)
        if not found:
            raise ValueError(f"{folder / 'images'}: holds no image ({', '.join(SUFFIXES)}):"
                             " put some there")
        images += found
        left_out += [path / name for path, names in walk([folder / "images", folder / "masks"])
                     for name in names if Path(name).suffix.lower() not in SUFFIXES]
        for image, mask in match_masks(index_by_stem(found),
                                       index_by_stem(find_files([folder / "masks"], SUFFIXES))):
            size = read_image(image, ("RGB", "L")).size
            width, height = scaled_size(size, scale)
            if min(width, height) < TILE:
                # Two decimals, rounded up, with 0.5 % to spare for the rounding in scaled_size.
                enough = math.ceil(100.5 * TILE / min(size)) / 100
                raise ValueError(f"{image}: {width} x {height} pixels, less than a tile of {TILE}: "
                                 f"give --scale {enough:g}")
            items.append((image, mask, [TileRow(stem(image), row, column, part, top, left)
                                        for row, top in enumerate(tile_starts(height))
                                        for column, left in enumerate(tile_starts(width))]))
    index_by_stem(images)  # no two of one name, in whatever parts
    if left_out:
        print(f"left out, as only {', '.join(SUFFIXES)} are read: {min(left_out)}"
              f"{' and others' if len(left_out) > 1 else ''}")
    names = own_classes([mask for _, mask, _ in items], classes)
    return items, {"classes": names, "scale": scale, "split": "official" if parts else "image",
                   "recipe": "monuseg" if len(names) == 1 else "bcss"}


def own_classes(masks, names):
    """The classes of a user's set, by the labels in its masks; ValueError if they make no sense."""
    first = {}  # of each label, the first mask that holds it
    for done, path in enumerate(masks, 1):
        for label in np.unique(read_labels(path)).tolist():
            first.setdefault(label, path)
        print_progress(f"labels of {done}/{len(masks)} masks read")
    labels, highest = sorted(first), max(first)
    found = f"{first[highest]}: holds the label {highest}"
    binary = len({*labels} - {0}) == 1  # one value beside 0, or alone
    if names and len(names) > 1:
        if highest >= len(names):
            raise ValueError(f"{found}, but --classes names {len(names)}, 0 to {len(names) - 1}" +
                             (": for masks of two values name one class" if binary else ""))
        return names
    if binary:
        return names or ["foreground"]
    if highest == 0:
        raise ValueError(f"{first[0]}: holds 0 alone, as all masks do: mark what is to be found")
    if highest >= len(PALETTE):
        raise ValueError(f"{found}, but masks hold two values, or classes from 0 to at most "
                         f"{len(PALETTE) - 1}: replace grey levels by these (and resize masks by "
                         "nearest neighbour)")
    if names:
        raise ValueError(f"{found}, but masks of one class hold two values, 0 and another, and "
                         f"these hold {', '.join(map(str, labels))}: name all classes")
    if highest >= len(labels):
        raise ValueError(f"{found}, but the masks hold only {', '.join(map(str, labels))}: number "
                         "classes from 0 without gaps, or name all with --classes")
    return [f"class {label}" for label in labels]


# -----------------------------------------------------------------------------
# Preparing: the same for every data set, in flat memory, and it can be interrupted

READERS = {
    "monuseg": (find_monuseg, read_monuseg),
    "monuseg-exact": (partial(find_monuseg, raster="exact"), partial(read_monuseg, raster="exact")),
    "bcss": (partial(find_bcss, suffix=""), partial(read_bcss, size=TILE, num_classes=3)),
    "bcss512": (partial(find_bcss, suffix="_512"), partial(read_bcss, size=512, num_classes=22)),
}


PROGRESS = "progress.json"  # how many files are done, of which list and which files


def stamp(item):
    """Bytes that change when another file takes the place of an item's image or mask."""
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in item[:2]]
    return repr(facts).encode()


def prepare(data, folders, root, **options):
    """Write ROOT/DATA/{images.npy, masks.npy, tiles.csv, set.json} from raw files in the folders.

    `options` go to the set's find function. A set that is there already is left alone. Works in
    ROOT/DATA.partial, continues there after an interruption, and renames it when whole. Raises
    ValueError if a raw file cannot be used (it names the first one, and keeps what is done) or if
    another process is preparing the set; FileExistsError if ROOT/DATA is something else.
    """
    final, working = Path(root, data), Path(root, data + ".partial")
    if (final / "tiles.csv").exists():
        print(f"{final} is prepared already; remove it to prepare it again")
        return
    if final.exists():
        raise FileExistsError(f"{final}: is in the way of the prepared tiles: move it elsewhere")
    if data in READERS:
        find, read = READERS[data]
        items, info = find(folders, **options), SETS[data]
    else:
        items, info = find_own(folders, **options)
        read = partial(read_own, scale=info["scale"], is_binary=len(info["classes"]) == 1)
    if not items:
        raise ValueError(f"{folders[0]}: holds no image of {data}: give the folder of the unpacked "
                         "archives")
    for image, mask, _ in items:
        try:
            f"{image.name} {mask.name}".encode()
        except UnicodeEncodeError:
            raise ValueError(f"{image}: its name, or its mask's, is not UTF-8: rename it") from None
    rows = [row for item in items for row in item[2]]
    start, lock = time.time(), lock_folder(working)
    write_arrays(working, items, read, *start_or_continue(working, items, rows, info))

    # Finish: write what is known and the table, then give the folder the name that is looked for.
    source = {"from": [str(Path(folder).absolute()) for folder in folders]}
    write_table(working, rows, info | source)
    lock.close()  # Windows renames no folder in which a file is open
    working.rename(final)
    for name in PROGRESS, ".lock":
        Path(final, name).unlink()
    print_progress(f"{final}: {len(rows)} tiles from {len(items)} files in "
                   f"{time.time() - start:.0f} s\n")


def start_or_continue(working, items, rows, info):
    """Find out how far `working` is, or create its arrays -> state as in PROGRESS, hash of stamps.

    What is done is kept if it was made from the very same list, of files that are still the same.
    """
    state = {"list": hashlib.sha256(json.dumps([rows, info]).encode()).hexdigest(), "files": 0}
    progress = working / PROGRESS
    before = json.loads(progress.read_text()) if progress.exists() else {}
    finished = hashlib.sha256()
    for item in items[:before.get("files", 0)]:
        finished.update(stamp(item))
    if (before.get("list"), before.get("stamp")) == (state["list"], finished.hexdigest()):
        return before, finished
    progress.unlink(missing_ok=True)  # it tells of the arrays that are replaced now
    for name, shape in ARRAYS.items():
        np.lib.format.open_memmap(working / f"{name}.npy", "w+", np.uint8, (len(rows), *shape))
    return state, hashlib.sha256()


def write_arrays(working, items, read, state, finished):
    """Read a chunk of files, write their tiles, note how far we are; and so on to the last item.

    `state` and `finished` are those of `start_or_continue`, and go on from there. The writes are
    plain ones: where the disk is full they raise, while a memory map would kill the process.
    """
    start, first = time.time(), state["files"]
    tiles_left = sum(len(item[2]) for item in items[first:])
    chunk_size = max(1, 256 // max(len(item[2]) for item in items))  # files, about 256 tiles
    with (ThreadPoolExecutor(os.cpu_count()) as pool, open(working / "images.npy", "r+b") as images,
          open(working / "masks.npy", "r+b") as masks):
        for file, shape in zip((images, masks), ARRAYS.values()):
            file.seek(-math.prod(shape) * tiles_left, os.SEEK_END)
        for begin in range(first, len(items), chunk_size):
            chunk = items[begin:begin + chunk_size]
            for item, arrays in zip(chunk, pool.map(lambda item: read(*item[:2]), chunk)):
                for file, array, shape in zip((images, masks), arrays, ARRAYS.values()):
                    if array.nbytes != len(item[2]) * math.prod(shape):
                        raise ValueError(f"{item[0]}: was read as {array.dtype} {array.shape}, but "
                                         f"listed with {len(item[2])} tiles: uint8 {shape} each")
                    file.write(array.tobytes())
                finished.update(stamp(item))
            for file in images, masks:  # the note must not be on the disk before the tiles are
                file.flush()
                os.fsync(file.fileno())
            state["files"], state["stamp"] = begin + len(chunk), finished.hexdigest()
            with write_atomic(working / PROGRESS) as file:
                file.write(json.dumps(state).encode())
            eta = (time.time() - start) / (state["files"] - first) * (len(items) - state["files"])
            print_progress(f"{working.stem}: {state['files']}/{len(items)} files, {eta:.0f} s left")
