"""data.py prepare monuseg --raster exact: nuclei as the pixels whose centre is in a polygon."""

import re
from functools import cache

import numpy as np
import pytest
from conftest import refused
from PIL import Image, ImageDraw
from test_data import LATER, ROWS, content, write_raw, xml

import data
from raw import MONUSEG_TEST, fill_by_centres, read_polygons, resize_thinner

EXACT = "run ./prepare_data.sh monuseg --raster exact"


def draw(folder, *polygons, raster="exact", size=(8, 6)):
    (folder / "a.xml").write_text(xml(*polygons))
    return np.asarray(read_polygons(folder / "a.xml", size, raster))


def winding(vertices, x, y):
    """How often a polygon winds around a point, from the side of each edge that it lies on."""
    turns = 0
    for (x0, y0), (x1, y1) in zip(vertices, [*vertices[1:], vertices[0]]):
        side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
        turns += (y0 <= y < y1 and side <= 0) - (y1 <= y < y0 and side >= 0)
    return turns


def prepare(root, *flags):
    data.main(data.parse_args(["prepare", "monuseg", "--from", str(root / "raw"),
                               "--data-root", str(root), *flags]))


@pytest.mark.parametrize("polygons, picture", [
    pytest.param([[(1, 1), (4, 1), (4, 3), (1, 3)]],
                 "........ .###.... .###.... ........ ........ ........", id="3 x 2 is 6 pixels"),
    pytest.param([[(1.4, 0.6), (3.6, 0.6), (3.6, 2.5), (1.4, 2.5)]],
                 "........ .###.... ........ ........ ........ ........", id="fractions"),
    pytest.param([[(0.5, 0.5), (2.5, 0.5), (2.5, 2.5), (0.5, 2.5)]],
                 "##...... ##...... ........ ........ ........ ........", id="left and top are in"),
    pytest.param([[(0, 0), (3, 0), (3, 3), (0, 3)], [(5, 4), (5, 2), (2, 2), (2, 4)]],
                 "###..... ###..... #####... ..###... ........ ........", id="overlap is a union"),
    pytest.param([[(0, 0), (5, 0), (5, 5), (0, 5), (0, 0), (3, 0), (3, 3), (0, 3)]],
                 "#####... #####... #####... #####... #####... ........", id="twice is no hole"),
    pytest.param([[(5, -3), (9, -3), (9, 2), (5, 2)], [(-1, 4), (1, 4), (1, 9), (-1, 9)]],
                 ".....### .....### ........ ........ #....... #.......", id="clipped at borders"),
    pytest.param([[(1, 2), (5, 2), (7, 2)], [(-2, 1), (0, 1), (0, 3)], [(2, 0), (6, 0), (4, -2)]],
                 "........ ........ ........ ........ ........ ........", id="flat and touching"),
])
def test_pixels_whose_centre_is_inside_are_filled(tmp_path, polygons, picture):
    mask = draw(tmp_path, *polygons)
    assert ["".join(".#"[value] for value in line) for line in mask] == picture.split()


@pytest.mark.parametrize("seed", range(20))
def test_any_polygon_matches_its_winding_numbers(tmp_path, seed):
    rng = np.random.default_rng(seed)  # even seeds on halves, where centres lie on outlines
    polygon = (rng.integers(-6, 40, (3 + seed % 5, 2)) / (2 if seed % 2 == 0 else 1.97)).tolist()
    expected = [[winding(polygon, x + 0.5, y + 0.5) != 0 for x in range(17)] for y in range(16)]
    assert np.any(expected) and (draw(tmp_path, polygon, size=(17, 16)) == expected).all()


def test_an_exact_mask_is_centred_on_its_polygon_and_pillows_is_not(tmp_path):
    centres = {}
    for raster in "exact", "paper":
        mask = draw(tmp_path, [(3, 2), (13, 2), (13, 10), (3, 10)], raster=raster, size=(20, 20))
        centres[raster] = [float(places.mean()) + 0.5 for places in mask.nonzero()]
    assert centres == {"exact": [6, 8], "paper": [6.5, 8.5]}


