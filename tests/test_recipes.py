"""recipes.py, and the flags of an experiment: one by one, and all at once."""

from inspect import signature
from pathlib import Path

import pytest
import torch
from conftest import arguments, fit, load, made_up_tiles, refused, stop_before_batch

import data
import eval as evaluation
import train
from data import SETS
from losses import SEVERAL_CLASSES, loss_for
from models import MODELS
from recipes import (RECIPE_VERSION, RECIPE_VERSIONS, RECIPES, SCHEDULES, recipe_for,
                     recipe_overrides)

pytestmark = pytest.mark.usefixtures("tiny_set")


@pytest.mark.parametrize("data", SETS)
@pytest.mark.parametrize("model", [*MODELS, "your_own"])
def test_every_data_set_has_a_recipe_for_every_network(data, model):
    name = SETS[data]["recipe"]
    for recipe in name, f"{name} strong":
        values = recipe_for(recipe, model)
        assert all(values[flag] > 0 for flag in ("epochs", "batch_size", "lr", "width"))
        assert not any(isinstance(value, dict) for value in values.values())


@pytest.mark.parametrize("model, rate", [("unet", 2e-3), ("swin_unet", 2e-4)])
def test_the_strong_recipe_has_a_rate_of_its_own(model, rate):
    assert all(recipe_for(f"{name} strong", model)["lr"] == rate for name in SETS
               if name in RECIPES)


@pytest.mark.parametrize("changed", [{}, {"lr": 2e-3}, {"epochs": 5, "width": 16},
                                     {"batch_size": 4, "ignore_index": [0, 7]}])
def test_what_differs_from_a_recipe_is_told(changed):
    args = {"data": "bcss512", "recipe": "bcss512", "model": "unet", "skip": "conv", "seed": 3,
            "split": "image", "ignore_index": [], **recipe_for("bcss512", "unet"), **changed}
    expected = changed | ({"ignore_index": "0 7"} if "ignore_index" in changed else {})
    assert recipe_overrides(args) == expected


def test_the_present_recipe_is_the_last_of_those_described():
    assert RECIPE_VERSION == max(RECIPE_VERSIONS) and all(RECIPE_VERSIONS.values())


@pytest.mark.parametrize("name", SEVERAL_CLASSES)
def test_a_loss_that_does_not_fit_the_classes_is_refused(tmp_path, capsys, name):
    line = refused(capsys, train, *arguments(tmp_path / "run", "--loss", name))
    assert f"--loss {name}" in line and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="--loss bce"):
        loss_for(3, (), "bce")


@pytest.mark.parametrize("classes, chosen, loss", [
    ([], [], "bce+dice"), (["--classes", "3"], [], "ce+dice"),
    (["--classes", "3"], ["--loss", "focal"], "focal")])
def test_the_strong_recipes_loss_fits_the_classes(classes, chosen, loss):
    args = train.parse_args(["--recipe", "strong", "--split", "image", *classes, *chosen])
    assert args.loss == loss


@pytest.mark.parametrize("flags, recorded", [
    ("--loss bce", None), ("--loss dice", "dice"), ("--loss ce+dice", "ce+dice"),
    ("--classes 3 --loss ce+dice", None), ("--classes 3 --loss bce", "bce"),
    ("--recipe strong --split image --loss bce", "bce")])
def test_the_papers_loss_by_its_name_is_no_departure(flags, recorded):
    args = train.parse_args(flags.split())
    assert args.loss == recorded and (f"-loss{recorded}-" in args.out.name) == bool(recorded)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_stays_between_0_and_the_rate(name):
    factors = [SCHEDULES[name](step / 1000) for step in range(1000)]
    assert min(factors) >= 0 and max(factors) == pytest.approx(1, abs=1e-3)


def test_cosine_warms_up_and_falls_to_zero():
    cosine = SCHEDULES["cosine"]
    assert cosine(0) == 0 and cosine(0.015) == pytest.approx(0.5) and cosine(0.03) == 1
    assert cosine(0.515) == pytest.approx(0.5) and cosine(1) == pytest.approx(0)


def test_weights_decay_in_matrices_alone():
    args = train.parse_args("--width 2 --weight-decay 0.5 --lr 0.1".split())
    model, _, optimizer, _ = train.build_training(args, 1, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before):
        torch.testing.assert_close(parameter.detach(), old * (0.95 if old.ndim > 1 else 1))


