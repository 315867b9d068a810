"""Synthetic tissue, drawn in a moment: the data set on which every first run learns.

With one class, nuclei, tiles look like H&E-stained tissue in which colour alone does not tell what
is a nucleus. With 3 to 22 classes there are regions, each with its own texture and mixture of
nuclei, and only their surroundings tell some nuclei apart. Every number of classes from 3 on has
the very same images. The classes form a tree: each is split off from an earlier one, and with K
classes the labels K and above are merged into those that they were split off from, so that K
changes only the labels.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from raw import TILE

HEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)  # absorption of R, G, B (Ruifrok 2001)


def draw_tiles(n, num_classes=1):
    """Draw n tiles, the same each time -> images (n, 224, 224, 3), masks (n, 224, 224), uint8."""
    draw, key = (nuclei_tile, 2025) if num_classes == 1 else (tissue_tile, 2026)
    tiles = (draw(np.random.default_rng([key, number])) for number in range(n))
    images, masks = map(np.stack, zip(*tiles))
    return images, masks if num_classes == 1 else merge(masks, num_classes)


def photograph(rng, density, blur):
    """Light through the stains, a soft focus, noise of the camera -> image (224, 224, 3) uint8.

    density (224, 224, 3) is optical density; `blur` is the largest radius of the Gaussian blur, in
    pixels.
    """
    image = Image.fromarray((255 * np.exp(-density)).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, blur)))
    image = np.asarray(image, np.float32) + rng.normal(0, 4, density.shape)
    return image.clip(0, 255).astype(np.uint8)


# -----------------------------------------------------------------------------
# One class. Stain strength varies between and within tiles, and blue haze is no nucleus.


def smooth(rng, rows, columns=None):
    """Noise, about 0..1: random values on a coarse grid, enlarged -> (224, 224)."""
    coarse = Image.fromarray(rng.random((rows, columns or rows), dtype=np.float32))
    return np.asarray(coarse.resize((TILE, TILE), Image.Resampling.BICUBIC))


def blobs(rng, number, radii, densities, clustered=0.0):
    """Draw bumpy ellipses, each filled with 100 x its density -> mode L image.

    `clustered` is the chance that one touches an earlier one.
    """
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


def nuclei_tile(rng):
    """One tile -> image (224, 224, 3) and nucleus mask (224, 224), uint8."""
    # Densities of the two stains: pink stroma with fibres, bluish haze.
    fibres = Image.fromarray(smooth(rng, 70, 6))
    fibres = fibres.rotate(rng.uniform(0, 180), Image.Resampling.BILINEAR)
    fibres = fibres.crop((33, 33, 191, 191)).resize((TILE, TILE))  # without the rotated corners
    eosin = 0.15 + 0.35 * smooth(rng, 7) + 0.35 * np.asarray(fibres) + 0.1 * smooth(rng, 80)
    haze = rng.uniform(0.3, 1.0) * (1.6 * smooth(rng, 6) - 0.7).clip(0, 1)
    hematoxylin = 0.08 + haze + 0.1 * smooth(rng, 50)

    # Distractors: pale vacuoles, red cells, blurred smudges of the nuclei's own blue.
    hole = 1 - np.asarray(blobs(rng, rng.integers(2, 8), (6, 16), (0.8, 0.9))) / 100
    red = np.asarray(blobs(rng, rng.integers(3, 12), (5, 8), (0.4, 1.0))) / 100
    smudge = blobs(rng, 6, (8, 18), (0.5, 1.5)).filter(ImageFilter.GaussianBlur(6))
    eosin = eosin * hole + red
    hematoxylin = hematoxylin * hole + np.asarray(smudge) / 100

    # Nuclei of varied size and stain, granular; about half of them touch or overlap another.
    nuclei = np.asarray(blobs(rng, rng.integers(30, 60), (5, 12), (0.35, 1.1), clustered=0.5)) / 100
    mask = nuclei > 0
    chromatin = 0.6 + 0.8 * smooth(rng, 75)
    hematoxylin = np.where(mask, nuclei * chromatin + 0.3 * hematoxylin, hematoxylin)

    density = (rng.uniform(0.7, 1.3) * hematoxylin[..., None] * HEMATOXYLIN
               + rng.uniform(0.7, 1.3) * eosin[..., None] * EOSIN)
    return photograph(rng, density, 1.3), mask.astype(np.uint8)


# -----------------------------------------------------------------------------
# Several classes

# What a class is called, the class that it is split off from, the region in which it lies, the kind
# of its nuclei (None: the ground between nuclei), and its relative frequency among the region's
# nuclei. Where kinds are alike, the region alone decides: small round nuclei are five classes,
# large pale ones three.
LABELS = [
    ("background", 0, "stroma", None, 0),
    ("tumour", 0, "tumour", None, 0),
    ("nucleus", 0, "stroma", "spindle", 6),
    ("tumour_nucleus", 1, "tumour", "pale", 5),
    ("epithelium", 0, "epithelium", None, 0),
    ("lymphoid_tissue", 0, "lymphoid", None, 0),
    ("necrosis", 0, "necrosis", None, 0),
    ("fat", 0, "fat", None, 0),
    ("blood", 0, "blood", None, 0),
    ("lymphocyte", 2, "lymphoid", "round", 6),
    ("epithelial_nucleus", 2, "epithelium", "pale", 5),
    ("pyknotic_nucleus", 2, "necrosis", "round", 6),
    ("tumour_lymphocyte", 3, "tumour", "round", 3),
    ("mitosis", 3, "tumour", "mitotic", 2),
    ("granular_tumour_nucleus", 3, "tumour", "granular", 3),
    ("stromal_lymphocyte", 9, "stroma", "round", 4),
    ("plasma_cell", 9, "lymphoid", "granular", 2),
    ("centroblast", 9, "lymphoid", "pale", 2),
    ("secretory_nucleus", 10, "epithelium", "granular", 3),
    ("epithelial_lymphocyte", 10, "epithelium", "round", 3),
    ("ghost_nucleus", 11, "necrosis", "ring", 4),
    ("fat_cell_nucleus", 2, "fat", "spindle", 1),
]
NAMES, PARENT, _, KIND, _ = zip(*LABELS)
NUCLEUS = np.array([kind is not None for kind in KIND], np.uint8)

# A nucleus: smallest and largest radius (pixels), width over length, bumpiness, how granular its
# chromatin is, and its layers from the rim inwards, each a part of the radius and a density.
KINDS = {
    "round": ((4.0, 5.5), 0.90, 0.06, 0.8, ((1.0, 0.95),)),
    "pale": ((7.5, 10.5), 0.75, 0.10, 0.8, ((1.0, 0.75), (0.82, 0.45), (0.27, 0.95))),
    "spindle": ((9.0, 13.0), 0.28, 0.08, 0.8, ((1.0, 0.75),)),
    "granular": ((6.0, 8.0), 0.85, 0.06, 2.2, ((1.0, 0.70),)),
    "ring": ((6.5, 9.0), 0.85, 0.08, 0.4, ((1.0, 0.70), (0.65, 0.15))),
    "mitotic": ((6.5, 8.5), 0.50, 0.35, 0.8, ((1.0, 1.15),)),
}

# A region: a bonus that enlarges it, densities of hematoxylin and of eosin, the share of places
# that hold a nucleus, and the weight in its ground of each texture: fibres, coarse and fine noise,
# and cells of three sizes. (A negative weight inverts a texture.)
REGIONS = {
    "stroma": (0.20, 0.12, 0.50, 0.38, (0.60, 0.00, 0.15, 0.00, 0.00, 0.00)),
    "tumour": (0.20, 0.28, 0.42, 0.55, (0.00, 1.10, 0.50, 0.00, 0.00, 0.00)),
    "epithelium": (0.03, 0.20, 0.43, 0.50, (0.00, 0.00, 0.10, 0.00, -1.10, 0.00)),
    "lymphoid": (0.03, 0.26, 0.34, 0.85, (0.15, 0.00, 0.15, 0.00, 0.00, 0.00)),
    "necrosis": (-0.02, 0.12, 0.58, 0.45, (0.00, 0.20, 0.90, 0.00, 0.00, 0.00)),
    "fat": (-0.05, 0.04, 0.12, 0.25, (0.00, 0.00, 0.05, 0.00, 0.00, 2.20)),
    "blood": (-0.07, 0.08, 0.60, 0.00, (0.00, 0.00, 0.10, -1.50, 0.00, 0.00)),
}
SPACING = 14  # pixels between the places of two nuclei

# Of each region, in the order above: the label of its ground, the share of places that hold a
# nucleus, and its labels' cumulative frequencies among these (blood has none, hence the clip).
GROUND = np.array([label for label, kind in enumerate(KIND) if kind is None], np.uint8)
OCCUPANCY = [row[3] for row in REGIONS.values()]
SHARES = np.array([[row[4] * (row[2] == region) for row in LABELS] for region in REGIONS])
CUMULATIVE = SHARES.cumsum(axis=1) / SHARES.sum(axis=1, keepdims=True).clip(min=1)


def noise(rng, size):
    """Smooth noise, about 0..1: random values `size` pixels apart, enlarged -> (224, 224)."""
    reach = TILE / size
    coarse = Image.fromarray(rng.random((int(reach) + 4, int(reach) + 4), dtype=np.float32))
    left, top = rng.uniform(1, 2, 2)  # away from the border, where there is nothing to blend with
    box = left, top, left + reach, top + reach
    return np.asarray(coarse.resize((TILE, TILE), Image.Resampling.BICUBIC, box))


def cells(rng, size):
    """Distance to the nearest of random points, one per square of `size` pixels -> (224, 224).

    In units of `size`, about -0.4..0.6: low inside a cell, high at the border of two.
    """
    pixels = np.arange(0, TILE, 2)  # every second will do
    square = pixels // size + 1     # the first row and column of squares lie outside
    side = square[-1] + 2
    ys, xs = (np.mgrid[-1:side - 1, -1:side - 1] + 0.9 * rng.random((2, side, side))) * size
    squared = [(ys[square[:, None] + i, square + j] - pixels[:, None])**2
               + (xs[square[:, None] + i, square + j] - pixels)**2
               for i in (-1, 0, 1) for j in (-1, 0, 1)]
    distance = Image.fromarray((np.sqrt(np.min(squared, axis=0)) / size).astype(np.float32))
    return np.asarray(distance.resize((TILE, TILE), Image.Resampling.BILINEAR)) - 0.4


def draw_ground(rng, region, grain):
    """Ground of the regions -> densities of hematoxylin and of eosin, direction of the fibres.

    region (224, 224): indices into REGIONS; each result is (224, 224), the last one in radians.
    `grain` as in `tissue_tile`.
    """
    # Fibres: random values along one direction, bent by smooth noise. A fibre runs where `across`
    # stays the same, perpendicular to its gradient.
    angle, (ys, xs) = rng.uniform(0, 2 * np.pi), np.mgrid[:TILE, :TILE]
    across = xs * np.cos(angle) + ys * np.sin(angle) + 90 * noise(rng, 90) + 12 * noise(rng, 24)
    fibres = np.interp(across / 4, np.arange(-100, 200), rng.random(300)) - 0.5
    down, right = np.gradient(across)

    # Each region shows its own mixture of textures, which fades in places.
    _, blue, pink, _, weights = (np.array(column)[region] for column in zip(*REGIONS.values()))
    textures = [fibres, noise(rng, 9) - 0.5, noise(rng, 2.5) - 0.5,
                cells(rng, 8), cells(rng, 15), cells(rng, 26)]
    texture = (weights * np.stack(textures, axis=2)).sum(axis=2) * (0.6 + 0.8 * noise(rng, grain))
    eosin = pink + texture + 0.25 * (noise(rng, 30) - 0.5)
    hematoxylin = blue + 0.3 * texture + 0.1 * (noise(rng, 4) - 0.5)

    # Distractors in the nuclei's own blue: haze and blurred smudges.
    smudges = Image.new("L", (TILE, TILE))
    for x, y, radius in rng.uniform((0, 0, 4), (TILE, TILE, 13), (10, 3)):
        box = x - radius, y - radius, x + radius, y + radius
        ImageDraw.Draw(smudges).ellipse(box, fill=int(rng.uniform(50, 150)))
    haze = rng.uniform(0.3, 0.8) * (1.6 * noise(rng, 36) - 0.7).clip(0, 1)
    smudges = np.asarray(smudges.filter(ImageFilter.GaussianBlur(4))) / 100
    return hematoxylin + haze + smudges, eosin, np.arctan2(right, -down)


def draw_nuclei(rng, region, direction):
    """Nuclei on the regions (224, 224) -> labels (224, 224) uint8, densities of hematoxylin.

    They stand on a jittered grid, the long ones along the direction of the fibres. The kind of each
    is drawn from those of the region of its centre. Each is drawn as polygons: one of its label,
    one for each layer of its density.
    """
    labels, density = Image.fromarray(GROUND[region]), Image.new("L", (TILE, TILE))
    t = np.linspace(0, 2 * np.pi, 20)
    places = np.mgrid[0:TILE:SPACING, 0:TILE:SPACING].reshape(2, -1).T
    for y, x in places + rng.uniform(0, SPACING, places.shape):
        place = region[int(y), int(x)]
        if rng.random() >= OCCUPANCY[place]:
            continue
        label = int((CUMULATIVE[place] < rng.random()).sum())
        radii, width, bumps, _, layers = KINDS[KIND[label]]
        bumpy = rng.uniform(*radii) * (1 + bumps * np.cos(3 * t + rng.uniform(0, 6)))
        tilt = direction[int(y), int(x)] + rng.normal(0, 0.3)
        outline = np.exp(1j * tilt) * bumpy * (np.cos(t) + 1j * width * np.sin(t))  # x + iy
        stain = rng.uniform(55, 125)
        for scale, value in layers:
            points = np.stack((x + scale * outline.real, y + scale * outline.imag), axis=1)
            points = points.ravel().tolist()
            ImageDraw.Draw(density).polygon(points, fill=int(stain * value))
            if scale == 1:
                ImageDraw.Draw(labels).polygon(points, fill=label)
    labels = np.asarray(labels)
    granular = np.array([KINDS[kind][3] if kind else 0 for kind in KIND])[labels]
    return labels, np.asarray(density) / 100 * (1 + granular * (noise(rng, 2.5) - 0.5))


def tissue_tile(rng, grain=40.0):
    """One tile -> image (224, 224, 3) and labels (224, 224) of all 22 classes, uint8.

    `grain` is the size of the regions in pixels: how far one must look to tell apart nuclei that
    look alike.
    """
    # Regions: a pixel belongs to the one whose smooth noise, plus its bonus, is the largest.
    region = np.argmax([noise(rng, grain) + row[0] for row in REGIONS.values()], axis=0)
    hematoxylin, eosin, direction = draw_ground(rng, region, grain)
    labels, nuclei = draw_nuclei(rng, region, direction)
    hematoxylin = np.where(NUCLEUS[labels], nuclei + 0.4 * hematoxylin, hematoxylin)

    density = np.zeros((TILE, TILE, 3))
    for amount, colour in (hematoxylin, HEMATOXYLIN), (eosin, EOSIN):
        strength = rng.uniform(0.7, 1.3) * (0.8 + 0.4 * noise(rng, 70))  # uneven
        density += (strength * amount).clip(0)[..., None] * colour
    return photograph(rng, density, 1.0), labels


def merge(labels, num_classes):
    """Labels (...) uint8 of all 22 classes -> of the first `num_classes`, or nuclei for 1."""
    if num_classes == 1:
        return NUCLEUS[labels]
    table = np.arange(len(NAMES), dtype=np.uint8)
    for label in range(num_classes, len(NAMES)):  # a class comes after its parent
        table[label] = table[PARENT[label]]
    return table[labels]
