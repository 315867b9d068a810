"""data.py with BCSS and BCSS512: layouts, labels, splits, and the way to a score.

A BCSS tile is quickly written: what it takes to prepare many files is tested here, too.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import train
from conftest import ROOT, load, noise, refused
from eval import compute_metrics, evaluate
from losses import loss_for
from models import build_model
from raw import READERS, TileRow
from utils import write_atomic

SIZE = {"bcss": 224, "bcss512": 512}


def write_tile(folder, part, suffix, name, image, label=1):
    """One image, given as an array, and its mask, 0 on the left, in the archive's layout."""
    mask = np.full(image.shape[:2], label, np.uint8)
    mask[:, :len(mask) // 2] = 0
    for kind, array in ("", image), ("_mask", mask):
        place = folder / f"{part}{kind}{suffix}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(place / f"{name}.png", compress_level=1)


def tile_name(region, number, size):
    return f"TCGA-A1-A0S{region}-DX1_xmin4{region}_ymin250_MPP-0_{448 + 112 * number}_0_size{size}"


def write_set(folder, name, regions=3, per_region=4):
    """A small data set in the archive's layout: the last region validates, the others train."""
    size, suffix = SIZE[name], "_512" if name == "bcss512" else ""
    for region, number in itertools.product(range(regions), range(per_region)):
        part = "val" if region == regions - 1 else "train"
        write_tile(folder, part, suffix, tile_name(region, number, size),
                   noise(size, size, 3, seed=10 * region + number),
                   (20 if name == "bcss512" else 1) + (region + number) % 2)
    return folder


def write_many(folder, n):
    """A BCSS of n training tiles, each in a shade of its own, and one for validation."""
    for i in range(n + 1):
        shade = np.full((224, 224, 3), (i % 256, i // 256, 9), np.uint8)
        write_tile(folder, "train" if i < n else "val", "", f"{i:03}", shade)
    return folder


def prepare(name, source, root):
    data.main(data.parse_args(["prepare", name, "--from", str(source), "--data-root", str(root)]))
    return data.load(name, root)


def test_a_run_is_scored_again_from_its_checkpoint(tmp_path):
    prepare("bcss512", write_set(tmp_path / "raw", "bcss512", regions=4), tmp_path)
    train.main(train.parse_args([
        "--data", "bcss512", "--width", "2", "--epochs", "1", "--batch-size", "4", "--data-root",
        str(tmp_path), "--out", str(tmp_path / "run")]))
    again, = evaluation.main(evaluation.parse_args([str(tmp_path / "run/best.pt")]))
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert again["per_tile"] == scores["per_tile"] and again["tiles"] == scores["tiles"]


@pytest.mark.parametrize("name", SIZE)
def test_archive_becomes_tiles_with_their_labels(name, tmp_path):
    source = write_set(tmp_path / "raw" / "extra level", name)
    (source / "test").mkdir()  # the official test tiles come without masks
    Image.new("RGB", (224, 224)).save(source / "test" / "nobody-knows.png")
    tiles = prepare(name, tmp_path / "raw", tmp_path)
    images, masks, rows = tiles.images, tiles.masks, tiles.rows
    assert images.shape == (12, 224, 224, 3) and masks.shape == (12, 224, 224)
    assert [row.official for row in rows] == ["train"] * 8 + ["val"] * 4
    assert rows[1] == ("TCGA-A1-A0S0-DX1_xmin40_ymin250_MPP-0", 560, 0, "train", 0, 0)
    assert masks[:, :, :112].max() == 0  # nearest: labels do not mix at their border
    first = 20 if name == "bcss512" else 1
    assert (masks[:, 0, 112] - first).tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1]
    suffix = "_512" if name == "bcss512" else ""
    with Image.open(source / f"train{suffix}" / (tile_name(0, 1, SIZE[name]) + ".png")) as image:
        expected = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))
    assert np.array_equal(images[1], expected)


def test_both_sets_prepare_from_one_folder_and_over_links(posix, tmp_path):
    write_set(tmp_path / "raw" / "BCSS", "bcss")
    write_set(tmp_path / "far" / "BCSS_512", "bcss512", regions=2)
    (tmp_path / "raw" / "BCSS_512").symlink_to(tmp_path / "far")
    assert len(prepare("bcss", tmp_path / "raw", tmp_path).rows) == 12
    assert len(prepare("bcss512", tmp_path / "raw", tmp_path).rows) == 8


