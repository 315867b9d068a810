"""The data: preparation, splits, a synthetic set and the augmentations (paper 2.3 and 2.4).

    python data.py prepare monuseg --from DIR       # raw files -> data/monuseg/
    python data.py preview monuseg --out sheet.png  # look at tiles before and after augmentation

Prepared data are three files: images.npy (n, 224, 224, 3) and masks.npy (n, 224, 224), both uint8
and memory-mapped, so that a batch is one indexing operation and no loader is needed, and tiles.csv,
one line per tile: source image, row, column, and the part of the official split it belongs to.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

warnings.filterwarnings("ignore", module="PIL")  # of damaged files, what we say is enough
TILE = 224  # pixels, the side of a tile
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# One class means a foreground against a background: one logit, BCE. More: one logit per class.
CLASSES = {
    "synthetic": ["nucleus"],
    "monuseg": ["nucleus"],
    "bcss": ["outside", "tumor", "stroma"],
    "bcss512": [
        "outside_roi", "tumor", "stroma", "lymphocytic_infiltrate", "necrosis_or_debris",
        "glandular_secretions", "blood", "exclude", "metaplasia_NOS", "fat", "plasma_cells",
        "other_immune_infiltrate", "mucoid_material", "normal_acinus_or_duct", "lymphatics",
        "undetermined", "nerve", "skin_adnexa", "blood_vessel", "angioinvasion", "dcis", "other"],
}

# One colour per label. Any two of them differ by at least 17 (CIE76) for normal, protanopic,
# deuteranopic and tritanopic eyes alike; the first, which are the commonest labels, by far more.
PALETTE = np.array([
    (0, 0, 0), (213, 94, 0), (86, 180, 233), (149, 0, 255), (255, 234, 191), (42, 64, 149),
    (149, 85, 85), (170, 255, 0), (128, 0, 0), (149, 170, 170), (85, 42, 85), (234, 149, 106),
    (128, 106, 149), (0, 255, 255), (212, 85, 255), (0, 0, 106), (234, 191, 85), (85, 0, 191),
    (106, 21, 42), (42, 0, 64), (106, 106, 191), (191, 0, 0)], np.uint8)

# The paper's 44 MoNuSeg images are 30 for training and these 14 of the challenge's test set.
MONUSEG_TEST = """TCGA-2Z-A9J9-01A-01-TS1 TCGA-44-2665-01B-06-BS6 TCGA-69-7764-01A-01-TS1
    TCGA-A6-6782-01A-01-BS1 TCGA-AC-A2FO-01A-01-TS1 TCGA-AO-A0J2-01A-01-BSA TCGA-CU-A0YN-01A-02-BSB
    TCGA-EJ-A46H-01A-03-TSC TCGA-FG-A4MU-01B-01-TS1 TCGA-GL-6846-01A-01-BS1 TCGA-HC-7209-01A-01-TS1
    TCGA-HT-8564-01Z-00-DX1 TCGA-IZ-8196-01A-01-BS1 TCGA-ZF-A9R5-01A-01-TS1""".split()
# Later training archives hold seven more, which the paper did not have.
MONUSEG_LATER = """TCGA-BC-A217-01Z-00-DX1 TCGA-F9-A8NY-01Z-00-DX1 TCGA-FG-A87N-01Z-00-DX1
    TCGA-MH-A561-01Z-00-DX1 TCGA-UZ-A9PJ-01Z-00-DX1 TCGA-UZ-A9PN-01Z-00-DX1
    TCGA-XS-A8TJ-01Z-00-DX1""".split()

# -----------------------------------------------------------------------------
# Reading raw files. Whatever is wrong with one is a ValueError that names it.


def read_image(path, modes):
    """Read an image file whose Pillow mode is in `modes`; ValueError if it cannot be used."""
    try:
        with Image.open(path) as image:
            image.load()
            depths = getattr(image, "tag_v2", {}).get(258, (8,))  # of a TIFF, bits per sample
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}): fetch it again") from None
    if image.mode not in modes:
        raise ValueError(f"{path}: Pillow mode {image.mode}, not {' or '.join(modes)}: "
                         "convert it, or export it again as 8-bit")
    if image.mode == "RGB" and max(depths) > 8:
        raise ValueError(f"{path}: {max(depths)} bits a channel, of which Pillow keeps the upper 8 "
                         "alone: export it again as 8-bit")
    return image


def read_polygons(path, size):
    """Rasterise MoNuSeg's XML: the union of all its filled polygons -> mask image, 0 or 1.

    `size` is (width, height) in pixels. Vertices just outside are clipped, as nuclei at the border
    have them. Raises ValueError if the file is broken or none of a polygon lies in the image.
    """
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
    for number, vertices in enumerate(regions, 1):
        if len(vertices) < 3:  # two of the 44 images have such a slip of the mouse
            live(f"{path.name}: left out region {number}, {len(vertices)} points enclose nothing\n")
            continue
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        if not (np.isfinite(vertices).all() and (high >= 0).all() and (low < size).all()
                and np.abs(vertices).max() < 10 * max(size)):
            raise ValueError(f"{path}: region {number} lies outside its {size[0]} x {size[1]} "
                             "image: the annotation is of another image or scale")
        draw.polygon([tuple(vertex) for vertex in vertices], fill=1, outline=1)
    return mask


def read_mask(path):
    """Read a nucleus mask stored as a picture (0/1 or 0/255, any 8-bit mode) -> mask, 0 or 1."""
    mask = np.asarray(read_image(path, ("L", "LA", "P", "1", "RGB")).convert("RGB")).max(axis=2)
    values = np.unique(mask)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise ValueError(f"{path}: holds the values {values[:9].tolist()}, but a nucleus mask "
                         "holds 0 and one other: export it again, uncompressed")
    return Image.fromarray((mask > 0).astype(np.uint8))


def read_monuseg(image_path, mask_path):
    """One MoNuSeg image and its annotation -> 16 tiles: 1000 -> 896 -> 4 x 4 x 224 (paper 2.3)."""
    image = read_image(image_path, ("RGB",))
    if image.size != (1000, 1000):
        raise ValueError(f"{image_path}: {image.width} x {image.height} pixels, but every MoNuSeg "
                         "image is 1000 x 1000: fetch it again")
    if mask_path.suffix.lower() == ".xml":
        mask = read_polygons(mask_path, image.size)
    else:
        mask = read_mask(mask_path)
        check_size(image_path, image, mask_path, mask)
    image = np.asarray(image.resize((4 * TILE, 4 * TILE), Image.Resampling.BILINEAR))
    mask = np.asarray(mask.resize((4 * TILE, 4 * TILE), Image.Resampling.NEAREST))
    return (image.reshape(4, TILE, 4, TILE, 3).swapaxes(1, 2).reshape(16, TILE, TILE, 3),
            mask.reshape(4, TILE, 4, TILE).swapaxes(1, 2).reshape(16, TILE, TILE))


def read_bcss(image_path, mask_path, size, num_classes):
    """One BCSS tile, size x size, and its labels -> 1 tile: 512 is resized to 224 (paper 2.3)."""
    image, mask = read_image(image_path, ("RGB",)), read_image(mask_path, ("L", "P"))
    check_size(image_path, image, mask_path, mask)
    if image.size != (size, size):
        raise ValueError(f"{image_path}: {image.width} x {image.height} pixels, but tiles of this "
                         f"set are {size} x {size}: fetch it again")
    highest = np.asarray(mask).max()
    if highest >= num_classes:
        raise ValueError(f"{mask_path}: holds the label {highest}, but the {num_classes} classes "
                         f"are 0 to {num_classes - 1}: store class indices, not grey levels")
    if size != TILE:
        image = image.resize((TILE, TILE), Image.Resampling.BILINEAR)
        mask = mask.resize((TILE, TILE), Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(mask)


def check_size(image_path, image, mask_path, mask):
    if image.size != mask.size:
        raise ValueError(f"{mask_path}: {mask.width} x {mask.height} pixels, but {image_path.name} "
                         f"has {image.width} x {image.height}: fetch both again")


# -----------------------------------------------------------------------------
# Finding raw files. A list of (image path, annotation path, its lines of tiles.csv).


def find_files(folders, suffixes):
    """All files below the folders by their suffix, without the debris that archives carry along."""
    found = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder: give that of the unpacked archives")
        found |= {path.absolute() for path in folder.rglob("*") if path.suffix.lower() in suffixes
                  and not path.name.startswith("._") and "__MACOSX" not in path.parts}
    return sorted(found)


def pair(images, masks):
    """Match {name: path} of images and of masks; ValueError names one without partner."""
    for one, other, missing in (images, masks, "mask or annotation"), (masks, images, "image"):
        for name in one:
            if name not in other:
                raise ValueError(f"{one[name]}: no {missing} of the same name: add it, or remove "
                                 "this file")
    return [(images[name], masks[name]) for name in sorted(images)]


def by_name(paths):
    """{name without suffix: path}; ValueError for two files of one name."""
    named = {}
    for path in paths:
        if named.setdefault(path.stem, path) != path:
            raise ValueError(f"{path}: {named[path.stem]} has the same name: keep one of them")
    return named


def find_monuseg(folders, later_images=False):
    """List MoNuSeg's official layout: *.tif, each with an *.xml or a mask *.png of its name."""
    images = by_name(find_files(folders, {".tif", ".tiff"}))
    if not images:
        raise ValueError(f"{folders[0]}: holds no *.tif: give the folder of the unpacked archives")
    masks = by_name(find_files(folders, {".png"})) | by_name(find_files(folders, {".xml"}))
    later = sorted(set(images) & set(MONUSEG_LATER))
    if later and not later_images:
        print(f"left out {len(later)} images that the paper did not have (--later-images keeps "
              f"them): {' '.join(later)}")
        for name in later:
            images.pop(name), masks.pop(name, None)
    return [(image, mask, [(image.stem, row, column, "test" if image.stem in MONUSEG_TEST
                            else "train") for row in range(4) for column in range(4)])
            for image, mask in pair(images, masks)]


