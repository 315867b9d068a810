"""data.py with BCSS and BCSS512: layouts, labels, splits, streaming, and the way to a score."""

import itertools
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from conftest import ROOT

SIZE = {"bcss": 224, "bcss512": 512}


def write_tile(folder, part, suffix, name, size, label=1, seed=0):
    """One image and its mask, of two labels side by side, in the archive's layout."""
    rng = np.random.default_rng(seed)
    mask = np.full((size, size), label, np.uint8)
    mask[:, :size // 2] = 0
    for kind, array in ("", rng.integers(0, 255, (size, size, 3), np.uint8)), ("_mask", mask):
        place = folder / f"{part}{kind}{suffix}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(place / f"{name}.png", compress_level=0)
    return folder / f"{part}_mask{suffix}" / f"{name}.png"


def tile_name(region, number, size):
    return f"TCGA-A1-A0S{region}-DX1_xmin4{region}_ymin250_MPP-0_{448 + 112 * number}_0_size{size}"


def write_set(folder, name, regions=3, per_region=4):
    """A small data set in the archive's layout: the last region validates, the others train."""
    size, suffix = SIZE[name], "_512" if name == "bcss512" else ""
    for region, number in itertools.product(range(regions), range(per_region)):
        part = "val" if region == regions - 1 else "train"
        write_tile(folder, part, suffix, tile_name(region, number, size), size,
                   label=1 + (region + number) % 2, seed=10 * region + number)
    return folder


def prepare(name, source, root):
    data.main(data.parse_args(["prepare", name, "--from", str(source), "--data-root", str(root)]))
    return data.load(name, root)


@pytest.mark.parametrize("name", SIZE)
def test_archive_becomes_tiles_with_their_labels(name, tmp_path):
    source = write_set(tmp_path / "raw" / "extra level", name)
    (source / "test").mkdir()  # the official test tiles come without masks
    Image.new("RGB", (224, 224)).save(source / "test" / "nobody-knows.png")
    images, masks, rows = prepare(name, tmp_path / "raw", tmp_path)
    assert images.shape == (12, 224, 224, 3) and masks.shape == (12, 224, 224)
    assert [row[3] for row in rows] == ["train"] * 8 + ["val"] * 4
    assert rows[1] == ("TCGA-A1-A0S0-DX1_xmin40_ymin250_MPP-0", 560, 0, "train")
    assert masks[:, :, :112].max() == 0  # nearest: labels do not mix at their border
    assert masks[:, 0, 112].tolist() == [1, 2, 1, 2, 2, 1, 2, 1, 1, 2, 1, 2]
    suffix = "_512" if name == "bcss512" else ""
    with Image.open(source / f"train{suffix}" / (tile_name(0, 1, SIZE[name]) + ".png")) as image:
        expected = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))
    assert np.array_equal(images[1], expected)


def test_both_sets_prepare_from_one_folder(tmp_path):
    write_set(tmp_path / "raw" / "BCSS", "bcss")
    write_set(tmp_path / "raw" / "BCSS_512" / "BCSS_512", "bcss512", regions=2)
    assert len(prepare("bcss", tmp_path / "raw", tmp_path)[0]) == 12
    assert len(prepare("bcss512", tmp_path / "raw", tmp_path)[0]) == 8


def test_real_tiles_prepare_and_train(shared, tmp_path):
    _, masks, rows = prepare("bcss", shared / "bcss", tmp_path)
    assert [row[3] for row in rows] == ["train", "train", "val", "val"]
    assert set(masks.unique().tolist()) <= {0, 1, 2}
    score = train.main(train.parse_args([
        "--data", "bcss", "--width", "2", "--epochs", "1", "--batch-size", "2", "--data-root",
        str(tmp_path), "--out", str(tmp_path / "run")]))
    assert 0 <= score <= 1


# -----------------------------------------------------------------------------
# Splits


