"""eval.py: scores worked out by hand, and the command on runs of the made-up tiles."""

import json
import multiprocessing
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import NOT_CHECKPOINTS, PARTS, fit, made_up_tiles, refused
from PIL import Image

import data
import eval as evaluation
import train
from eval import compute_metrics, confusion_matrices, evaluate, logits_to_labels
from losses import loss_for
from models import build_model
from utils import load_checkpoint

pytestmark = pytest.mark.usefixtures("tiny_set")


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
    result = compute_metrics(count(2, *NUCLEI))
    assert result["per_tile"] == pytest.approx({"iou": (3/6 + 1/4) / 2, "f1": (6/9 + 2/5) / 2})
    assert result["global"] == pytest.approx({"iou": 4/10, "f1": 8/14})
    assert result["tiles"] == pytest.approx([1/2, 1/4])
    row, = result["classes"]
    assert row == pytest.approx({"label": 1, "pixels": 9, "iou": 4/10, "f1": 8/14,
                                 "precision": 4/5, "recall": 4/9})


def test_three_classes_by_hand_and_one_predicted_but_nowhere_in_the_masks_scores_0():
    result = compute_metrics(count(3, *TISSUE))
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
    with_three, with_four = (compute_metrics(count(k, *TISSUE)) for k in (3, 4))
    assert with_four["classes"][3] == {"label": 3, "pixels": 0, "iou": None, "f1": None,
                                       "precision": None, "recall": None}
    for part in "per_tile", "global", "tiles":
        assert with_four[part] == pytest.approx(with_three[part])


def test_a_tile_without_nuclei_counts_in_the_global_average_alone():
    result = compute_metrics(count(2, *NUCLEI, ("00000000", "11000000")))
    assert result["tiles"] == pytest.approx([1/2, 1/4, None])
    assert result["per_tile"]["iou"] == pytest.approx(3/8)
    assert result["global"]["iou"] == pytest.approx(4/12)
    empty = compute_metrics(count(2, ("00", "00")))
    assert empty["global"] == empty["per_tile"] == {"iou": None, "f1": None}


def test_ignored_labels_are_neither_counted_nor_scored():
    result = compute_metrics(count(3, *TISSUE), ignore=[0])  # leaves true 1: found 1122 and 111000
    assert result["tiles"] == pytest.approx([2/4, 3/6])
    assert result["global"] == pytest.approx({"iou": (5/10 + 0) / 2, "f1": (10/15 + 0) / 2})
    assert [(row["label"], row["pixels"]) for row in result["classes"]] == [(1, 10), (2, 0)]


def test_f1_follows_from_iou_for_one_class():
    confusions = torch.randint(1, 99, (5, 2, 2), generator=torch.Generator().manual_seed(0))
    pairs = [compute_metrics(confusions)["global"],
             *(compute_metrics(one[None])["per_tile"] for one in confusions)]
    for pair in pairs:
        assert pair["f1"] == pytest.approx(2 * pair["iou"] / (1 + pair["iou"]))


def test_a_better_mask_scores_better():
    mask = made_up_tiles().masks[:1].long()
    results = [compute_metrics(confusion_matrices(mask.roll(shift, 2)[:, None] - 0.5, mask))
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
    one = torch.tensor([-9, -1e-6, 0, 1e-6, 9]).view(1, 1, 1, 5)
    three = torch.tensor([[-3.0, 5], [-2, 6], [-4, 5.5]]).view(1, 3, 1, 2)
    assert logits_to_labels(one).tolist() == [[[0, 0, 0, 1, 1]]]
    assert logits_to_labels(three).tolist() == [[[1, 1]]]


@pytest.fixture
def judged(whole):
    """All sixteen tiles in some order, and how to evaluate a trained network on them."""
    model = build_model(load_checkpoint(whole.out / "best.pt"), "")
    return torch.randperm(16), lambda indices, *args: evaluate(
        model, made_up_tiles(), indices, loss_for(1), torch.device("cpu"), *args)


def test_score_does_not_depend_on_batch_size_or_order(judged):
    order, judge = judged
    confusions, losses = judge(torch.arange(16), 16)
    assert confusions.shape == (16, 2, 2) and (confusions.sum((1, 2)) == 32 * 32).all()
    for batch_size in 1, 3, 8:
        again, losses_again = judge(order, batch_size)
        assert torch.equal(again, confusions[order])
        assert torch.allclose(losses_again, losses[order], atol=1e-6)


def join(rank, world_size, folder, judge, indices):
    """The body of a process: take part in judging, and write what comes out."""
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank,
                            world_size=world_size)
    torch.save(judge(indices, 4, rank, world_size), folder / f"{rank}.pt")


