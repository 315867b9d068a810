"""The data, from raw files to augmented batches (paper 2.3 and 2.4).

    python data.py prepare monuseg --from DIR       # raw files -> data/monuseg/
    python data.py prepare lung --from DIR          # images and masks of your own -> data/lung/
    python data.py preview monuseg --out sheet.png  # look at tiles before and after augmentation
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import struct
import time
import warnings
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from losses import RECIPES
from plots import PALETTE, draw_preview
from synthetic import EOSIN, HEMATOXYLIN, NAMES, draw_tiles
from utils import (first_mismatch, lock_folder, number, print_progress, run_cli, to_device,
                   write_atomic)

warnings.filterwarnings("ignore", module="PIL")  # of damaged files, what we say is enough
TILE = 224  # pixels, the side of a tile
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What is known of a set. `classes` names its labels: one class means a foreground against a
# background, which takes one logit and BCE; several take a logit each. `scale` is the factor by
# which raw images are resized before they are cut, `split` the default of --split, and `recipe` a
# row of RECIPES in losses.py.
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
INFO = {"classes": [str], "scale": float, "split": str, "recipe": str}  # its schema
SPLITS = ("tile", "image", "official")  # see `split_tiles`

# -----------------------------------------------------------------------------
# A prepared set is a folder with images.npy (n, 224, 224, 3) and masks.npy (n, 224, 224), both
# uint8, tiles.csv, one line per tile: source image, row, column, the part of the official split
# that it belongs to, and where in the image its corner lies, and set.json, what is known of the
# set. The arrays are memory-mapped, so that a batch is one indexing operation and no loader is
# needed.

ARRAYS = {"images": (TILE, TILE, 3), "masks": (TILE, TILE)}  # shape of a tile in each


@dataclass
class Tiles:
    """images (n, 224, 224, 3) and masks (n, 224, 224), uint8 tensors; of each tile, its row
    (source image, row, column, part of the official split); what is known of the set, see SETS;
    of each tile, the first pixel (top, left) in its image, no list if that was not noted."""

    images: torch.Tensor
    masks: torch.Tensor
    rows: list
    info: dict
    corners: list = None


def how_to_prepare(data):
    if data == "monuseg-exact":
        return "run `python data.py prepare monuseg --raster exact --from DIR`"
    return (f"run ./prepare_data.sh {data}" if data in READERS else
            f"run `python data.py prepare {data} --from DIR`, DIR with folders images and masks")


def read_info(data, root, num_classes=1):
    """What is known of a data set -> dict as in SETS; of an own one, what its set.json says.

    `num_classes` is of the synthetic set. Raises FileNotFoundError or ValueError saying how to
    prepare the data.
    """
    if data in SETS:
        return SETS[data] | ({} if num_classes == 1 else {"classes": [*NAMES[:num_classes]]})
    path = Path(root, data, "set.json")
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: {data} is not prepared: {how_to_prepare(data)}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        info = None
    if first_mismatch(info, INFO) or not (0 < len(info["classes"]) <= len(PALETTE) and
                                          info["split"] in SPLITS and info["recipe"] in RECIPES):
        raise ValueError(f"{path}: damaged, or not written by this version: remove {path.parent} "
                         f"and {how_to_prepare(data)}")
    return info


def set_of(checkpoint, path):
    """What a checkpoint of train.py knows of the set that it was trained on -> dict as in SETS.

    Raises ValueError if it knows nothing, or another number of classes.
    """
    info = checkpoint.get("set", SETS.get(checkpoint["args"]["data"]))
    if first_mismatch(info, INFO) or len(info["classes"]) != checkpoint["num_classes"]:
        raise ValueError(f"{path}: does not say what its {checkpoint['num_classes']} classes are: "
                         "it was not written by this version")
    return info


def load(data, root, num_classes=1):
    """Open a prepared data set -> Tiles, memory-mapped. "synthetic" is drawn on the spot.

    `num_classes` is of the synthetic set. Raises FileNotFoundError or ValueError saying how to
    prepare the data.
    """
    info = read_info(data, root, num_classes)
    if data == "synthetic":
        return synthetic(num_classes=num_classes)
    folder = Path(root, data)
    again = f"remove {folder} and {how_to_prepare(data)}"
    if not (folder / "tiles.csv").exists():
        raise FileNotFoundError(f"{folder}: {data} is not prepared: {how_to_prepare(data)}")
    try:
        with open(folder / "tiles.csv", newline="") as file:
            lines = [*csv.DictReader(file)]
        rows = [(line["image"], int(line["row"]), int(line["column"]), line["official"])
                for line in lines]
        corners = ([(int(line["top"]), int(line["left"])) for line in lines]
                   if lines and "top" in lines[0] else None)  # older versions did not note them
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'tiles.csv'}: damaged ({error!r}): {again}") from None
    arrays = []
    for name, shape in ARRAYS.items():
        path = folder / f"{name}.npy"
        try:  # copy-on-write, because torch wants an array that it could write to
            arrays.append(np.load(path, mmap_mode="c"))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}): {again}") from None
        except OSError as error:  # the system's: the file itself may be sound
            raise OSError(f"{path}: cannot be opened ({error.strerror})") from None
        if arrays[-1].shape != (len(rows), *shape) or arrays[-1].dtype != np.uint8:
            raise ValueError(f"{path}: {arrays[-1].dtype} {arrays[-1].shape}, but tiles.csv has "
                             f"{len(rows)} tiles: {again}")
    labels, highest = max(2, len(info["classes"])), arrays[1].max(initial=0)
    if highest >= labels:
        raise ValueError(f"{folder / 'masks.npy'}: holds the label {highest}, but {data} has the "
                         f"labels 0 to {labels - 1}: {again}")
    return Tiles(*map(torch.from_numpy, arrays), rows, info, corners)


def synthetic(n=100, num_classes=1):
    """Draw n tiles of the synthetic set, the same each time -> Tiles, as `load` returns them."""
    images, masks = map(torch.from_numpy, draw_tiles(n, num_classes))
    rows = [(f"synthetic-{number:03}", 0, 0, "train") for number in range(n)]
    return Tiles(images, masks, rows, read_info("synthetic", "", num_classes), [(0, 0)] * n)


# -----------------------------------------------------------------------------
# Splits (paper 2.3). The order that decides is a hash of names: the same with every --seed, on
# every machine and with every version of anything.


def split_by_hash(rows, pool, fraction, unit):
    """Draw whole units, tiles or source images, from `pool` -> (drawn, rest), lists of indices."""
    names = {i: f"{rows[i][:3] if unit == 'tile' else rows[i][0]}" for i in pool}
    order = sorted(set(names.values()), key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(order[:round(fraction * len(order))])
    return [i for i in pool if names[i] in chosen], [i for i in pool if names[i] not in chosen]


def split_tiles(data, rows, split):
    """Tiles of each part -> {"train": indices, "val": indices, "test": indices} (paper 2.3).

    tile: the paper's. MoNuSeg: 70/20/10 % of all tiles at random, so that tiles of one image fall
    on both sides. BCSS: its test tiles have no masks, so 4,021 validation tiles are the test set.
    BCSS512: so are 600 training tiles. image: the same shares of whole images, or regions.
    official: the parts that the set came in; where it has none to validate on, as MoNuSeg, a fifth
    of the training images does. Raises ValueError where a part would be empty.
    """
    everything = range(len(rows))
    official = {part: [i for i in everything if rows[i][3] == part]
                for part in ("train", "val", "test")}
    if split == "official":
        train, val, test = official.values()
        if not val:
            val, train = split_by_hash(rows, train, 1 / 5, "image")
    elif data == "bcss512":
        val = official["val"]
        test, train = split_by_hash(rows, official["train"], 600 / 6000, split)
    elif data == "bcss":
        train, rest = ((official["train"], official["val"]) if split == "tile" else
                       split_by_hash(rows, everything, 30760 / 36189, "image"))
        test, val = split_by_hash(rows, rest, 4021 / 5429, split)
    else:
        train, rest = split_by_hash(rows, everything, 0.7, split)
        val, test = split_by_hash(rows, rest, 2 / 3, split)
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
# Whole images: a pixel of one is looked up in the tile that holds it. Training with --windows cuts
# its tiles out of them anew, anywhere, and eval.py --whole predicts them.


@dataclass
class WholeImage:
    """grid (R, C): indices of the tiles; tops, lefts: R and C first pixels of theirs, ascending."""

    grid: torch.Tensor
    tops: list
    lefts: list

    @property
    def size(self):
        """Height and width in pixels."""
        return self.tops[-1] + TILE, self.lefts[-1] + TILE


def whole_images(data, tiles, indices):
    """Put the tiles with these indices together -> {name of a source image: WholeImage}.

    Raises ValueError if they do not cover their images.
    """
    if not tiles.corners:
        raise ValueError(f"{data} was prepared by an older version, which did not note where tiles "
                         f"lie: remove that folder and {how_to_prepare(data)}")
    images = {}
    for i in indices.tolist():
        images.setdefault(tiles.rows[i][0], []).append(i)
    for name, members in images.items():
        places = {tiles.corners[i]: i for i in members}
        tops, lefts = (sorted(set(starts)) for starts in zip(*places))
        covered = all(starts[0] == 0 and max(np.diff(starts), default=0) <= TILE
                      for starts in (tops, lefts))
        if not covered or not len(members) == len(places) == len(tops) * len(lefts):
            raise ValueError(f"{data}: the tiles of {name} do not make up a whole image, which "
                             "--windows and --whole need")
        grid = torch.tensor([[places[top, left] for left in lefts] for top in tops])
        images[name] = WholeImage(grid, tops, lefts)
    return images


def cut(tiles, whole, top, left, height, width):
    """Cut a piece out of a whole image -> image (height, width, 3), mask (height, width), uint8.

    Beyond the border the image continues mirrored, as in `augment`.
    """
    def look_up(start, length, starts, size):  # -> which row or column of tiles, and where in it
        positions = torch.arange(start, start + length) % (2 * size)
        positions = torch.minimum(positions, 2 * size - 1 - positions)
        starts = torch.tensor(starts)
        which = torch.searchsorted(starts, positions, right=True) - 1
        return which, positions - starts[which]

    row, y = look_up(top, height, whole.tops, whole.size[0])
    column, x = look_up(left, width, whole.lefts, whole.size[1])
    places = tuple(to_device(place, tiles.images.device)
                   for place in (whole.grid[row[:, None], column], y[:, None], x))
    return tiles.images[places], tiles.masks[places]


# -----------------------------------------------------------------------------
# Batches


def generator(*numbers):
    """A random generator for, say, (seed, epoch, step): what it yields depends on these alone."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 2)


