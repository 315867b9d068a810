"""The strong recipe: windows of whole images, stains, averaged weights, and whole images scored."""

import math

import numpy as np
import pytest
import torch
from conftest import load, refused, save_network, stop_before_batch
from PIL import Image

import data
import eval as evaluation
import train
from losses import loss_for
from models import create_model
from raw import TileRow
from recipes import RECIPES, SCHEDULES

SIZE = 230, 300  # pixels, height and width: 2 x 2 tiles, of which most of each overlaps


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Prepared sets of six images: `mine`, whose nuclei are bright in red, and `other`, blue."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(256, size=(9, 12, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC))
        for name, channel in ("mine", 0), ("other", 2):
            for kind, array in ("images", image), ("masks", 255 * (image[..., channel] > 128)):
                (root / "raw" / name / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(root / f"raw/{name}/{kind}/{i}.png")
    for name in "mine", "other":
        data.prepare(name, [root / "raw" / name], root)
    return root


@pytest.fixture
def wholes(root):
    tiles = data.load("mine", root)
    return tiles, data.whole_images("mine", tiles, torch.arange(len(tiles.rows)))


def read(root, kind, name):
    return np.asarray(Image.open(root / "raw/mine" / kind / f"{name}.png"))


# -----------------------------------------------------------------------------
# Whole images and windows


def test_overlapping_tiles_make_up_the_image_that_continues_mirrored(root, wholes):
    tiles, images = wholes
    assert len(images) == 6
    for name, whole in images.items():
        assert whole.shape == SIZE
        image, mask = data.crop(tiles, whole, -250, -10, SIZE[0] + 300, SIZE[1] + 20)
        padding = (250, 50), (10, 10)
        assert (image.numpy() == np.pad(read(root, "images", name), (*padding, (0, 0)),
                                        "symmetric")).all()
        assert (mask.numpy() == np.pad(read(root, "masks", name) > 0, padding, "symmetric")).all()


def ramp_window(draws, side):
    """A window of an image whose red is its column and whose green is its row, in 1 / 1000."""
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5 - side / 2) / 1000] * 2, indexing="ij")
    images = torch.stack((x, y, x))[None]
    window, _ = data.augment(images, torch.zeros(1, side, side).long(), draws)
    return 1000 * window[0, 0], 1000 * window[0, 1]


@pytest.mark.parametrize("angle, scale", [(0, 1), (1.9, 1), (math.pi / 4, math.exp(0.25)),
                                          (-math.pi / 4, math.exp(-0.25))])
def test_a_turned_and_scaled_window_shows_what_lies_there_to_its_corners(angle, scale):
    lines, side = torch.linspace(-1, 1, data.GRID_CELLS + 1)[None], data.window_side(0.25)
    c, s = math.cos(angle), math.sin(angle)
    draws = {"matrix": torch.tensor([[[c, -s], [s, c]]]), "columns": lines, "rows": lines,
             "elastic": torch.zeros(1, 2, *[data.ELASTIC_CELLS + 3] * 2),
             "zoom": torch.tensor([scale * 224 / side])}
    x, y = ramp_window(draws, side)
    v, u = torch.meshgrid(*[torch.arange(224) - 111.5] * 2, indexing="ij")
    assert x.shape == (224, 224)
    torch.testing.assert_close(x, scale * (c * u - s * v), atol=0.01, rtol=0)
    torch.testing.assert_close(y, scale * (s * u + c * v), atol=0.01, rtol=0)


def test_around_a_turned_window_there_is_room_for_elastic_shifts():
    assert data.window_side(0.25) >= 2 * (112 * math.exp(0.25) * math.sqrt(2) + 8)  # pixels


def batches(tiles, images, n=8, names="none", seed=0, windows=1e-9, **options):
    indices = torch.arange(len(tiles.rows))
    return [*data.train_batches(tiles, indices, 4, seed, 0, n, "cpu", augmentations=names,
                                wholes=images, windows=windows, **options)]


