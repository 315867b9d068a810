"""predict.py: any image in, a mask of its size out, and no trace of the tiles in between.

Most networks here are stubs that compute something known from each pixel or tile.
"""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import predict
from models import create_model

TILING = (64, 16, 16, 3)  # small tiles: many of them in a small image


class Stub(nn.Module):
    """A network that remembers what it was shown, and answers `function(images)`."""

    def __init__(self, function, num_classes=1):
        super().__init__()
        self.function, self.num_classes, self.shown = function, num_classes, []

    def forward(self, images):
        self.shown.append(images)
        return self.function(images)


def redness(num_classes=1):
    """A network that looks at nothing but the pixel itself: one linear map of its colour."""
    weight = torch.randn(num_classes, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return Stub(lambda images: nn.functional.conv2d(images, weight), num_classes)


def noise(width, height):
    array = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(array)


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


def whole(network, image, tiling=TILING, tta=False):
    """All bands of an image in one -> (C, H, W)."""
    bands = predict.predict_bands(network, image, network.num_classes, tiling,
                                  torch.device("cpu"), tta)
    return torch.cat([band.clone() for band in bands], dim=1)


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Run main with a network of our own on images and flags -> shares; writes to tmp_path/out."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # main changes it

    def run(network, *arguments, data="synthetic", model="unet"):
        checkpoint = {"args": {"data": data, "model": model}, "num_classes": network.num_classes}
        monkeypatch.setattr(predict, "load_checkpoint", lambda path: checkpoint)
        monkeypatch.setattr(predict, "build_model", lambda checkpoint, path: network)
        return predict.main(predict.parse_args(["best.pt", *map(str, arguments),
                                                "--out", str(tmp_path / "out")]))
    return run


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a tiny U-Net with random weights."""
    torch.manual_seed(0)
    model, path = create_model("unet", "conv", 1, width=2), tmp_path / "best.pt"
    args = {"data": "monuseg", "model": "unet", "skip": "conv", "width": 2}
    torch.save({"args": args, "num_classes": 1, "model": model.state_dict(), "split": "",
                "epoch": 1, "log": []}, path)
    return path


# -----------------------------------------------------------------------------
# Tiles and blending


@pytest.mark.parametrize("tiling", [TILING, (64, 16, 40, 1), (32, 32, 16, 8)])
@pytest.mark.parametrize("size", [(1, 1), (5, 150), (64, 64), (65, 63), (230, 99)])
def test_blending_changes_nothing_where_all_tiles_agree(size, tiling):
    for network in redness(), redness(3):
        image = noise(*size)
        logits = network.function(data.normalize(tensor(image)))[0]
        expected = logits.sigmoid() if len(logits) == 1 else logits.softmax(dim=0)
        torch.testing.assert_close(whole(network, image, tiling), expected, rtol=0, atol=1e-6)


def test_no_seam_shows_where_tiles_disagree():
    answers = iter([-4.0, 4.0] * 99)  # neighbours say opposite things
    network = Stub(lambda images: torch.full_like(images[:, :1], next(answers)))
    blended = whole(network, noise(300, 260), (64, 16, 32, 1))[0]
    steps = max(blended.diff(dim=0).abs().max(), blended.diff(dim=1).abs().max())
    assert blended.max() - blended.min() > 0.9
    assert steps < 2 * 0.96 / 32  # a cut would be 0.96, a straight ramp over the overlap 0.96 / 32


def test_an_image_that_one_tile_can_hold_is_one_tile():
    for length, tile in (1, 16), (16, 16), (224, 224), (896, 896), (1020, 1024), (1024, 1024):
        starts, places, weights = predict.cover(length, *predict.TILINGS["unet"][:3])
        assert (starts, len(places), len(weights)) == ([0], tile, tile)


@pytest.mark.parametrize("model", predict.TILINGS)
@pytest.mark.parametrize("length", [1, 100, 224, 225, 896, 1000, 1025, 2000, 20_000])
def test_tiles_cover_an_axis_and_have_sides_that_the_network_takes(model, length):
    side, multiple, overlap, _ = predict.TILINGS[model]
    starts, places, weights = predict.cover(length, side, multiple, overlap)
    assert len(weights) % multiple == 0 and len(weights) <= side
    assert all(b - a == len(weights) - overlap for a, b in zip(starts, starts[1:]))
    assert starts[-1] + len(weights) == len(places) >= length > starts[-1]
    assert places[:length].tolist() == list(range(length)) and 0 <= places.min()
    assert weights.min() > 0


def test_a_small_image_is_continued_by_its_mirror_image():
    network, image = redness(), noise(40, 9)
    whole(network, image, (32, 32, 16, 8))
    array = np.pad(np.asarray(image), ((0, 23), (0, 8), (0, 0)), "reflect")
    expected = data.normalize(tensor(array))
    assert torch.equal(network.shown[0][0], expected[0, :, :, :32])
    assert torch.equal(network.shown[0][1], expected[0, :, :, 16:])


def test_batch_size_changes_nothing():
    torch.manual_seed(0)
    network = Stub(create_model("unet", "fusion", 3, width=2).eval(), 3)
    image = noise(300, 100)
    one, four = (whole(network, image, (*TILING[:3], size)) for size in (1, 4))
    torch.testing.assert_close(one, four, rtol=0, atol=1e-5)
    assert {len(batch) for batch in network.shown} == {1, 4, 2}  # a row has six tiles


def test_memory_does_not_grow_with_the_height():
    sizes, peaks = [], []
    for height in 300, 3000:
        image = noise(100, height)
        tracemalloc.start()  # sees numpy's memory; PyTorch's is the sums, of which bands are views
        for band in predict.predict_bands(redness(22), image, 22, TILING, torch.device("cpu")):
            sizes.append(band.untyped_storage().nbytes())
            assert band.shape[1] <= 64
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert set(sizes) == {23 * 64 * 112 * 4}
    assert peaks[1] < peaks[0] + 3000 * 50  # a sixth of its pixels: there are lists of rows


# -----------------------------------------------------------------------------
# What the network sees and says


@pytest.mark.parametrize("name, side", [("monuseg", 1000), ("bcss", 224), ("bcss512", 512)])
def test_network_sees_exactly_what_it_saw_in_training(use, tmp_path, name, side):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    noise(side, side).save(image)
    Image.new("L", (side, side)).save(mask)
    tiles, masks = map(torch.tensor, data.READERS[name][1](image, mask))
    tiles, masks = tiles.view(-1, 224, 224, 3), masks.view(-1, 224, 224)
    trained, _ = data.get_batch(tiles, masks, torch.arange(len(tiles)), "cpu")
    expected = list(data.normalize(trained))

    unet, swin = redness(), redness()
    use(unet, image, data=name)
    large, = unet.shown[0]
    n = large.shape[1] // 224
    assert large.shape == (3, 224 * n, 224 * n) and n * n == len(expected)
    for k, tile in enumerate(expected):
        row, column = divmod(k, n)
        assert torch.equal(large[:, 224 * row:224 * (row + 1), 224 * column:224 * (column + 1)],
                           tile)
    use(swin, image, data=name, model="swin_unet")
    rows = [batch for batch in swin.shown[::2 if n > 1 else 1]]  # every other row of tiles
    assert all(torch.equal(rows[k // n][2 * (k % n)], tile) for k, tile in enumerate(expected))


def test_scale_is_the_users_if_given(use, tmp_path):
    noise(100, 60).save(tmp_path / "a.png")
    network = redness()
    use(network, tmp_path / "a.png", "--scale", "1.6", "--probabilities", data="monuseg")
    assert np.load(tmp_path / "out" / "a_probabilities.npy").shape == (96, 160, 1)
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (100, 60)


def test_tta_is_the_mean_over_eight_views():
    torch.manual_seed(0)
    network, images = create_model("unet", "standard", 3, width=4).eval(), tensor(noise(64, 32))
    views = []
    for transpose in False, True:
        for axes in (), (2,), (3,), (2, 3):
            view = images.transpose(2, 3) if transpose else images
            answer = network(data.normalize(view.flip(axes))).softmax(dim=1).flip(axes)
            views.append(answer.transpose(2, 3) if transpose else answer)
    expected = torch.stack(views).mean(dim=0)
    assert (expected - views[0]).abs().max() > 1e-3
    torch.testing.assert_close(predict.ask(network, images, tta=True), expected)


def test_tta_changes_nothing_for_a_network_without_a_sense_of_direction(use, tmp_path):
    image = noise(150, 90)
    torch.testing.assert_close(whole(redness(3), image, tta=True), whole(redness(3), image))
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


@pytest.mark.parametrize("kind, suffix", [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"),
                                          ("<i4", "tif"), ("<f4", "tif")])
def test_deeper_grey_is_scaled_not_clipped(tmp_path, kind, suffix):
    levels = np.arange(256) * (1 / 255 if kind == "<f4" else 257)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.stack([levels] * 2).astype(kind)).save(path)
    array = np.asarray(predict.read_rgb(path))
    assert array.shape == (2, 256, 3) and (array == np.arange(256)[:, None]).all()


@pytest.mark.parametrize("value", [-1, 1.5, float("nan")])
def test_floats_of_an_unknown_range_are_refused_by_name(tmp_path, value):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: holds values from"):
        predict.read_rgb(tmp_path / "a.tif")


def test_a_slide_may_be_larger_than_pillow_likes(use, tmp_path, monkeypatch):
    noise(100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    use(redness(), tmp_path / "a.png")
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (100, 100)


def test_a_folder_is_searched_but_not_for_predictions(use, tmp_path):
    folder = tmp_path / "slides"
    for name in ("a.png", "deep/b.TIF", "a_mask.png", "a_overlay.png", "__MACOSX/._a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(20, 20).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    noise(20, 20).save(tmp_path / "c.png")
    assert set(use(redness(), folder, tmp_path / "c.png")) == {"a", "b", "c"}
    assert len(list((tmp_path / "out").iterdir())) == 6
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


def test_masks_beside_the_images_are_never_overwritten(use, tmp_path):
    (tmp_path / "out").mkdir()
    noise(20, 20).save(tmp_path / "out" / "a.png")
    with pytest.raises(ValueError, match="name another folder"):
        use(redness(), tmp_path / "out" / "a.png")


def test_a_bad_image_is_named_and_the_others_are_done(script, checkpoint, tmp_path):
    noise(130, 70).save(tmp_path / "a.png")
    noise(90, 100).save(tmp_path / "c.png")
    whole_file = (tmp_path / "c.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole_file[:len(whole_file) // 2])
    done = script("predict.py", checkpoint, "a.png", "b.png", "absent.png", "c.png", "--out", "o")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 3
    assert "b.png" in lines[0] and "absent.png" in lines[1] and "2 of 4 images" in lines[2]
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == [
        "a: 130 x 70", "c: 90 x 100"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "a_mask.png", "a_overlay.png", "c_mask.png", "c_overlay.png"]


def test_what_is_no_checkpoint_ends_with_one_line(script, tmp_path):
    (tmp_path / "best.pt").write_bytes(b"no weights")
    done = script("predict.py", "best.pt", "a.png")
    assert done.returncode == 2 and done.stderr.startswith("predict.py: best.pt: not a checkpoint")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "predictions").exists()


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


def test_mask_of_many_classes_holds_their_indices_in_the_palettes_colours(use, tmp_path, capsys):
    noise(100, 60).save(tmp_path / "a.png")
    network = redness(22)
    shares = use(network, tmp_path / "a.png", "--probabilities", "--scale", "1", data="bcss512")
    logits = network.function(data.normalize(tensor(noise(100, 60))))[0]
    expected = logits.argmax(dim=0).numpy()
    mask = Image.open(tmp_path / "out" / "a_mask.png")
    assert mask.mode == "P" and (np.asarray(mask) == expected).all()
    assert (np.asarray(mask.convert("RGB")) == data.PALETTE[expected]).all()
    assert shares["a"] == pytest.approx(np.bincount(expected.ravel(), minlength=22) / 6000)
    commonest = int(np.argmax(shares["a"]))
    text = f"{data.CLASSES['bcss512'][commonest]} {100 * shares['a'][commonest]:.1f} %"
    assert text in capsys.readouterr().out

    probabilities = np.load(tmp_path / "out" / "a_probabilities.npy")
    assert probabilities.shape == (60, 100, 22) and probabilities.dtype == np.float16
    np.testing.assert_allclose(probabilities, logits.softmax(0).permute(1, 2, 0), atol=1e-3)


def test_overlay_outlines_every_region_in_its_colour(use, tmp_path):
    image = noise(3, 150).resize((60, 3000))  # taller than the strips it is drawn in
    image.save(tmp_path / "a.png")
    for classes, width, palette in (1, 1, [(0, 0, 0), (0, 255, 0)]), (3, 3, data.PALETTE):
        use(redness(classes), tmp_path / "a.png", data="bcss" if classes == 3 else "synthetic")
        mask = np.array(Image.open(tmp_path / "out" / "a_mask.png"))
        expected, rest = np.array(image), mask.copy()
        for _ in range(width):  # one line of pixels, then what is outermost without it
            border = data.outline(rest)
            expected[border] = np.array(palette)[mask[border]]
            rest[border] = 0
        assert len(np.unique(mask)) > classes / 2 and (rest > 0).any()
        assert (np.asarray(Image.open(tmp_path / "out" / "a_overlay.png")) == expected).all()


def test_mask_at_another_scale_comes_back_in_place_and_smooth(use, tmp_path):
    y, x = np.mgrid[:400, :300]
    disc = (x - 100) ** 2 + (y - 250) ** 2 < 80**2
    Image.fromarray(np.where(disc, 255, 0).astype(np.uint8)).save(tmp_path / "a.png")
    one = Stub(lambda images: 3 * images[:, :1])
    two = Stub(lambda images: torch.cat((-images[:, :1], images[:, :1]), dim=1), 2)
    for network, overlap in (one, 0.985), (two, 0.95):  # without interpolation it has steps
        use(network, tmp_path / "a.png", "--scale", "0.25", data="bcss" if network is two else
            "synthetic")
        mask = np.asarray(Image.open(tmp_path / "out" / "a_mask.png")) == 1
        assert mask.shape == disc.shape and (mask & disc).sum() / (mask | disc).sum() > overlap