def read_tiles(tiles, indices, device):
    """Take tiles out of the set as they are stored -> what `to_batch` takes, pinned for CUDA.

    Touches no other device than the set's, so that a thread may do it ahead: MPS bears only one.
    """
    indices = to_device(indices, tiles.images.device)
    return pinned([array.index_select(0, indices) for array in (tiles.images, tiles.masks)],
                  tiles, device)


def read_windows(tiles, wholes, indices, places, scale, device):
    """Cut windows out of the whole images of some tiles, with room around them to turn and grow.

    places (n, 2): where their centres lie, 0..1 of the way that a tile can move within its image.
    """
    side, pieces = window_side(scale), []
    for index, place in zip(indices.tolist(), places.tolist()):
        whole = wholes[tiles.rows[index][0]]
        top, left = (round(share * (size - TILE)) - (side - TILE) // 2
                     for share, size in zip(place, whole.size))
        pieces.append(cut(tiles, whole, top, left, side, side))
    return pinned([torch.stack(arrays) for arrays in zip(*pieces)], tiles, device)


def window_side(scale):
    """Pixels of a square that holds a window turned by 45 degrees and at its largest scale."""
    return 2 * math.ceil(TILE * math.exp(scale) / math.sqrt(2) + ELASTIC_STD)


def pinned(arrays, tiles, device):
    """The same in memory from which CUDA copies without waiting."""
    pin = torch.device(device).type == "cuda" and not tiles.images.is_cuda
    return [array.pin_memory() for array in arrays] if pin else arrays