def test_windows_are_pieces_of_the_image_from_border_to_border(root, wholes):
    tops, lefts = set(), set()
    pictures = [(read(root, "images", name), read(root, "masks", name)) for name in wholes[1]]
    for images, masks in batches(*wholes, n=30):
        for image, mask in zip((255 * images).round().byte().permute(0, 2, 3, 1).numpy(), masks):
            place, = [(top, left, other) for picture, other in pictures for top, left in
                      np.argwhere((picture[:7, :77] == image[0, 0]).all(2))
                      if (picture[top:top + 224, left:left + 224] == image).all()]
            top, left, other = place
            assert ((other[top:top + 224, left:left + 224] > 0) == mask.numpy()).all()
            tops.add(top), lefts.add(left)
    assert tops == set(range(7)) and min(lefts) < 4 and max(lefts) > 72 and len(lefts) > 40


def test_windows_leave_all_other_draws_as_they_are():
    plain, windows = (data.draw_augmentation(2000, torch.Generator().manual_seed(0), **options)
                      for options in ({}, {"windows": 0.25, "stain": 0.25}))
    assert all(torch.equal(plain[name], windows[name]) for name in plain)
    scale = (windows["zoom"] * data.window_side(0.25) / 224).log()
    assert 0.24 < scale.max() <= 0.25 and -0.25 <= scale.min() < -0.24 and abs(scale.mean()) < 0.02
    factors, shifts = windows["stain"].unbind(1)
    assert factors.shape == (2000, 3)
    assert 0.75 <= factors.min() < 0.76 < 1.24 < factors.max() <= 1.25
    assert -0.05 <= shifts.min() < -0.049 and 0.049 < shifts.max() <= 0.05
    assert torch.cat((factors, shifts), 1).T.corrcoef().sub(torch.eye(6)).abs().max() < 0.15


def test_each_rank_takes_its_share_of_a_batch_of_windows(wholes):
    alone = batches(*wholes, n=1, names="all", windows=0.25, stain=0.25)[0]
    shares = [batches(*wholes, n=1, names="all", windows=0.25, stain=0.25, rank=rank,
                      world_size=2)[0] for rank in range(2)]
    for one, *parts in zip(alone, *shares):
        torch.testing.assert_close(one, torch.stack(parts, 1).flatten(0, 1))


@pytest.mark.parametrize("flags, said", [
    ("--split tile", "--split image, or official if"),
    ("--data monuseg", "--split image, or official if")])
def test_windows_are_refused_where_test_tiles_share_their_images(root, capsys, flags, said):
    assert said in refused(capsys, train, "--data", "mine", "--recipe", "strong", "--data-root",
                           root, *flags.split())


def test_tiles_that_make_no_whole_image_are_refused(wholes):
    tiles, _ = wholes
    with pytest.raises(ValueError, match="mine: the tiles of 0 do not make up a whole image"):
        data.whole_images("mine", tiles, torch.arange(1, 4))
    for indices in [1, 3], [2, 3]:  # the right column alone, and the lower row
        with pytest.raises(ValueError, match="mine: the tiles of 0 do not make up a whole image"):
            data.whole_images("mine", tiles, torch.tensor(indices))
    for corners in [(0, 0), (0, 225)], [(0, 0), (225, 0)]:  # a line of pixels between two tiles
        with pytest.raises(ValueError, match="mine: the tiles of a do not make up a whole image"):
            rows = [TileRow("a", 0, 0, "train", *corner) for corner in corners]
            data.whole_images("mine", data.Tiles(None, None, rows, {}), torch.arange(2))
    with pytest.raises(ValueError, match="bcss: the tiles of"):
        tiles = data.Tiles(None, None, [TileRow("a", 9, 9, "train")] * 2, {})
        data.whole_images("bcss", tiles, torch.arange(2))