@pytest.mark.parametrize("world_size, tiles", [(2, 16), (3, 16), (4, 3)])
def test_processes_share_tiles_count_none_twice_and_all_know_the_whole(posix, judged, tmp_path,
                                                                       world_size, tiles):
    order, judge = judged
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=join, args=(rank, world_size, tmp_path, judge,
                                                    order[:tiles]), daemon=True)
                 for rank in range(world_size)]
    for process in processes:
        process.start()
    confusions, losses = judge(order[:tiles], 4)
    for rank, process in enumerate(processes):
        process.join(60)
        their_confusions, their_losses = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(their_confusions, confusions)
        assert torch.allclose(their_losses, losses, atol=1e-6)


# The command


def evaluated(capsys, *flags):
    capsys.readouterr()
    results = evaluation.main(evaluation.parse_args([*map(str, flags), "--device", "cpu"]))
    return results, capsys.readouterr().out


def test_one_network_in_detail_scores_as_at_the_end_of_training(whole, capsys, tmp_path):
    (result,), out = evaluated(capsys, whole.out / "best.pt", "--json", tmp_path / "scores.json")
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
    assert compute_metrics(torch.tensor([stored["confusion"]]))["global"] == stored["global"]
    assert np.sum(stored["confusion"]) == 2 * 32 * 32


def test_several_checkpoints_print_mean_and_deviation_of_both_averages(whole, capsys, tmp_path):
    fit(tmp_path, "--seed", "1")
    results, out = evaluated(capsys, whole.out / "best.pt", tmp_path / "best.pt")
    assert "**monuseg, tile split**" in out
    row, = [line for line in out.splitlines() if line.startswith("| unet")]
    for average in "per_tile", "global":
        ious = [100 * result[average]["iou"] for result in results]
        assert f"{statistics.mean(ious):.2f} ± {abs(ious[0] - ious[1]) / 2**0.5:.2f} |" in row


def changed(whole, path, **changes):
    """Write the whole run's best.pt with other entries, or other `args` -> path."""
    checkpoint = torch.load(whole.out / "best.pt")
    args = checkpoint["args"] | changes.pop("args", {})
    torch.save(checkpoint | {"args": args} | changes, path)
    return path


def test_a_result_tells_the_epoch_that_its_weights_are_of(whole, capsys, tmp_path):
    best, longer = whole.out / "best.pt", changed(whole, tmp_path / "99.pt", args={"epochs": 99})
    for path in best, longer:
        (result,), _ = evaluated(capsys, path)
        assert result["epoch"] == len(load_checkpoint(best)["log"])


def test_where_no_tile_shows_a_class_a_dash_stands_for_the_score(whole, capsys, tmp_path,
                                                                 monkeypatch):
    def draw(titles, rows, names):
        captions.extend(row[-1] for row in rows)
        return Image.new("L", (1, 1))

    tiles, captions = made_up_tiles(), []
    tiles.masks.zero_()
    monkeypatch.setattr(evaluation, "load", lambda *_: tiles)
    monkeypatch.setattr(evaluation, "draw_figure", draw)
    other = changed(whole, tmp_path / "best.pt", args={"seed": 1})
    (result,), out = evaluated(capsys, whole.out / "best.pt", "--figure", tmp_path / "figure.png")
    assert result["per_tile"] == {"iou": None, "f1": None} and result["tiles"] == [None, None]
    assert out.splitlines()[2].split() == ["per", "tile", "-", "-"]
    assert captions == [["IoU -"], ["IoU -"]]
    _, out = evaluated(capsys, whole.out / "best.pt", other)
    assert out.count("| standard | 0.00 ± 0.00 | 0.00 ± 0.00 | 2 |") == 1  # of false alarms