def rows_of(counts, per_region=40):
    """Rows as the real sets have them in number: {part: number of tiles}."""
    return [(f"region-{part if exclusive else ''}{i // per_region}", i, 0, part)
            for part, (number, exclusive) in counts.items() for i in range(number)]


@pytest.mark.parametrize("name, counts, sizes", [
    ("bcss", {"train": (30760, False), "val": (5429, False)}, [30760, 1408, 4021]),
    ("bcss512", {"train": (6000, True), "val": (2768, True)}, [5400, 2768, 600])])
def test_split_sizes_are_the_papers(name, counts, sizes):
    rows = rows_of(counts)
    parts = data.split_tiles(name, rows, "tile")
    assert [len(parts[part]) for part in ("train", "val", "test")] == sizes
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(rows)))
    officially = {part: {rows[i][3] for i in indices} for part, indices in parts.items()}
    assert officially == ({"train": {"train"}, "val": {"val"}, "test": {"val"}} if name == "bcss"
                          else {"train": {"train"}, "val": {"val"}, "test": {"train"}})


@pytest.mark.parametrize("name", SIZE)
def test_image_split_shares_no_region(name):
    rows = rows_of({"train": (6000, True), "val": (2768, True)} if name == "bcss512" else
                   {"train": (3076, False), "val": (543, False)})
    parts = data.split_tiles(name, rows, "image")
    regions = [{rows[i][0] for i in parts[part]} for part in ("train", "val", "test")]
    assert not (regions[0] & regions[2] or regions[0] & regions[1] or regions[1] & regions[2])
    assert abs(len(parts["test"]) / len(rows) - {"bcss": 4021 / 36189, "bcss512": 600 / 8768}[
        name]) < 0.02


def test_a_split_without_test_tiles_is_refused():
    with pytest.raises(ValueError, match="--split official leaves no tile of bcss"):
        data.split_tiles("bcss", rows_of({"train": (50, False), "val": (9, False)}), "official")


# -----------------------------------------------------------------------------
# Bad input: one line that names the file


@pytest.mark.parametrize("array, complaint", [
    (np.full((224, 224), 3, np.uint8), "holds the label 3, but the 3 classes are 0 to 2"),
    (np.full((224, 224), 255, np.uint8), "holds the label 255"),
    (np.zeros((224, 224, 3), np.uint8), "Pillow mode RGB, not L or P"),
    (np.zeros((200, 224), np.uint8), "224 x 200 pixels, but .* has 224 x 224")])
def test_unusable_masks_are_named(array, complaint, tmp_path):
    write_set(tmp_path / "raw", "bcss")
    path = tmp_path / "raw" / "train_mask" / (tile_name(1, 2, 224) + ".png")
    Image.fromarray(array).save(path)
    with pytest.raises(ValueError, match=f"{path.name}: {complaint}"):
        prepare("bcss", tmp_path / "raw", tmp_path)
    assert not (tmp_path / "bcss").exists()


def test_tiles_of_another_size_are_named(tmp_path):
    write_tile(tmp_path / "raw", "train", "", "a", 512)
    write_tile(tmp_path / "raw", "val", "", "b", 224)
    with pytest.raises(ValueError, match="a.png: 512 x 512 pixels, but tiles of this set are 224"):
        prepare("bcss", tmp_path / "raw", tmp_path)


@pytest.mark.parametrize("folder, partner", [("train", "mask"), ("val_mask", "image")])
def test_a_name_without_partner_is_named_on_either_side(folder, partner, tmp_path):
    write_set(tmp_path / "raw", "bcss")
    Image.new("L", (224, 224)).save(tmp_path / "raw" / folder / "lonely.png")
    with pytest.raises(ValueError, match=f"lonely.png: no {partner}.* of the same name"):
        prepare("bcss", tmp_path / "raw", tmp_path)


def test_missing_folders_are_named(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match="holds no folder train_512"):
        prepare("bcss512", tmp_path / "raw", tmp_path)


