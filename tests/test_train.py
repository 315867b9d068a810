"""train.py: what a run writes and refuses, alone and in pairs, on sixteen made-up tiles."""

import itertools
import json
import math
import os
import random
import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (OFTEN, PARTS, arguments, assert_same_run, content, fit, leaves, load,
                      made_up_tiles, read_log, read_scores, refused_run, same, stop_before_batch)
from PIL import Image
from torch import nn

import data
import eval as evaluation
import losses
import train
import utils
from losses import loss_for
from models import SKIPS, build_model, create_model

pytestmark = pytest.mark.usefixtures("tiny_set")
COLUMNS = ["epoch", "train_loss", "val_loss", "val_iou_per_tile", "val_f1_per_tile",
           "val_iou_global", "val_f1_global"]


# What a run leaves behind


def test_a_run_writes_a_log_curves_and_checkpoints_of_plain_values(whole):
    assert {*content(whole.out)} == {"best.pt", "curves.png", "last.pt", "log.csv", "scores.json"}
    scores = read_scores(whole.out)
    assert scores["per_tile"]["iou"] == whole.score and scores["args"]["width"] == 2
    assert scores["images"] == [made_up_tiles().rows[index].image for index in PARTS["test"]]
    assert scores["recipe_version"] == train.RECIPE_VERSION
    assert scores["log"] == read_log(whole.out) and torch.__version__ == scores["torch"]
    assert "cpu" in scores["device"] and len(scores["tiles"]) == len(scores["images"])
    assert [list(row) for row in read_log(whole.out)] == 3 * [COLUMNS]
    assert [row["epoch"] for row in read_log(whole.out)] == [1, 2, 3]
    assert len(Image.open(whole.out / "curves.png").getcolors(100_000)) > 5
    for name in "best.pt", "last.pt":
        kinds = {type(value) for value in leaves(load(whole.out / name)).values()}
        assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}
    adam = load(whole.out / "last.pt")["optimizer"]
    for group in adam["param_groups"]:
        assert (group["lr"], group["eps"], *group["betas"]) == (1e-3, 1e-8, 0.9, 0.999)
        assert group["weight_decay"] == 0
    assert {"exp_avg", "exp_avg_sq"} < set(adam["state"][0])


def test_scores_are_those_of_untouched_tiles_worked_out_by_hand(whole):
    def iou(index):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        image = ((images[index] / 255 - mean) / std).permute(2, 0, 1)[None]
        with torch.no_grad():
            found, mask = model(image)[0, 0].numpy() > 0, masks[index].numpy() == 1
        return (found & mask).sum() / (found | mask).sum()

    images, masks = made_up_tiles().images, made_up_tiles().masks
    best = load(whole.out / "best.pt")
    model = build_model(best, "").eval()
    validated = read_log(whole.out)[len(best["log"]) - 1]["val_iou_per_tile"]
    assert validated == pytest.approx(np.mean([iou(index) for index in PARTS["val"]]))
    assert whole.score == pytest.approx(np.mean([iou(index) for index in PARTS["test"]])) != 0


def test_the_log_holds_means_over_tiles_and_every_average_under_its_name(tmp_path, monkeypatch):
    def recorded(*args):
        def loss(logits, masks):
            values = loss_for(*args)(logits, masks)
            (trained if logits.requires_grad else scored).append(values.detach().clone())
            return values
        return loss

    trained, scored = [], []
    monkeypatch.setattr(train, "loss_for", recorded)
    fit(tmp_path, "--epochs", "1")
    row, = read_log(tmp_path)
    assert row["train_loss"] == pytest.approx(torch.cat(trained).mean().item())
    assert row["val_loss"] == pytest.approx(torch.cat(scored)[:3].mean().item())  # then the test's
    confusions, _ = evaluation.evaluate(build_model(load(tmp_path / "best.pt"), ""),
                                        made_up_tiles(), PARTS["val"], loss_for(1),
                                        torch.device("cpu"), 2)
    metrics = evaluation.compute_metrics(confusions)
    assert metrics["global"] != pytest.approx(metrics["per_tile"])
    for name in "iou", "f1":
        for average in "per_tile", "global":
            assert row[f"val_{name}_{average}"] == pytest.approx(metrics[average][name])