def test_data_are_looked_for_where_training_found_them(whole, capsys, tmp_path, monkeypatch):
    def load(data, root, num_classes):
        roots.append(root)
        return made_up_tiles()

    roots, path = [], tmp_path / "run/best.pt"
    monkeypatch.setattr(evaluation, "load", load)
    fit(path.parent, "--epochs", "1", "--data-root", "disk/prepared")
    evaluated(capsys, path)
    evaluated(capsys, path, "--data-root", "elsewhere")
    assert roots == ["disk/prepared", "elsewhere"]


def test_figure_and_curves_from_checkpoints(whole, capsys, tmp_path):
    (tmp_path / "other").mkdir()
    fit(tmp_path / "other/run", "--seed", "1", "--epochs", "1")  # two folders of one name
    _, out = evaluated(capsys, whole.out / "best.pt", tmp_path / "other/run/best.pt", "--figure",
                       tmp_path / "figure.png", "--curves", tmp_path / "curves.png")
    assert "figure.png: 2 test tiles" in out  # all there are, each once
    assert Image.open(tmp_path / "figure.png").width == 4 * (32 + 10) + 10
    assert Image.open(tmp_path / "curves.png").size == (1200, 460 + 2 * 24)
    name = "{}/{}/{}".format(*made_up_tiles().rows[PARTS["test"][0]])
    _, out = evaluated(capsys, whole.out / "best.pt", "--figure", tmp_path / "figure.webp",
                       "--tiles", name)
    assert "figure.webp: 1 test tiles" in out and Image.open(tmp_path / "figure.webp")


# What is refused


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_and_its_code_not_run(whole, tmp_path, capsys, kind):
    NOT_CHECKPOINTS[kind](tmp_path / "best.pt", whole.out)
    assert str(tmp_path / "best.pt") in refused(capsys, evaluation, tmp_path / "best.pt")
    assert not (tmp_path / "it ran").exists()


def test_tiles_other_than_those_of_the_training_are_refused(whole, capsys, monkeypatch):
    tiles = made_up_tiles()
    fewer = data.Tiles(tiles.images[1:], tiles.masks[1:], tiles.rows[1:], tiles.info)
    monkeypatch.setattr(evaluation, "load", lambda *_: fewer)
    line = refused(capsys, evaluation, whole.out / "best.pt", "--data-root", "elsewhere")
    assert "other tiles than elsewhere" in line and str(whole.out / "best.pt") in line
    scaled = data.Tiles(**vars(tiles) | {"info": tiles.info | {"scale": 2.0}})
    monkeypatch.setattr(evaluation, "load", lambda *_: scaled)
    assert "at --scale 0.896, but" in refused(capsys, evaluation, whole.out / "best.pt")


def test_a_network_of_other_classes_or_unknown_data_is_refused(whole, tmp_path, capsys,
                                                               monkeypatch):
    path = changed(whole, tmp_path / "best.pt", num_classes=3)
    assert f"{path}: its weights do not fit" in refused(capsys, evaluation, path)
    changed(whole, path, set={})
    assert f"{path}: does not say what its 1 classes are" in refused(capsys, evaluation, path)
    changed(whole, path, args={"data": "../secret"})
    monkeypatch.setattr(evaluation, "load", data.load)
    assert "'../secret' is not the name of a data set" in refused(capsys, evaluation, path)


@pytest.mark.parametrize("change", [{"args": {"split": "image"}}, {"num_classes": 3}])
def test_a_figure_of_two_splits_or_numbers_of_classes_is_refused_before_anything_is_scored(
        whole, tmp_path, capsys, change):
    path, scores = changed(whole, tmp_path / "b.pt", **change), tmp_path / "s.json"
    line = refused(capsys, evaluation, whole.out / "best.pt", path, "--figure", tmp_path / "x.png",
                   "--json", scores)
    assert "--figure compares networks of one data set, split and number of classes" in line
    assert not scores.exists()


def test_no_network_gets_an_empty_batch_where_processes_outnumber_tiles():
    class Picky(torch.nn.Module):
        def forward(self, images):
            assert len(images)
            return images[:, :1]

    scores = [evaluate(Picky(), made_up_tiles(), torch.arange(3), loss_for(1),
                       torch.device("cpu"), 8, rank, 8)
              for rank in (0, 7)]
    assert len(scores[0][1]) == 3 and torch.equal(scores[0][1], scores[1][1])