def test_real_tiles_prepare_and_train(shared, tmp_path):
    tiles = prepare("bcss", shared / "bcss", tmp_path)
    assert [row.official for row in tiles.rows] == ["train", "train", "val", "val"]
    assert set(tiles.masks.unique().tolist()) <= {0, 1, 2}
    score = train.main(train.parse_args([
        "--data", "bcss", "--width", "2", "--epochs", "1", "--batch-size", "2", "--data-root",
        str(tmp_path), "--out", str(tmp_path / "run")]))
    again, = evaluation.main(evaluation.parse_args([str(tmp_path / "run/best.pt")]))
    assert again["per_tile"]["iou"] == score


# -----------------------------------------------------------------------------
# Splits


def test_labels_have_the_names_that_the_sets_authors_gave_them():
    assert data.SETS["bcss"]["classes"] == ["outside", "tumor", "stroma"]
    assert data.SETS["bcss512"]["classes"] == (
        "outside_roi tumor stroma lymphocytic_infiltrate necrosis_or_debris glandular_secretions "
        "blood exclude metaplasia_NOS fat plasma_cells other_immune_infiltrate mucoid_material "
        "normal_acinus_or_duct lymphatics undetermined nerve skin_adnexa blood_vessel "
        "angioinvasion dcis other").split()


def rows_of(counts, per_region=40):
    """Rows as the real sets have them in number: {part: number of tiles}."""
    return [TileRow(f"region-{part if exclusive else ''}{i // per_region}", i, 0, part)
            for part, (number, exclusive) in counts.items() for i in range(number)]


@pytest.mark.parametrize("name, counts, sizes", [
    ("bcss", {"train": (30760, False), "val": (5429, False)}, [30760, 1408, 4021]),
    ("bcss512", {"train": (6000, True), "val": (2768, True)}, [5400, 2768, 600])])
def test_split_sizes_are_the_papers(name, counts, sizes):
    rows = rows_of(counts)
    parts = data.split_tiles(name, rows, "tile")
    assert [len(parts[part]) for part in ("train", "val", "test")] == sizes
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(rows)))
    officially = {part: {rows[i].official for i in indices} for part, indices in parts.items()}
    assert officially == ({"train": {"train"}, "val": {"val"}, "test": {"val"}} if name == "bcss"
                          else {"train": {"train"}, "val": {"val"}, "test": {"train"}})


@pytest.mark.parametrize("name, how, digest", [
    ("bcss", "tile", "665dade9cafe97ac"), ("bcss", "image", "631de364be0a17f8"),
    ("bcss512", "tile", "cdd6ad99d3bd71a6"), ("bcss512", "image", "a9d2f8a3b39e663c")])
def test_split_is_that_of_earlier_versions(name, how, digest):
    rows = rows_of({"train": (6000, True), "val": (2768, True)} if name == "bcss512" else
                   {"train": (30760, False), "val": (5429, False)})
    listed = json.dumps(sorted([*rows[i][:3], part] for part, indices in data.split_tiles(
        name, rows, how).items() for i in indices.tolist()))
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", SIZE)
def test_image_split_shares_no_region(name):
    rows = rows_of({"train": (6000, True), "val": (2768, True)} if name == "bcss512" else
                   {"train": (3076, False), "val": (543, False)})
    parts = data.split_tiles(name, rows, "image")
    regions = [{rows[i].image for i in parts[part]} for part in ("train", "val", "test")]
    assert not (regions[0] & regions[2] or regions[0] & regions[1] or regions[1] & regions[2])
    assert abs(len(parts["test"]) / len(rows) - {"bcss": 4021 / 36189, "bcss512": 600 / 8768}[
        name]) < 0.02


def test_a_split_without_test_tiles_is_refused():
    with pytest.raises(ValueError, match="--split official leaves no tile of bcss"):
        data.split_tiles("bcss", rows_of({"train": (50, False), "val": (9, False)}), "official")
    with pytest.raises(ValueError, match="no split is called 'half': there are tile, image, "):
        data.split_tiles("bcss", rows_of({"train": (50, False), "val": (9, False)}), "half")


# -----------------------------------------------------------------------------
# Bad input: one line that names the file


def save(path, *shape, value=0):
    return lambda raw: Image.fromarray(np.full(shape, value, np.uint8)).save(raw / path)