def test_two_points_and_polygons_outside_are_treated_alike(tmp_path, capsys):
    assert draw(tmp_path, [(1, 1), (3, 3)], [(2, 2), (4, 2), (4, 4)]).sum() == 3
    assert re.search(r"a\.xml.*region 1\b", capsys.readouterr().out)
    with pytest.raises(ValueError, match="region 1 lies outside"):
        draw(tmp_path, [(8, 1), (9, 1), (9, 4)])


# -----------------------------------------------------------------------------
# Real annotations


@cache
def rasters(path):
    """A real annotation -> its masks, {raster: image}."""
    return {raster: read_polygons(path, (1000, 1000), raster) for raster in ("exact", "paper")}


@pytest.mark.parametrize("part", ["train", "test"])
def test_real_masks_are_smaller_than_the_papers_by_their_outlines(shared, part):
    paths = [path for path in sorted((shared / "monuseg").rglob("*.xml"))
             if (path.stem in MONUSEG_TEST) == (part == "test")][::4]
    exact, paper = (np.stack([rasters(path)[raster] for path in paths])
                    for raster in ("exact", "paper"))
    both = (exact & paper).sum()
    assert 0.93 < 2 * both / (exact.sum() + paper.sum()) < 0.96
    assert 0.07 < 1 - exact.sum() / paper.sum() < 0.12


def test_real_polygons_match_their_winding_numbers(shared):
    path = sorted((shared / "monuseg/MoNuSegTestData").glob("*.xml"))[0]
    regions = re.findall(r"<Region .*?</Region>", path.read_text(), re.DOTALL)[::60]
    assert len(regions) > 5
    for text in regions:
        polygon = [(float(x), float(y)) for x, y in re.findall(r'X="(.+?)" Y="(.+?)"', text)]
        mask = Image.new("L", (1000, 1000))
        fill_by_centres(mask, np.array(polygon))
        left, top, right, bottom = mask.getbbox()
        expected = [[winding(polygon, x + 0.5, y + 0.5) != 0 for x in range(left - 2, right + 2)]
                    for y in range(top - 2, bottom + 2)]
        assert (np.asarray(mask.crop((left - 2, top - 2, right + 2, bottom + 2))) == expected).all()


# -----------------------------------------------------------------------------
# The set


def test_both_rasters_stand_side_by_side_and_differ_in_the_masks_alone(tmp_path):
    write_raw(tmp_path / "raw", "a", MONUSEG_TEST[0])
    prepare(tmp_path, "--raster", "paper")
    paper = content(tmp_path / "monuseg")
    prepare(tmp_path, "--raster", "exact")
    exact = content(tmp_path / "monuseg-exact")
    assert content(tmp_path / "monuseg") == paper and exact.keys() == paper.keys()
    assert {name for name in exact if exact[name] != paper[name]} == {"masks.npy"}
    masks = [data.load(name, tmp_path).masks for name in ("monuseg-exact", "monuseg")]
    assert 0.98 < masks[0].sum() / masks[1].sum() < 1 and (masks[0] <= masks[1]).all()


def test_an_interrupted_preparation_is_not_continued_in_the_other_raster(tmp_path):
    raw = write_raw(tmp_path / "raw", *(f"{i:02}" for i in range(17)))  # 16 at a time
    whole = (raw / "16.xml").read_text()
    (raw / "16.xml").write_text("")
    for raster in "paper", "exact":
        with pytest.raises(ValueError, match="16.xml"):
            prepare(tmp_path, "--raster", raster)
    (raw / "16.xml").write_text(whole)
    for raster in "exact", "paper":
        prepare(tmp_path, "--raster", raster)
    exact, paper = (data.load(name, tmp_path).masks.view(17, -1).sum(1)
                    for name in ("monuseg-exact", "monuseg"))
    assert (exact < paper).all()