def test_class_names_of_any_length_stand_apart_from_their_scores():
    names = ["a", "lymphocytic_infiltrate", "m" * 40]
    metrics = evaluation.compute_metrics(torch.randint(1, 9, (2, 3, 3)))
    heading, *lines = evaluation.metrics_table(metrics, names).splitlines()
    end = heading.index("IoU") + 3  # of the first score, to the right
    for name, line in zip(["per tile", "global", *names], lines):
        assert line.split()[:-1] and line[:end].split()[:-1] == name.split()
        assert len(line[:end].split()[-1]) == 5 and line[end] == " "


def test_scores_stand_beside_their_classes_names_also_where_a_label_is_ignored():
    metrics = compute_metrics(count(3, *TISSUE), ignore=[0])
    lines = evaluation.metrics_table(metrics, ["a", "b", "c"]).splitlines()[-2:]
    assert [line.split()[:2] for line in lines] == [["b", "50.00"], ["c", "0.00"]]


def test_what_cannot_be_shown_is_refused_before_anything_is_scored(whole, tmp_path, capsys,
                                                                   monkeypatch):
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("scored"))
    twin, odd = tmp_path / "twin.pt", tmp_path / "odd.pt"
    shutil.copy(whole.out / "best.pt", twin)
    assert "one seed, of [0, 0]: leave" in refused(capsys, evaluation, whole.out / "best.pt", twin)
    changed(whole, odd, args={"skip": "fusion"})
    line = refused(capsys, evaluation, whole.out / "best.pt", odd)
    assert f"{odd}: its weights do not fit" in line and "skip.convs.0.weight" in line
    changed(whole, odd, args={"recipe": "mine"})
    assert "no recipe is called 'mine'" in refused(capsys, evaluation, odd)
    assert "no such test tile" in refused(capsys, evaluation, twin, "--tiles", "a/0/0", "--figure",
                                          tmp_path / "x.png")


def test_the_tiles_of_all_networks_are_opened_before_one_is_scored(whole, tmp_path, capsys,
                                                                   monkeypatch):
    def load(_, root, *__):
        tiles = made_up_tiles()
        return data.Tiles(tiles.images[:-2], tiles.masks[:-2], tiles.rows[:-2], tiles.info) if (
            root == "other") else tiles

    monkeypatch.setattr(evaluation, "load", load)
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("scored"))
    odd = changed(whole, tmp_path / "odd.pt", data_root="other", args={"seed": 1})
    line = refused(capsys, evaluation, whole.out / "best.pt", odd)
    assert f"{odd}: was trained on other tiles than {Path('other', 'monuseg')} holds" in line
    rows = load("", "other").rows
    fewer = data.fingerprint(rows, data.split_tiles("monuseg", rows, "tile"))
    changed(whole, odd, data_root="other", args={"seed": 1}, split=fewer)
    for flags in (), ("--figure", tmp_path / "x.png"):
        line = refused(capsys, evaluation, whole.out / "best.pt", odd, *flags)
        assert "runs of monuseg, tile, have different test images or classes: leave out" in line


@pytest.mark.parametrize("flags, message", [
    (["--figure", "x.png", "--tiles", "nowhere/0/0"], "nowhere/0/0: no such test tile"),
    (["--tiles", "image-1/0/0"], "--tiles is for --figure"),
    (["--json", "no/folder/scores.json"], "no/folder/scores.json cannot be written: name a file"),
    (["--curves", "no/folder/curves.png"], "no/folder/curves.png cannot be written: name a file"),
    (["--figure", "figure.txt"], "figure.txt is not the name of a picture: let"),
    (["--curves", "curves.psd"], "curves.psd is not the name of a picture: let"),
    (["--json", ".."], ".. cannot be written: name a file in a"),
    (["--ensemble"], "takes two runs or more, each of another seed: name each once"),
    (["--batch-size", "0"], "0 is not a number above 0"), (["--device", "abacus"], "abacus")])
def test_impossible_flags_are_refused_by_name(whole, capsys, tmp_path, monkeypatch, flags,
                                                  message):
    monkeypatch.chdir(tmp_path)
    best = whole.out / "best.pt"
    assert message in refused(capsys, evaluation, best, *[best] * ("--ensemble" in flags), *flags)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("log", ["", "epoch,train_loss\n1,0.5\n", "\0", "train_loss,val_loss,"
                                 "val_iou_per_tile\n0.5,nan,0.5\n"])
