"""eval.py: scores worked out by hand, tables, curves, and the command on runs of test_train.py."""

import json
import runpy
import statistics
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train import (NOT_CHECKPOINTS, PARTS, fit, load, made_up_tiles, tiny_world,  # noqa: F401
                        whole)

import data
import eval as evaluation
import train
from eval import confusion_matrices, draw_curves, evaluate, predict, score
from losses import loss_for
from models import build_model


def count(k, *tiles):
    """Confusion matrices of tiles given as (true labels, predicted labels), strings of digits."""
    masks, found = (torch.tensor([[[int(label) for label in tile[i]]] for tile in tiles])
                    for i in (0, 1))
    logits = (torch.where(found == 1, 0.1, -3.0)[:, None] if k == 2 else
              torch.nn.functional.one_hot(found, k).permute(0, 3, 1, 2).float())
    return confusion_matrices(logits, masks)


NUCLEI = ("11111000", "11100100"), ("11110000", "10000000")  # TP FP FN: 3 1 2, 1 0 3
TISSUE = ("00001111", "00011122"), ("11111100", "11100000")


# Metrics


def test_one_class_by_hand():
    result = score(count(2, *NUCLEI))
    assert result["per_tile"] == pytest.approx({"iou": (3/6 + 1/4) / 2, "f1": (6/9 + 2/5) / 2})
    assert result["global"] == pytest.approx({"iou": 4/10, "f1": 8/14})
    assert result["tiles"] == pytest.approx([1/2, 1/4])
    row, = result["classes"]
    assert row == pytest.approx({"label": 1, "pixels": 9, "iou": 4/10, "f1": 8/14,
                                 "precision": 4/5, "recall": 4/9})


def test_three_classes_by_hand_and_one_predicted_but_nowhere_in_the_masks_scores_0():
    result = score(count(3, *TISSUE))
    tiles = (3/4 + 2/5) / 2, (2/5 + 3/6) / 2  # labels 0 and 1, which the masks hold
    assert result["tiles"] == pytest.approx(tiles)
    assert result["per_tile"] == pytest.approx({
        "iou": sum(tiles) / 2, "f1": ((6/7 + 4/7) / 2 + (4/7 + 6/9) / 2) / 2})
    assert result["global"] == pytest.approx({"iou": (5/9 + 5/11 + 0) / 3,
                                              "f1": (10/14 + 10/16 + 0) / 3})
    assert result["classes"] == [
        pytest.approx({"label": 0, "pixels": 6, "iou": 5/9, "f1": 10/14, "precision": 5/8,
                       "recall": 5/6}),
        pytest.approx({"label": 1, "pixels": 10, "iou": 5/11, "f1": 10/16, "precision": 5/6,
                       "recall": 5/10}),
        {"label": 2, "pixels": 0, "iou": 0, "f1": 0, "precision": 0, "recall": None}]


def test_a_class_that_occurs_nowhere_is_in_no_average():
    with_three, with_four = score(count(3, *TISSUE)), score(count(4, *TISSUE))
    assert with_four["classes"][3] == {"label": 3, "pixels": 0, "iou": None, "f1": None,
                                       "precision": None, "recall": None}
    for part in "per_tile", "global", "tiles":
        assert with_four[part] == pytest.approx(with_three[part])


def test_a_tile_without_nuclei_counts_in_the_global_average_alone():
    result = score(count(2, *NUCLEI, ("00000000", "11000000")))
    assert result["tiles"] == pytest.approx([1/2, 1/4, None])
    assert result["per_tile"]["iou"] == pytest.approx(3/8)
    assert result["global"]["iou"] == pytest.approx(4/12)
    assert score(count(2, ("00", "00")))["global"] == {"iou": None, "f1": None}


def test_ignored_labels_are_neither_counted_nor_scored():
    result = score(count(3, *TISSUE), ignore=[0])  # leaves true 1: found 1122 and 111000
    assert result["tiles"] == pytest.approx([2/4, 3/6])
    assert result["global"] == pytest.approx({"iou": (5/10 + 0) / 2, "f1": (10/15 + 0) / 2})
    assert [(row["label"], row["pixels"]) for row in result["classes"]] == [(1, 10), (2, 0)]


def test_f1_follows_from_iou_for_one_class():
    confusions = torch.randint(1, 99, (5, 2, 2), generator=torch.Generator().manual_seed(0))
    pairs = [score(confusions)["global"], *(score(one[None])["per_tile"] for one in confusions)]
    for pair in pairs:
        assert pair["f1"] == pytest.approx(2 * pair["iou"] / (1 + pair["iou"]))