def test_the_split_is_that_of_the_papers_raster():
    rows = [row._replace(image=row.image.replace("made-up-", ""))  # sites of their own
            for row in ROWS]
    for split in data.SPLITS:
        prints = {data.fingerprint(rows, data.split_tiles(name, rows, split))
                  for name in ("monuseg-exact", "monuseg")}
        assert len(prints) == 1


def test_mask_pictures_are_made_thinner_and_counted_in_one_line(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", "a", "b", "c")
    for name in "ab":
        (raw / f"{name}.xml").unlink()
        Image.fromarray(np.eye(1000, dtype=np.uint8)).save(raw / f"{name}.png")
    prepare(tmp_path, "--raster", "exact")
    said = capsys.readouterr().out
    assert said.count("mask picture") == said.count("2 images have only a mask picture") == 1
    prepare(tmp_path)
    assert "mask picture" not in capsys.readouterr().out
    exact, paper = (data.load(name, tmp_path).masks for name in ("monuseg-exact", "monuseg"))
    assert paper[:32].sum() == 2 * 896 and exact[:32].sum() == 0  # a line has nothing inside
    assert not (exact[32:] == paper[32:]).all()


def test_thinner_masks_are_nearly_the_exact_ones():
    # MoNuSeg's outlines have a median of 177 vertices; what Pillow adds depends on how many.
    rng, angles = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 177, endpoint=False)
    circle = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    exact, paper = Image.new("L", (1000, 1000)), Image.new("L", (1000, 1000))
    for middle in np.stack(np.meshgrid(range(40, 980, 40), range(40, 980, 40)), -1).reshape(-1, 2):
        nucleus = middle + rng.random(2) + rng.uniform(6, 14) * circle
        fill_by_centres(exact, nucleus)
        ImageDraw.Draw(paper).polygon([*map(tuple, nucleus)], fill=1, outline=1)
    exact, nearest = (np.asarray(mask.resize((896, 896), Image.Resampling.NEAREST))
                      for mask in (exact, paper))
    thinner = resize_thinner(np.asarray(paper), 896)
    assert nearest.sum() > 1.06 * exact.sum() and abs(thinner.sum() / exact.sum() - 1) < 0.01
    assert (thinner != exact).sum() < 0.7 * (nearest != exact).sum()


def test_thinner_real_masks_are_nearly_the_exact_ones(shared):
    paths = sorted((shared / "monuseg/MoNuSeg 2018 Training Data").rglob("*.xml"))[::4]
    exact, nearest = (np.stack([rasters(path)[raster].resize((896, 896), Image.Resampling.NEAREST)
                                for path in paths]) for raster in ("exact", "paper"))
    thinner = np.stack([resize_thinner(np.asarray(rasters(path)["paper"]), 896) for path in paths])
    assert nearest.sum() > 1.08 * exact.sum() and abs(thinner.sum() / exact.sum() - 1) < 0.02
    assert (thinner != exact).sum() < 0.85 * (nearest != exact).sum()


def test_later_images_may_be_kept(tmp_path):
    write_raw(tmp_path / "raw", "a", LATER)
    prepare(tmp_path, "--raster", "exact", "--later-images")
    assert {row.image for row in data.load("monuseg-exact", tmp_path).rows} == {"a", LATER}


@pytest.mark.parametrize("command, said", [
    ("prepare monuseg-exact --from x", EXACT), ("preview monuseg-exact --data-root none", EXACT),
    ("prepare monuseg-exact --raster exact --from x", EXACT),
    ("prepare bcss --raster exact --from x", "--raster are MoNuSeg's"),
    ("prepare lung --raster paper --from x", "--raster are MoNuSeg's"),
    ("prepare monuseg --raster fine --from x", "--raster: invalid choice: 'fine'")])
def test_impossible_commands_are_refused_in_one_line(capsys, command, said):
    assert said in refused(capsys, data, *command.split())
