"""The data: prepared sets, splits, augmented batches (paper 2.3 and 2.4).

    python data.py prepare monuseg --from DIR       # raw files -> data/monuseg/
    python data.py prepare lung --from DIR          # images and masks of your own -> data/lung/
    python data.py preview monuseg --out sheet.png  # look at tiles before and after augmentation
"""

import argparse
import csv
import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from plots import PALETTE, draw_preview
from raw import ARRAYS, READERS, SETS, TILE, TileRow, prepare
from recipes import RECIPES
from synthetic import EOSIN, HEMATOXYLIN, NAMES, draw_tiles
from utils import (first_mismatch, number, output_picture, read_json, run_cli, to_device,
                   write_atomic)

# Of ImageNet, on which Swin-UNet's encoder was trained. (The paper does not say how it normalises.)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INFO_SCHEMA = {"classes": [str], "scale": float, "split": str, "recipe": str}  # as SETS in raw.py
SET_NAME = re.compile(r"\w[\w-]*")  # of a data set: letters, digits, _ and -
SPLITS = ("tile", "image", "official", "official-sites", "official-all")  # see `split_tiles`


@dataclass
class Tiles:
    """A prepared set of n tiles."""

    images: torch.Tensor  # (n, 224, 224, 3) uint8
    masks: torch.Tensor   # (n, 224, 224) uint8, labels
    rows: list            # of n TileRow
    info: dict            # what is known about the set, as in SETS


def how_to_prepare(data):
    """The command that prepares a data set, as the end of an error's sentence."""
    if data == "monuseg-exact":
        return "run ./prepare_data.sh monuseg --raster exact"
    return (f"run ./prepare_data.sh {data}" if data in READERS else
            f"run `python data.py prepare {data} --from DIR`, DIR with folders images and masks")


def not_prepared(data, root):
    """The error of a set that is not there -> FileNotFoundError, which says how to prepare it."""
    return FileNotFoundError(f"{Path(root, data)}: {data} is not prepared: {how_to_prepare(data)}, "
                             "or give --data-root")


def read_info(data, root):
    """What is known about a data set -> dict as in SETS; for a set of your own, from its set.json.

    Raises FileNotFoundError or ValueError saying how to prepare the data.
    """
    if not SET_NAME.fullmatch(data):
        raise ValueError(f"{data!r} is not the name of a data set: give that of a folder in "
                         "--data-root, of letters, digits, _ and - alone")
    if data in SETS:
        return SETS[data]
    path = Path(root, data, "set.json")
    if not path.exists():
        raise not_prepared(data, root)
    info = read_json(path)
    if first_mismatch(info, INFO_SCHEMA) or not (
            0 < len(info["classes"]) <= len(PALETTE) and info["split"] in SPLITS
            and info["recipe"] in RECIPES):
        raise ValueError(f"{path}: damaged, or not written by this version: remove {path.parent} "
                         f"and {how_to_prepare(data)}")
    return info


def set_of(checkpoint, path):
    """What a checkpoint of train.py knows about the set that it was trained on, as in SETS.

    Raises ValueError if it knows nothing, or another number of classes.
    """
    info = checkpoint["set"]
    if first_mismatch(info, INFO_SCHEMA) or len(info["classes"]) != checkpoint["num_classes"]:
        raise ValueError(f"{path}: does not say what its {checkpoint['num_classes']} classes are: "
                         "it was not written by this version")
    return info


