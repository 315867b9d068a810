"""What several test files share: made-up tiles, runs on them, and how two runs compare."""

import csv
import itertools
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"
os.environ["PYTHON_COLORS"] = "0"  # else argparse may colour what it says
torch.set_num_threads(1)  # tiny maps: a second thread mostly waits, much longer on a busy machine

import data  # noqa: E402, from ROOT
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from models import create_model  # noqa: E402
from raw import TileRow  # noqa: E402
from utils import run_cli  # noqa: E402

FLAGS = "--data monuseg --width 2 --batch-size 2 --epochs 3 --device cpu".split()
OFTEN = "--save-every", "0.000001"  # minutes: after every step


@pytest.fixture(autouse=True)
def seed():
    """What a test draws does not depend on those that ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def posix():
    """For tests of links, pipes, signals, locks or forked processes, and of Bash scripts."""
    if os.name == "nt":
        pytest.skip("Windows has no such links, pipes, signals, locks or processes")


def noise(*shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(high, size=shape, dtype=np.uint8)


def made_up_tiles(*_):
    """Stands in for data.load: 16 grey tiles of 32 pixels, two an image, each with a dark block."""
    rng = np.random.default_rng(0)
    masks = np.zeros((16, 32, 32), np.uint8)
    for mask in masks:
        top, left, height, width = *rng.integers(0, 16, 2), *rng.integers(8, 16, 2)
        mask[top:top + height, left:left + width] = 1
    images = 200 - 110 * masks[..., None] + rng.integers(-30, 30, (16, 32, 32, 3))
    rows = [TileRow(f"image-{i // 2}", 0, i % 2, "test" if i > 11 else "train",
                    0, 32 * (i % 2)) for i in range(16)]
    return data.Tiles(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(masks), rows,
                      data.SETS["monuseg"])


PARTS = data.split_tiles("monuseg", made_up_tiles().rows, "tile")  # 11, 3 and 2 tiles


def arguments(out, *flags):
    return [*FLAGS, "--out", str(out), *map(str, flags)]


def fit(out, *flags):
    """Train three epochs of five steps on the loaded tiles -> test score."""
    return train.main(train.parse_args(arguments(out, *flags)))


def refused(capsys, script, *flags):
    """Run a script (a module) with flags that it must refuse with status 2 -> the line it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(script.main, lambda: script.parse_args([*map(str, flags)]))
    *usage, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and (not usage or usage[0].startswith("usage: "))
    return line


def refused_run(capsys, out, *flags):
    """Give train.py flags that it must refuse with status 2 -> the one line that it says."""
    return refused(capsys, train, *arguments(out, *flags))


def load(path):
    """A checkpoint without its clock, in which alone equal runs may differ."""
    checkpoint = torch.load(path, weights_only=True)
    return {name: checkpoint[name] for name in checkpoint if name not in ("seconds", "elapsed")}


def read_scores(out):
    scores = json.loads((out / "scores.json").read_text())
    assert len(scores["seconds"]) == len(scores["log"]) and min(scores["seconds"]) > 0
    assert scores.pop("seconds") == sorted(torch.load(out / "last.pt")["seconds"])
    return scores


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def read_log(out):
    with open(out / "log.csv", newline="") as file:
        return [{key: float(row[key]) for key in row} for row in csv.DictReader(file)]


def leaves(value, name=""):
    """Nested dicts and lists -> one flat dict of their values."""
    if not isinstance(value, (dict, list, tuple)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in items for k, v in leaves(item, f"{name}/{key}").items()}


def same(one, other):
    """Equal to the last bit."""
    one, other = leaves(one), leaves(other)
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) if isinstance(one[k], torch.Tensor) else one[k] == other[k]
        for k in one)


def assert_same_run(out, whole):
    assert same(load(out / "best.pt"), load(whole / "best.pt"))
    assert same(load(out / "last.pt"), load(whole / "last.pt"))
    assert read_scores(out) == read_scores(whole)
    out, whole = content(out), content(whole)
    assert sorted(name for name in out if name[0] != ".") == sorted(whole)
    assert out["log.csv"] == whole["log.csv"]


def save_network(path, model, skip="conv", num_classes=1, width=2, name="monuseg"):
    """Write a checkpoint of an untrained network, as train.py writes its best.pt -> path."""
    torch.manual_seed(0)
    args = {"model": model, "skip": skip, "data": name, "split": "tile", "seed": 0, "epochs": 1,
            "batch_size": 8, "lr": 1e-3, "width": width, "ignore_index": [], "recipe": "monuseg",
            "skip_depth": 1}
    log = [{"epoch": 1, "train_loss": 0.5, "val_loss": 0.5, "val_iou_per_tile": 0.5}]
    torch.save({"model": create_model(model, skip, num_classes, width).state_dict(), "args": args,
                "num_classes": num_classes, "set": data.SETS.get(name, {}), "split": "",
                "data_root": "data", "recipe_version": 3, "weights": "from scratch", "log": log},
               path)
    return path