def test_best_is_the_epoch_of_the_best_validation_iou_also_after_a_resume(tmp_path, monkeypatch):
    def run(out, ious, *flags):  # one for each epoch's validation, and one for the test
        def score(confusions, *args):
            tested[out] = confusions
            result = evaluation.compute_metrics(confusions, *args)
            return result | {"per_tile": result["per_tile"] | {"iou": next(values)}}

        values = iter(ious)
        monkeypatch.setattr(train, "compute_metrics", score)
        assert fit(tmp_path / out, *flags) == ious[-1]
        return load(tmp_path / out / "best.pt")

    tested = {}
    run("two", [0.1, 0.4, 0.0], "--epochs", "2")
    best = run("run", [0.1, 0.4, 0.3, 0.0])
    assert same(best["model"], load(tmp_path / "two/last.pt")["model"])
    assert torch.equal(tested["run"], tested["two"])
    assert len(best["log"]) == 2
    assert len(run("tie", [0.4, 0.4, 0.1, 0.0])["log"]) == 2  # of equal epochs, the later one
    longer = run("run", [0.35, 0.0], "--epochs", "4", "--resume")
    assert len(longer["log"]) == 2 and longer["args"]["epochs"] == 4
    assert len(run("run", [0.45, 0.0], "--epochs", "5", "--resume")["log"]) == 5


@pytest.mark.parametrize("name, model, epochs, batch_size, lr", [
    ("monuseg", "unet", 50, 8, 1e-3), ("monuseg", "swin_unet", 50, 8, 1e-3),
    ("bcss", "unet", 10, 50, 1e-3), ("bcss", "swin_unet", 10, 50, 1e-5),
    ("bcss512", "unet", 10, 50, 1e-3), ("bcss512", "swin_unet", 10, 50, 1e-5),
    ("synthetic", "unet", 8, 2, 1e-3), ("synthetic", "swin_unet", 8, 2, 1e-4)])  # these two: ours
def test_defaults_are_the_papers_recipe(name, model, epochs, batch_size, lr):
    for skip in SKIPS:
        args = train.parse_args(["--data", name, "--model", model, "--skip", skip, "--seed", "3"])
        assert (args.epochs, args.batch_size, args.lr) == (epochs, batch_size, lr)
        assert (args.width, args.split) == (16 if name == "synthetic" else 64, "tile")
        assert not args.ignore_index
        assert args.out == Path(f"runs/{name}-{model}-{skip}-seed3")


@pytest.mark.parametrize("flags, folder", [
    ("--data monuseg --width 32", "monuseg-unet-standard-width32-seed0"),
    ("--data monuseg --split official", "monuseg-unet-standard-official-seed0"),
    ("--data bcss --skip conv --skip-depth 3", "bcss-unet-conv-skipdepth3-seed0"),
    ("--data bcss --skip conv --skip-depth 1", "bcss-unet-conv-seed0"),
    ("--data bcss --ignore-index 0 2", "bcss-unet-standard-ignoreindex0-2-seed0"),
    ("--data bcss --ignore-index 2 0 2", "bcss-unet-standard-ignoreindex0-2-seed0"),
    ("--data bcss --augment elastic flip", "bcss-unet-standard-augmentflip-elastic-seed0"),
    ("--data monuseg --model swin_unet --no-pretrained --lr 1e-4 --epochs 5",
     "monuseg-swin_unet-standard-epochs5-lr0.0001-scratch-seed0"),
    ("--data monuseg --width 16 --epochs 5", "monuseg-unet-standard-epochs5-width16-seed0"),
    ("--recipe strong --data monuseg-exact --split official",
     "monuseg-exact-unet-standard-official-strong-seed0")])
def test_runs_that_differ_have_folders_of_their_own(flags, folder):
    assert train.parse_args(flags.split()).out == Path("runs", folder)


# Chance


