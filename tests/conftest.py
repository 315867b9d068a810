"""What several test files share: where things are, made-up tiles, and a small finished run."""

import itertools
import os
import subprocess
import sys
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
from utils import run_cli  # noqa: E402

FLAGS = "--data monuseg --width 2 --batch-size 2 --epochs 3 --device cpu".split()


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
    rows = [(f"image-{i // 2}", 0, i % 2, "test" if i > 11 else "train", 0, 32 * (i % 2))
            for i in range(16)]
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


def load(path):
    """A checkpoint without its clock, in which alone equal runs may differ."""
    checkpoint = torch.load(path, weights_only=True)
    return {name: checkpoint[name] for name in checkpoint if name not in ("seconds", "elapsed")}


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