def batches(augmentations):
    tiles, indices = made_up_tiles(), torch.arange(4)
    return [*data.train_batches(tiles, indices, 4, 0, 0, 9, "cpu", augmentations=augmentations)]


def test_without_augmentation_training_sees_the_tiles_themselves():
    plain = made_up_tiles().images[:4].permute(0, 3, 1, 2) / 255
    for images, _ in batches("none"):
        assert all(any(torch.allclose(image, tile, atol=1e-4) for tile in plain)
                   for image in images)


@pytest.mark.parametrize("name", [*data.WARPS, *data.COLOURS])
def test_an_augmentation_can_be_chosen_alone_and_changes_something(name):
    changed = [not torch.allclose(one[0], other[0], atol=1e-3)
               for one, other in zip(batches(name), batches("none"))]
    assert any(changed)
    masks_move = any(not torch.equal(one[1], other[1])
                     for one, other in zip(batches(name), batches("none")))
    assert masks_move == (name in data.WARPS)  # colours leave masks alone


@pytest.mark.parametrize("flags", ["--loss bce+dice", "--schedule cosine", "--weight-decay 0.1",
                                   "--augment none", "--augment flip rotation"])
def test_every_flag_changes_the_run_and_is_held_to_on_resume(tmp_path, capsys, whole, flags):
    out = tmp_path / "run"
    fit(out, *flags.split())
    stored, plain = (load(path / "last.pt") for path in (out, whole.out))
    assert not torch.equal(stored["model"]["head.weight"], plain["model"]["head.weight"])
    name = flags.split()[0]
    assert name in refused(capsys, train, *arguments(out, "--resume"))
    assert str(train.parse_args(["--data", "synthetic", *flags.split()]).out).count(
        name.strip("-").replace("-", "")) == 1


def test_flags_together_resume_to_the_bit(tmp_path, monkeypatch):
    flags = ("--loss bce+dice --schedule cosine --weight-decay 0.05 --augment flip brightness "
             "--save-every 0.000001").split()
    score = fit(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_before_batch(patch, 7)
        fit(tmp_path / "run", *flags)
    assert fit(tmp_path / "run", *flags, "--resume") == score
    one, other = (load(tmp_path / name / "last.pt")["model"] for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    line = "--epochs 4"  # another length would bend the schedule
    with pytest.raises(ValueError, match=line):
        fit(tmp_path / "run", *flags, *line.split(), "--resume")


def test_synthetic_classes_train_and_score_by_their_names(tmp_path, monkeypatch, capsys):
    for module in train, evaluation:
        monkeypatch.setattr(module, "load", lambda name, root, k: data.synthetic_tiles(10, k))
    flags = [*"--classes 4 --width 2 --epochs 1 --batch-size 4 --out".split(), str(tmp_path)]
    train.main(train.parse_args(flags))
    result, = evaluation.main(evaluation.parse_args([f"{tmp_path}/best.pt"]))
    assert "tumour_nucleus" in capsys.readouterr().out and len(result["classes"]) == 4
    assert "--classes" in refused(capsys, train, *flags[2:], "--resume")
    for wrong in "--classes 2", "--classes 23", "--classes 3 --data monuseg":
        assert "--classes" in refused(capsys, train, *wrong.split())


def test_bfloat16_trains_and_validates_but_the_test_is_in_float32_as_eval_scores(tmp_path,
                                                                                monkeypatch):
    def evaluate(*args, **named):
        halves.append(signature(original).bind(*args, **named).arguments.get("bf16", False))
        return original(*args, **named)

    halves, original = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", evaluate)
    fit(tmp_path / "run", "--bf16")
    assert halves == [True, True, True, False]


def test_bfloat16_is_refused_where_it_would_be_float32(tmp_path):
    args = train.parse_args(arguments(tmp_path, "--bf16"))
    with pytest.raises(ValueError, match="--bf16: MPS trains in float32"):
        train.build_training(args, 1, torch.device("mps"))


def test_bfloat16_on_a_cpu_learns_nearly_the_same_and_is_told_apart(tmp_path, whole):
    fit(tmp_path / "run", "--bf16")
    half, full = (load(folder / "last.pt") for folder in (tmp_path / "run", whole.out))
    assert all(value.dtype == full["model"][name].dtype for name, value in half["model"].items())
    for one, other in zip(half["log"], full["log"]):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)
    assert not torch.equal(half["model"]["head.weight"], full["model"]["head.weight"])
    args = train.parse_args(["--bf16"])
    assert args.out == Path("runs/synthetic-unet-standard-bf16-seed0")