TILE = tile_name(1, 2, 224) + ".png"
BAD_RAW = {  # what is wrong: (how to make it so, what the error says)
    "label 3": (save(f"train_mask/{TILE}", 224, 224, value=3),
                f"{TILE}: holds the label 3, but the 3 classes are 0 to 2"),
    "label 255": (save(f"train_mask/{TILE}", 224, 224, value=255), f"{TILE}: holds the label 255"),
    "RGB mask": (save(f"train_mask/{TILE}", 224, 224, 3), f"{TILE}: Pillow mode RGB, not L or P"),
    "mask of another size": (save(f"train_mask/{TILE}", 200, 224),
                             f"{TILE}: 224 x 200 pixels, but .* has 224 x 224"),
    "tile of another size": (lambda raw: write_tile(raw, "val", "", "big", noise(512, 512, 3)),
                             "big.png: 512 x 512 pixels, but tiles of this set are 224 x 224"),
    "image without mask": (save("train/lonely.png", 224, 224, 3),
                           "lonely.png: no mask or annotation of the same name"),
    "mask without image": (save("val_mask/lonely.png", 224, 224),
                           "lonely.png: no image of the same name"),
    "no folder": (lambda raw: (raw / "train").rename(raw / "trian"), "raw: holds no folder train:"),
    "two folders": (lambda raw: write_set(raw / "again", "bcss"), "has the same name: keep one"),
}


@pytest.mark.parametrize("change, message", BAD_RAW.values(), ids=BAD_RAW)
def test_bad_raw_file_is_named(change, message, tmp_path):
    change(write_set(tmp_path / "raw", "bcss"))
    with pytest.raises(ValueError, match=message):
        prepare("bcss", tmp_path / "raw", tmp_path)
    assert not (tmp_path / "bcss").exists()


def test_postscript_named_png_is_refused_without_starting_ghostscript(tmp_path, monkeypatch,
                                                                      capsys):
    path = write_set(tmp_path / "raw", "bcss") / "train" / (tile_name(0, 0, 224) + ".png")
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 224 224\n%%EndComments\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert f"{path.name}: not a readable image" in refused(
        capsys, data, "prepare", "bcss", "--from", tmp_path / "raw", "--data-root", tmp_path)
    assert not (tmp_path / "started").exists()


# -----------------------------------------------------------------------------
# Preparing many files


def content(root):
    return {path.name: path.read_bytes() for path in (root / "bcss").iterdir()
            if path.name != "set.json"}  # which names the raw folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    prepare("bcss", write_many(folder / "raw", 300), folder / "fresh")
    return folder


@pytest.fixture
def raw(posix, many, tmp_path):
    """A raw folder of 301 tiles, more than are read at a time; below `fresh` they are prepared."""
    (tmp_path / "fresh").symlink_to(many / "fresh")
    return shutil.copytree(many / "raw", tmp_path / "raw")


def test_empty_folders_of_bcss_are_named(tmp_path, capsys):
    for name in "train", "val", "train_mask", "val_mask":
        (tmp_path / "raw" / name).mkdir(parents=True)
    assert "raw: holds no image of bcss" in refused(
        capsys, data, "prepare", "bcss", "--from", tmp_path / "raw", "--data-root", tmp_path)


def spoil(path):
    """Make a file unreadable without a trace in its size and time."""
    facts = path.stat()
    path.write_bytes(bytes(facts.st_size))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_truncated_tile_is_named_and_the_same_command_goes_on_once_it_is_mended(raw, tmp_path):
    done, bad = raw / "train" / "000.png", raw / "train" / "280.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="280.png: not a readable image"):
        prepare("bcss", raw, tmp_path)
    assert not (tmp_path / "bcss").exists()
    bad.write_bytes(whole)
    spoil(done)  # but it is not read again
    prepare("bcss", raw, tmp_path)
    assert content(tmp_path) == content(tmp_path / "fresh")


def test_interrupted_preparation_goes_on(raw, tmp_path, monkeypatch):
    def interrupted(image, mask):
        if image.stem == "280":
            raise KeyboardInterrupt
        return read(image, mask)
    find, read = READERS["bcss"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(READERS, "bcss", (find, interrupted))
        prepare("bcss", raw, tmp_path)
    spoil(raw / "train" / "000.png")
    prepare("bcss", raw, tmp_path)
    assert content(tmp_path) == content(tmp_path / "fresh")


def test_tiles_are_on_the_disk_before_a_note_says_so(raw, tmp_path, monkeypatch):
    @contextmanager
    def note(path):
        stored, before = np.load(path.with_name("images.npy")), len(synced)
        with write_atomic(path) as file:
            yield file
        files = json.loads(path.read_text())["files"]
        assert before == 2 + 3 * len(notes) and stored[:files].any(axis=(1, 2, 3)).all()
        notes.append(files)

    synced, notes, fsync = [], [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(number) or fsync(number))
    monkeypatch.setattr("raw.write_atomic", note)
    prepare("bcss", raw, tmp_path)
    assert len(notes) == 2 and notes[0] == 256


def test_work_on_another_list_of_files_is_not_continued(raw, tmp_path):
    first, bad = raw / "train" / "000.png", raw / "train" / "280.png"
    whole = first.read_bytes(), bad.read_bytes()
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="280.png"):
        prepare("bcss", raw, tmp_path)
    first.write_bytes(b"")
    write_tile(raw, "val", "", "one more", noise(224, 224, 3))
    with pytest.raises(ValueError, match="000.png"):  # from the start, since the list is another
        prepare("bcss", raw, tmp_path)
    first.write_bytes(whole[0]), bad.write_bytes(whole[1])
    for part in "val", "val_mask":
        (raw / part / "one more.png").unlink()
    prepare("bcss", raw, tmp_path)
    assert content(tmp_path) == content(tmp_path / "fresh")