# -----------------------------------------------------------------------------
# Stains


def test_stains_scale_and_shift_their_own_density_alone():
    absorption = torch.nn.functional.normalize(torch.tensor((data.HEMATOXYLIN, data.EOSIN)))
    absorption = torch.cat((absorption, torch.linalg.cross(*absorption)[None]))  # the residual's
    amounts = torch.tensor([[0.6, 0.3, 0], [0.2, 0.7, 0], [0.6, 0.3, 0.1]])
    images = (-amounts @ absorption).exp()[..., None, None].expand(-1, -1, 4, 4).clone()
    changes = torch.tensor([[[1.2, 1, 1], [0, 0, 0]], [[1, 0.8, 1], [0.05, 0, 0]],
                            [[1, 1, 0.5], [0, 0, 0.04]]])
    changed = data.change_stain(images, changes)[:, :, 0, 0]
    amounts = torch.tensor([[0.72, 0.3, 0], [0.25, 0.56, 0], [0.6, 0.3, 0.09]])
    torch.testing.assert_close(changed, (-amounts @ absorption).exp(), atol=1e-5, rtol=0)


def test_stains_left_as_they_are_change_no_image_and_none_leaves_0_to_1():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0] = 0
    still = torch.tensor([[1.0, 1, 1], [0, 0, 0]]).expand(4, 2, 3)
    assert (data.change_stain(images.clone(), still) - images).abs().max() < 1 / 254
    wild = data.change_stain(images.clone(), still * 3 - 0.5)
    assert wild.isfinite().all() and wild.min() >= 0 and wild.max() <= 1


def test_black_has_the_optical_density_of_grey_level_1():
    images = torch.zeros(1, 3, 2, 2)
    half = torch.tensor([[[0.5, 0.5, 0.5], [0, 0, 0]]])
    expected = torch.full_like(images, (1 / 255)**0.5)
    torch.testing.assert_close(data.change_stain(images, half), expected, atol=1e-5, rtol=0)


def test_stains_change_before_the_light_does():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drawn = data.draw_augmentation(2, data.seeded_generator(0), names=["brightness"], stain=0.25)
    drawn["brightness"] = torch.tensor([[0.8], [1.2]])
    stained = data.change_stain(images.clone(), drawn["stain"])
    expected = data.change_brightness(stained, drawn["brightness"])
    changed, _ = data.augment(images, torch.zeros(2, 32, 32), drawn)
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=0)


# -----------------------------------------------------------------------------
# Runs


def fit(root, out, *flags):
    args = train.parse_args(["--data", "mine", "--data-root", str(root), "--recipe", "strong",
                             "--width", "2", "--batch-size", "4", "--epochs", "2", "--device",
                             "cpu", "--out", str(out), *flags])
    return train.main(args), args


@pytest.fixture(scope="module")
def strong(root):
    score, args = fit(root, root / "run")
    return root / "run", score, args


def test_the_strong_recipe_takes_its_values_where_no_flag_says_otherwise(strong):
    recorded = load(strong[0] / "best.pt")["args"]
    expected = {"lr": 2e-3, "loss": "bce+dice", "schedule": "cosine", "weight_decay": 0.05,
                "ema": 0.999, "windows": 0.25, "stain": 0.25, "recipe": "monuseg strong"}
    assert {name: recorded[name] for name in expected} == expected
    args = train.parse_args("--data synthetic --recipe strong --windows 0 --ema 0 --weight-decay 0 "
                            "--stain 0.5 --loss bce --schedule constant".split())
    assert not args.windows and not args.ema and not args.weight_decay and args.stain == 0.5
    assert args.out.name == ("synthetic-unet-standard-strong-lossbce-scheduleconstant-"
                             "weightdecay0.0-ema0.0-windows0.0-stain0.5-seed0")
    assert RECIPES["bcss strong"].get("loss") is None  # cross-entropy + Dice, as the paper
    args = train.parse_args("--recipe strong --data monuseg --split official".split())
    assert (args.epochs, args.batch_size, args.width) == (200, 8, 64)