def find_bcss(folders, suffix):
    """List BCSS's layout: folders train, val and train_mask, val_mask, or all with _512 behind.

    A tile is named after slide, region of interest and offset; its region counts as source image.
    """
    layout = {}
    for folder in (Path(folder) for top in folders for folder, _, _ in os.walk(top)):
        name = folder.name.removesuffix(suffix) if folder.name.endswith(suffix) else ""
        if name in ("train", "val", "train_mask", "val_mask"):
            if not layout.setdefault(name, folder).samefile(folder):
                raise ValueError(f"{folder}: {layout[name]} has the same name: keep one of them")
    items = []
    for part in "train", "val":
        for name in part, part + "_mask":
            if name not in layout:
                raise ValueError(f"{folders[0]}: holds no folder {name}{suffix}: give the folder "
                                 "of the unpacked archive")
        for image, mask in pair(*(by_name(find_files([layout[name]], {".png"}))
                                  for name in (part, part + "_mask"))):
            match = re.fullmatch(r"(.+)_(\d+)_(\d+)_size\d+", image.stem)
            region, row, column = match.groups() if match else (image.stem, 0, 0)
            items.append((image, mask, [(region, int(row), int(column), part)]))
    return items


# -----------------------------------------------------------------------------
# Preparation: the same for every data set, in flat memory, and it can be interrupted.