def test_the_seed_draws_the_initial_weights():
    model, *_ = train.build_training(train.parse_args(["--width", "2", "--seed", "5"]), 1,
                                     torch.device("cpu"))
    torch.manual_seed(5)
    expected = create_model("unet", "standard", 1, 2).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_seed_fixes_the_run_and_another_changes_all_but_the_split(whole, tmp_path):
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert fit(tmp_path / "run") == whole.score
    assert_same_run(tmp_path / "run", whole.out)
    fit(tmp_path / "other", "--seed", "1", "--epochs", "1")
    one, other = load(whole.out / "last.pt"), load(tmp_path / "other/last.pt")
    assert one["split"] == other["split"]
    assert not torch.equal(one["model"]["head.weight"], other["model"]["head.weight"])
    assert read_log(whole.out)[0]["train_loss"] != read_log(tmp_path / "other")[0]["train_loss"]
    first, second = (train.build_training(train.parse_args(["--seed", seed, "--width", "2"]), 1,
                                          torch.device("cpu"))[0] for seed in "01")
    assert not torch.equal(first.head.weight, second.head.weight)  # not the order alone


@pytest.fixture
def seen(monkeypatch):
    """Every batch that is augmented from now on: images, draws, images and masks that result."""
    def spy(images, masks, draws):
        batches.append((images, draws, *augment(images, masks, draws)))
        return batches[-1][2:]

    batches, augment = [], data.augment
    monkeypatch.setattr(data, "augment", spy)
    return batches


def test_memory_format_follows_the_cpu_and_losses_differ_by_rounding_alone(tmp_path, monkeypatch):
    def run(out, kind, *flags):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)
        layouts.clear()
        fit(tmp_path / out, *flags)
        assert layouts[0] == (kind == "AVX512")
        return [row["train_loss"] for row in read_log(tmp_path / out)]

    layouts, forward = [], nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda conv, x: layouts.append(
        x.is_contiguous(memory_format=torch.channels_last)) or forward(conv, x))
    losses = run("one", "AVX2")
    assert run("other", "AVX512") == pytest.approx(losses, rel=1e-3)
    run("both", "AVX512", "--epochs", "1")
    assert run("both", "AVX2", "--resume") == pytest.approx(losses, rel=1e-3)


def test_training_tiles_alone_are_augmented_each_time_anew(tmp_path, seen):
    def number(image):
        pixels = (image.permute(1, 2, 0) * 255).round().byte()
        return next(i for i, tile in enumerate(made_up_tiles().images) if torch.equal(tile, pixels))

    fit(tmp_path / "run", "--epochs", "2")
    order = [number(image) for images, *_ in seen for image in images]
    assert len(order) == 20 and set(order) <= set(PARTS["train"].tolist())
    assert len(set(order[:10])) == len(set(order[10:])) == 10 and order[:10] != order[10:]
    assert not any(all(torch.equal(one[1][name], other[1][name]) for name in one[1])
                   for one, other in itertools.combinations(seen, 2))


def test_the_network_is_trained_on_what_augmentation_gives_normalised(tmp_path, monkeypatch, seen):
    def watched(*args):
        model = create_model(*args)
        model.register_forward_pre_hook(
            lambda model, inputs: shown.append(inputs[0].clone()) if model.training else None)
        return model

    shown = []
    monkeypatch.setattr(train, "create_model", watched)
    fit(tmp_path, "--epochs", "1")
    for images, (*_, augmented, _) in zip(shown, seen, strict=True):
        torch.testing.assert_close(images, data.normalize(augmented))


# When it saves


@pytest.fixture
def made_up_time(monkeypatch):
    """train.py's clock, a list that ends in the time, and {file: steps at which it was saved}."""
    def save(path, checkpoint):
        saved[path.name].append(checkpoint["step"])
        utils.save_checkpoint(path, checkpoint)

    clock, saved = [0.0], {"last.pt": [], "best.pt": []}
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: clock[-1]))
    monkeypatch.setattr(train, "save_checkpoint", save)
    return clock, saved


def test_last_pt_is_written_every_five_minutes_and_after_every_epoch(tmp_path, monkeypatch,
                                                                     made_up_time):
    def augment(*args):  # each batch takes two minutes
        clock.append(clock[-1] + 120)
        return original(*args)

    (clock, saved), original = made_up_time, data.augment
    monkeypatch.setattr(data, "augment", augment)
    fit(tmp_path, "--epochs", "2")
    assert saved["last.pt"] == [3, 5, 8, 10]


