"""Data sets of one's own: folders of images and masks, to tiles, scores and predictions."""

import json
import os
import re
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
from conftest import noise, refused
from PIL import Image

import data
import eval as evaluation
import predict
import raw
import train


def write_set(folder, n=10, labels=(0, 255), size=(230, 300), name="image"):
    """Images of noise, height x width, and masks whose columns show the labels in turn."""
    for kind in "images", "masks":
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        mask = np.resize(np.repeat(np.uint8(labels), 20), (size[1],))[None].repeat(size[0], 0)
        Image.fromarray(noise(*size, 3, seed=i)).save(folder / "images" / f"{name}-{i}.png")
        Image.fromarray(np.roll(mask, i, 1)).save(folder / "masks" / f"{name}-{i}.png")
    return folder


def prepare(folder, root, *flags, name="mine"):
    data.main(data.parse_args(["prepare", name, "--from", str(folder), "--data-root", str(root),
                               *flags]))
    return data.load(name, root)


# Preparation


@pytest.mark.parametrize("size", [(224, 224), (224, 449), (300, 670), (447, 448)])
def test_every_pixel_of_an_image_is_in_a_tile(tmp_path, size):
    tiles = prepare(write_set(tmp_path / "raw", 1, (0, 1, 2), size), tmp_path)
    image, mask = (np.asarray(Image.open(tmp_path / "raw" / kind / "image-0.png"))
                   for kind in ("images", "masks"))
    seen = np.zeros(size, int)
    for tile, labels, (_, row, column, *_) in zip(tiles.images, tiles.masks, tiles.rows):
        y, x = min(224 * row, size[0] - 224), min(224 * column, size[1] - 224)
        assert (tile.numpy() == image[y:y + 224, x:x + 224]).all()
        assert (labels.numpy() == mask[y:y + 224, x:x + 224]).all()
        seen[y:y + 224, x:x + 224] += 1
    assert seen.min() == 1


@pytest.mark.parametrize("labels, flags, classes", [
    ((0, 255), (), ["foreground"]), ((0, 1), (), ["foreground"]),
    ((0, 7), ("--classes", "nucleus"), ["nucleus"]),
    ((0, 1), ("--classes", "background", "nucleus"), ["background", "nucleus"]),
    ((0, 1, 2), (), ["class 0", "class 1", "class 2"]),
    ((0, 3), ("--classes", "a", "b", "c", "d"), ["a", "b", "c", "d"])])
def test_classes_follow_from_the_labels_or_are_named(tmp_path, labels, flags, classes):
    tiles = prepare(write_set(tmp_path / "raw", 3, labels), tmp_path, *flags)
    assert tiles.info["classes"] == classes
    assert tiles.info["recipe"] == ("monuseg" if len(classes) == 1 else "bcss")
    expected = [0, 1] if len(classes) == 1 else sorted(labels)
    assert tiles.masks.unique().tolist() == expected


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_masks_of_any_one_channel_mode_count_by_index(tmp_path, mode):
    folder = write_set(tmp_path / "raw", 3)
    for path in (folder / "masks").iterdir():
        mask = Image.open(path).point(lambda value: value > 0)
        if mode == "P":
            mask.putpalette([9, 9, 9, 200, 0, 0])  # its colours say nothing
        (mask.point(lambda value: 255 * value, "1") if mode == "1" else mask).save(path)
        assert Image.open(path).mode == mode
    assert prepare(folder, tmp_path).masks.unique().tolist() == [0, 1]


