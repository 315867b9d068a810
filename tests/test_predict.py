"""predict.py: any image in, a mask of its size out, and no trace of the tiles in between.

Most networks here are stubs that compute something known from each pixel or tile.
"""

import os
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from conftest import refused, save_network
from PIL import Image
from torch import nn

import data
import predict
from models import MODELS, UNet, build_model, create_model
from plots import PALETTE, outline
from raw import READERS, read_labels
from utils import load_checkpoint


class Stub(nn.Module):
    """A network that remembers what it was shown, and answers `function(images)`.

    It takes small tiles, many of them in a small image, unless it stands for another: `like`.
    """

    def __init__(self, function, num_classes=1, like=None):
        super().__init__()
        self.function, self.num_classes, self.shown = function, num_classes, []
        self.side_multiple, self.max_side = (
            (MODELS[like].side_multiple, MODELS[like].max_side) if like else (16, 64))

    def forward(self, images):
        self.shown.append(images)
        return self.function(images)


def redness(num_classes=1, like=None):
    """A network that looks at nothing but the pixel itself: one linear map of its colour."""
    weight = torch.randn(num_classes, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return Stub(lambda images: nn.functional.conv2d(images, weight), num_classes, like)


def noise(width, height):
    array = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(array)


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


def blend(network, image, batch_size=None, tta=False):
    """All bands of an image in one -> (C, H, W)."""
    bands = predict.predict_bands(network, image, network.num_classes, torch.device("cpu"),
                                  batch_size, tta)
    return torch.cat([band.clone() for band in bands], dim=1)


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Run main with a network of our own on images and flags -> shares; writes to tmp_path/out."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # read_image changes it

    def run(network, *arguments, data="synthetic"):
        monkeypatch.setitem(MODELS, "stub", lambda *_: network)
        path = save_network(tmp_path / "best.pt", "stub", "conv", network.num_classes, name=data)
        return predict.main(predict.parse_args([str(path), *map(str, arguments), "--device", "cpu",
                                                "--out", str(tmp_path / "out")]))
    return run


@pytest.fixture
def out(tmp_path):
    """What is in the folder that `use` writes to -> {file name: content}."""
    return lambda: {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


# -----------------------------------------------------------------------------
# Tiles and blending


@pytest.mark.parametrize("multiple, side", [(16, 64), (32, 32), (24, 72)])
@pytest.mark.parametrize("size", [(1, 1), (5, 150), (64, 64), (65, 63), (230, 99)])
def test_blending_changes_nothing_where_all_tiles_agree(size, multiple, side):
    for network in redness(), redness(3):
        network.side_multiple, network.max_side = multiple, side
        image = noise(*size)
        logits = network.function(data.normalize(tensor(image)))[0]
        expected = logits.sigmoid() if len(logits) == 1 else logits.softmax(dim=0)
        torch.testing.assert_close(blend(network, image), expected, rtol=0, atol=1e-6)
        sides = {side for batch in network.shown for side in batch.shape[2:]}
        assert all(tile % multiple == 0 and tile <= side for tile in sides)


def test_no_seam_shows_where_tiles_disagree():
    answers = iter([-4.0, 4.0] * 99)  # neighbours say opposite things
    network = Stub(lambda images: torch.full_like(images[:, :1], next(answers)))
    blended = blend(network, noise(300, 260), batch_size=1)[0]
    steps = max(blended.diff(dim=0).abs().max(), blended.diff(dim=1).abs().max())
    assert blended.max() - blended.min() > 0.9
    assert steps < 2 * 0.96 / 32  # a cut would be 0.96, a straight ramp over the overlap 0.96 / 32


def test_the_weights_of_two_tiles_that_overlap_by_half_add_up_to_one():
    _, _, weights = predict.tile_positions(300, 224, 224, 112)
    torch.testing.assert_close(weights[:112] + weights[112:], torch.ones(112))


def test_large_tiles_overlap_by_128_pixels():
    network = redness(like="unet")
    blend(network, noise(1200, 10))
    left, right = network.shown
    assert torch.equal(left[..., -128:], right[..., :128])


def test_an_image_that_one_tile_can_hold_is_one_tile():
    for length, tile in (1, 16), (16, 16), (224, 224), (896, 896), (1020, 1024), (1024, 1024):
        network = redness(like="unet")
        blend(network, noise(length, 5))
        assert [batch.shape for batch in network.shown] == [(1, 3, 16, tile)]


@pytest.mark.parametrize("model, overlap", [("unet", 128), ("swin_unet", 112)])
@pytest.mark.parametrize("length", [1, 100, 224, 225, 896, 1000, 1025, 2000, 20_000])
def test_tiles_cover_an_axis_and_have_sides_that_the_network_takes(model, overlap, length):
    side, multiple = MODELS[model].max_side or 1024, MODELS[model].side_multiple
    starts, places, weights = predict.tile_positions(length, side, multiple, overlap)
    assert len(weights) % multiple == 0 and len(weights) <= side
    assert all(b - a == len(weights) - overlap for a, b in zip(starts, starts[1:]))
    assert starts[-1] + len(weights) == len(places) >= length > starts[-1]
    assert places[:length].tolist() == list(range(length)) and 0 <= places.min()
    assert weights.min() > 0


def test_a_small_image_is_continued_by_its_mirror_image():
    network, image = redness(), noise(40, 9)
    network.side_multiple = network.max_side = 32
    blend(network, image)
    array = np.pad(np.asarray(image), ((0, 23), (0, 8), (0, 0)), "reflect")
    expected = data.normalize(tensor(array))
    assert torch.equal(network.shown[0][0], expected[0, :, :, :32])
    assert torch.equal(network.shown[0][1], expected[0, :, :, 16:])


def test_batch_size_changes_nothing():
    torch.manual_seed(0)
    network = Stub(create_model("unet", "fusion", 3, width=2).eval(), 3)
    one, four = (blend(network, noise(300, 100), size) for size in (1, 4))
    torch.testing.assert_close(one, four, rtol=0, atol=1e-5)
    assert {len(batch) for batch in network.shown} == {1, 4}  # a row has nine tiles


def test_by_default_batches_are_of_one_large_tile_or_of_eight_small_ones():
    unet, swin = redness(like="unet"), redness(like="swin_unet")
    for network in unet, swin:
        blend(network, noise(1200, 10))  # two large tiles, or ten small ones
    assert [len(batch) for batch in unet.shown] == [1, 1]
    assert [len(batch) for batch in swin.shown] == [8, 2]


def test_batches_are_as_large_as_the_flag_says(use, tmp_path):
    noise(200, 20).save(tmp_path / "a.png")
    network = redness()
    use(network, tmp_path / "a.png", "--batch-size", "3")
    assert [len(batch) for batch in network.shown] == [3, 3]  # in place of six


def test_memory_does_not_grow_with_the_height():
    sizes, peaks = [], []
    for height in 300, 3000:
        image = noise(100, height)
        tracemalloc.start()  # sees numpy's memory; PyTorch's is the sums, of which bands are views
        for band in predict.predict_bands(redness(22), image, 22, torch.device("cpu")):
            sizes.append(band.untyped_storage().nbytes())
            assert band.shape[1] <= 64
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert set(sizes) == {23 * 64 * 128 * 4}
    assert peaks[1] < peaks[0] + 3000 * 50  # a sixth of its pixels: there are lists of rows


# -----------------------------------------------------------------------------
# What the network sees and says


@pytest.mark.parametrize("name, side", [("monuseg", 1000), ("bcss", 224), ("bcss512", 512)])
def test_network_sees_exactly_what_it_saw_in_training(use, tmp_path, name, side):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    noise(side, side).save(image)
    Image.new("L", (side, side)).save(mask)
    tiles, masks = map(torch.tensor, READERS[name][1](image, mask))
    tiles, masks = tiles.view(-1, 224, 224, 3), masks.view(-1, 224, 224)
    expected = list(data.normalize(data.to_batch((tiles, masks), "cpu")[0]))

    unet, swin = (redness(len(data.SETS[name]["classes"]), like) for like in ("unet", "swin_unet"))
    for network in unet, swin:
        use(network, image, data=name)
    large, = unet.shown[0]
    n = large.shape[1] // 224
    assert large.shape == (3, 224 * n, 224 * n) and n * n == len(expected)
    rows = swin.shown[::2]  # every other row of tiles
    for k, tile in enumerate(expected):
        y, x = 224 * (k // n), 224 * (k % n)
        assert torch.equal(large[:, y:y + 224, x:x + 224], tile)
        assert torch.equal(rows[k // n][2 * (k % n)], tile)


def test_scale_is_the_users_if_given(use, tmp_path):
    noise(100, 60).save(tmp_path / "a.png")
    use(redness(), tmp_path / "a.png", "--scale", "1.6", "--probabilities", data="monuseg")
    assert np.load(tmp_path / "out" / "a_probabilities.npy").shape == (96, 160, 1)
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (100, 60)


@pytest.mark.parametrize("scale", ["1e9", "0", "nan", "-1"])
def test_a_scale_beyond_reason_is_refused(capsys, scale):
    assert f"argument --scale: {scale} is not a number above 0 and at most 10" in refused(
        capsys, predict, "best.pt", "a.png", f"--scale={scale}")


def test_a_network_added_to_models_is_shown_the_sides_that_its_class_names(tmp_path, monkeypatch):
    class Mine(UNet):
        side_multiple, max_side = 48, 96

        def forward(self, images):
            assert all(side in (48, 96) for side in images.shape[2:])
            return super().forward(images)

    monkeypatch.setitem(MODELS, "mine", Mine)
    path = save_network(tmp_path / "mine.pt", "mine", name="synthetic")
    noise(150, 40).save(tmp_path / "a.png")
    predict.main(predict.parse_args([str(path), str(tmp_path / "a.png"), "--device", "cpu",
                                     "--out", str(tmp_path / "out")]))
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (150, 40)


def test_tta_is_the_mean_over_eight_views():
    torch.manual_seed(0)
    network, images = create_model("unet", "standard", 3, width=4).eval(), tensor(noise(64, 32))
    views = []
    for transpose in False, True:
        for axes in (), (2,), (3,), (2, 3):
            view = images.transpose(2, 3) if transpose else images
            probs = network(data.normalize(view.flip(axes))).softmax(dim=1).flip(axes)
            views.append(probs.transpose(2, 3) if transpose else probs)
    expected = torch.stack(views).mean(dim=0)
    assert (expected - views[0]).abs().max() > 1e-3
    torch.testing.assert_close(predict.predict_probs(network, images, tta=True), expected)


def test_tta_changes_nothing_for_a_network_without_a_sense_of_direction(use, tmp_path):
    image = noise(60, 40)
    torch.testing.assert_close(blend(redness(3), image, tta=True), blend(redness(3), image))
    network = redness()
    image.save(tmp_path / "a.png")
    use(network, tmp_path / "a.png", "--tta")
    assert len(network.shown) == 8


# -----------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK"])
def test_eight_bit_modes_are_shown_as_they_look(tmp_path, mode):
    image = Image.linear_gradient("L")  # 256 x 256, black to white downwards
    expected = np.asarray(image)
    if mode == "P":  # the index is not what it looks like
        image.putpalette(np.repeat(np.arange(256)[::-1], 3).tolist())
        expected = 255 - expected
    elif mode == "1":
        image = image.point(lambda level: 255 * (level > 99), "1")
        expected = 255 * (expected > 99)
    else:
        image = image.convert("RGB").convert(mode)
    image.save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == mode
    assert (np.asarray(predict.read_rgb(tmp_path / "a.tif")) == expected[..., None]).all()


def test_a_trained_network_predicts_by_its_running_statistics(tmp_path):
    path = save_network(tmp_path / "best.pt", "unet", width=4, name="synthetic")
    noise(48, 32).save(tmp_path / "a.png")
    predict.main(predict.parse_args([str(path), str(tmp_path / "a.png"), "--device", "cpu", "--out",
                                     str(tmp_path / "out"), "--probabilities"]))
    model = build_model(load_checkpoint(path), path).eval()
    with torch.no_grad():
        expected = model(data.normalize(tensor(noise(48, 32))))[0, 0].sigmoid()
    found = np.load(tmp_path / "out" / "a_probabilities.npy")[..., 0]
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("kind, suffix", [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"),
                                          ("<i4", "tif"), ("<f4", "tif")])
def test_deeper_grey_is_scaled_not_clipped(tmp_path, kind, suffix):
    levels = np.arange(256) * (1 / 255 if kind == "<f4" else 257)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.stack([levels] * 2).astype(kind)).save(path)
    array = np.asarray(predict.read_rgb(path))
    assert array.shape == (2, 256, 3) and (array == np.arange(256)[:, None]).all()


def png_of_16_bits(path, array):
    """Pillow reads such a file in 8 bits and writes none, unless it is grey."""
    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum
    height, width, channels = array.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]  # grey with alpha, colours, colours with alpha
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_png_of_16_bits_a_channel_is_refused_as_a_tiff_of_them_is(tmp_path, channels):
    png_of_16_bits(tmp_path / "a.png", np.full((4, 4, channels), 4095))  # black in 8 bits
    with pytest.raises(ValueError, match=r"a\.png: 16 bits per channel"):
        predict.read_rgb(tmp_path / "a.png")


def test_a_stack_of_pages_is_refused_but_a_slide_with_smaller_copies_is_not(tmp_path):
    pages = [Image.new("L", (300, 300), level) for level in (10, 20, 30)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    for read in predict.read_rgb, read_labels:
        with pytest.raises(ValueError, match=r"stack\.tif: holds 3 pages"):
            read(tmp_path / "stack.tif")
    pages[0].resize((50, 50)).save(tmp_path / "first.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"first\.tif: holds 3 pages"):
        predict.read_rgb(tmp_path / "first.tif")
    pages[0].save(tmp_path / "slide.tif", save_all=True,
                  append_images=[page.resize((150, 150)) for page in pages[1:]])
    assert (np.asarray(predict.read_rgb(tmp_path / "slide.tif")) == 10).all()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_animation_is_refused_but_a_cameras_jpeg_with_a_smaller_copy_is_not(tmp_path, suffix):
    frames = [Image.new("RGB", (300, 300), (level, 0, 0)) for level in (10, 200)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: holds 2 pages or frames"):
        predict.read_rgb(tmp_path / f"a.{suffix}")
    frames[0].save(tmp_path / "photo.jpg", "MPO", save_all=True,
                   append_images=[frames[1].resize((50, 50))])
    assert predict.read_rgb(tmp_path / "photo.jpg").size == (300, 300)


@pytest.mark.parametrize("value", [-1, 1.5, float("nan"), float("inf")])
def test_floats_of_an_unknown_range_are_refused_by_name(tmp_path, value):
    levels = np.full((4, 4), 0.5, np.float32)
    levels[2, 1] = value
    Image.fromarray(levels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: holds values from"):
        predict.read_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix, orientation, turns, mirrored", [
    ("png", 1, 0, False), ("png", 3, 2, False), ("png", 5, 3, True),
    *((suffix, 6, 3, False) for suffix in ("png", "jpg", "tif", "webp"))])
def test_an_image_is_turned_as_viewers_show_it(use, tmp_path, suffix, orientation, turns, mirrored):
    exif, plain, turned = Image.Exif(), tmp_path / f"plain.{suffix}", tmp_path / f"turned.{suffix}"
    exif[0x0112] = orientation  # EXIF's tag for it: 6, for one, means turn me clockwise
    noise(50, 20).save(plain)
    noise(50, 20).save(turned, exif=exif)
    use(redness(), plain, turned)
    for kind in "mask", "overlay":
        expected = np.rot90(np.array(Image.open(tmp_path / "out" / f"plain_{kind}.png")), turns)
        picture = Image.open(tmp_path / "out" / f"turned_{kind}.png")
        assert np.array_equal(picture, expected[:, ::-1] if mirrored else expected)
        assert 0x0112 not in picture.getexif()  # or viewers would turn it again


def test_a_slide_may_be_larger_than_pillow_likes(use, tmp_path, monkeypatch):
    noise(100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    use(redness(), tmp_path / "a.png")
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (100, 100)


def test_a_folder_is_searched_but_not_for_predictions(use, tmp_path, out):
    folder = tmp_path / "slides"
    for name in ("a.png", "deep/b.TIF", "a_mask.png", "a_overlay.png", "__MACOSX/x.png", "._a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(20, 20).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    noise(20, 20).save(tmp_path / "c.png")
    assert set(use(redness(), folder, tmp_path / "c.png")) == {"a", "b", "c"}
    assert len(out()) == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no image"):
        use(redness(), tmp_path / "empty")


def test_two_images_of_one_name_are_refused_before_work_starts(use, tmp_path):
    for name in "0.png", "a.png", "a.tif":
        noise(20, 20).save(tmp_path / name)
    network = redness()
    with pytest.raises(ValueError, match=r"a\.tif: .*a\.png has the same name"):
        use(network, *(tmp_path / name for name in ("0.png", "a.png", "a.tif")))
    assert not network.shown


def bomb(path):
    """A PNG of a few bytes that claims to hold 10**12 pixels."""
    header = struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks))


def test_a_bad_image_is_named_and_the_others_are_done(posix, use, tmp_path, capsys, out):
    noise(130, 70).save(tmp_path / "a.png")
    noise(90, 100).save(tmp_path / "z.png")
    content = (tmp_path / "z.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:len(content) // 2])
    noise(9, 9).save(tmp_path / "exif.png", exif=b"garbage")
    os.mkfifo(tmp_path / "pipe.png")
    bomb(tmp_path / "bomb.png")
    bad = ["cut.png", "exif.png", "pipe.png", "bomb.png", "absent.png"]
    with pytest.raises(ValueError, match="5 of 7 images could not be used"):
        use(redness(), *(tmp_path / name for name in ("a.png", *bad, "z.png")))
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 5 and all(name in line for name, line in zip(bad, lines))
    assert "exceeds limit" in lines[3]  # before any memory was asked for
    assert "a: 130 x 70, " in said.out and "z: 90 x 100, " in said.out
    assert sorted(out()) == ["a_mask.png", "a_overlay.png", "z_mask.png", "z_overlay.png"]


@pytest.mark.parametrize("error", [MemoryError("100 GB"), RuntimeError("CUDA out of memory")])
def test_an_image_that_memory_does_not_hold_is_named_and_the_others_are_done(
        use, tmp_path, capsys, out, error):
    def answer(images):
        if images.shape[3] > 32:
            raise error
        return images[:, :1]

    for name, side in ("a", 9), ("big", 40), ("z", 9):
        noise(side, side).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="1 of 3 images"):
        use(Stub(answer), *(tmp_path / f"{name}.png" for name in ("a", "big", "z")),
            "--probabilities")
    line, = capsys.readouterr().err.splitlines()
    assert f"big.png: out of memory ({error}): cut it, or give a smaller --scale" in line
    assert {name.split("_")[0] for name in out()} == {"a", "z"} and len(out()) == 6


def test_a_mistake_in_a_network_is_not_taken_for_lack_of_memory(use, tmp_path):
    def answer(images):
        raise RuntimeError("shapes do not fit")

    noise(9, 9).save(tmp_path / "a.png")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        use(Stub(answer), tmp_path / "a.png")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_names_that_the_terminal_cannot_show_do_not_end_the_job(script, tmp_path):
    save_network(tmp_path / "best.pt", "unet")
    for name in "naïve", "a\udce9", "z":  # the second is no UTF-8
        noise(20, 20).save(tmp_path / f"{name}.png")
    done = script("predict.py", "best.pt", "naïve.png", "a\udce9.png", "z.png", "\udce9.png",
                  "--out", "o", PYTHONIOENCODING="ascii")
    assert "1 of 4 images" in done.stderr and len(done.stderr.splitlines()) == 2
    assert done.stdout.count(": 20 x 20, ") == 3 and len(list((tmp_path / "o").iterdir())) == 6


def test_what_is_no_checkpoint_ends_with_one_line(capsys, tmp_path):
    path, out = tmp_path / "best.pt", tmp_path / "out"
    path.write_bytes(b"no weights")
    assert f"{path}: not a checkpoint" in refused(capsys, predict, path, "a.png", "--out", out)
    assert not out.exists()


def test_a_second_checkpoint_is_not_taken_for_an_image(capsys, tmp_path):
    one, other = (save_network(tmp_path / name, "unet") for name in ("one.pt", "other.pt"))
    line = refused(capsys, predict, one, other, "a.png", "--out", tmp_path / "out")
    assert f"{other}: a checkpoint: name one alone" in line and not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_unknown_data_set_is_refused(use, tmp_path):
    noise(9, 9).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"best\.pt: does not say what its .* classes are"):
        use(redness(), tmp_path / "a.png", data="glands")


# -----------------------------------------------------------------------------
# What is written


def test_mask_of_one_class_holds_0_and_1_and_is_visible(use, tmp_path):
    noise(100, 60).save(tmp_path / "a.png")
    network = redness()
    shares = use(network, tmp_path / "a.png")
    expected = network.function(data.normalize(tensor(noise(100, 60))))[0, 0] > 0
    mask = Image.open(tmp_path / "out" / "a_mask.png")
    assert mask.mode == "P" and (np.asarray(mask) == expected.numpy()).all()
    assert {colour for _, colour in mask.convert("RGB").getcolors()} == {(0, 0, 0), (0, 255, 0)}
    assert shares["a"] == pytest.approx([1 - expected.numpy().mean(), expected.numpy().mean()])


def test_the_share_of_nuclei_is_told_by_their_name(use, tmp_path, capsys):
    image = Image.new("RGB", (64, 64))
    image.paste("white", (0, 0, 32, 32))
    image.save(tmp_path / "a.png")
    use(Stub(lambda images: images[:, :1]), tmp_path / "a.png")  # white is above 0, black below
    assert "a: 64 x 64, background 75.0 %, nucleus 25.0 %" in capsys.readouterr().out


def test_predictions_are_in_the_half_precision_that_the_device_trains_in(monkeypatch):
    seen, original = [], predict.autocast
    monkeypatch.setattr(predict, "autocast", lambda device: seen.append(device) or original(device))
    predict.predict_probs(redness(), torch.rand(1, 3, 16, 16), tta=True)
    assert seen == 8 * [torch.device("cpu")]


def test_mask_of_many_classes_holds_their_indices_in_the_palettes_colours(use, tmp_path, capsys):
    noise(100, 60).save(tmp_path / "a.png")
    network = redness(22)
    shares = use(network, tmp_path / "a.png", "--probabilities", "--scale", "1", data="bcss512")
    logits = network.function(data.normalize(tensor(noise(100, 60))))[0]
    expected = logits.argmax(dim=0).numpy()
    mask = Image.open(tmp_path / "out" / "a_mask.png")
    assert mask.mode == "P" and (np.asarray(mask) == expected).all()
    assert (np.asarray(mask.convert("RGB")) == PALETTE[expected]).all()
    assert shares["a"] == pytest.approx(np.bincount(expected.ravel(), minlength=22) / 6000)
    commonest = int(np.argmax(shares["a"]))
    text = f"{data.SETS['bcss512']['classes'][commonest]} {100 * shares['a'][commonest]:.1f} %"
    assert text in capsys.readouterr().out

    probabilities = np.load(tmp_path / "out" / "a_probabilities.npy")
    assert probabilities.shape == (60, 100, 22) and probabilities.dtype == np.float16
    np.testing.assert_allclose(probabilities, logits.softmax(0).permute(1, 2, 0), atol=1e-3)


@pytest.mark.parametrize("name, width", [("synthetic", 1), ("bcss", 3)])
def test_overlay_outlines_every_region_in_its_colour(use, tmp_path, name, width):
    image = noise(3, 150).resize((60, 3000))  # taller than the strips it is drawn in
    image.save(tmp_path / "a.png")
    classes = len(data.SETS[name]["classes"])
    use(redness(classes), tmp_path / "a.png", data=name)
    mask = np.array(Image.open(tmp_path / "out" / "a_mask.png"))
    palette = np.array([(0, 0, 0), (0, 255, 0)]) if classes == 1 else PALETTE
    expected, rest = np.array(image), mask.copy()
    for _ in range(width):  # one line of pixels, then what is outermost without it
        border = outline(rest)
        expected[border] = palette[mask[border]]
        rest[border] = 0
    assert len(np.unique(mask)) > classes / 2 and (rest > 0).any()
    assert (np.asarray(Image.open(tmp_path / "out" / "a_overlay.png")) == expected).all()


def test_overlay_of_an_image_with_a_transparent_grey_is_opaque(use, tmp_path):
    Image.new("L", (64, 64), 255).save(tmp_path / "a.png", transparency=255)
    use(redness(), tmp_path / "a.png")
    overlay = Image.open(tmp_path / "out" / "a_overlay.png").convert("RGBA")
    assert overlay.getextrema()[3] == (255, 255)


def test_mask_at_another_scale_comes_back_in_place_and_smooth(use, tmp_path):
    y, x = np.mgrid[:400, :300]
    disc = (x - 100) ** 2 + (y - 250) ** 2 < 80**2
    Image.fromarray(np.where(disc, 255, 0).astype(np.uint8)).save(tmp_path / "a.png")
    one = Stub(lambda images: 3 * images[:, :1])
    many = Stub(lambda images: images * torch.tensor([-1, -9, 1]).view(3, 1, 1) - torch.tensor(
        [0, 99, 0]).view(3, 1, 1), 3)  # labels 0 and 2, never 1
    for network, name, label, overlap in (one, "synthetic", 1, 0.985), (many, "bcss", 2, 0.95):
        use(network, tmp_path / "a.png", "--scale", "0.25", data=name)
        mask = np.asarray(Image.open(tmp_path / "out" / "a_mask.png"))
        assert mask.shape == disc.shape and np.unique(mask).tolist() == [0, label]
        found = mask == label  # without interpolation the first has steps
        assert (found & disc).sum() / (found | disc).sum() > overlap


# -----------------------------------------------------------------------------
# What is overwritten


def test_masks_beside_the_images_are_never_overwritten(use, tmp_path):
    (tmp_path / "out").mkdir()
    noise(20, 20).save(tmp_path / "out" / "a.png")
    with pytest.raises(ValueError, match="name another folder"):
        use(redness(), tmp_path / "out" / "a.png")


@pytest.mark.parametrize("name", ["b_mask.png", "b_overlay.png", "b_probabilities.npy"])
def test_a_file_of_somebody_else_is_named_and_kept_before_work_starts(use, tmp_path, out, name):
    (tmp_path / "out").mkdir()
    noise(20, 20).save(tmp_path / "out" / name, format="PNG")
    for image in "a.png", "b.png":
        noise(20, 20).save(tmp_path / image)
    before, network = out(), redness()
    with pytest.raises(ValueError, match=rf"{name}: predict\.py has not written it .* --out"):
        use(network, tmp_path / "a.png", tmp_path / "b.png")
    assert out() == before and not network.shown


def test_a_command_can_be_repeated_until_a_mask_was_edited(use, tmp_path, out):
    noise(20, 20).save(tmp_path / "a.png")
    use(redness(), tmp_path / "a.png", "--probabilities")
    first, mask = out(), tmp_path / "out" / "a_mask.png"
    use(Stub(lambda images: images[:, :1], 1), tmp_path / "a.png", "--probabilities")
    assert out().keys() == first.keys() and all(out()[name] != first[name] for name in first)
    Image.open(mask).save(mask)  # as any editor does, with no text of ours in it
    with pytest.raises(ValueError, match="a_mask.png: predict.py has not written it"):
        use(redness(), tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["mask", "overlay"])
def test_a_full_disk_leaves_the_earlier_pictures_whole(use, tmp_path, monkeypatch, out, kind):
    noise(20, 20).save(tmp_path / "a.png")
    use(redness(), tmp_path / "a.png")
    before, save = out(), Image.Image.save

    def fail(image, file, **options):
        if kind in file.name:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(image, file, **options)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match=f"a_{kind}.png: cannot be written .No space left"):
        use(Stub(lambda images: images[:, :1]), tmp_path / "a.png")
    assert out().keys() == before.keys()
    assert out()[f"a_{kind}.png"] == before[f"a_{kind}.png"]


def test_an_interruption_leaves_the_earlier_files_whole(use, tmp_path, out):
    def answer(images):
        if network.shown[1:]:  # not in the first row of tiles
            raise KeyboardInterrupt
        return images[:, :1]

    noise(20, 200).save(tmp_path / "a.png")
    use(redness(), tmp_path / "a.png", "--probabilities")
    before, network = out(), Stub(answer)
    with pytest.raises(KeyboardInterrupt):
        use(network, tmp_path / "a.png", "--probabilities")
    assert out() == before and len(network.shown) == 2