@pytest.mark.parametrize("seconds, expected", [(1, [5, 10, 25]), (40, [5, 10, 15, 20, 25])])
def test_a_short_epoch_is_saved_if_it_is_the_best_or_the_last(tmp_path, monkeypatch, made_up_time,
                                                              seconds, expected):
    def validate(*args):  # each epoch takes so many seconds
        clock.append(clock[-1] + seconds)
        iou = (0.2, 0.4, 0.3, 0.3, 0.1)[args[1] - 1]
        return original(*args) | {"val_iou_per_tile": iou}

    (clock, saved), original = made_up_time, train.validate
    monkeypatch.setattr(train, "validate", validate)
    fit(tmp_path / "whole", "--epochs", "5")
    assert saved == {"last.pt": expected, "best.pt": [5, 10]}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_before_batch(patch, 22)  # in the last epoch
        fit(tmp_path / "run", "--epochs", "5")
    assert load(tmp_path / "run/last.pt")["step"] == expected[-2]
    assert len(read_log(tmp_path / "run")) == 4
    fit(tmp_path / "run", "--epochs", "5", "--resume")
    assert same(load(tmp_path / "run/last.pt")["model"], load(tmp_path / "whole/last.pt")["model"])
    assert load(tmp_path / "run/best.pt")["step"] == 10
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


@pytest.mark.parametrize("flags", [[], ["--checkpointing"], ["--compile"]])
def test_flags_of_speed_and_memory_reach_the_network(tmp_path, monkeypatch, flags):
    made, compiled = [], []
    monkeypatch.setattr(train, "create_model",
                        lambda *args: made.append(create_model(*args)) or made[-1])
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    fit(tmp_path, "--epochs", "1", *flags)
    assert made[0].checkpointing == ("--checkpointing" in flags)
    assert compiled == (made if "--compile" in flags else [])


# Several processes


def per_tile_norm():
    nn.BatchNorm2d = lambda channels: nn.GroupNorm(1, channels)


@pytest.fixture
def start_pair(start):
    """Start two processes, as torchrun does on one node or on two -> them, when they have ended."""
    def run(out, *flags, folders=(), **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        nodes = [{"LOCAL_RANK": "0", "folder": folder} for folder in folders]
        pair = [start(out, *flags, RANK=rank, WORLD_SIZE="2", MASTER_PORT=port,
                      MASTER_ADDR="127.0.0.1", **where, **environment)
                for rank, where in zip("01", nodes or [{"LOCAL_RANK": rank} for rank in "01"])]
        for process in pair:
            process.join(60)
        return pair
    return run


def test_two_processes_are_one_with_the_same_batch(start_pair, tmp_path, monkeypatch):
    """Tiles are normalised one by one: on CPUs BatchNorm's statistics are of a process's share."""
    flags = "--batch-size", "5", "--lr", "0.01"  # three tiles on one, two on the other
    pair = start_pair(tmp_path / "pair", *flags, before=per_tile_norm)
    monkeypatch.setattr(nn, "BatchNorm2d", lambda channels: nn.GroupNorm(1, channels))
    alone = fit(tmp_path / "alone", *flags)
    assert [process.exitcode for process in pair] == [0, 0], pair[0].said(".err")
    told = float(re.search(r"per tile +([\d.]+)", pair[0].said(".out"))[1]) / 100
    assert told == pytest.approx(alone, abs=1.5e-4) and alone > 0.05  # told in steps of 1e-4
    assert pair[1].said(".out") == ""
    logs = [leaves(read_log(tmp_path / name)) for name in ("pair", "alone")]
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)


def test_two_nodes_need_no_common_disk(start_pair, tmp_path):
    """Rank 0 alone reads and writes: the second node's folder stays empty, also on a resume."""
    nodes = tmp_path / "node 0", tmp_path / "node 1"
    for node in nodes:
        node.mkdir()
    for epochs in "1", "2":
        pair = start_pair("run", "--epochs", epochs, "--resume", folders=nodes)
        assert [process.exitcode for process in pair] == [0, 0], pair[1].said(".err")
    scores = json.loads((nodes[0] / "run/scores.json").read_text())
    assert len(scores["log"]) == scores["processes"] == 2
    assert not list(nodes[1].iterdir())