def to_batch(arrays, device):
    """Stored tiles -> images (n, 3, H, W) float 0..1, masks (n, H, W) int64 on `device`."""
    images, masks = (to_device(array, device) for array in arrays)
    return images.permute(0, 3, 1, 2).float() / 255, masks.long()


def get_batch(tiles, indices, device):
    """Take tiles out of the set -> images (n, 3, 224, 224) float, 0..1, masks (n, 224, 224) int64.
    """
    return to_batch(read_tiles(tiles, indices, device), device)


def normalize(images):
    """Subtract ImageNet's mean and divide by its standard deviation: images (n, 3, H, W), 0..1."""
    mean, std = (to_device(torch.tensor(value), images.device).view(3, 1, 1)
                 for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def train_batches(tiles, indices, batch_size, seed, first_step, last_step, device, rank=0,
                  world_size=1, augmentations="all", wholes=None, windows=0.0, stain=0.0):
    """Yield the augmented batches of training steps first_step..last_step - 1, counted from 0.

    A batch is images (n, 3, 224, 224) float 0..1 and masks (n, 224, 224) int64 on `device`, n this
    process's share of the batch size. Every epoch has an order of its own, and leaves out the tiles
    of an incomplete batch. Chance depends on the seed and the step alone, so that resuming needs no
    generator's state; PyTorch's own generator is seeded, too, for what the network draws.
    `augmentations` are names of WARPS and COLOURS in one text, or "all", or "none". With `wholes`,
    as `whole_images` returns them, a tile stands for a window anywhere in its image, whose scale
    varies by up to exp(+-windows). `stain` is the strength of the stains' variation.
    """
    names = [*WARPS, *COLOURS] if augmentations == "all" else augmentations.split()
    steps = len(indices) // batch_size  # in an epoch

    def fetch(step):
        epoch, place = divmod(step, steps)
        order = torch.randperm(len(indices), generator=generator(seed, epoch + 1))
        batch = indices[order[place * batch_size:(place + 1) * batch_size]][rank::world_size]
        if not wholes:
            return read_tiles(tiles, batch, device)
        places = torch.rand(batch_size, 2, generator=generator(seed, epoch + 1, place, "windows"))
        return read_windows(tiles, wholes, batch, places[rank::world_size], windows, device)

    with ThreadPoolExecutor(1) as reader:
        next_batch = reader.submit(fetch, first_step)
        for step in range(first_step, last_step):
            images, masks = to_batch(next_batch.result(), device)
            if step + 1 < last_step:
                next_batch = reader.submit(fetch, step + 1)
            epoch, place = divmod(step, steps)
            chance = generator(seed, epoch + 1, place)
            draws = draw_augmentation(batch_size, chance, names, windows if wholes else None, stain)
            torch.manual_seed(chance.initial_seed() + rank)
            yield augment(images, masks, {name: values[rank::world_size]
                                          for name, values in draws.items()})


# -----------------------------------------------------------------------------
# Augmentation (paper 2.4), on the training device, a whole batch at a time

# The paper names six and gives no strengths, so all of them are ours.
CHANCE = 0.5          # of each augmentation, for each tile
ELASTIC_CELLS = 7     # elastic: random shifts on a grid of 7 x 7 cells of 32 pixels,
ELASTIC_STD = 8       # pixels, their standard deviation before smoothing
GRID_CELLS = 5        # grid distortion: rows and columns of 5 cells each grow or shrink
GRID_STRETCH = 0.3    # by up to 30 %
BRIGHTNESS = 0.2      # brightness changes by up to 20 %
STAIN_SHIFT = 0.2     # stains, where asked for, are shifted by a fifth of what they are scaled by


def uniform(*shape, generator):
    """Random numbers from -1 to 1."""
    return 2 * torch.rand(*shape, generator=generator) - 1


def chance(*shape, generator):
    """1 where an augmentation happens, else 0."""
    return (torch.rand(*shape, generator=generator) < CHANCE).float()


def draw_brightness(n, generator):
    """One factor a tile, (n, 1)."""
    return 1 + BRIGHTNESS * uniform(n, 1, generator=generator) * chance(n, 1, generator=generator)


def change_brightness(images, factors):
    return images.mul_(factors[..., None, None]).clamp_(0, 1)


def change_stain(images, changes):
    """Scale and shift the amounts of haematoxylin, of eosin and of what neither explains.

    images (n, 3, H, W), 0..1; changes (n, 2, 3): factors and shifts, in optical density.
    """
    stains = F.normalize(torch.tensor((HEMATOXYLIN, EOSIN)))
    stains = torch.cat((stains, torch.linalg.cross(*stains)[None]))         # (3, 3), one a row
    inverse, stains = (to_device(x, images.device) for x in (stains.inverse(), stains))
    factors, shifts = changes.unbind(1)
    mix = (inverse * factors[:, None]) @ stains                             # (n, 3, 3)
    density = -images.clamp_(min=1 / 255).log_()
    density = torch.einsum("nihw,nij->njhw", density, mix) + (shifts @ stains)[..., None, None]
    return density.neg_().exp_().clamp_(0, 1)


# What moves pixels is one look-up, below. What changes colours is a function that draws parameters,
# (n, generator) -> tensor on the CPU, and one that applies them, (images (n, 3, H, W), 0..1,
# parameters) -> images: one entry adds another.
WARPS = ("flip", "rotation", "grid", "elastic")
COLOURS = {"brightness": (draw_brightness, change_brightness)}


def draw_augmentation(n, generator, names=(*WARPS, *COLOURS), windows=None, stain=0.0):
    """Draw the random parameters of n tiles: small tensors on the CPU, the same for any device.

    matrix (n, 2, 2): flips and rotation; columns, rows (n, 6): the grid's distorted lines, -1..1;
    elastic (n, 2, 10, 10): shifts at the grid's points; brightness (n, 1): factors. A warp that is
    not in `names` is drawn as well but changes nothing, so that the others stay what they are. For
    windows of varied scale also zoom (n,): a window's share of the piece that was cut out for it;
    for stains of varied strength (above 0) also stain (n, 2, 3): factors and shifts.
    """
    def happens(name, *shape):
        return chance(*shape, generator=generator) * (name in names)

    flips = 1 - 2 * happens("flip", n, 2)
    angle = math.pi * uniform(n, generator=generator) * happens("rotation", n)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(n, 2, 2)
    stretch = uniform(n, 2, GRID_CELLS, generator=generator) * happens("grid", n, 1, 1)
    widths = 1 + GRID_STRETCH * stretch
    lines = F.pad(widths.cumsum(2) / widths.sum(2, keepdim=True), (1, 0)) * 2 - 1
    shifts = torch.randn(n, 2, ELASTIC_CELLS + 3, ELASTIC_CELLS + 3, generator=generator)
    elastic = shifts * happens("elastic", n, 1, 1, 1) * ELASTIC_STD * 2 / TILE
    draws = {"matrix": rotation * flips[:, None], "columns": lines[:, 0], "rows": lines[:, 1],
             "elastic": elastic} | {name: draw(n, generator) for name, (draw, _) in COLOURS.items()
                                    if name in names}
    if windows is not None:
        scale = (windows * uniform(n, generator=generator)).exp()
        draws["zoom"] = scale * TILE / window_side(windows)
    if stain:
        scaled, shifted = stain * uniform(2, n, 3, generator=generator)
        draws["stain"] = torch.stack((1 + scaled, STAIN_SHIFT * shifted), dim=1)
    return draws


def augment(images, masks, draws):
    """Flip, rotate, distort and brighten each tile its own way (paper 2.4).

    images (n, 3, H, W) float 0..1, masks (n, H, W) integer, draws from `draw_augmentation`; returns
    the same types and shapes, but for windows 224 x 224, of which images and masks hold more. Every
    output pixel looks up one place of the input: its position is bent along each axis (grid
    distortion), turned and mirrored, shifted (elastic), and scaled. Images are interpolated, masks
    take the nearest label, beyond the border both continue mirrored.
    """
    device = images.device
    height, width = (TILE, TILE) if "zoom" in draws else images.shape[2:]
    draws = {name: to_device(values, device) for name, values in draws.items()}
    # Lines and shifts are given on coarse grids; these matrices interpolate them to pixels.
    x = draws["columns"] @ linear_basis(width, device).T                   # (n, W)
    y = draws["rows"] @ linear_basis(height, device).T                     # (n, H)
    shift = cubic_basis(height, device) @ draws["elastic"] @ cubic_basis(width, device).T
    x, y, matrix = x[:, None, None, :], y[:, None, :, None], draws["matrix"][..., None, None]
    grid = matrix[:, :, 0] * x + matrix[:, :, 1] * y + shift               # (n, 2, H, W)
    grid = grid.permute(0, 2, 3, 1)
    if "zoom" in draws:
        grid = grid * draws["zoom"].view(-1, 1, 1, 1)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    warped = F.grid_sample(masks[:, None].float(), grid, "nearest", "reflection",
                           align_corners=False)
    if "stain" in draws:
        images = change_stain(images, draws["stain"])
    for name, (_, change) in COLOURS.items():
        if name in draws:
            images = change(images, draws[name])
    return images, warped[:, 0].to(masks.dtype)


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
# Preparation: reading raw files. Whatever is wrong with one is a ValueError that names it.

FORMATS = ("TIFF", "PNG", "JPEG", "BMP", "WEBP")  # the only ones that Pillow may try
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}