def test_a_better_mask_scores_better():
    mask = made_up_tiles()[1][:1].long()
    results = [score(confusion_matrices(mask.roll(shift, 2)[:, None] - 0.5, mask))
               for shift in (0, 1, 3, 6, 20)]
    for average in "per_tile", "global":
        for name in "iou", "f1":
            values = [result[average][name] for result in results]
            assert values[0] == 1 and values == sorted(set(values), reverse=True)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_confusion_matrices_match_a_slow_loop_and_numpy(classes):
    chance, k = torch.Generator().manual_seed(classes), max(2, classes)
    logits = torch.randn(3, classes, 6, 7, generator=chance)
    masks = torch.randint(k, (3, 6, 7), generator=chance)
    found = (logits[:, 0].sigmoid() > 0.5).long() if classes == 1 else logits.argmax(1)
    slow = torch.zeros(3, k, k, dtype=torch.int64)
    for tile, row, column in np.ndindex(3, 6, 7):
        slow[tile, masks[tile, row, column], found[tile, row, column]] += 1
    confusions = confusion_matrices(logits, masks)
    assert torch.equal(confusions, slow) and confusions.sum() == 3 * 6 * 7
    for tile in range(3):
        pairs = masks[tile].numpy().ravel(), found[tile].numpy().ravel()
        expected, _, _ = np.histogram2d(*pairs, bins=k, range=[(0, k)] * 2)
        assert np.array_equal(confusions[tile], expected)


def test_one_logit_is_cut_at_probability_one_half_and_of_more_the_largest_wins():
    assert predict(torch.tensor([-9, -1e-6, 0, 1e-6, 9]).view(1, 1, 1, 5)).tolist() == [
        [[0, 0, 0, 1, 1]]]
    assert predict(torch.tensor([[-3.0, 5], [-2, 6], [-4, 5.5]]).view(1, 3, 1, 2)).tolist() == [
        [[1, 1]]]


@pytest.fixture
def judged(whole):  # noqa: F811
    """All sixteen tiles in some order, and how to evaluate a trained network on them."""
    images, masks, _ = made_up_tiles()
    model, order = build_model(load(whole.out / "best.pt"), ""), torch.randperm(16)
    return order, lambda indices, *args: evaluate(
        model, images, masks, indices, loss_for(1), torch.device("cpu"), *args)


def test_score_does_not_depend_on_batch_size_or_order(judged):
    order, judge = judged
    confusions, losses = judge(torch.arange(16), 16)
    assert confusions.shape == (16, 2, 2) and (confusions.sum((1, 2)) == 32 * 32).all()
    for batch_size in 1, 3, 8:
        again, losses_again = judge(order, batch_size)
        assert torch.equal(again, confusions[order])
        assert torch.allclose(losses_again, losses[order], atol=1e-6)


@pytest.mark.parametrize("world, tiles", [(2, 16), (3, 16), (4, 3)])
def test_processes_share_tiles_and_count_none_twice(judged, monkeypatch, world, tiles):
    (order, judge), shares = judged, []
    monkeypatch.setattr(evaluation.dist, "all_reduce", lambda values: shares.append(values + 0))
    for rank in range(world):
        judge(order[:tiles], 4, rank, world)
    confusions, losses = judge(order[:tiles], 4)
    assert len(shares) == 2 * world  # every process takes part, or the others would wait for ever
    assert torch.equal(sum(shares[::2]), confusions)
    assert torch.allclose(sum(shares[1::2]), losses, atol=1e-6)


# The command


def evaluated(capsys, *flags):
    results = evaluation.main(evaluation.parse_args([str(flag) for flag in flags]))
    return results, capsys.readouterr().out