def test_all_processes_validate_the_network_of_rank_0(start_pair, tmp_path):
    """On CPUs each has BatchNorm statistics of its own share."""
    start_pair(tmp_path / "run", "--epochs", "1")
    last = load(tmp_path / "run/last.pt")
    _, validated = evaluation.evaluate(build_model(last, ""), made_up_tiles(), PARTS["val"],
                                       loss_for(1), torch.device("cpu"), 2)
    assert last["log"][-1]["val_loss"] == pytest.approx(validated.mean().item(), rel=1e-5)


def test_a_refusal_is_told_by_one_of_the_processes(start_pair, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").write_bytes(b"no checkpoint")
    pair = start_pair("run", "--resume")
    assert [process.exitcode for process in pair] == [2, 2]
    line, = pair[0].said(".err").splitlines()
    assert "last.pt" in line and not pair[1].said(".err")


def test_a_batch_has_a_tile_for_every_process(tmp_path):
    args = train.parse_args(arguments(tmp_path / "run", "--batch-size", "1"))
    with pytest.raises(ValueError, match="--batch-size 1: .* no fewer than there are processes, 2"):
        train.read_data(args, world_size=2)


def other_tiles_on_rank_1():
    if os.environ["RANK"] == "1":
        data.load = lambda *_: data.Tiles(**vars(made_up_tiles()) | {
            "rows": [row._replace(image=f"other {row.image}") for row in made_up_tiles().rows]})


def no_tiles(name, root, _):
    raise data.not_prepared(name, root)


def no_tiles_on_rank_1():
    if os.environ["RANK"] == "1":
        data.load = no_tiles


def nan_and_a_fast_clock_on_rank_1():
    losses.loss_for = lambda *_: lambda logits, masks: math.nan * logits.mean(dim=(1, 2, 3))
    normalize, clock = data.normalize, time.time
    data.normalize = lambda images: time.sleep(0.2) or normalize(images)
    if os.environ["RANK"] == "1":
        time.time = lambda: 3 * clock()


def test_a_loss_that_is_not_finite_is_told_whichever_process_would_see_it_first(start_pair):
    pair = start_pair("run", before=nan_and_a_fast_clock_on_rank_1)
    assert "the loss is nan in epoch 1" in pair[0].said(".err")


@pytest.mark.parametrize("before, said", [
    (other_tiles_on_rank_1, "nodes have different tiles"),
    (no_tiles_on_rank_1, "data/monuseg: monuseg is not prepared")])
def test_nodes_with_different_tiles_or_none_are_refused(start_pair, before, said):
    pair = start_pair("run", before=before)
    assert [process.exitcode for process in pair] == [2, 2]  # neither waits for the other
    assert said in pair[0].said(".err")


# Learning


def test_model_overfits_two_tiles():
    tiles = data.synthetic_tiles(2)
    images, masks = data.get_batch(tiles, torch.arange(2), "cpu")
    images, masks = images[..., :64, :64], masks[..., :64, :64]
    torch.manual_seed(0)
    model = create_model("unet", "conv", 1, width=8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(90):
        optimizer.zero_grad()
        loss_for(1)(model(data.normalize(images)), masks).mean().backward()
        optimizer.step()
    with torch.no_grad():
        confusions = evaluation.confusion_matrices(model.eval()(data.normalize(images)), masks)
    assert min(evaluation.compute_metrics(confusions)["tiles"]) > 0.9


def test_loss_decreases_on_synthetic_tiles(tmp_path, monkeypatch):
    tiles = data.synthetic_tiles(20)
    tiles = data.Tiles(tiles.images[:, :64, :64], tiles.masks[:, :64, :64], tiles.rows,
                       tiles.info)
    monkeypatch.setattr(train, "load", lambda *_: tiles)
    fit(tmp_path, "--data", "synthetic", "--width", "4", "--epochs", "6", "--lr", "0.005")
    first, *_, last = read_log(tmp_path)
    assert last["train_loss"] < 0.8 * first["train_loss"] and last["val_iou_per_tile"] > 0.2


# What is refused, and what stops a run


@pytest.mark.parametrize("flag, value", [
    ("--epochs", "0"), ("--epochs", "1.5"), ("--batch-size", "0"), ("--batch-size", "-2"),
    ("--batch-size", "12"), ("--lr", "-1"), ("--lr", "0"), ("--lr", "nan"), ("--lr", "inf"),
    ("--width", "0"), ("--save-every", "0"), ("--device", "nonsense"), ("--device", "meta"),
    ("--width", "1000000000"), ("--epochs", "1" + 20 * "0"), ("--seed", "-1"),
    ("--seed", str(2**64)), ("--ignore-index", "0")])
def test_an_impossible_value_is_refused_by_name(tmp_path, capsys, flag, value):
    line = refused_run(capsys, tmp_path / "run", flag, value)
    assert flag in line and value in line and not (tmp_path / "run").exists()


def test_width_is_the_u_nets_and_a_folder_must_be_one(tmp_path, capsys):
    assert "--width" in refused_run(capsys, tmp_path / "run", "--model", "swin_unet")
    (tmp_path / "file").touch()
    assert re.search(r"file(\W+run)?: ", refused_run(capsys, tmp_path / "file" / "run"))
    assert "file' is not a folder" in refused_run(capsys, tmp_path / "file")
    assert "'' is not a folder" in refused_run(capsys, "")


@pytest.mark.parametrize("flags, said", [
    ("--no-pretrained", "--no-pretrained are for networks"),
    ("--weights swin.pth", "--no-pretrained are for networks"),
    ("--model swin_unet --weights swin.pth --no-pretrained", "--no-pretrained: not allowed with"),
    ("--data mine/", "'mine/' is not the name of a data set"),
    ("--augment none flip", "--augment: all and none stand alone")])
def test_flags_that_do_not_go_together_are_refused(tmp_path, capsys, flags, said):
    assert said in refused_run(capsys, tmp_path / "run", *flags.split())


def test_a_validation_loss_that_is_not_a_number_stops_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "loss_for", lambda *args: lambda logits, masks: loss_for(*args)(
        logits, masks) * (1 if logits.requires_grad else math.nan))
    assert "nan in epoch 1, validation tile 1" in refused_run(capsys, tmp_path, "--epochs", "1")
    assert not [*tmp_path.glob("*.pt")]


@pytest.mark.parametrize("flags, found", [((), 5), (OFTEN, 7)])
def test_nan_loss_stops_a_run_and_spoils_no_checkpoint(whole, tmp_path, capsys, monkeypatch,
                                                       flags, found):
    def poisoned(*args):  # the third training batch's loss is not a number
        def loss(logits, masks):
            values = loss_for(*args)(logits, masks)
            return values * math.nan if logits.requires_grad and next(count) == 3 else values
        count = itertools.count(1)
        return loss

    fit(tmp_path / "run", "--epochs", "1")  # a finished run, which may be made longer
    before = content(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_for", poisoned)
        line = refused_run(capsys, tmp_path / "run", *flags, "--resume")
    assert all(part in line for part in ("nan", "epoch 2", "step 3", "--lr", "last.pt"))
    assert load(tmp_path / "run/last.pt")["step"] == found
    changed = {"last.pt": 0, "best.pt": 0}  # the latter with another clock
    assert content(tmp_path / "run") | changed == before | changed
    assert fit(tmp_path / "run", "--resume") == whole.score
    assert_same_run(tmp_path / "run", whole.out)


def test_a_rate_far_too_high_ends_with_a_sentence_and_finite_weights(tmp_path, capsys):
    for name, flags in ("often", OFTEN), ("seldom", ()):
        out = tmp_path / name
        line = refused_run(capsys, out, "--lr", "1e39", *flags)
        assert re.search(r"(loss is (nan|inf)|weights are not finite) in epoch \d", line)
        assert all(value.isfinite().all() for path in out.glob("*.pt")
                   for value in load(path)["model"].values())