# The paper's 44 MoNuSeg images are 30 for training and these 14 of the challenge's test set.
MONUSEG_TEST = """TCGA-2Z-A9J9-01A-01-TS1 TCGA-44-2665-01B-06-BS6 TCGA-69-7764-01A-01-TS1
    TCGA-A6-6782-01A-01-BS1 TCGA-AC-A2FO-01A-01-TS1 TCGA-AO-A0J2-01A-01-BSA TCGA-CU-A0YN-01A-02-BSB
    TCGA-EJ-A46H-01A-03-TSC TCGA-FG-A4MU-01B-01-TS1 TCGA-GL-6846-01A-01-BS1 TCGA-HC-7209-01A-01-TS1
    TCGA-HT-8564-01Z-00-DX1 TCGA-IZ-8196-01A-01-BS1 TCGA-ZF-A9R5-01A-01-TS1""".split()
# Later training archives hold seven more, which the paper did not have.
MONUSEG_LATER = """TCGA-BC-A217-01Z-00-DX1 TCGA-F9-A8NY-01Z-00-DX1 TCGA-FG-A87N-01Z-00-DX1
    TCGA-MH-A561-01Z-00-DX1 TCGA-UZ-A9PJ-01Z-00-DX1 TCGA-UZ-A9PN-01Z-00-DX1
    TCGA-XS-A8TJ-01Z-00-DX1""".split()