def test_weights_and_batch_norms_statistics_are_averaged_and_its_count_is_copied():
    model, average = torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1)
    expected = [1.0, 0.0, 1.0]
    for step, value in enumerate((3.0, 5.0, -2.0)):
        model.weight.data[:] = value
        model(torch.tensor([3.0, value]).view(2, 1, 1, 1))
        train.update_ema(average, model, step, decay=0.15)
        decay = min(0.15, (step + 1) / (step + 10))
        expected = [decay * old + (1 - decay) * new.item() for old, new in zip(
            expected, (model.weight, model.running_mean, model.running_var))]
    assert [average.weight.item(), average.running_mean.item(),
            average.running_var.item()] == pytest.approx(expected)
    assert average.num_batches_tracked == 3


def test_the_average_is_what_gets_scored(strong):
    last = load(strong[0] / "last.pt")
    assert not torch.equal(last["model"]["head.weight"], last["trained"]["head.weight"])
    result, = evaluation.main(evaluation.parse_args([f"{strong[0]}/best.pt", "--device", "cpu"]))
    assert result["per_tile"]["iou"] == strong[1]


def test_a_killed_strong_run_goes_on_to_the_same_bits(strong, root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_before_batch(patch, 6)
        fit(root, tmp_path / "run", "--save-every", "0.000001")
    assert fit(root, tmp_path / "run", "--resume")[0] == strong[1]
    one, other = (load(path / "last.pt") for path in (tmp_path / "run", strong[0]))
    assert all(torch.equal(one[part][name], other[part][name])
               for part in ("model", "trained") for name in one[part])


@pytest.mark.parametrize("flag", ["--windows", "--stain", "--ema"])
def test_every_ingredient_can_be_left_out_and_makes_a_difference(strong, root, tmp_path, flag,
                                                                 capsys):
    fit(root, tmp_path / "run", flag, "0")
    one, other = (load(path / "last.pt")["model"] for path in (tmp_path / "run", strong[0]))
    assert not torch.equal(one["head.weight"], other["head.weight"])
    with pytest.raises(ValueError, match=f"{flag} 0.0: .* was trained with 0[.]"):
        fit(root, strong[0], flag, "0", "--resume")


# -----------------------------------------------------------------------------
# Whole images scored


def test_whole_images_are_scored_beside_tiles_and_on_other_masks(strong, root, capsys):
    flags = [f"{strong[0]}/best.pt", "--whole"]
    plain, views, other = (evaluation.main(evaluation.parse_args([*flags, *more]))[0] for more in
                           ([], ["--tta"], ["--data", "other"]))
    assert len(plain["images"]) == len({*plain["images"]} & {*"012345"}) == 1
    assert plain["per_image"]["iou"] == pytest.approx(plain["whole"]["iou"])  # of a single image
    assert abs(plain["whole"]["iou"] - plain["global"]["iou"]) < 0.2
    assert views["global"] == plain["global"] and views["whole"] != plain["whole"]
    assert other["whole"] != plain["whole"] and other["data"] == "other"
    out = capsys.readouterr().out
    assert "per whole image" in out and "whole images" in out


@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_perfect_network_scores_one_on_whole_images(wholes, num_classes):
    class Perfect(torch.nn.Module):
        max_side, side_multiple = None, 16

        def forward(self, images):
            x = images[:, :1] * data.IMAGENET_STD[0] + data.IMAGENET_MEAN[0] - 128.5 / 255
            return x if num_classes == 1 else torch.cat((-x, x, x - 1), dim=1)

    confusions = evaluation.evaluate_whole(Perfect(), *wholes, num_classes, torch.device("cpu"),
                                           True)
    metrics = evaluation.compute_metrics(confusions)
    assert len(confusions) == 6 and metrics["global"]["f1"] == 1


def test_an_ensemble_takes_the_mean_of_the_logits(strong, root, tmp_path, capsys):
    fit(root, tmp_path / "other", "--seed", "1")
    paths = [folder / "best.pt" for folder in (strong[0], tmp_path / "other")]
    models = [evaluation.build_model(load(path), path).eval() for path in paths]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = evaluation.Ensemble(models)(images)
    torch.testing.assert_close(both, (models[0](images) + models[1](images)) / 2)
    models[0].max_side, models[0].side_multiple = 224, 224  # as of Swin-UNet
    assert (evaluation.Ensemble(models).max_side, evaluation.Ensemble(models).side_multiple) == (
        224, 224)
    result, = evaluation.main(evaluation.parse_args([*map(str, paths), "--ensemble", "--whole"]))
    capsys.readouterr()
    alone = evaluation.main(evaluation.parse_args([*map(str, paths), "--whole"]))
    ious, out = [100 * one["whole"]["iou"] for one in alone], capsys.readouterr().out
    assert "| mIoU whole images | F1 whole images |" in out
    assert f"| {sum(ious) / 2:.2f} ± {abs(ious[0] - ious[1]) / 2**0.5:.2f} |" in out
    assert result["ensemble"] == [*map(str, paths)] and len(alone) == 2
    assert result["whole"]["iou"] not in [one["whole"]["iou"] for one in alone]
    one = torch.load(paths[0])
    three_classes, conv = (create_model("unet", skip, k, one["args"]["width"]).state_dict()
                           for skip, k in (("standard", 3), ("conv", 1)))
    for number, change in enumerate((
            {"split": "of other tiles"}, {"num_classes": 3, "model": three_classes},
            {"args": one["args"] | {"skip": "conv"}, "model": conv}, {"recipe_version": 2},
            {"weights": "of elsewhere"}, {"args": one["args"] | {"stain": 0.5}})):
        odd = tmp_path / f"{number}.pt"
        torch.save(one | change, odd)
        line = refused(capsys, evaluation, *paths, odd, "--ensemble")
        assert f"{odd}: was trained on other tiles than {paths[0]}, or with other flags" in line
    assert "--ensemble" in refused(capsys, evaluation, *paths, "--ensemble", "--figure", "x.png")
    assert "two runs or more" in refused(capsys, evaluation, paths[0], "--ensemble")


def test_flags_for_whole_images_are_refused_where_they_do_not_apply(root, tmp_path, capsys):
    assert "--tta is for --whole" in refused(capsys, evaluation, "best.pt", "--tta")
    tiles = data.load("mine", root)
    split = data.fingerprint(tiles.rows, data.split_tiles("mine", tiles.rows, "tile"))
    path = save_network(tmp_path / "best.pt", "unet", "standard", name="mine")
    torch.save(torch.load(path) | {"set": tiles.info, "data_root": str(root), "split": split}, path)
    assert "has seen parts of all images" in refused(capsys, evaluation, path, "--whole")


def test_whole_images_are_the_test_parts_and_each_average_has_its_own_name(strong, root, tmp_path,
                                                                           monkeypatch):
    def whole_images(name, tiles, indices):
        asked.append(indices)
        return {"a": None, "b": None}

    tiles, asked = data.load("mine", root), []
    parts = data.split_tiles("mine", tiles.rows, "image")
    monkeypatch.setattr(evaluation, "whole_images", whole_images)
    monkeypatch.setattr(evaluation, "evaluate_whole", lambda *_: torch.tensor(
        [[[6, 2], [0, 2]], [[0, 0], [0, 96]]]))  # IoU 2/4 and 96/96, together 98/100
    result, = evaluation.main(evaluation.parse_args([f"{strong[0]}/best.pt", "--whole"]))
    assert torch.equal(asked[0], parts["test"])
    assert result["per_image"]["iou"] == pytest.approx(0.75)
    assert result["whole"]["iou"] == pytest.approx(0.98)
    assert result["images"] == {"a": 0.5, "b": 1.0}
    checkpoint = torch.load(strong[0] / "best.pt")
    checkpoint["args"]["ignore_index"] = [0]  # then no false alarm in the background counts
    torch.save(checkpoint, tmp_path / "best.pt")
    result, = evaluation.main(evaluation.parse_args([f"{tmp_path}/best.pt", "--whole"]))
    assert result["whole"]["iou"] == 1


def test_the_average_is_what_is_validated(strong, root):
    best, tiles = load(strong[0] / "best.pt"), data.load("mine", root)
    model = evaluation.build_model(best, "")
    confusions, _ = evaluation.evaluate(model, tiles, data.split_tiles(
        "mine", tiles.rows, "image")["val"], loss_for(1), torch.device("cpu"), 4)
    assert evaluation.compute_metrics(confusions)["global"]["iou"] == pytest.approx(
        best["log"][-1]["val_iou_global"])


def test_the_average_is_taken_after_the_step(root, tmp_path):
    # With so small a decay, the average is all but the weights themselves.
    fit(root, tmp_path / "run", "--ema", "1e-4", "--schedule", "constant")
    last = load(tmp_path / "run/last.pt")
    for name, weights in last["trained"].items():
        torch.testing.assert_close(last["model"][name], weights, atol=1e-4, rtol=0)


def test_schedule_and_average_know_where_in_the_whole_run_they_are(root, tmp_path, monkeypatch):
    cosine, average, shares, steps = SCHEDULES["cosine"], train.update_ema, [], []
    monkeypatch.setitem(SCHEDULES, "cosine", lambda done: shares.append(done) or cosine(done))
    monkeypatch.setattr(train, "update_ema",
                        lambda *args: steps.append(args[2]) or average(*args))
    fit(root, tmp_path / "run")
    last = load(tmp_path / "run/last.pt")
    total = last["step"]
    assert steps == [*range(total)] and total == 2 * len(last["losses"])
    assert [*dict.fromkeys(shares)] == [step / total for step in range(total)]  # one a group
    for group in last["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(2e-3 * cosine((total - 1) / total))


def test_another_seed_shows_other_tiles_warps_and_windows(wholes):
    def first(seed, indices, **options):
        (images, _), = data.train_batches(tiles, torch.tensor(indices), 4, seed, 0, 1, "cpu",
                                          wholes=whole, **options)
        return images

    tiles, whole = wholes
    for indices, options in [
            (range(24), {"augmentations": "none"}),                           # the order alone
            ([0] * 4, {"augmentations": "rotation"}),                         # the warps alone
            (range(4), {"augmentations": "none", "windows": 1e-9})]:          # the places alone
        one, same, other = (first(seed, [*indices], **options) for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.allclose(one.sort(0)[0], other.sort(0)[0], atol=0.01)


def test_a_windows_elastic_shifts_grow_with_its_scale():
    lines, side = torch.linspace(-1, 1, data.GRID_CELLS + 1)[None], data.window_side(0.25)
    elastic = torch.zeros(1, 2, *[data.ELASTIC_CELLS + 3] * 2)
    elastic[:, 0] = 10 * 2 / 224  # everywhere 10 pixels, looked up to the right
    draws = {"matrix": torch.eye(2)[None], "columns": lines, "rows": lines, "elastic": elastic,
             "zoom": torch.tensor([1.2 * 224 / side])}
    x, y = ramp_window(draws, side)
    v, u = torch.meshgrid(*[torch.arange(224) - 111.5] * 2, indexing="ij")
    torch.testing.assert_close(x, 1.2 * (u + 10), atol=0.01, rtol=0)
    torch.testing.assert_close(y, 1.2 * v, atol=0.01, rtol=0)
