"""resume.py: a run that is killed, interrupted or lengthened goes on as if it had never stopped."""

import json
import os
import random
import re
import signal
import time
from functools import partial

import pytest
import torch
from conftest import (NOT_CHECKPOINTS, OFTEN, assert_same_run, content, edited, fit, load,
                      made_up_tiles, read_scores, refused_run, stop_before_batch, wait_for_save)
from torch import nn

import data
import resume
import train
import utils
from models import create_model
from raw import TileRow

pytestmark = pytest.mark.usefixtures("tiny_set")

# Which folders it takes


def test_a_run_is_never_overwritten(tmp_path, capsys):
    fit(tmp_path / "run", "--epochs", "1")
    before = content(tmp_path / "run")
    assert "--out" in refused_run(capsys, tmp_path / "run", "--seed", "1")
    assert content(tmp_path / "run") == before
    (tmp_path / "run/last.pt").unlink()
    for flags in (), ("--resume",):
        assert "--out" in refused_run(capsys, tmp_path / "run", *flags)
    del before["last.pt"]
    assert content(tmp_path / "run") == before


def test_a_run_that_has_not_saved_a_step_does_not_block_its_folder(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_before_batch(patch, 2)
        fit(tmp_path / "run")
    assert fit(tmp_path / "run") == whole.score


def test_resume_starts_a_missing_run_and_tells_of_a_finished_one(tmp_path, whole, capsys):
    assert fit(tmp_path / "run", "--resume") == whole.score
    assert_same_run(tmp_path / "run", whole.out)
    before, stamp = content(tmp_path / "run"), (tmp_path / "run/last.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert fit(tmp_path / "run", "--resume") == whole.score
    assert "is finished" in capsys.readouterr().out
    assert content(tmp_path / "run") == before
    assert (tmp_path / "run/last.pt").stat().st_mtime_ns == stamp


def test_damaged_scores_of_a_finished_run_are_made_again(tmp_path):
    fit(tmp_path / "run", "--epochs", "1")
    path = tmp_path / "run/scores.json"
    scores = path.read_text()
    path.write_text("{")
    fit(tmp_path / "run", "--epochs", "1", "--resume")
    assert path.read_text() == scores


def test_a_longer_run_that_is_killed_before_its_test_is_not_taken_for_finished(tmp_path,
                                                                               monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    def epochs():
        return len(json.loads((tmp_path / "run/scores.json").read_text())["log"])

    fit(tmp_path / "run", "--epochs", "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "test", crash)
        fit(tmp_path / "run", "--epochs", "2", "--resume")
    assert epochs() == 1  # the scores of before are not lost
    fit(tmp_path / "run", "--epochs", "2", "--resume")
    assert epochs() == 2


def test_scores_that_an_earlier_run_left_in_the_folder_are_not_taken_for_this_ones(tmp_path,
                                                                                 monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    other = fit(tmp_path / "run", "--epochs", "1", "--seed", "1")
    for name in "last.pt", "best.pt", "log.csv":
        (tmp_path / "run" / name).unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "test", crash)
        fit(tmp_path / "run", "--epochs", "1")
    score = fit(tmp_path / "run", "--epochs", "1", "--resume")
    assert read_scores(tmp_path / "run")["args"]["seed"] == 0 and score != other


def test_two_runs_in_one_folder_at_once_are_refused(start, tmp_path, capsys):
    process = start(tmp_path / "run", "--epochs", "999", *OFTEN)
    wait_for_save(process, tmp_path / "run/last.pt")
    line = refused_run(capsys, tmp_path / "run", "--epochs", "999", "--resume")
    assert str(tmp_path / "run") in line and "another process" in line
    assert process.is_alive()


@pytest.mark.parametrize("name", ["best.pt", "log.csv"])
def test_a_kill_between_an_epochs_writes_loses_none_of_them(tmp_path, monkeypatch, whole, name):
    """last.pt is written first and knows the epoch; the others catch up on a resume."""
    def crash(path):
        if path.name == name and len(load(path.with_name("last.pt"))["log"]) == best:
            raise KeyboardInterrupt
        return write_atomic(path)

    best, write_atomic = len(load(whole.out / "best.pt")["log"]), utils.write_atomic
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train if name == "log.csv" else utils, "write_atomic", crash)
        fit(tmp_path / "run")
    assert fit(tmp_path / "run", "--resume") == whole.score
    assert_same_run(tmp_path / "run", whole.out)


# Going on


@pytest.mark.parametrize("flags, batches, found", [
    ((), [7], 5), (OFTEN, [8], 7), (OFTEN, [2, 3, 3, 5], 9)],
    ids=["from an epoch's end", "within an epoch", "four times"])
def test_resume_equals_uninterrupted_run(whole, tmp_path, monkeypatch, flags, batches, found):
    out = tmp_path / "run"
    for life, batch in enumerate(batches):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_before_batch(patch, batch)
            fit(out, *flags, *["--resume"] * (life > 0))
        for name in "last.pt", "best.pt", "log.csv":  # as a crash leaves them
            (out / f".partial-{name}").write_bytes(b"half a file")
    assert load(out / "last.pt")["step"] == found
    torch.manual_seed(99)
    assert fit(out, "--resume") == whole.score
    assert_same_run(out, whole.out)


def test_a_run_whose_data_moved_goes_on_from_where_they_are_now(tiny_set, tmp_path):
    fit(tmp_path, "--epochs", "1", "--data-root", "before")
    fit(tmp_path, "--epochs", "2", "--data-root", "after", "--resume")
    assert load(tmp_path / "last.pt")["data_root"] == "after"


def test_resume_repeats_what_the_network_itself_draws(tmp_path, monkeypatch):
    """As Swin-UNet's stochastic depth does; here it is a dropout before the U-Net's head."""
    def with_dropout(*args, **kwargs):
        model = create_model(*args, **kwargs)
        model.head.register_forward_pre_hook(
            lambda head, inputs: nn.functional.dropout(inputs[0], 0.5, head.training))
        return model

    monkeypatch.setattr(train, "create_model", with_dropout)
    fit(tmp_path / "whole", "--epochs", "2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_before_batch(patch, 8)
        fit(tmp_path / "run", "--epochs", "2", *OFTEN)
    torch.manual_seed(99)
    fit(tmp_path / "run", "--epochs", "2", "--resume")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_kill_9_at_random_moments_changes_nothing(start, tmp_path):
    last, before = tmp_path / "run/last.pt", 0
    for life in range(3):
        process = start(last.parent, "--epochs", "999", *OFTEN, *["--resume"] * (life > 0))
        wait_for_save(process, last, before)
        time.sleep(random.uniform(0, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.said(".err")
        before = last.stat().st_mtime_ns
    epochs = "--epochs", str(load(last)["step"] // 5 + 1)  # of five steps each
    assert fit(last.parent, *epochs, "--resume") == fit(tmp_path / "whole", *epochs)
    assert_same_run(last.parent, tmp_path / "whole")


def heed_ctrl_c():
    """As in a terminal. Processes of a suite that a script started with & would ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_is_one_line_that_says_how_to_go_on(start, tmp_path):
    process = start(tmp_path / "run", "--epochs", "999", *OFTEN, before=heed_ctrl_c)
    wait_for_save(process, tmp_path / "run/last.pt")
    time.sleep(random.uniform(0, 0.3))
    for _ in range(2):  # torch.save pickles, and a bare except in Python's copyreg may swallow one
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
            process.join(30)
    line, = process.said(".err").strip().splitlines()
    assert process.exitcode == 130 and "--resume" in line
    assert len(load(tmp_path / "run/last.pt")["log"]) < 999


def small_disk():
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # room for weights, not for all


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(whole, start, tmp_path):
    fit(tmp_path / "run", "--epochs", "1")
    process = start(tmp_path / "run", "--resume", before=small_disk)
    process.join(60)
    line, = process.said(".err").splitlines()
    assert process.exitcode == 2 and str(tmp_path / "run/last.pt") in line
    assert load(tmp_path / "run/last.pt")["step"] == 5
    assert fit(tmp_path / "run", "--resume") == whole.score
    assert_same_run(tmp_path / "run", whole.out)


def test_swin_unet_starts_from_a_file_and_goes_on_without_it(tmp_path, monkeypatch, capsys):
    import timm  # here, as every process that imports this file would wait for it

    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depths=(1, 1, 1, 1)))
    tiles = data.synthetic_tiles(6)
    tiles.rows = [TileRow(f"image-{i}", 0, 0, "train") for i in range(6)]  # 4, 1 and 1 tiles
    monkeypatch.setattr(train, "load", lambda *_: tiles)
    monkeypatch.setattr("pretrained.fetch_from_hub", lambda: pytest.fail("asked the hub"))
    path = tmp_path / "encoder.pth"
    torch.save(create_model("swin_unet", "standard", 1).encoder.state_dict(), path)
    flags = ["--model", "swin_unet", "--batch-size", "4", "--epochs", "1", "--lr", "1e-9",
             "--weights", str(path), "--out", str(tmp_path / "run"), "--device", "cpu"]
    score = train.main(train.parse_args(flags))
    assert str(path) in capsys.readouterr().out
    stored, given = load(tmp_path / "run/last.pt"), torch.load(path)
    assert str(path) in stored["weights"]
    name = "layers.2.blocks.0.mlp.fc1.weight"  # at this rate, still what the file held
    torch.testing.assert_close(stored["model"][f"encoder.{name}"], given[name])
    path.unlink()
    assert train.main(train.parse_args([*flags, "--resume"])) == score


def test_an_average_starts_from_the_pretrained_weights(tmp_path, monkeypatch):
    def load_pretrained(model, path):
        model.head.weight.data[:] = 3
        return "weights"

    monkeypatch.setattr(create_model("unet", "standard", 1, 2).__class__, "pretrained", True)
    monkeypatch.setattr(nn.Module, "load_pretrained", load_pretrained, raising=False)
    monkeypatch.setattr(resume, "read_last", lambda *_: None)
    args = train.parse_args(["--data", "synthetic", "--ema", "0.9"])
    args.width = 2
    model, scored, optimizer, scaler = train.build_training(args, 1, torch.device("cpu"))
    changed = resume.start_or_resume(args, {}, model, scored, optimizer, scaler)
    assert changed == {"weights": "weights"}
    assert scored is not model and (scored.head.weight == 3).all()
    args.no_pretrained = True
    assert resume.start_or_resume(args, {}, model, scored, optimizer, scaler) == {}


def test_all_processes_start_from_the_pretrained_weights_of_rank_0(monkeypatch):
    """Here on a rank above 0, which gets them, and reads nothing."""
    monkeypatch.setattr(create_model("unet", "standard", 1, 2).__class__, "pretrained", True)
    monkeypatch.setattr(nn.Module, "load_pretrained", "weights", raising=False)
    monkeypatch.setattr(resume, "on_rank_0",
                        lambda function, *_: None if function is resume.read_last else function)
    monkeypatch.setattr(resume.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(resume.dist, "broadcast", lambda value, source: value.fill_(3 - source))
    args = train.parse_args(["--data", "synthetic", "--ema", "0.9"])
    args.width = 2
    training = train.build_training(args, 1, torch.device("cpu"))
    assert resume.start_or_resume(args, {}, *training) == {"weights": "weights"}
    for network in training[:2]:
        assert all((value == 3).all() for value in network.state_dict().values())


def test_float16_goes_on_at_its_scale_of_gradients():  # which only some GPUs have
    args = train.parse_args(["--width", "2"])
    model, scored, optimizer, scaler = train.build_training(args, 1, torch.device("cpu"))
    assert not scaler.state_dict()
    stopped, resumed = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (4096, 2))
    checkpoint = {"model": model.state_dict(), "trained": model.state_dict(),
                  "optimizer": optimizer.state_dict(), "scaler": stopped.state_dict()}
    resume.restore(checkpoint, model, scored, optimizer, resumed)
    assert resumed.get_scale() == 4096


# What is refused


@pytest.mark.parametrize("flag, ours, value", [
    ("--lr", "0.001", "0.002"), ("--skip", "standard", "fusion"), ("--split", "tile", "image"),
    ("--width", "2", "4"), ("--seed", "0", "7"), ("--batch-size", "2", "5")])
def test_resume_refuses_flags_that_contradict_the_run(whole, capsys, flag, ours, value):
    before = content(whole.out)
    line = refused_run(capsys, whole.out, flag, value, "--resume")
    assert {flag, ours, value} <= set(re.split(r"[ :;,]+", line))
    assert content(whole.out) == before


def test_resume_names_the_flag_on_which_others_depend(whole, capsys):
    line = refused_run(capsys, whole.out, "--recipe", "strong", "--windows", "0", "--resume")
    assert "--recipe monuseg strong: " in line and "trained with monuseg;" in line


def test_resume_refuses_to_train_fewer_epochs_than_there_are(whole, capsys):
    before = content(whole.out)
    assert "--epochs 2" in refused_run(capsys, whole.out, "--epochs", "2", "--resume")
    assert content(whole.out) == before


def moment(change):
    return edited(lambda checkpoint: change(checkpoint["optimizer"]["state"]))


BROKEN_LAST = {
    "moments of another shape": moment(lambda state: state[0].update(exp_avg=torch.zeros(9))),
    "moments no tensors": moment(lambda state: state[1].update(exp_avg_sq=[1.0])),
    "moments missing": moment(lambda state: state.pop(0)),
    "optimizer a list": edited(lambda checkpoint: checkpoint.update(optimizer=[1])),
    "step beyond the log": edited(lambda checkpoint: checkpoint.update(step=4)),
    "trained another network's": edited(lambda checkpoint: checkpoint.update(
        trained=create_model("unet", "fusion", 1, 2).state_dict())),
    "a second missing": edited(lambda checkpoint: checkpoint.update(
        seconds=checkpoint["seconds"][:-1])),
    "losses too short": edited(lambda checkpoint: checkpoint.update(losses=torch.zeros(2))),
    "older recipe": edited(lambda checkpoint: checkpoint.update(recipe_version=1))}


@pytest.mark.parametrize("kind", BROKEN_LAST)
def test_resume_refuses_a_last_pt_whose_parts_do_not_fit(whole, tmp_path, capsys, kind):
    BROKEN_LAST[kind](tmp_path / "last.pt", whole.out)
    assert str(tmp_path / "last.pt") in refused_run(capsys, tmp_path, "--resume")


@pytest.mark.parametrize("kind", [*(kind for kind in NOT_CHECKPOINTS if kind != "missing"),
                                  "best.pt"])
def test_resume_refuses_what_is_not_a_checkpoint_of_the_run(whole, tmp_path, capsys, kind):
    if kind == "best.pt":
        (tmp_path / "last.pt").write_bytes((whole.out / "best.pt").read_bytes())
    else:
        NOT_CHECKPOINTS[kind](tmp_path / "last.pt", whole.out)
    assert str(tmp_path / "last.pt") in refused_run(capsys, tmp_path, "--resume")
    assert not (tmp_path / "it ran").exists()


def test_resume_refuses_other_tiles(whole, capsys, monkeypatch):
    tiles = made_up_tiles()
    tiles.rows = [row._replace(image=row.image + "x") for row in tiles.rows]
    monkeypatch.setattr(train, "load", lambda *_: tiles)
    assert "other tiles" in refused_run(capsys, whole.out, "--resume")
    tiles = made_up_tiles()
    for change in {"classes": ["one", "two", "three"]}, {"classes": ["other"]}, {"scale": 2.0}:
        tiles.info = made_up_tiles().info | change
        assert "other classes or another scale" in refused_run(capsys, whole.out, "--resume")


def test_resume_refuses_other_pretrained_weights(monkeypatch):
    monkeypatch.setattr(resume, "read_last", lambda *_: {"weights": "encoder weights from a.pth"})
    args = train.parse_args(["--data", "synthetic", "--width", "2"])
    parts = train.build_training(args, 1, torch.device("cpu"))
    for weights, no_pretrained in ("other.pth", False), (None, True):
        args.weights, args.no_pretrained = weights, no_pretrained
        with pytest.raises(ValueError, match="weights: encoder weights from a.pth; the flags"):
            resume.start_or_resume(args, {}, *parts)
    monkeypatch.setattr(type(parts[0]), "pretrained", True)
    monkeypatch.setattr(resume, "read_last", lambda *_: {"weights": "from scratch"})
    args.weights = args.no_pretrained = None
    with pytest.raises(ValueError, match="from scratch; the flags ask for: pretrained"):
        resume.start_or_resume(args, {}, *parts)