def test_a_damaged_log_is_named(whole, capsys, tmp_path, log):
    path = changed(whole, tmp_path / "best.pt")
    (tmp_path / "log.csv").write_text(log)
    line = refused(capsys, evaluation, path, "--curves", tmp_path / "curves.png")
    assert f"{tmp_path / 'log.csv'}: not the log of a run" in line


def test_a_figure_shows_what_each_network_is_scored_for(whole, capsys, tmp_path, monkeypatch):
    def draw(titles, rows, names):
        drawn.extend([titles, *rows])
        return Image.new("L", (1, 1))

    drawn = []
    monkeypatch.setattr(evaluation, "draw_figure", draw)
    fit(tmp_path / "conv", "--skip", "conv", "--epochs", "1")
    evaluated(capsys, whole.out / "best.pt", tmp_path / "conv/best.pt", "--figure",
              tmp_path / "figure.png")
    titles, *rows = drawn
    assert titles == ["unet, standard\n--epochs 3", "unet, conv\n--epochs 1"] and len(rows) == 2
    for caption, image, mask, predictions, captions in rows:
        index, = [i for i, row in enumerate(made_up_tiles().rows) if
                  caption == "{}/{}/{}".format(*row)]
        assert (image == made_up_tiles().images[index].numpy()).all()
        assert (mask == made_up_tiles().masks[index].numpy()).all()
        ious = [(found & mask).sum() / (found | mask).sum() for found in predictions]
        assert captions == [f"IoU {100 * iou:.1f}" for iou in ious]


def test_titles_of_a_figure_tell_its_networks_apart():
    def result(*words):
        args = train.parse_args(["--data", "monuseg", *words])
        return {"args": vars(args), "weights": "from scratch"}

    assert evaluation.titles([result(), result("--recipe", "strong", "--windows", "0"),
                              result("--loss", "dice", "--seed", "1")]) == [
        "unet, standard\n--seed 0", "unet, standard\n--recipe strong --windows 0 --seed 0",
        "unet, standard\n--loss dice --seed 1"]
    assert evaluation.titles([result(), result("--skip", "conv")]) == [
        "unet, standard", "unet, conv"]


def test_a_figure_shows_the_tiles_that_are_asked_for_in_their_order(whole, capsys, tmp_path,
                                                                    monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "draw_figure", lambda titles, rows, names:
                        drawn.extend(row[0] for row in rows) or Image.new("L", (1, 1)))
    names = ["{}/{}/{}".format(*made_up_tiles().rows[i]) for i in reversed(PARTS["test"])]
    evaluated(capsys, whole.out / "best.pt", "--figure", tmp_path / "f.png", "--tiles", *names)
    assert drawn == names


def figure_of(path, scores):
    """Draw a network's figure as if its tiles had these scores -> what is drawn, how many tiles."""
    checkpoint = load_checkpoint(path)
    return evaluation.figure([build_model(checkpoint, path).eval()],
                             [{"args": checkpoint["args"], "tiles": scores}], made_up_tiles(),
                             PARTS["test"] if len(scores) == 2 else torch.arange(16), None,
                             torch.device("cpu"))


@pytest.mark.parametrize("scores", [[0.9, 0.2], [0.2, 0.9], [0.9, None]])
def test_a_figure_goes_from_the_worst_tile_to_the_best(whole, tmp_path, monkeypatch, scores):
    monkeypatch.setattr(evaluation, "draw_figure", lambda titles, rows, names: rows)
    rows, n = figure_of(whole.out / "best.pt", scores)
    assert n == 2 and [row[-1] for row in rows] == [
        ["IoU -" if None in scores else "IoU 20.0"], ["IoU 90.0"]]
    known = ["{}/{}/{}".format(*made_up_tiles().rows[i]) for i in PARTS["test"]]
    assert [row[0] for row in rows] == [known[scores.index(score)] for score in
                                        sorted(scores, key=lambda score: score or 0)]


def test_of_many_tiles_a_figure_shows_five_over_the_range_of_scores(whole, monkeypatch):
    monkeypatch.setattr(evaluation, "draw_figure", lambda titles, rows, names: rows)
    rows, n = figure_of(whole.out / "best.pt", [k / 20 for k in reversed(range(16))])
    assert n == 5 and [row[-1] for row in rows] == [
        [f"IoU {iou}"] for iou in ("0.0", "20.0", "40.0", "55.0", "75.0")]