def load(data, root, num_classes=1):
    """Open a prepared data set -> Tiles, memory-mapped. "synthetic" is drawn on the spot.

    `num_classes` is for the synthetic set. Raises FileNotFoundError or ValueError saying how to
    prepare the data, OSError if an array cannot be opened.
    """
    if data == "synthetic":
        return synthetic_tiles(num_classes=num_classes)
    info = read_info(data, root)
    folder = Path(root, data)
    again = f"remove {folder} and {how_to_prepare(data)}"
    if not (folder / "tiles.csv").exists():
        raise not_prepared(data, root)
    try:
        with open(folder / "tiles.csv", newline="", encoding="utf-8") as file:
            lines = [*csv.DictReader(file)]
        rows = [TileRow(line["image"], int(line["row"]), int(line["column"]), line["official"],
                        int(line["top"]), int(line["left"])) for line in lines]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{folder / 'tiles.csv'}: damaged ({type(error).__name__}: {error}): "
                         f"{again}") from None
    arrays = []
    for name, shape in ARRAYS.items():
        path = folder / f"{name}.npy"
        try:  # copy-on-write, because torch wants an array that it could write to
            array = np.lib.format.open_memmap(path, "c")
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}): {again}") from None
        except OSError as error:  # the system's: the file itself may be sound
            raise OSError(f"{path}: cannot be opened ({error.strerror})") from None
        if array.shape != (len(rows), *shape) or array.dtype != np.uint8:
            raise ValueError(f"{path}: {array.dtype} {array.shape}, but tiles.csv has {len(rows)} "
                             f"tiles: {again}")
        arrays.append(array)
    labels, highest = max(2, len(info["classes"])), arrays[1].max(initial=0)
    if highest >= labels:
        raise ValueError(f"{folder / 'masks.npy'}: holds the label {highest}, but {data} has the "
                         f"labels 0 to {labels - 1}: {again}")
    return Tiles(*map(torch.from_numpy, arrays), rows, info)


def synthetic_tiles(n=100, num_classes=1):
    """Draw n tiles of the synthetic set, the same each time -> Tiles, as `load` returns them."""
    images, masks = map(torch.from_numpy, draw_tiles(n, num_classes))
    rows = [TileRow(f"synthetic-{i:03}", 0, 0, "train") for i in range(n)]
    names = {"classes": [*NAMES[:num_classes]]} if num_classes > 1 else {}
    return Tiles(images, masks, rows, SETS["synthetic"] | names)


# -----------------------------------------------------------------------------
# Splits (paper 2.3). They follow from hashes of names, so they are the same for every --seed, on
# every machine and with every version of every package.