def use_made_up_tiles(patch):
    for module in train, evaluation:
        patch.setattr(module, "load", made_up_tiles)


@pytest.fixture(scope="module")
def tiny_set():
    """All of a test file's runs see the made-up tiles."""
    with pytest.MonkeyPatch.context() as patch:
        use_made_up_tiles(patch)
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run of three epochs of five steps: its folder `out` and test `score`."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_made_up_tiles(patch)
        return SimpleNamespace(score=fit(out), out=out)


def command(flags, before, environment, notes, folder):
    """The body of a process: `python train.py` on the made-up tiles, its output in files."""
    sys.stdout, sys.stderr = open(f"{notes}.out", "w"), open(f"{notes}.err", "w")
    sys.argv = ["train.py", *flags]
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    data.load = made_up_tiles
    before()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


@pytest.fixture
def start(posix, tmp_path, monkeypatch):
    """Start train.py in a process -> it, with `said(suffix)`, the text of its .out or .err.

    It is forked from one that has imported torch. Runs that are killed, interrupted, fill a disk or
    work in pairs are such processes; all others go through `fit`.
    """
    def begin(out, *flags, before=os.getpid, folder=tmp_path, **environment):
        notes = tmp_path / f"process-{len(started)}"
        started.append(processes.Process(target=command, args=(
            arguments(out, *flags), before, environment, notes, folder)))
        started[-1].start()
        started[-1].said = lambda suffix: Path(f"{notes}{suffix}").read_text()
        return started[-1]

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    started, processes = [], multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train", "torch._dynamo"])  # the optimizer imports the latter
    yield begin
    for process in started:
        process.kill()


def wait_for_save(process, path, since=0):
    while process.is_alive() and not (path.exists() and path.stat().st_mtime_ns > since):
        time.sleep(0.001)


def stop_before_batch(patch, number):
    """Interrupt the next run when it comes to this batch."""
    count = itertools.count(1)

    def augment(*args):
        if next(count) == number:
            raise KeyboardInterrupt
        return original(*args)
    original = data.augment
    patch.setattr(data, "augment", augment)


class Code:
    """Pickles as a call that writes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def edited(change):
    """A checkpoint in which one thing is not as it should be: (path to write, a run's folder)."""
    def write(path, run):
        checkpoint = torch.load(run / "last.pt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)
    return write


NOT_CHECKPOINTS = {  # (path to write, a run's folder) -> None
    "missing": lambda path, run: None, "folder": lambda path, run: path.mkdir(),
    "empty": lambda path, run: path.touch(), "no dict": lambda path, run: torch.save([1], path),
    "cut off": lambda path, run: path.write_bytes((run / "best.pt").read_bytes()[:99_999]),
    "text": lambda path, run: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "code": lambda path, run: torch.save(Code(path.parent / "it ran"), path),
    "weights alone": lambda path, run: torch.save(load(run / "last.pt")["model"], path),
    "entries missing": lambda path, run: torch.save(
        {key: load(run / "last.pt")[key] for key in ("args", "model")}, path),
    "another model's": edited(lambda checkpoint: checkpoint.update(
        model=create_model("unet", "fusion", 1, 2).state_dict())),
    "args a list": edited(lambda checkpoint: checkpoint.update(args=[1])),
    "width a text": edited(lambda checkpoint: checkpoint["args"].update(width="wide")),
    "width giant": edited(lambda checkpoint: checkpoint["args"].update(width=10**9)),
    "network unknown": edited(lambda checkpoint: checkpoint["args"].update(model="no network")),
    "log of texts": edited(lambda checkpoint: checkpoint.update(log=["epoch 1"])),
    "weights no tensors": edited(lambda checkpoint: checkpoint["model"].update({"head.bias": 1})),
    "classes a float": edited(lambda checkpoint: checkpoint.update(num_classes=1.0))}


@pytest.fixture
def shared():
    """The folder of real data, which is not part of the repository."""
    if not SHARED.exists():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture
def script(tmp_path):
    """Run a script as a user does, from an empty folder -> finished process with text output."""
    def run(*command, **environment):
        return subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])],
                              cwd=tmp_path, env=os.environ | environment, text=True,
                              capture_output=True, timeout=120)
    return run