def read_image(path, modes):
    """Read an image file whose Pillow mode is in `modes`; ValueError if it cannot be used."""
    check_is_file(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            depths = getattr(image, "tag_v2", {}).get(258, (8,))  # of a TIFF, bits per sample
            ImageOps.exif_transpose(image, in_place=True)  # as viewers show it
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError,
            MemoryError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's: the file may be sound
            raise OSError(f"{path}: cannot be opened ({error.strerror})") from None
        raise ValueError(f"{path}: not a readable image ({error or 'out of memory'}): fetch it "
                         "again") from None
    if image.mode not in modes:
        raise ValueError(f"{path}: Pillow mode {image.mode}, not {' or '.join(modes)}: "
                         "convert it, or export it again as 8-bit")
    if image.mode == "RGB" and max(depths) > 8:
        raise ValueError(f"{path}: {max(depths)} bits a channel, of which Pillow keeps the upper 8 "
                         "alone: export it again as 8-bit")
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
    have them. Pillow fills the pixels of the outline, too, as the paper's code does; the raster
    "exact" is that of `fill_by_centres`. Raises ValueError if the file is broken or none of a
    polygon lies in the image.
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
    """Read a nucleus mask stored as a picture (0/1 or 0/255, any 8-bit mode) -> mask, 0 or 1."""
    mask = np.asarray(read_image(path, ("L", "LA", "P", "1", "RGB")).convert("RGB")).max(axis=2)
    values = np.unique(mask)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise ValueError(f"{path}: holds the values {values[:9].tolist()}, but a nucleus mask "
                         "holds 0 and one other: export it again, uncompressed")
    return Image.fromarray((mask > 0).astype(np.uint8))


def read_monuseg(image_path, mask_path, raster="paper"):
    """One MoNuSeg image and its annotation -> 16 tiles: 1000 -> 896 -> 4 x 4 x 224 (paper 2.3)."""
    image = read_image(image_path, ("RGB",))
    if image.size != (1000, 1000):
        raise ValueError(f"{image_path}: {image.width} x {image.height} pixels, but every MoNuSeg "
                         "image is 1000 x 1000: fetch it again")
    if mask_path.suffix.lower() == ".xml":
        mask = read_polygons(mask_path, image.size, raster)
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


def check_is_file(path):
    if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
        raise ValueError(f"{path}: not a file")


def read_labels(path):
    """Read a mask of an own set, 8-bit and of one channel; of a palette picture, its indices."""
    image = read_image(path, ("L", "P", "1", "RGB", "RGBA", "LA", "I;16", "I"))
    if image.mode not in ("L", "P", "1"):
        raise ValueError(f"{path}: Pillow mode {image.mode}, but a mask stores one class index a "
                         "pixel, 0 to 255: replace colours by indices")
    return Image.fromarray(np.asarray(image).astype(np.uint8))


def read_own(image_path, mask_path, scale, is_binary):
    """One image of an own set and its mask -> tiles that cover it, the last ones overlapping."""
    image, mask = read_image(image_path, ("RGB", "L")).convert("RGB"), read_labels(mask_path)
    check_size(image_path, image, mask_path, mask)
    if is_binary:
        mask = mask.point(lambda value: value > 0)
    if scale != 1:
        size = scaled_size(image.size, scale)
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = mask.resize(size, Image.Resampling.NEAREST)
    image, mask = np.asarray(image), np.asarray(mask)
    places = [(y, x) for y in tile_starts(len(mask)) for x in tile_starts(mask.shape[1])]
    return tuple(np.stack([array[y:y + TILE, x:x + TILE] for y, x in places])
                 for array in (image, mask))


def scaled_size(size, scale):
    return tuple(max(1, round(scale * side)) for side in size)


def tile_starts(length):
    """Where tiles start that cover `length` pixels; the last one ends there and may overlap."""
    return [min(start, length - TILE) for start in range(0, length, TILE)]


def check_size(image_path, image, mask_path, mask):
    if image.size != mask.size:
        raise ValueError(f"{mask_path}: {mask.width} x {mask.height} pixels, but {image_path.name} "
                         f"has {image.width} x {image.height}: fetch both again")


# -----------------------------------------------------------------------------
# Finding raw files. A list of (image path, annotation path, its lines of tiles.csv). (Tiles of
# BCSS come by themselves: where in their region they lie is not known in pixels of theirs.)


def walk(folders):
    """All folders below `folders`, each once, links followed, with their files' names.

    The debris that archives carry along is left out. Raises FileNotFoundError.
    """
    seen = set()
    for top in folders:
        if not Path(top).is_dir():
            raise FileNotFoundError(f"{top}: no such folder: give that of the unpacked archives")
        for folder, below, names in os.walk(Path(top).absolute(), followlinks=True):
            real = os.path.realpath(folder)
            below[:] = [] if real in seen else sorted(set(below) - {"__MACOSX"})
            if real not in seen:
                yield Path(folder), [name for name in names if not name.startswith(".")]
            seen.add(real)


def find_files(folders, suffixes):
    """All files below the folders by their suffix, sorted."""
    return sorted(folder / name for folder, names in walk(folders) for name in names
                  if Path(name).suffix.lower() in suffixes)


def match_masks(images, masks):
    """Match {name: path} of images and of masks; ValueError names one without partner."""
    for one, other, missing in (images, masks, "mask or annotation"), (masks, images, "image"):
        for name in one:
            if name not in other:
                raise ValueError(f"{one[name]}: no {missing} of the same name: add it, or remove "
                                 "this file")
    return [(images[name], masks[name]) for name in sorted(images)]


def index_by_stem(paths):
    """{name without suffix: path}; ValueError for two files of one name."""
    named = {}
    for path in paths:
        if named.setdefault(path.stem, path) != path:
            raise ValueError(f"{path}: {named[path.stem]} has the same name: keep one of them")
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
            images.pop(name), masks.pop(name, None)
    pictures = sum(path.suffix.lower() == ".png" for path in masks.values())
    if raster == "exact" and pictures:
        print(f"{pictures} images have only a mask picture, whose raster stays as it is")
    return [(image, mask, [(image.stem, row, column, "test" if image.stem in MONUSEG_TEST
                            else "train", TILE * row, TILE * column)
                           for row in range(4) for column in range(4)])
            for image, mask in match_masks(images, masks)]


def find_bcss(folders, suffix):
    """List BCSS's layout: folders train, val and train_mask, val_mask, or all with _512 behind.

    A tile is named after slide, region of interest and offset; its region counts as source image.
    """
    layout = {}
    for folder, _ in walk(folders):
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
        for image, mask in match_masks(*(index_by_stem(find_files([layout[name]], {".png"}))
                                         for name in (part, part + "_mask"))):
            match = re.fullmatch(r"(.+)_(\d+)_(\d+)_size\d+", image.stem)
            region, row, column = match.groups() if match else (image.stem, 0, 0)
            items.append((image, mask, [(region, int(row), int(column), part, 0, 0)]))
    return items


def find_own(folders, names=None, scale=1.0):
    """List an own set -> items as above, and what is known of it.

    A folder with images/* and masks/* of the same names, or with these in train, val and test.
    `names` of the classes may be given; else two values in all masks, 0 and any other, are one
    class, and labels 0 to K - 1 are K. Raises ValueError naming the file that does not fit.
    """
    if len(folders) > 1:
        raise ValueError(f"--from {folders[1]}: one folder holds an own set, in images and masks")
    top, items, images = Path(folders[0]), [], []
    parts = [part for part in ("train", "val", "test") if (top / part).is_dir()]
    for folder, part in [(top / part, part) for part in parts] or [(top, "train")]:
        found = find_files([folder / "images"], SUFFIXES)
        if not found:
            raise ValueError(f"{folder / 'images'}: holds no image")
        images += found
        for image, mask in match_masks(index_by_stem(found),
                                       index_by_stem(find_files([folder / "masks"], SUFFIXES))):
            width, height = scaled_size(read_image(image, ("RGB", "L")).size, scale)
            if min(width, height) < TILE:
                raise ValueError(f"{image}: {width} x {height} pixels, less than a tile of {TILE}: "
                                 f"give --scale {1.005 * scale * TILE / min(width, height):.2f}")
            items.append((image, mask, [(image.stem, row, column, part, top, left)
                                        for row, top in enumerate(tile_starts(height))
                                        for column, left in enumerate(tile_starts(width))]))
    index_by_stem(images)  # no two of one name, in whatever parts
    return items, {"classes": own_classes([mask for _, mask, _ in items], names), "scale": scale,
                   "split": "official" if parts else "image"}


def own_classes(masks, names):
    """The classes of an own set, from the labels in its masks; ValueError if they make no sense."""
    first = {}  # of each label, the first mask that holds it
    for done, path in enumerate(masks, 1):
        for label in np.unique(read_labels(path)).tolist():
            first.setdefault(label, path)
        print_progress(f"labels of {done}/{len(masks)} masks read")
    labels = sorted(first)
    binary = len(labels) <= 2 and labels[-1] > 0 and (len(labels) == 1 or labels[0] == 0)
    if names and len(names) > 1:
        if labels[-1] >= len(names):
            raise ValueError(f"{first[labels[-1]]}: holds the label {labels[-1]}, but --classes "
                             f"names {len(names)}, 0 to {len(names) - 1}")
        return names
    if binary:
        return names or ["foreground"]
    if names or labels == [0]:
        raise ValueError(f"{first[labels[-1]]}: masks of one class hold two values, 0 and another, "
                         f"but these hold {', '.join(map(str, labels[:9]))}")
    gap = next((label for label, there in enumerate(labels) if label != there), None)
    if gap is not None or len(labels) > len(PALETTE):
        odd = labels[gap] if gap is not None else labels[-1]
        raise ValueError(f"{first[odd]}: holds the label {odd}, but classes are numbered from 0 "
                         f"without gaps, at most {len(PALETTE)} of them: number them so, or name "
                         "all with --classes")
    return [f"class {label}" for label in labels]


# -----------------------------------------------------------------------------
# Preparing: the same for every data set, in flat memory, and it can be interrupted

READERS = {
    "monuseg": (find_monuseg, read_monuseg),
    "monuseg-exact": (partial(find_monuseg, raster="exact"), partial(read_monuseg, raster="exact")),
    "bcss": (partial(find_bcss, suffix=""), partial(read_bcss, size=224, num_classes=3)),
    "bcss512": (partial(find_bcss, suffix="_512"), partial(read_bcss, size=512, num_classes=22)),
}


def prepare(data, folders, root, **options):
    """Write ROOT/DATA/{images.npy, masks.npy, tiles.csv} from the raw files below the folders.

    `options` are those of the set's find function. Works in ROOT/DATA.partial, continues there
    after an interruption, and renames it when whole. Raises ValueError naming the first raw file
    that cannot be used; what is done stays.
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
        info["recipe"] = "monuseg" if len(info["classes"]) == 1 else "bcss"
        read = partial(read_own, scale=info["scale"], is_binary=len(info["classes"]) == 1)
    rows = [row for _, _, rows in items for row in rows]
    lock = lock_folder(working)

    # Start, or continue if the partial folder was made from the very same list.
    listed = json.dumps([[str(path) for path in items[0][:2]], rows, info])
    state = {"list": hashlib.sha256(listed.encode()).hexdigest(), "files": 0, "tiles": 0}
    progress = working / "progress.json"
    before = json.loads(progress.read_text()) if progress.exists() else {}
    if before.get("list") == state["list"]:
        state = before
    else:
        progress.unlink(missing_ok=True)  # it tells of the arrays that are replaced now
        for name, shape in ARRAYS.items():
            np.lib.format.open_memmap(working / f"{name}.npy", "w+", np.uint8, (len(rows), *shape))

    # Read some files at a time, write their tiles, note how far we are. (Plain writes: where the
    # disk is full they raise, while writing to a memory map would kill the process.)
    start, first = time.time(), state["files"]
    chunk = max(1, 256 // max(len(rows) for _, _, rows in items))  # files
    with (ThreadPoolExecutor(os.cpu_count()) as pool, open(working / "images.npy", "r+b") as images,
          open(working / "masks.npy", "r+b") as masks):
        for file, shape in zip((images, masks), ARRAYS.values()):
            file.seek(-math.prod(shape) * (len(rows) - state["tiles"]), os.SEEK_END)
        for done in range(first, len(items), chunk):
            some = items[done:done + chunk]
            for item, arrays in zip(some, pool.map(lambda item: read(*item[:2]), some)):
                for file, array, shape in zip((images, masks), arrays, ARRAYS.values()):
                    if array.nbytes != len(item[2]) * math.prod(shape):
                        raise ValueError(f"{item[0]}: was read as {array.dtype} {array.shape}, but "
                                         f"listed with {len(item[2])} tiles: uint8 {shape} each")
                    file.write(array.tobytes())
                state["tiles"] += len(item[2])
            for file in images, masks:  # the note must not be on the disk before the tiles are
                file.flush()
                os.fsync(file.fileno())
            state["files"] = done + len(some)
            with write_atomic(progress) as file:
                file.write(json.dumps(state).encode())
            eta = (time.time() - start) / (state["files"] - first) * (len(items) - state["files"])
            print_progress(f"{data}: {state['files']}/{len(items)} files, {eta:.0f} s left")

    # Complete: what is known, the table, then the name that the other scripts look for.
    source = {"from": [str(Path(folder).absolute()) for folder in folders]}
    (working / "set.json").write_text(json.dumps(info | source, indent=1), encoding="utf-8")
    with open(working / "tiles.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "row", "column", "official", "top", "left"), *rows])
    working.rename(final)
    for name in progress.name, ".lock":
        Path(final, name).unlink()
    lock.close()
    print_progress(f"{final}: {len(rows)} tiles from {len(items)} files in "
                   f"{time.time() - start:.0f} s\n")


# -----------------------------------------------------------------------------
# The command line


def preview(data, root, out, seed=0):
    """Write a sheet: eight tiles with their outlines, each above three augmented versions."""
    tiles = load(data, root)
    indices = torch.linspace(0, len(tiles.rows) - 1, min(8, len(tiles.rows))).long()
    images, masks = get_batch(tiles, indices, "cpu")
    chance = torch.Generator().manual_seed(seed)
    batches = [(images, masks)] + [augment(images, masks, draw_augmentation(len(images), chance))
                                   for _ in range(3)]
    rows = [((images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8), masks.numpy())
            for images, masks in batches]
    with write_atomic(out) as file:
        draw_preview(rows).save(file)
    print(f"{out}: {len(indices)} tiles of {data}, and three times augmented below")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare data sets, look at augmented tiles.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="raw files -> memory-mapped tiles")
    command.add_argument("data", help="data set: monuseg, bcss, bcss512, or a name of your own")
    command.add_argument("--from", dest="folders", nargs="+", required=True, metavar="DIR",
                         help="folders of the raw files; of an own set the one with images and "
                              "masks, or with these in train, val and test")
    command.add_argument("--later-images", action="store_true",
                         help="keep the seven MoNuSeg images that the paper did not have")
    command.add_argument("--raster", choices=("paper", "exact"),
                         help="of MoNuSeg's polygons: paper fills the pixels of the outline, too "
                              "(default); exact fills those whose centre is inside, and prepares "
                              "the set monuseg-exact")
    command.add_argument("--classes", nargs="+", metavar="NAME", help="of an own set, the names of "
                         "its labels 0, 1, ..., or of the one class (default: as the masks say)")
    command.add_argument("--scale", type=number(float, most=100),
                         help="of an own set, resize images by this factor first (default: 1)")
    command.add_argument("--data-root", default="data", help="folder of the prepared data")
    command = commands.add_parser("preview", help="draw tiles before and after augmentation")
    command.add_argument("data", help="data set")
    command.add_argument("--out", default="preview.png", help="picture to write")
    command.add_argument("--seed", type=int, default=0, help="of the augmentation")
    command.add_argument("--data-root", default="data", help="folder of the prepared data")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        if args.data == "monuseg-exact":
            parser.error(f"to prepare {args.data}, {how_to_prepare(args.data)}")
        if (args.later_images or args.raster) and args.data != "monuseg":
            parser.error("--later-images and --raster are MoNuSeg's")
        if (args.classes or args.scale) and args.data in SETS:
            parser.error(f"--classes and --scale are for own sets: those of {args.data} are fixed")
        if args.data == "synthetic" or not re.fullmatch(r"\w[\w-]*", args.data):
            parser.error(f"{args.data!r} cannot name an own set: use letters, digits, _ and -, and "
                         "none of our names")
        if args.classes and not len(set(args.classes)) == len(args.classes) <= len(PALETTE):
            parser.error(f"--classes: give at most {len(PALETTE)} different names")
    return args


def main(args):
    if args.command == "preview":
        preview(args.data, args.data_root, args.out, args.seed)
        return
    options = {name: value for name, value in (("later_images", args.later_images),
                                               ("names", args.classes), ("scale", args.scale))
               if value}
    try:
        prepare("monuseg-exact" if args.raster == "exact" else args.data, args.folders,
                args.data_root, **options)
    except OSError as error:
        if error.errno is None:  # one of ours, it says what to do
            raise
        raise OSError(f"{error.filename or args.data_root}: {error.strerror}: mend that, and the "
                      "same command goes on where it was") from None


if __name__ == "__main__":
    run_cli(main, parse_args, "the same command goes on where it was")