def split_by_hash(rows, pool, fraction, unit):
    """Draw whole units from `pool` -> (drawn, rest), lists of indices.

    A unit is a tile, a source image, or a tissue source site, TCGA's code for an institution and a
    kind of cancer: images whose names share their first two parts, such as TCGA-B0.
    """
    name_of = {"tile": lambda row: str(row[:3]), "image": lambda row: row.image,
               "site": lambda row: "-".join(row.image.split("-")[:2])}[unit]
    names = {i: name_of(rows[i]) for i in pool}
    order = sorted(set(names.values()), key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set(order[:round(fraction * len(order))])
    return [i for i in pool if names[i] in chosen], [i for i in pool if names[i] not in chosen]


def split_tiles(data, rows, split):
    """Split a set -> {"train": indices, "val": indices, "test": indices}, tensors (paper 2.3).

    tile: as many as in the paper, which does not say what it drew. 70/20/10 % of all tiles at
        random, so that tiles of one image fall on both sides. BCSS keeps its training tiles; its
        test tiles have no masks, so 4,021 of its validation tiles are the test set, and the others
        validate. BCSS512 keeps its validation tiles; 600 of its training tiles are the test set.
    image: the same shares of whole images (in BCSS and BCSS512, of regions of interest).
    official: the parts that the set came in. If none of them is for validation, as in MoNuSeg, a
        fifth of the training images is.
    official-sites: as official, but validation images come from tissue source sites that are not
        trained on, as MoNuSeg's test images do.
    official-all: as official, but validation images are trained on, too, for a last run whose flags
        are settled.
    Raises ValueError for an unknown split, and if a part would be empty.
    """
    if split not in SPLITS:
        raise ValueError(f"no split is called {split!r}: there are {', '.join(SPLITS)}")
    everything = range(len(rows))
    official = {part: [i for i in everything if rows[i].official == part]
                for part in ("train", "val", "test")}
    if split.startswith("official"):
        train, val, test = official.values()
        if split == "official-sites":
            val, train = split_by_hash(rows, train + val, 1 / 5, "site")
        elif not val:
            val, train = split_by_hash(rows, train, 1 / 5, "image")
        if split == "official-all":
            train = train + val
    elif data == "bcss512":
        val = official["val"]
        test, train = split_by_hash(rows, official["train"], 600 / 6000, split)
    elif data == "bcss":
        if split == "tile":
            train, rest = official["train"], official["val"]
        else:
            train, rest = split_by_hash(rows, everything, 30760 / 36189, "image")  # tile's share
        test, val = split_by_hash(rows, rest, 4021 / 5429, split)
    else:
        train, rest = split_by_hash(rows, everything, 0.7, split)
        val, test = split_by_hash(rows, rest, 2 / 3, split)
    parts = {"train": train, "val": val, "test": test}
    for part, indices in parts.items():
        if not indices:
            raise ValueError(f"--split {split} leaves no tile of {data} for {part}: prepare images "
                             "for it, or take another split")
    return {part: torch.tensor(indices) for part, indices in parts.items()}


def fingerprint(rows, parts):
    """A short text that is the same for two splits only if their tiles have the same names.

    It knows nothing of pixels: monuseg and monuseg-exact have the same.
    """
    names = {part: [rows[i][:3] for i in indices] for part, indices in parts.items()}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


# -----------------------------------------------------------------------------
# Whole images: a pixel of one is looked up in the tile that holds it. Training with --windows takes
# random crops of them instead of the tiles, and eval.py --whole predicts them.


@dataclass
class WholeImage:
    """A source image as R rows of C tiles, which may overlap."""

    grid: torch.Tensor  # (R, C), indices of the tiles
    tops: list          # of the R rows, their first pixels
    lefts: list         # of the C columns

    @property
    def shape(self):
        """Height and width in pixels."""
        return self.tops[-1] + TILE, self.lefts[-1] + TILE


def whole_images(data, tiles, indices):
    """Put the tiles with these indices together -> {name of a source image: WholeImage}.

    Raises ValueError if they do not cover their images.
    """
    by_image, wholes = {}, {}
    for i in indices.tolist():
        by_image.setdefault(tiles.rows[i].image, []).append(i)
    for name, members in by_image.items():
        tile_at = {(tiles.rows[i].top, tiles.rows[i].left): i for i in members}
        tops, lefts = (sorted(set(starts)) for starts in zip(*tile_at.keys()))
        covered = all(starts[0] == 0 and max(np.diff(starts), default=0) <= TILE
                      for starts in (tops, lefts))
        if not covered or not len(members) == len(tile_at) == len(tops) * len(lefts):
            raise ValueError(f"{data}: the tiles of {name} do not make up a whole image: give "
                             "--windows 0, or leave out --whole")
        grid = torch.tensor([[tile_at[top, left] for left in lefts] for top in tops])
        wholes[name] = WholeImage(grid, tops, lefts)
    return wholes


def crop(tiles, whole, top, left, height, width):
    """Crop a whole image -> image (height, width, 3), mask (height, width), uint8.

    All in pixels; `top` and `left` may be negative. Beyond the border the image continues mirrored,
    as in `augment`.
    """
    def look_up(start, length, starts, size):  # -> row or column of tiles, pixel within that tile
        positions = torch.arange(start, start + length) % (2 * size)
        positions = torch.minimum(positions, 2 * size - 1 - positions)
        starts = torch.tensor(starts)
        which = torch.searchsorted(starts, positions, right=True) - 1
        return which, positions - starts[which]

    row, y = look_up(top, height, whole.tops, whole.shape[0])
    column, x = look_up(left, width, whole.lefts, whole.shape[1])
    index = tuple(to_device(part, tiles.images.device)
                  for part in (whole.grid[row[:, None], column], y[:, None], x))
    return tiles.images[index], tiles.masks[index]


# -----------------------------------------------------------------------------
# Batches


def seeded_generator(*key):
    """A torch.Generator seeded by a key such as (seed, epoch, step) and by nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    # 62 bits, so that torch still takes the seed with a rank added to it.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 2)


def read_tiles(tiles, indices):
    """Copy tiles out of the set -> [images (n, 224, 224, 3), masks (n, 224, 224)], uint8.

    Touches no device but the set's, so that a thread may do it ahead of time, even though MPS must
    be used from one thread only.
    """
    indices = to_device(indices, tiles.images.device)
    return [array.index_select(0, indices) for array in (tiles.images, tiles.masks)]


def read_windows(tiles, wholes, indices, positions, scale):
    """Cut windows out of the whole images of some tiles -> [images, masks], as `read_tiles` does.

    They are (n, side, side, 3) and (n, side, side), `side` being `window_side(scale)`: a window and
    the room around it that rotating and scaling need. positions (n, 2), 0..1: where windows lie,
    from the image's first pixel to the last at which a tile can start.
    """
    side, pieces = window_side(scale), []
    for index, position in zip(indices.tolist(), positions.tolist()):
        whole = wholes[tiles.rows[index].image]
        top, left = (round(share * (size - TILE)) - (side - TILE) // 2
                     for share, size in zip(position, whole.shape))
        pieces.append(crop(tiles, whole, top, left, side, side))
    return [torch.stack(arrays) for arrays in zip(*pieces)]


def window_side(scale):
    """Side in pixels of a square that holds a window turned by 45 degrees at its largest scale.

    It has room for most of the elastic shifts, too.
    """
    return 2 * math.ceil(TILE * math.exp(scale) / math.sqrt(2) + ELASTIC_STD)


def to_batch(arrays, device):
    """Stored tiles -> images (n, 3, H, W) float 0..1, masks (n, H, W) int64 on `device`."""
    images, masks = (to_device(array, device) for array in arrays)
    return images.permute(0, 3, 1, 2).float() / 255, masks.long()


def get_batch(tiles, indices, device):
    """Read tiles of the set -> images (n, 3, 224, 224) float 0..1, masks (n, 224, 224) int64."""
    return to_batch(read_tiles(tiles, indices), device)


def normalize(images):
    """Subtract ImageNet's mean and divide by its standard deviation: images (n, 3, H, W), 0..1."""
    mean, std = (to_device(torch.tensor(value), images.device).view(3, 1, 1)
                 for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def train_batches(tiles, indices, batch_size, seed, first_step, end_step, device, rank=0,
                  world_size=1, augmentations="all", wholes=None, windows=0.0, stain=0.0):
    """Yield the augmented batches of training steps first_step to end_step - 1, counted from 0.

    A batch is images (n, 3, 224, 224) float 0..1 and masks (n, 224, 224) int64 on `device`, n this
    process's share of the batch size. Every epoch has an order of its own, and leaves out the tiles
    of an incomplete batch. Chance depends on the seed and the step alone, so that resuming needs no
    generator's state; PyTorch's own generator is seeded, too, for what the network draws.
    `augmentations` is "all", "none", or names from AUGMENTATIONS, separated by spaces. With
    `windows` above 0, a tile stands for a window anywhere in its image, one of `wholes` (see
    `whole_images`), at a scale that varies by up to exp(+-windows). `stain` is how much stains
    vary. 0 leaves either out.
    """
    # "none" matches no augmentation's name, so that nothing is applied.
    names = AUGMENTATIONS if augmentations == "all" else augmentations.split()
    num_steps = len(indices) // batch_size  # in an epoch
    # From pinned memory CUDA copies without waiting.
    pin = torch.device(device).type == "cuda" and not tiles.images.is_cuda

    def fetch(step):
        epoch, batch_index = divmod(step, num_steps)
        order = torch.randperm(len(indices), generator=seeded_generator(seed, epoch + 1))
        start = batch_index * batch_size
        batch = indices[order[start:start + batch_size]][rank::world_size]
        if windows:
            rng = seeded_generator(seed, epoch + 1, batch_index, "windows")
            positions = torch.rand(batch_size, 2, generator=rng)[rank::world_size]
            arrays = read_windows(tiles, wholes, batch, positions, windows)
        else:
            arrays = read_tiles(tiles, batch)
        return [array.pin_memory() for array in arrays] if pin else arrays

    with ThreadPoolExecutor(1) as reader:
        next_batch = reader.submit(fetch, first_step)
        for step in range(first_step, end_step):
            images, masks = to_batch(next_batch.result(), device)
            if step + 1 < end_step:
                next_batch = reader.submit(fetch, step + 1)
            epoch, batch_index = divmod(step, num_steps)
            rng = seeded_generator(seed, epoch + 1, batch_index)
            draws = draw_augmentation(batch_size, rng, names, windows, stain)
            torch.manual_seed(rng.initial_seed() + rank)
            yield augment(images, masks, {name: values[rank::world_size]
                                          for name, values in draws.items()})


# -----------------------------------------------------------------------------
# Augmentation (paper 2.4), on the training device, a whole batch at a time

# The paper names six ("flip" is two of them) and gives no strengths, so all of them are ours.
CHANCE = 0.5          # of each augmentation, for each tile
ELASTIC_CELLS = 7     # elastic: random shifts on a grid of 7 x 7 cells of 32 pixels,
ELASTIC_STD = 8       # pixels, their standard deviation before smoothing
GRID_CELLS = 5        # grid distortion: rows and columns of 5 cells each grow or shrink
GRID_STRETCH = 0.3    # by up to 30 %, and are then fitted into the tile again
BRIGHTNESS = 0.2      # brightness changes by up to 20 %
STAIN_SHIFT = 0.2     # with --stain S, stains are also shifted, by up to S / 5 in optical density


def uniform(*shape, generator):
    """Random numbers from -1 to 1."""
    return 2 * torch.rand(*shape, generator=generator) - 1


def coin_flips(*shape, generator):
    """1 where an augmentation happens, else 0."""
    return (torch.rand(*shape, generator=generator) < CHANCE).float()


def draw_brightness(n, generator):
    """One factor a tile, (n, 1)."""
    strength = BRIGHTNESS * uniform(n, 1, generator=generator)
    return 1 + strength * coin_flips(n, 1, generator=generator)


def change_brightness(images, factors):
    """Multiply each tile by its factor, (n, 1): images (n, 3, H, W), 0..1, are overwritten."""
    return images.mul_(factors[..., None, None]).clamp_(0, 1)


def change_stain(images, changes):
    """Scale and shift each stain: hematoxylin, eosin and the residual (Ruifrok, 2001).

    images (n, 3, H, W), 0..1, are overwritten; changes (n, 2, 3): factors and shifts of the three,
    in optical density (with the natural logarithm; a shift of the residual, whose axis is a cross
    product, counts for 0.64 of it). Returns images of the same shape. Not in the paper.
    """
    stains = F.normalize(torch.tensor((HEMATOXYLIN, EOSIN)))
    stains = torch.cat((stains, torch.linalg.cross(*stains)[None]))         # (3, 3), one a row
    inverse, stains = (to_device(x, images.device) for x in (stains.inverse(), stains))
    factors, shifts = changes.unbind(1)
    mix = (inverse * factors[:, None]) @ stains                             # (n, 3, 3)
    density = -images.clamp_(min=1 / 255).log_()
    density = torch.einsum("nihw,nij->njhw", density, mix) + (shifts @ stains)[..., None, None]
    return density.neg_().exp_().clamp_(0, 1)


# All that moves pixels is one look-up, below. A change of colours is two functions: one draws its
# parameters, (n, generator) -> tensor on the CPU, the other applies them, (images (n, 3, H, W),
# 0..1, which it may overwrite, parameters) -> images. To add one, enter it in COLOURS.
WARPS = ("flip", "rotation", "grid", "elastic")
COLOURS = {"brightness": (draw_brightness, change_brightness)}
AUGMENTATIONS = (*WARPS, *COLOURS)  # what --augment chooses from


def draw_augmentation(n, generator, names=AUGMENTATIONS, windows=0.0, stain=0.0):
    """Draw the random parameters of n tiles: small tensors on the CPU, the same for any device.

    matrix (n, 2, 2): flips and rotation; columns, rows (n, 6): the grid's distorted lines, -1..1;
    elastic (n, 2, 10, 10): shifts at the grid's points, in units of half a tile; brightness
    (n, 1): factors. A warp that is not in `names` is drawn, too, but changes nothing, so that the
    draws of the others do not depend on it; those of zoom and stain depend on the colours. With
    `windows` above 0, also zoom (n,): a window's share of the piece that was cropped for it; with
    `stain` above 0, also stain (n, 2, 3): factors and shifts.
    """
    def happens(name, *shape):
        return coin_flips(*shape, generator=generator) * (name in names)

    flips = 1 - 2 * happens("flip", n, 2)
    angle = math.pi * uniform(n, generator=generator) * happens("rotation", n)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(n, 2, 2)
    stretch = uniform(n, 2, GRID_CELLS, generator=generator) * happens("grid", n, 1, 1)
    widths = 1 + GRID_STRETCH * stretch
    lines = F.pad(widths.cumsum(2) / widths.sum(2, keepdim=True), (1, 0)) * 2 - 1
    shifts = torch.randn(n, 2, ELASTIC_CELLS + 3, ELASTIC_CELLS + 3, generator=generator)
    elastic = shifts * happens("elastic", n, 1, 1, 1) * ELASTIC_STD / (TILE / 2)
    draws = {"matrix": rotation * flips[:, None], "columns": lines[:, 0], "rows": lines[:, 1],
             "elastic": elastic} | {name: draw(n, generator) for name, (draw, _) in COLOURS.items()
                                    if name in names}
    if windows:
        scale = (windows * uniform(n, generator=generator)).exp()
        draws["zoom"] = scale * TILE / window_side(windows)
    if stain:
        scaled, shifted = stain * uniform(2, n, 3, generator=generator)
        draws["stain"] = torch.stack((1 + scaled, STAIN_SHIFT * shifted), dim=1)
    return draws


def augment(images, masks, draws):
    """Flip, rotate, distort and brighten each tile its own way (paper 2.4).

    images (n, 3, H, W) float 0..1, masks (n, H, W) integer, draws from `draw_augmentation`; returns
    the same types and shapes. (Windows come in larger pieces and leave as 224 x 224.) Every output
    pixel looks up one place of the input: its position is bent along each axis (grid distortion),
    mirrored and turned, shifted (elastic), and scaled. Images are interpolated, masks take the
    nearest label, and beyond the border both continue mirrored.
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
# The command line


def preview(data, root, out, seed):
    """Write a sheet: eight tiles with their outlines, each above three augmented versions."""
    tiles = load(data, root)
    indices = torch.linspace(0, len(tiles.rows) - 1, min(8, len(tiles.rows))).long()
    images, masks = get_batch(tiles, indices, "cpu")
    rng = torch.Generator().manual_seed(seed)
    batches = [(images, masks)] + [augment(images, masks, draw_augmentation(len(images), rng))
                                   for _ in range(3)]
    rows = [((images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8), masks.numpy())
            for images, masks in batches]
    with write_atomic(out) as file:
        draw_preview(rows, tiles.info["classes"]).save(file)
    print(f"{out}: {len(indices)} tiles of {data}, each with three augmented versions below")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare data sets, look at augmented tiles.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="raw files -> memory-mapped tiles")
    command.add_argument("data", help="data set: monuseg, bcss, bcss512, or a name of your own")
    command.add_argument("--from", dest="folders", nargs="+", required=True, metavar="DIR",
                         help="folders of the raw files; for a set of your own, the one with "
                              "images and masks, or with these in train, val and test")
    command.add_argument("--later-images", action="store_true",
                         help="keep the seven MoNuSeg images that the paper did not have (one, "
                              "TCGA-FG-A87N, is of a site that the official split tests on)")
    command.add_argument("--raster", choices=("paper", "exact"),
                         help="of MoNuSeg's polygons: paper fills the pixels of the outline, too "
                              "(default); exact fills those whose centre is inside, and prepares "
                              "the set monuseg-exact")
    command.add_argument("--classes", nargs="+", metavar="NAME", help="for a set of your own, the "
                         "names of its labels 0, 1, ..., or of the one class (default: as the "
                         "masks say)")
    command.add_argument("--scale", type=number(float, maximum=100),
                         help="for a set of your own, resize images by this factor first "
                              "(default: 1)")
    command = commands.add_parser("preview", help="draw tiles before and after augmentation")
    command.add_argument("data", help="data set")
    command.add_argument("--out", type=output_picture, default="preview.png",
                         help="picture to write (default: preview.png)")
    command.add_argument("--seed", type=number(int, minimum=0, maximum=2**63 - 1), default=0,
                         help="of the augmentation (default: 0)")
    for command in commands.choices.values():
        command.add_argument("--data-root", default="data",
                             help="folder of the prepared data (default: data)")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        if args.data == "monuseg-exact":
            parser.error(f"to prepare {args.data}, {how_to_prepare(args.data)}")
        if (args.later_images or args.raster) and args.data != "monuseg":
            parser.error("--later-images and --raster are MoNuSeg's")
        if (args.classes or args.scale) and args.data in SETS:
            parser.error("--classes and --scale are for sets of your own: those of "
                         f"{args.data} are fixed")
        if args.data == "synthetic" or not SET_NAME.fullmatch(args.data):
            parser.error(f"{args.data!r} cannot name a set of your own: use letters, digits, _ "
                         "and -, and none of our names")
        if args.classes and not len(set(args.classes)) == len(args.classes) <= len(PALETTE):
            parser.error(f"--classes: give at most {len(PALETTE)} different names")
    return args


def main(args):
    if args.command == "preview":
        preview(args.data, args.data_root, args.out, args.seed)
        return
    options = {name: getattr(args, name) for name in ("later_images", "classes", "scale")
               if getattr(args, name)}
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