READERS = {
    "monuseg": (find_monuseg, read_monuseg),
    "bcss": (partial(find_bcss, suffix=""), partial(read_bcss, size=224, num_classes=3)),
    "bcss512": (partial(find_bcss, suffix="_512"), partial(read_bcss, size=512, num_classes=22)),
}
TILES_ON_DISK = {"images": (TILE, TILE, 3), "masks": (TILE, TILE)}  # uint8, n of each


def prepare(data, folders, root, **options):
    """Write ROOT/DATA/{images.npy, masks.npy, tiles.csv} from the raw files below the folders.

    Works in ROOT/DATA.partial, continues there after an interruption, and renames it when whole.
    Raises ValueError naming the first raw file that cannot be used; what is done stays.
    """
    final, working = Path(root, data), Path(root, data + ".partial")
    if (final / "tiles.csv").exists():
        print(f"{final} is prepared already; remove it to prepare it again")
        return
    if final.exists():
        raise FileExistsError(f"{final}: is in the way of the prepared tiles: move it elsewhere")
    find, read = READERS[data]
    items = find(folders, **options)
    rows = [row for _, _, rows in items for row in rows]
    per_item = len(items[0][2])

    # Start, or continue if the partial folder was made from the very same list.
    fingerprint = hashlib.sha256(json.dumps([[str(p) for p in items[0][:2]], rows]).encode())
    progress = working / "progress.json"
    state = json.loads(progress.read_text()) if progress.exists() else {}
    if state.get("list") != fingerprint.hexdigest():
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        state = {"list": fingerprint.hexdigest(), "done": 0}
        for name, shape in TILES_ON_DISK.items():
            np.lib.format.open_memmap(working / f"{name}.npy", "w+", np.uint8, (len(rows), *shape))

    # Read a few files at a time, write their tiles, note how far we are. (Plain writes: where the
    # disk is full they raise, while writing to a memory map would kill the process.)
    start, first, chunk = time.time(), state["done"], 256 // per_item
    with (ThreadPoolExecutor(os.cpu_count()) as pool, open(working / "images.npy", "r+b") as images,
          open(working / "masks.npy", "r+b") as masks):
        for file, shape in zip((images, masks), TILES_ON_DISK.values()):
            file.seek(-math.prod(shape) * (len(rows) - first * per_item), os.SEEK_END)
        for done in range(first, len(items), chunk):
            for image, mask in pool.map(lambda item: read(*item[:2]), items[done:done + chunk]):
                images.write(image.tobytes()), masks.write(mask.tobytes())
            images.flush(), masks.flush()
            done = min(done + chunk, len(items))
            replace(progress, json.dumps(state | {"done": done}))
            left = (time.time() - start) / (done - first) * (len(items) - done)
            live(f"{data}: {done}/{len(items)} files, {left:.0f} s left")

    # Complete: the table, then the name that the other scripts look for.
    with open(working / "tiles.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "row", "column", "official"), *rows])
    working.rename(final)
    Path(final, progress.name).unlink()
    live(f"{final}: {len(rows)} tiles from {len(items)} files in {time.time() - start:.0f} s\n")


def replace(path, content):
    """Write a file, bytes or text, so that it is whole at any moment: beside its name, flushed,
    then renamed. Raises OSError naming it, and leaves the old one, where that fails."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror}): the old one, if any, is "
                      "whole") from None


def live(line):
    """Show a line that the next one replaces, on a terminal; elsewhere only lines that end."""
    if sys.stdout.isatty():
        print("\r\x1b[K" + line, end="", flush=True)
    elif line.endswith("\n"):
        print(line, end="", flush=True)


def load(data, root):
    """Open a prepared data set -> images (n, 224, 224, 3), masks (n, 224, 224), rows of tiles.csv.

    Both tensors are uint8 and memory-mapped: nothing is read before it is used. "synthetic" is
    drawn on the spot. Raises FileNotFoundError or ValueError saying how to prepare the data.
    """
    if data == "synthetic":
        return synthetic()
    folder, again = Path(root, data), f"run ./prepare_data.sh {data}"
    if not (folder / "tiles.csv").exists():
        raise FileNotFoundError(f"{folder}: {data} is not prepared: {again}")
    try:
        with open(folder / "tiles.csv", newline="") as file:
            rows = [(row["image"], int(row["row"]), int(row["column"]), row["official"])
                    for row in csv.DictReader(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'tiles.csv'}: damaged ({error!r}): remove {folder} and "
                         f"{again}") from None
    tensors = []
    for name, shape in TILES_ON_DISK.items():
        path = folder / f"{name}.npy"
        try:  # "c": changes, of which there are none, would stay in memory
            array = np.load(path, mmap_mode="c")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}): remove {folder} and {again}") from None
        if array.shape != (len(rows), *shape) or array.dtype != np.uint8:
            raise ValueError(f"{path}: {array.dtype} {array.shape}, but tiles.csv has {len(rows)} "
                             f"tiles: remove {folder} and {again}")
        tensors.append(torch.from_numpy(array))
    return *tensors, rows


# -----------------------------------------------------------------------------
# Splits. The order that decides is a hash of names: the same with every --seed, on every machine
# and with every version of anything.


def draw(rows, pool, fraction, unit):
    """Draw whole units, tiles or source images, from `pool` -> (drawn, rest), lists of indices."""
    names = {i: f"{rows[i][:3] if unit == 'tile' else rows[i][0]}" for i in pool}
    order = sorted(set(names.values()), key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(order[:round(fraction * len(order))])
    return [i for i in pool if names[i] in chosen], [i for i in pool if names[i] not in chosen]


def split_tiles(data, rows, split):
    """Tiles of each part -> {"train": indices, "val": indices, "test": indices} (paper 2.3).

    tile: the paper's. MoNuSeg: 70/20/10 % of all tiles at random, so that tiles of one image fall
    on both sides. BCSS: its test tiles have no masks, so 4,021 validation tiles are the test set.
    BCSS512: so are 600 training tiles. image: the same shares of whole images, or regions. official
    (MoNuSeg): the challenge's test images are the test set, a fifth of the others validates.
    Raises ValueError where a part would be empty.
    """
    everything = range(len(rows))
    official = {part: [i for i in everything if rows[i][3] == part]
                for part in ("train", "val", "test")}
    if split == "official":
        test = official["test"]
        val, train = draw(rows, official["train"], 1 / 5, "image")
    elif data == "bcss512":
        val = official["val"]
        test, train = draw(rows, official["train"], 600 / 6000, split)
    elif data == "bcss":
        train, rest = ((official["train"], official["val"]) if split == "tile" else
                       draw(rows, everything, 30760 / 36189, "image"))
        test, val = draw(rows, rest, 4021 / 5429, split)
    else:
        train, rest = draw(rows, everything, 0.7, split)
        val, test = draw(rows, rest, 2 / 3, split)
    parts = {"train": train, "val": val, "test": test}
    for part, indices in parts.items():
        if not indices:
            raise ValueError(f"--split {split} leaves no tile of {data} for {part}: take another")
    return {part: torch.tensor(indices) for part, indices in parts.items()}


def fingerprint(rows, parts):
    """A short text that tells whether two splits are of the same tiles."""
    names = {part: [rows[i][:3] for i in indices] for part, indices in parts.items()}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


# -----------------------------------------------------------------------------
# The synthetic set: tiles that look like H&E-stained tissue, drawn in a moment. Colour alone does
# not solve it: stain strength varies between and within tiles, blue haze is not a nucleus.

HEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)  # absorption of R, G, B (Ruifrok 2001)


def synthetic(n=100):
    """Draw the synthetic set, the same each time -> images, masks, rows as `load` returns them."""
    tiles = [synthetic_tile(np.random.default_rng([2025, number])) for number in range(n)]
    images, masks = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*tiles))
    return images, masks, [(f"synthetic-{number:03}", 0, 0, "train") for number in range(n)]


def synthetic_tile(rng):
    """One tile -> image (224, 224, 3) and nucleus mask (224, 224), uint8."""
    def noise(rows, columns=None):  # smooth, in 0..1: random values on a coarse grid, enlarged
        coarse = Image.fromarray(rng.random((rows, columns or rows), dtype=np.float32))
        return np.asarray(coarse.resize((TILE, TILE), Image.Resampling.BICUBIC))

    def blobs(number, radii, densities, clustered=0.0):  # bumpy ellipses, each of one density
        picture, centres = Image.new("L", (TILE, TILE)), []
        for _ in range(number):
            radius, centre = rng.uniform(*radii), rng.uniform(0, TILE, 2)
            tilt, phase, angle = rng.uniform(0, 2 * np.pi, 3)
            if centres and rng.random() < clustered:  # touch or overlap an earlier one
                step = 1.6 * radius * np.array((np.cos(angle), np.sin(angle)))
                centre = centres[rng.integers(len(centres))] + step
            centres.append(centre)
            t = np.linspace(0, 2 * np.pi, 24)
            bumps = radius * (1 + rng.uniform(0, 0.12) * np.cos(3 * t + phase))
            u = rng.uniform(0.9, 1.3) * bumps * np.cos(t)
            v = rng.uniform(0.6, 0.9) * bumps * np.sin(t)
            points = np.stack((u * np.cos(tilt) - v * np.sin(tilt),
                               u * np.sin(tilt) + v * np.cos(tilt)), axis=1) + centre
            ImageDraw.Draw(picture).polygon([tuple(point) for point in points],
                                            fill=int(100 * rng.uniform(*densities)))
        return picture

    # Densities of the two stains: pink stroma with fibres, bluish haze.
    fibres = Image.fromarray(noise(70, 6)).rotate(rng.uniform(0, 180), Image.Resampling.BILINEAR)
    fibres = fibres.crop((33, 33, 191, 191)).resize((TILE, TILE))  # without the rotated corners
    eosin = 0.15 + 0.35 * noise(7) + 0.35 * np.asarray(fibres) + 0.1 * noise(80)
    haze = rng.uniform(0.3, 1.0) * (1.6 * noise(6) - 0.7).clip(0, 1)
    hematoxylin = 0.08 + haze + 0.1 * noise(50)

    # Distractors: pale vacuoles, red cells, blurred smudges of the nuclei's own blue.
    hole = 1 - np.asarray(blobs(rng.integers(2, 8), (6, 16), (0.8, 0.9))) / 100
    red = np.asarray(blobs(rng.integers(3, 12), (5, 8), (0.4, 1.0))) / 100
    smudge = blobs(6, (8, 18), (0.5, 1.5)).filter(ImageFilter.GaussianBlur(6))
    eosin = eosin * hole + red
    hematoxylin = hematoxylin * hole + np.asarray(smudge) / 100

    # Nuclei of varied size and stain, granular; about half of them touch or overlap another.
    nuclei = np.asarray(blobs(rng.integers(30, 60), (5, 12), (0.35, 1.1), clustered=0.5)) / 100
    mask = nuclei > 0
    chromatin = 0.6 + 0.8 * noise(75)
    hematoxylin = np.where(mask, nuclei * chromatin + 0.3 * hematoxylin, hematoxylin)

    # Light through the stains, a soft focus, noise of the camera.
    density = (rng.uniform(0.7, 1.3) * hematoxylin[..., None] * HEMATOXYLIN
               + rng.uniform(0.7, 1.3) * eosin[..., None] * EOSIN)
    image = Image.fromarray((255 * np.exp(-density)).astype(np.uint8))
    image = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.3))), np.float32)
    image = image + rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


# -----------------------------------------------------------------------------
# Batches and augmentation (paper 2.4), on the training device, a whole batch at a time.


def send(tensor, device):
    """Copy to `device`, on CUDA without waiting. (MPS could read memory that is free by then.)"""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def read_tiles(images, masks, indices, device):
    """Cut tiles out of the set as they are stored -> what `to_batch` takes, pinned for CUDA.

    Touches no other device than the set's, so that a thread may do it ahead: MPS bears only one.
    """
    indices = send(indices, images.device)
    tiles = [tensor.index_select(0, indices) for tensor in (images, masks)]  # copies whole rows
    pin = torch.device(device).type == "cuda" and not images.is_cuda
    return [tile.pin_memory() for tile in tiles] if pin else tiles


def to_batch(tiles, device):
    """Stored tiles -> images (n, 3, 224, 224) float 0..1, masks (n, 224, 224) int64 on `device`."""
    images, masks = (send(tensor, device) for tensor in tiles)
    return images.permute(0, 3, 1, 2).float() / 255, masks.long()


def get_batch(images, masks, indices, device):
    """Cut tiles out of the set -> images (n, 3, 224, 224) float 0..1, masks (n, 224, 224) int64."""
    return to_batch(read_tiles(images, masks, indices, device), device)


def normalize(images):
    """Subtract ImageNet's mean and divide by its standard deviation: images (n, 3, H, W), 0..1."""
    mean, std = (send(torch.tensor(value), images.device).view(3, 1, 1)
                 for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


# Strengths; the paper names the six augmentations and gives no values, so all of these are ours.
CHANCE = 0.5          # of each augmentation, for each tile
ELASTIC_CELLS = 7     # elastic: random shifts on a grid of 7 x 7 cells of 32 pixels,
ELASTIC_STD = 8       # pixels, their standard deviation before smoothing
GRID_CELLS = 5        # grid distortion: rows and columns of 5 cells each grow or shrink
GRID_STRETCH = 0.3    # by up to 30 %
BRIGHTNESS = 0.2      # brightness changes by up to 20 %


def draw_augmentation(n, generator):
    """Draw the random parameters of n tiles: small tensors on the CPU, the same for any device.

    matrix (n, 2, 2): flips and rotation; columns, rows (n, 6): the grid's distorted lines, -1..1;
    elastic (n, 2, 10, 10): shifts at the grid's points; brightness (n, 1): factors.
    """
    def uniform(*shape):  # -1..1
        return 2 * torch.rand(*shape, generator=generator) - 1

    def chance(*shape):
        return (torch.rand(*shape, generator=generator) < CHANCE).float()

    flips = 1 - 2 * chance(n, 2)
    angle = math.pi * uniform(n) * chance(n)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(n, 2, 2)
    widths = 1 + GRID_STRETCH * uniform(n, 2, GRID_CELLS) * chance(n, 1, 1)
    lines = F.pad(widths.cumsum(2) / widths.sum(2, keepdim=True), (1, 0)) * 2 - 1
    shifts = torch.randn(n, 2, ELASTIC_CELLS + 3, ELASTIC_CELLS + 3, generator=generator)
    return {"matrix": rotation * flips[:, None], "columns": lines[:, 0], "rows": lines[:, 1],
            "elastic": shifts * chance(n, 1, 1, 1) * ELASTIC_STD * 2 / TILE,
            "brightness": 1 + BRIGHTNESS * uniform(n, 1) * chance(n, 1)}


def augment(images, masks, draws):
    """Flip, rotate, distort and brighten each tile its own way (paper 2.4).

    images (n, 3, H, W) float 0..1, masks (n, H, W) integer, draws from `draw_augmentation`; returns
    the same shapes and types. Every output pixel looks up one place of the input: its position is
    bent along each axis (grid distortion), turned and mirrored, then shifted (elastic). Images are
    interpolated, masks take the nearest label, beyond the border both continue mirrored.
    """
    (height, width), device = images.shape[2:], images.device
    matrix, columns, rows, elastic, brightness = (
        send(draws[name], device)
        for name in ("matrix", "columns", "rows", "elastic", "brightness"))
    # Lines and shifts are given on coarse grids; these matrices interpolate them to pixels.
    x = columns @ linear_basis(width, device).T                            # (n, W)
    y = rows @ linear_basis(height, device).T                              # (n, H)
    shift = cubic_basis(height, device) @ elastic @ cubic_basis(width, device).T  # (n, 2, H, W)
    x, y, matrix = x[:, None, None, :], y[:, None, :, None], matrix[..., None, None]
    grid = matrix[:, :, 0] * x + matrix[:, :, 1] * y + shift               # (n, 2, H, W)
    grid = grid.permute(0, 2, 3, 1)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    warped = F.grid_sample(masks[:, None].float(), grid, "nearest", "reflection",
                           align_corners=False)
    return images.mul_(brightness[..., None, None]).clamp_(0, 1), warped[:, 0].to(masks.dtype)


def linear_basis(size, device):
    """(size, 6): each pixel centre's weights of the lines of the distortion grid around it."""
    position = (torch.arange(size, device=device) + 0.5) / size * GRID_CELLS
    distance = position[:, None] - torch.arange(GRID_CELLS + 1, device=device)
    return (1 - distance.abs()).clamp(min=0)


def cubic_basis(size, device):
    """(size, 10): each pixel centre's weights of the elastic grid's points, cubic B-splines."""
    position = (torch.arange(size, device=device) + 0.5) / size * ELASTIC_CELLS + 1
    distance = (position[:, None] - torch.arange(ELASTIC_CELLS + 3, device=device)).abs()
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp(min=0)**3 / 6
    return torch.where(distance < 1, near, far)


# -----------------------------------------------------------------------------
# Looking at it, and the command line.


def outline(mask):
    """Border pixels of each region of one label, inside the region: mask (H, W) -> bool (H, W)."""
    padded = np.pad(mask, 1, mode="edge")
    return np.any([padded[1:-1, 1:-1] != neighbour for neighbour in (
        padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])],
        axis=0) & (mask > 0)


def preview(data, root, out, seed=0):
    """Write a sheet: eight tiles with their outlines, each above three augmented versions."""
    images, masks, rows = load(data, root)
    indices = torch.linspace(0, len(rows) - 1, min(8, len(rows))).long()
    batch, labels = get_batch(images, masks, indices, "cpu")
    chance = torch.Generator().manual_seed(seed)
    lines = [(batch, labels)] + [augment(batch, labels, draw_augmentation(len(batch), chance))
                                 for _ in range(3)]
    sheet = []
    for pictures, labels in lines:
        pictures = (pictures.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        for picture, label in zip(pictures, labels.numpy()):
            picture[outline(label)] = (0, 255, 0)
        sheet.append(np.concatenate(pictures, axis=1))
    Image.fromarray(np.concatenate(sheet)).save(out)
    print(f"{out}: {len(indices)} tiles of {data}, and three times augmented below")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare data sets, look at augmented tiles.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="raw files -> memory-mapped tiles")
    command.add_argument("data", choices=READERS, help="data set")
    command.add_argument("--from", dest="folders", nargs="+", required=True, metavar="DIR",
                         help="folders of the raw files")
    command.add_argument("--later-images", action="store_true",
                         help="keep the seven MoNuSeg images that the paper did not have")
    command.add_argument("--data-root", default="data", help="folder of the prepared data")
    command = commands.add_parser("preview", help="draw tiles before and after augmentation")
    command.add_argument("data", choices=CLASSES, help="data set")
    command.add_argument("--out", default="preview.png", help="picture to write")
    command.add_argument("--seed", type=int, default=0, help="of the augmentation")
    command.add_argument("--data-root", default="data", help="folder of the prepared data")
    args = parser.parse_args(argv)
    if args.command == "prepare" and args.later_images and args.data != "monuseg":
        parser.error("--later-images is MoNuSeg's")
    return args


def positive(kind):
    """An argparse type: an int or float above 0, and finite."""
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value
    parse.__name__ = kind.__name__  # argparse names it in its own errors
    return parse


def main(args):
    if args.command == "preview":
        preview(args.data, args.data_root, args.out, args.seed)
    else:
        options = {"later_images": True} if args.later_images else {}
        try:
            prepare(args.data, args.folders, args.data_root, **options)
        except OSError as error:
            if error.errno is None:  # one of ours, it says what to do
                raise
            raise OSError(f"{error.filename or args.data_root}: {error.strerror}: mend that, and "
                          "the same command goes on where it was") from None


def run(main, args, after_interrupt="nothing unfinished was kept"):
    """Run a script: bad input, a ValueError or OSError, ends it with one line and status 2."""
    name = Path(sys.argv[0]).name
    try:
        main(args)
    except (ValueError, OSError) as error:
        live("")
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; {after_interrupt}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main, parse_args(), "the same command goes on where it was")