def test_grey_and_turned_images_are_taken_as_they_look(tmp_path):
    folder = write_set(tmp_path / "raw", 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(noise(300, 230)).save(folder / "images/image-1.png", exif=exif)
    tiles = prepare(folder, tmp_path)
    turned = np.rot90(noise(300, 230), -1)[:224, :224]
    assert (tiles.images[4].numpy() == turned[..., None]).all()


def test_scaled_masks_hold_only_their_own_labels(tmp_path):
    tiles = prepare(write_set(tmp_path / "raw", 2, (0, 2), (150, 200)), tmp_path, "--scale", "1.5",
                    "--classes", "a", "b", "c")
    mask = Image.open(tmp_path / "raw/masks/image-1.png")  # the edges of image 0's fit both sizes
    mask = np.asarray(mask.resize((300, 225), Image.Resampling.NEAREST))
    assert (tiles.masks[4].numpy() == mask[:224, :224]).all()
    assert tiles.masks.unique().tolist() == [0, 2]


def test_scale_is_stored_and_used_by_predict(tmp_path):
    tiles = prepare(write_set(tmp_path / "raw", 6, size=(150, 200)), tmp_path, "--scale", "1.5")
    image = Image.open(tmp_path / "raw/images/image-0.png").resize(
        (300, 225), Image.Resampling.BILINEAR)
    assert (tiles.images[0].numpy() == np.asarray(image)[:224, :224]).all()
    train.main(train.parse_args([*"--data mine --width 2 --epochs 1 --batch-size 4".split(),
                                 "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]))
    predict.main(predict.parse_args([
        f"{tmp_path}/run/best.pt", str(tmp_path / "raw/images/image-0.png"), "--probabilities",
        "--out", str(tmp_path / "out")]))
    assert np.load(tmp_path / "out/image-0_probabilities.npy").shape == (225, 300, 1)
    assert Image.open(tmp_path / "out/image-0_mask.png").size == (200, 150)


def test_parts_are_the_official_split_and_else_whole_images_are_drawn(tmp_path):
    for part, n in ("train", 3), ("val", 2), ("test", 1):
        write_set(tmp_path / "raw" / part, n, name=part)
    tiles = prepare(tmp_path / "raw", tmp_path)
    parts = data.split_tiles("mine", tiles.rows, tiles.info["split"])
    assert {part: {tiles.rows[i].image for i in indices} for part, indices in parts.items()} == {
        "train": {"train-0", "train-1", "train-2"}, "val": {"val-0", "val-1"}, "test": {"test-0"}}
    whole = prepare(write_set(tmp_path / "one folder"), tmp_path, name="other")
    parts = data.split_tiles("other", whole.rows, whole.info["split"])
    assert [len({whole.rows[i].image for i in indices}) for indices in parts.values()] == [7, 2, 1]


def test_a_file_that_was_written_anew_is_read_again_when_preparation_goes_on(tmp_path):
    folder = write_set(tmp_path / "raw", 65, (0, 1), size=(225, 225))  # more than a chunk of tiles
    bad, done = folder / "masks/image-9.png", folder / "masks/image-0.png"  # read last, first
    whole = bad.read_bytes()
    Image.open(bad).crop((0, 0, 225, 224)).save(bad)
    with pytest.raises(ValueError, match=r"image-9\.png"):
        prepare(folder, tmp_path)
    bad.write_bytes(whole)
    Image.fromarray(1 - np.asarray(Image.open(done))).save(done)
    tiles = prepare(folder, tmp_path)
    assert (tiles.masks[0].numpy() == np.asarray(Image.open(done))[:224, :224]).all()


def test_a_file_that_an_older_one_replaced_is_read_again_when_preparation_goes_on(tmp_path,
                                                                                 monkeypatch):
    def stop_at_the_last(image_path, *args, **options):
        if image_path.stem == "image-9":  # the last by name, in the second chunk of tiles
            raise KeyboardInterrupt
        return read_own(image_path, *args, **options)

    folder, read_own = write_set(tmp_path / "raw", 65, (0, 1), size=(225, 225)), raw.read_own
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(raw, "read_own", stop_at_the_last)
        prepare(folder, tmp_path)
    done = folder / "masks/image-0.png"
    Image.fromarray(1 - np.asarray(Image.open(done))).save(tmp_path / "older.png")
    os.utime(tmp_path / "older.png", (0, 0))
    (tmp_path / "older.png").replace(done)
    tiles = prepare(folder, tmp_path)
    assert (tiles.masks[0].numpy() == np.asarray(Image.open(done))[:224, :224]).all()


def test_names_of_any_script_are_kept_whatever_the_systems_encoding(tmp_path, monkeypatch):
    opened = open

    def ascii_unless_told(path, mode="r", *rest, encoding=None, **options):
        return opened(path, mode, *rest, encoding=encoding or (None if "b" in mode else "ascii"),
                      **options)
    for module in raw, data:
        monkeypatch.setattr(module, "open", ascii_unless_told, raising=False)
    tiles = prepare(write_set(tmp_path / "raw", 1, name="größe_腫瘍"), tmp_path)
    assert tiles.rows[0].image == "größe_腫瘍-0"


def test_an_accent_has_one_spelling_whatever_system_stored_it(tmp_path):
    folder = write_set(tmp_path / "raw", 2, name="caf\u00e9")
    for path in (folder / "images").iterdir():  # as some systems store it: e, then its accent
        path.rename(path.with_name(path.name.replace("\u00e9", "e\u0301")))
    tiles = prepare(folder, tmp_path)
    assert {row.image for row in tiles.rows} == {"caf\u00e9-0", "caf\u00e9-1"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_a_name_that_is_no_text_is_named_before_work_starts(tmp_path):
    folder = write_set(tmp_path / "raw", 2, name="gr\udcf6sse")  # Latin-1 on a disk
    with pytest.raises(ValueError, match=r"sse-0\.png: its name.*rename it"):
        prepare(folder, tmp_path)
    assert not list(tmp_path.glob("mine*"))


def test_an_own_image_may_be_larger_than_pillow_likes(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert len(prepare(write_set(tmp_path / "raw", 1), tmp_path).images) == 4


def test_hidden_folders_are_not_searched(tmp_path):
    folder = write_set(tmp_path / "raw", 1)
    (folder / "images/.ipynb_checkpoints").mkdir()
    Image.fromarray(noise(230, 300, 3)).save(
        folder / "images/.ipynb_checkpoints/image-0-checkpoint.png")
    assert len(prepare(folder, tmp_path).rows) == 4


# The other scripts


@pytest.mark.parametrize("labels", [(0, 255), (0, 1, 2)])
def test_own_data_train_and_score_and_predict_by_their_name_alone(tmp_path, capsys, monkeypatch,
                                                                  labels):
    monkeypatch.chdir(tmp_path)
    folder = write_set(tmp_path / "raw", 6, labels)
    prepare(folder, "data")
    score = train.main(train.parse_args("--data mine --width 2 --epochs 1 --batch-size 4".split()))
    run, = (tmp_path / "runs").iterdir()
    assert run.name == "mine-unet-standard-epochs1-batchsize4-width2-seed0"
    stored = json.loads((run / "scores.json").read_text())
    assert stored["set"]["classes"] == json.loads((tmp_path / "data/mine/set.json").read_text())[
        "classes"] and len(stored["classes"]) == (1 if len(labels) == 2 else 3)
    result, = evaluation.main(evaluation.parse_args([f"{run}/best.pt", "--figure", "figure.png"]))
    assert result["per_tile"]["iou"] == score
    capsys.readouterr()
    predict.main(predict.parse_args([f"{run}/best.pt", f"{folder}/images/image-0.png"]))
    assert result["set"]["classes"][0] in capsys.readouterr().out


def test_a_set_prepared_with_other_classes_than_the_checkpoints_is_refused(tmp_path, capsys):
    folder = write_set(tmp_path / "raw", 6, (0, 1, 2))
    for names in ["a", "b", "c"], ["a", "b", "other"]:
        root = tmp_path / names[-1]
        prepare(folder, root, "--classes", *names)
    train.main(train.parse_args([*"--data mine --width 2 --epochs 1 --batch-size 4".split(),
                                 "--data-root", f"{tmp_path}/c", "--out", f"{tmp_path}/run"]))
    line = refused(capsys, evaluation, tmp_path / "run/best.pt", "--data-root", root)
    assert "a, b, c" in line and "a, b, other" in line


# Bad input: one line that names it


def save(path, array):
    return lambda raw: Image.fromarray(array).save(raw / path)


def png_of_4_bits(array):
    """A grey PNG with 4 bits a pixel, which Pillow reads but does not write."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content +
                struct.pack(">I", zlib.crc32(kind + content)))

    height, width = array.shape
    lines = b"".join(b"\0" + (line[::2] << 4 | line[1::2]).tobytes() for line in array)
    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines))
            + chunk(b"IEND", b""))


def bitmap_of_two_greys(path):
    """Write an 8-bit BMP with a palette of black and white alone."""
    mask = Image.fromarray(noise(230, 300, high=2))
    mask.putpalette([0, 0, 0, 255, 255, 255])
    mask.save(path)


def remove(pattern):
    return lambda raw: [path.unlink() for path in raw.glob(pattern)]


def move_to(*parts):
    """Copy the images and masks to each of the parts, and remove them where they were."""
    def change(raw):
        for kind in "images", "masks":
            for part in parts:
                shutil.copytree(raw / kind, raw / part / kind)
            shutil.rmtree(raw / kind)
    return change


BAD = {
    "no images": (remove("images/*"), (), "images: holds no image"),
    "no masks": (remove("masks/*"), (), "image-0.png: no mask"),
    "a mask too few": (remove("masks/image-1.png"), (), "image-1.png: no mask"),
    "an image too few": (remove("images/image-1.png"), (), "image-1.png: no image"),
    "sizes that differ": (save("masks/image-1.png", noise(230, 301, high=2)), (),
                          "masks/image-1.png: 301 x 230 pixels, but image-1.png has 300 x 230"),
    "three values for one class": (save("masks/image-1.png", noise(230, 300, high=3)),
                                   ("--classes", "nucleus"), "two values, 0 and another"),
    "three values for two names": (save("masks/image-1.png", noise(230, 300, high=3)),
                                   ("--classes", "a", "b"), "--classes names 2"),
    "a gap": (save("masks/image-1.png", 2 * noise(230, 300, high=3)), (), "without gaps"),
    "256 labels": (save("masks/image-1.png", noise(230, 300)), (), "classes from 0 to at most 21"),
    "two names for 0 and 255": (lambda raw: [save(f"masks/image-{i}.png", 255 * noise(
        230, 300, high=2))(raw) for i in range(3)], ("--classes", "a", "b"), "name one class"),
    "nothing marked": (lambda raw: [save(f"masks/image-{i}.png", noise(230, 300, high=1))(raw)
                                    for i in range(3)], (), "holds 0 alone, as all masks do"),
    "a JPEG mask": (lambda raw: (remove("masks/image-1.png")(raw), save(
        "masks/image-1.jpg", noise(230, 300, high=2))(raw)), (), "image-1.jpg: a JPEG"),
    "no such folder": (shutil.rmtree, (), "raw: no such folder: give the one that holds images"),
    "4-bit mask": (lambda raw: (raw / "masks/image-1.png").write_bytes(
        png_of_4_bits(noise(230, 300, high=2))), (), "image-1.png: fewer than 8 bits"),
    "BMP that Pillow misreads": (lambda raw: (remove("masks/image-1.png")(raw), bitmap_of_two_greys(
        raw / "masks/image-1.bmp")), (), "image-1.bmp: a BMP with a grey palette"),
    "16-bit mask": (save("masks/image-1.png", noise(230, 300).astype(np.uint16)), (),
                    "export it as 8-bit"),
    "colours": (save("masks/image-1.png", noise(230, 300, 3)), (), "mode RGB, but a mask"),
    "small image": (save("images/image-1.png", noise(100, 300, 3)), (), "--scale 2.26"),
    "an image that its scale makes too small": (save("images/image-0.png", noise(694, 700, 3)),
                                                ("--scale", "0.3"), "--scale 0.33"),
    "a scale far too small": (remove("no such file"), ("--scale", "0.001"), "--scale 0.98"),
    "duplicate stems": (save("images/image-1.bmp", noise(230, 300, 3)), (), "the same name"),
    "no image file": (lambda raw: (raw / "images/image-1.png").write_bytes(b"GIF"), (),
                      "image-1.png: not a readable image"),
    "empty part": (lambda raw: [(raw / "train" / kind).mkdir(parents=True)
                                for kind in ("images", "masks")] and move_to("test")(raw), (),
                   "train/images: holds no"),
    "no folders": (lambda raw: (raw / "images").rename(raw / "pictures"), (), "images: no such"),
    "a JPEG in a TIFF": (lambda raw: (remove("masks/image-1.png")(raw), Image.fromarray(
        noise(230, 300, high=2)).save(raw / "masks/image-1.tif", compression="jpeg")), (),
        "image-1.tif: a JPEG"),
    "parts in images": (lambda raw: (raw / "images/test").mkdir(), (), "images/test: a part of"),
    "images beside a part": (lambda raw: (raw / "train").mkdir(), (), "raw/images: would be left"),
    "no part to test on": (move_to("train", "val"), (), "a folder train, but none to test on"),
    "no part to train on": (move_to("test"), (), "a folder test, but none to train on"),
    "a part of another name": (move_to("train", "valid"), (), "valid/images: would be left out"),
}


@pytest.mark.parametrize("change, flags, said", BAD.values(), ids=BAD)
def test_bad_own_data_are_named_and_nothing_is_prepared(tmp_path, capsys, change, flags, said):
    change(write_set(tmp_path / "raw", 3, labels=(0, 1)))
    line = refused(capsys, data, "prepare", "mine", "--from", tmp_path / "raw", "--data-root",
                   tmp_path, *flags)
    assert said in line.replace("\\", "/") and not (tmp_path / "mine").exists()


@pytest.mark.parametrize("name, flags, said", [
    ("synthetic", (), "'synthetic' cannot name"), ("a/b", (), "'a/b' cannot name"),
    ("..", (), "'..' cannot name"), ("bcss", ("--classes", "a"), "of bcss are fixed"),
    ("monuseg", ("--scale", "2"), "of monuseg are fixed"), ("mine", ("--scale", "-1"), "--scale"),
    ("mine", ("--classes", "a", "a"), "different names")])
def test_impossible_names_and_flags_are_refused(tmp_path, capsys, name, flags, said):
    assert said in refused(capsys, data, "prepare", name, "--from", tmp_path, *flags)


@pytest.mark.parametrize("change", [{"recipe": "mine"}, {"split": "half"}, {"classes": []},
                                    {"scale": "1"}])
def test_a_set_json_that_is_not_as_it_should_be_is_named(tmp_path, capsys, change):
    prepare(write_set(tmp_path / "raw", 3), tmp_path)
    path = tmp_path / "mine/set.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert f"{path}: damaged" in refused(capsys, train, "--data", "mine", "--data-root", tmp_path)


def test_files_that_are_no_images_are_left_out_and_named(tmp_path, capsys):
    folder = write_set(tmp_path / "raw", 2)
    for kind in "images", "masks":
        Image.fromarray(noise(230, 300)).save(folder / kind / "image-2.gif")
        (folder / kind / ".DS_Store").touch()
    assert {row.image for row in prepare(folder, tmp_path).rows} == {"image-0", "image-1"}
    said = capsys.readouterr().out
    assert re.search(r"left out, as only \.bmp, .* are read: .*image-2\.gif and others", said)


def test_a_set_that_is_not_prepared_says_how(tmp_path, capsys):
    line = refused(capsys, train, "--data", "mine", "--data-root", tmp_path)
    assert "data.py prepare mine --from DIR" in line