def test_one_network_in_detail_scores_as_at_the_end_of_training(whole, capsys, tmp_path):  # noqa
    (result,), out = evaluated(capsys, whole.out / "best.pt", "--device", "cpu",
                               "--json", tmp_path / "scores.json")
    assert result["per_tile"]["iou"] == whole.score
    rows = {line.strip().split("  ")[0]: line.split() for line in out.splitlines()}
    nucleus = result["classes"][0]
    for name in "per_tile", "global":
        assert rows[name.replace("_", " ")][-2:] == [
            f"{100 * result[name][metric]:.2f}" for metric in ("iou", "f1")]
    assert rows["nucleus"][1:] == [*(f"{100 * nucleus[name]:.2f}" for name in (
        "iou", "f1", "precision", "recall")), str(nucleus["pixels"])]

    stored, = json.loads((tmp_path / "scores.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["args"]["width"] == 2 and len(stored["tiles"]) == 2
    assert score(torch.tensor([stored["confusion"]]))["global"] == stored["global"]
    assert np.sum(stored["confusion"]) == 2 * 32 * 32


def result(iou, f1, *flags, weights="from scratch"):
    args = vars(train.parse_args(["--data", "monuseg", *flags]))
    return {"args": args, "weights": weights, "per_tile": {"iou": iou, "f1": f1},
            "global": {"iou": iou - 0.1, "f1": f1 - 0.1}}


def test_several_networks_become_table_2_with_mean_and_deviation_over_seeds():
    conv = "--skip", "conv"
    results = [
        result(0.70, 0.80, *conv), result(0.72, 0.81, *conv, "--seed", "1"),
        result(0.74, 0.85, *conv, "--seed", "2"), result(0.6543, 0.7654, "--width", "32"),
        result(0.66, 0.77, "--epochs", "5"), result(0.5, 0.6, *conv, "--data", "bcss"),
        result(0.4, 0.5, "--model", "swin_unet", weights="a file"),
        result(0.3, 0.5, "--model", "swin_unet"),
        result(0.2, 0.5, *conv, "--data", "bcss", "--ignore-index", "0")]
    tables = {}
    for average in "per_tile", "global":
        lines = evaluation.table_2(results, average).splitlines()
        assert "monuseg" in lines[0] and "bcss" in lines[0]
        assert len({line.count("|") for line in lines}) == 1  # else it is no Markdown table
        tables[average] = {tuple(cells[:2]): cells[2:] for line in lines[2:]
                           if (cells := [cell.strip() for cell in line.strip("|").split("|")])}
    rows, nothing = tables["per_tile"], ["-", "-", "-"]
    assert rows["unet", "conv"] == [  # deviations: sqrt((4 + 0 + 4) / 2), sqrt((4 + 1 + 9) / 2)
        "72.00 ± 2.00 (67.32)", "82.00 ± 2.65 (80.28)", "3", "50.00 (33.78)", "60.00 (47.42)", "1"]
    assert rows["unet --width 32", "standard"] == ["65.43", "76.54", "1", *nothing]
    assert rows["unet --epochs 5", "standard"] == ["66.00", "77.00", "1", *nothing]
    assert rows["unet --ignore-index 0", "conv"] == [*nothing, "20.00", "50.00", "1"]
    assert rows["swin_unet", "standard"] == ["40.00 (63.98)", "50.00 (77.65)", "1", *nothing]
    assert rows["swin_unet --no-pretrained", "standard"] == ["30.00", "50.00", "1", *nothing]
    assert tables["global"]["unet", "conv"][:2] == ["62.00 ± 2.00", "72.00 ± 2.65"]
    with pytest.raises(ValueError, match="two runs of unet conv .*seed 2"):
        evaluation.table_2([*results, result(0.74, 0.85, *conv, "--seed", "2")], "per_tile")


def test_several_checkpoints_print_both_tables(whole, capsys, tmp_path):  # noqa: F811
    fit(tmp_path, "--seed", "1")
    results, out = evaluated(capsys, whole.out / "best.pt", tmp_path / "best.pt")
    rows = [line for line in out.splitlines() if line.startswith("| unet")]
    for row, average in zip(rows, ("per_tile", "global"), strict=True):
        ious = [100 * result[average]["iou"] for result in results]
        assert f"{statistics.mean(ious):.2f} ± {abs(ious[0] - ious[1]) / 2**0.5:.2f} |" in row


def test_the_papers_table_2():
    columns = "bcss", "bcss512", "monuseg"
    rows = [("unet", "standard", (30.44, 53.70), (23.96, 34.04), (66.27, 79.45)),
            ("unet", "conv", (33.78, 47.42), (23.45, 33.70), (67.32, 80.28)),
            ("unet", "fusion", None, None, (65.68, 79.03)),
            ("swin_unet", "standard", (57.55, 64.39), (47.45, 53.84), (63.98, 77.65)),
            ("swin_unet", "conv", (57.23, 64.16), (45.78, 53.12), (64.78, 78)),
            ("swin_unet", "fusion", (56.59, 63.69), (48.11, 55.06), (63.42, 76.96))]
    assert evaluation.PAPER == {(name, model, skip): pair for model, skip, *pairs in rows
                                for name, pair in zip(columns, pairs) if pair}


def refused(capsys, monkeypatch, *flags):
    """Start eval.py on what it must refuse with status 2 -> the one line that it says."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_and_its_code_not_run(whole, tmp_path, capsys,  # noqa
                                                               monkeypatch, kind):
    NOT_CHECKPOINTS[kind](tmp_path / "best.pt", whole.out)
    assert str(tmp_path / "best.pt") in refused(capsys, monkeypatch, tmp_path / "best.pt")
    assert not (tmp_path / "it ran").exists()


def test_tiles_other_than_those_of_the_training_are_refused(whole, capsys, monkeypatch):  # noqa
    images, masks, rows = made_up_tiles()
    monkeypatch.setattr(data, "load", lambda *_: (images[1:], masks[1:], rows[1:]))
    line = refused(capsys, monkeypatch, whole.out / "best.pt")
    assert "other tiles" in line and str(whole.out / "best.pt") in line


# Curves


@pytest.mark.parametrize("epochs", [1, 50])
def test_curves_show_every_run_in_its_colour_in_both_panels(tmp_path, epochs):
    logs = {f"run {i}": [{"epoch": n, "train_loss": 0.9 - 0.2 * i, "val_loss": 1.0 - 0.2 * i,
                          "val_iou_per_tile": 0.2 + 0.2 * i} for n in range(1, epochs + 1)]
            for i in range(3)}
    draw_curves(logs, tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))[:420]  # no legend
    colours = [tuple(bytes.fromhex(colour[1:])) for colour in evaluation.COLOURS[:3]]
    for panel in picture[:, :600], picture[:, 600:]:
        heights = [np.nonzero((panel == colour).all(axis=2))[0] for colour in colours]
        assert all(len(height) > (20 if epochs == 1 else 500) for height in heights)
    assert heights[0].mean() > heights[1].mean() > heights[2].mean()  # by IoU, from below


@pytest.mark.parametrize("iou", [0.0, 0.3, 1.0])
def test_curves_of_a_score_that_never_moves(tmp_path, iou):
    logs = {"run": [{"train_loss": 0.5, "val_loss": 0.5, "val_iou_per_tile": iou}] * 3}
    draw_curves(logs, tmp_path / "curves.png")
    panel = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))[:460, 600:]
    blue = tuple(bytes.fromhex(evaluation.COLOURS[0][1:]))
    heights = np.nonzero((panel == blue).all(axis=2))[0]
    assert 50 < heights.min() and heights.max() < 410  # between the axes


# Figures


def colours_of(picture):
    return {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3)}


def test_one_class_shows_found_missed_and_mistaken_pixels_apart():
    mask, found = np.array([[1, 1, 0, 0]], np.uint8), np.array([[1, 0, 1, 0]], np.uint8)
    assert [tuple(colour) for colour in evaluation.paint(found, mask, 1)[0].tolist()] == [
        evaluation.FOUND, evaluation.MISSED, evaluation.FALSE_ALARM, (0, 0, 0)]


def test_more_classes_show_their_palette_colour_and_a_legend(tmp_path):
    labels = np.repeat(np.arange(22, dtype=np.uint8), 11)[:224][None].repeat(224, 0)
    image = np.full((224, 224, 3), 77, np.uint8)
    evaluation.draw_figure(["one", "two"], [("tile", image, labels, [labels, labels], ["", ""])],
                           data.CLASSES["bcss512"], tmp_path / "figure.png")
    picture = Image.open(tmp_path / "figure.png")
    assert picture.width == 4 * 234 + 10
    assert {tuple(colour) for colour in data.PALETTE[labels[0]].tolist()} <= colours_of(
        picture.crop((244, 40, 468, 264)))
    legend = picture.crop((0, 290, *picture.size))
    assert {tuple(data.PALETTE[label].tolist()) for label in set(labels[0])} <= colours_of(legend)


def test_figure_and_curves_from_checkpoints(whole, capsys, tmp_path):  # noqa: F811
    fit(tmp_path / "run", "--seed", "1", "--epochs", "1")
    _, out = evaluated(capsys, whole.out / "best.pt", tmp_path / "run/best.pt", "--figure",
                       tmp_path / "figure.png", "--curves", tmp_path / "curves.png")
    assert "figure.png: 2 test tiles" in out  # all there are, each once
    assert Image.open(tmp_path / "figure.png").width == 4 * 234 + 10
    assert Image.open(tmp_path / "curves.png").size[0] == 1200
    test = made_up_tiles()[2][PARTS["test"][0]]
    name = f"{test[0]}/{test[1]}/{test[2]}"
    _, out = evaluated(capsys, whole.out / "best.pt", "--figure", tmp_path / "figure.png",
                       "--tiles", name)
    assert "figure.png: 1 test tiles" in out
    with pytest.raises(ValueError, match="nowhere/0/0: no such test tile"):
        evaluated(capsys, whole.out / "best.pt", "--figure", tmp_path / "x.png",
                  "--tiles", "nowhere/0/0")