def test_memory_does_not_grow_with_the_number_of_tiles(tmp_path):
    source = write_many(tmp_path / "raw", 1)
    for part, i in itertools.product(("train", "train_mask"), range(1, 700)):
        (source / part / f"{i:03}.png").hardlink_to(source / part / "000.png")
    tracemalloc.start()
    prepare("bcss", source, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 350 * 224 * 224 * 4  # never half of the 701 tiles at a time


def test_a_second_preparation_at_the_same_time_is_refused(posix, tmp_path, monkeypatch, script):
    def read_meanwhile(image, mask):
        if image.parent.name == "val":
            second.append(script("data.py", "prepare", "bcss", "--from", "raw", "--data-root", "."))
        return read(image, mask)
    second, (find, read) = [], READERS["bcss"]
    monkeypatch.setitem(READERS, "bcss", (find, read_meanwhile))
    assert len(prepare("bcss", write_many(tmp_path / "raw", 3), tmp_path).rows) == 4
    assert second[0].returncode == 2 and len(second[0].stderr.splitlines()) == 1
    assert "bcss.partial: another process is writing there" in second[0].stderr


def test_full_disk_is_one_line_and_can_be_continued(posix, tmp_path):
    import resource

    def small_files():  # what a full disk looks like to the program
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    write_set(tmp_path / "raw", "bcss")
    command = [sys.executable, ROOT / "data.py", "prepare", "bcss", "--from", "raw", "--data-root",
               "."]
    done = subprocess.run(command, cwd=tmp_path, preexec_fn=small_files, text=True,
                          capture_output=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "goes on where it was" in done.stderr and not (tmp_path / "bcss").exists()
    assert len(prepare("bcss", tmp_path / "raw", tmp_path).rows) == 12


# -----------------------------------------------------------------------------
# Ignored labels


def test_ignored_labels_are_left_out_of_the_loss_the_choice_of_epoch_and_the_scores(tmp_path,
                                                                                    capsys):
    prepare("bcss", write_set(tmp_path / "raw", "bcss", regions=4), tmp_path)
    flags = ["--data", "bcss", "--width", "2", "--epochs", "1", "--batch-size", "4", "--data-root",
             str(tmp_path), "--ignore-index", "0", "2", "--out"]
    train.main(train.parse_args([*flags, str(tmp_path / "run")]))
    best, tiles = load(tmp_path / "run/best.pt"), data.load("bcss", tmp_path)
    parts = data.split_tiles("bcss", tiles.rows, "tile")
    confusions, losses = evaluate(build_model(best, ""), tiles, parts["val"], loss_for(3, [0, 2]),
                                  torch.device("cpu"), 4)
    metrics, row = compute_metrics(confusions, [0, 2]), best["log"][0]
    assert row["val_loss"] == pytest.approx(losses.mean().item())
    assert row["val_iou_global"] == pytest.approx(metrics["global"]["iou"] or 0)
    assert row["val_iou_per_tile"] == pytest.approx(metrics["per_tile"]["iou"] or 0)
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert [label["label"] for label in scores["classes"]] == [1]
    again, = evaluation.main(evaluation.parse_args([str(tmp_path / "run/best.pt")]))
    assert all(again[part] == scores[part] for part in ("per_tile", "global", "classes", "tiles"))
    said = refused(capsys, train, *flags, tmp_path / "none", "--ignore-index", 3)
    assert "--ignore-index 3: bcss has no such label" in said
    said = refused(capsys, train, *flags, tmp_path / "none", "--ignore-index", 0, 1, 2)
    assert "--ignore-index 0 1 2: leaves no label to score" in said