def test_truncated_tile_is_named_what_was_done_stays_and_goes_on(tmp_path, monkeypatch):
    source, size = tmp_path / "raw", 224
    for number in range(300):  # more than are read at a time
        write_tile(source, "train", "", tile_name(0, number, size), size, seed=number)
    write_tile(source, "val", "", tile_name(1, 0, size), size)
    bad = sorted((source / "train").iterdir())[280]
    whole = bad.read_bytes()
    bad.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match=f"{bad.name}: not a readable image"):
        prepare("bcss", source, tmp_path)
    bad.write_bytes(whole)
    find, read = data.READERS["bcss"]
    again = []
    monkeypatch.setitem(data.READERS, "bcss",
                        (find, lambda *paths: again.append(paths) or read(*paths)))
    images, masks, _ = prepare("bcss", source, tmp_path)
    assert len(again) == 301 - 256
    assert torch.equal(images[0], data.load("bcss", tmp_path)[0][0])
    fresh = prepare("bcss", source, tmp_path / "fresh")
    assert torch.equal(images, fresh[0]) and torch.equal(masks, fresh[1])
    assert sorted(path.name for path in (tmp_path / "bcss").iterdir()) == [
        "images.npy", "masks.npy", "tiles.csv"]


def test_full_disk_is_one_line_and_can_be_continued(tmp_path):
    write_set(tmp_path / "raw", "bcss")

    def small_files():  # what a full disk looks like to the program
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    command = [sys.executable, ROOT / "data.py", "prepare", "bcss", "--from", "raw", "--data-root",
               "."]
    result = subprocess.run(command, cwd=tmp_path, preexec_fn=small_files, text=True,
                            capture_output=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "goes on where it was" in result.stderr and not (tmp_path / "bcss").exists()
    assert len(prepare("bcss", tmp_path / "raw", tmp_path)[0]) == 12


# -----------------------------------------------------------------------------
# Ignored labels, colours, the confusion matrix


def test_ignored_labels_count_in_neither_training_nor_scores(tmp_path):
    write_set(tmp_path / "raw", "bcss", regions=4)
    prepare("bcss", tmp_path / "raw", tmp_path)
    common = ["--data", "bcss", "--width", "2", "--epochs", "1", "--batch-size", "4",
              "--data-root", str(tmp_path)]
    scores = {}
    for name, flags in ("all", []), ("some", ["--ignore-index", "0"]):
        out = tmp_path / name
        train.main(train.parse_args(common + flags + ["--out", str(out)]))
        scores[name] = json.loads((out / "scores.json").read_text())
    assert [row["label"] for row in scores["all"]["classes"]] == [0, 1, 2]
    assert [row["label"] for row in scores["some"]["classes"]] == [1, 2]
    losses = [(tmp_path / name / "log.csv").read_text() for name in scores]
    assert losses[0] != losses[1]
    with pytest.raises(SystemExit):
        train.parse_args(["--data", "bcss", "--ignore-index", "3"])
    with pytest.raises(SystemExit):
        train.parse_args(["--data", "monuseg", "--ignore-index", "0"])


# Machado et al. 2009, complete protanopia, deuteranopia, tritanopia; on linear RGB
SIGHT = [np.eye(3),
         [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
          [-0.003882, -0.048116, 1.051998]],
         [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
          [-0.011820, 0.042940, 0.968881]],
         [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
          [0.004733, 0.691367, 0.303900]]]


@pytest.mark.parametrize("sight", SIGHT, ids=["normal", "protan", "deutan", "tritan"])
def test_colours_are_told_apart_by_every_eye(sight):
    rgb = data.PALETTE / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055)**2.4) @ np.transpose(
        sight)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                       [0.0193, 0.1192, 0.9505]])
    xyz = linear.clip(0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), 1)
    distance = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(len(lab))
    assert len(lab) == 22 and distance.min() > 17 and distance[:3, :3].min() > 70
