"""reproduce.sh: beside stand-ins for train.py and report.py, and once for real."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.skipif(not shutil.which("bash"), reason="needs bash"),
              pytest.mark.usefixtures("posix")]

TRAIN = """\
import os, pathlib, sys
words = sys.argv[1:]
value = dict(zip(words, words[1:]))
folder = pathlib.Path("runs", "-".join(value[f"--{name}"] for name in
                                       ("data", "model", "skip", "seed")))
with open("calls.txt", "a") as file:
    print(*words, file=file)
with open("gpus.txt", "a") as file:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
if value["--skip"] == "conv":
    sys.exit("train.py: no such luck")
folder.mkdir(exist_ok=True)
(folder / "scores.json").touch()
"""


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """Run the script beside stand-ins -> finished process, what train.py was called with."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # of the machine

    def run(*words, status=0, **variables):
        (tmp_path / "calls.txt").write_text("")
        done = subprocess.run(
            ["bash", "reproduce.sh", *words], text=True, capture_output=True, cwd=tmp_path,
            env=os.environ | {"PYTHON": sys.executable} | variables)
        assert done.returncode == status, done.stdout + done.stderr
        return done, (tmp_path / "calls.txt").read_text().splitlines()

    shutil.copy(ROOT / "reproduce.sh", tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "report.py").write_text("import sys; print('page of', *sys.argv[1:])")
    return run


def test_every_cell_of_the_table_is_trained_whatever_becomes_of_the_others(reproduce):
    done, calls = reproduce("monuseg", status=1)
    assert len(calls) == len(set(calls)) == 2 * 3 * 3
    assert all("--data monuseg --model" in call and "--resume" in call for call in calls)
    assert [call.split("--seed ")[1][0] for call in calls] == [*("0" * 6), *("1" * 6), *("2" * 6)]
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 6 and all("--skip conv" in line and "no such luck" in line
                                    for line in failed)
    page = next(line for line in done.stdout.splitlines() if line.startswith("page of"))
    assert page.count("scores.json") == 12 and page.endswith("--page runs/monuseg.md")


def test_without_a_data_set_it_says_what_it_takes(reproduce, tmp_path):
    done = subprocess.run(["bash", "reproduce.sh", "--models", "unet"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert "./reproduce.sh monuseg " in done.stdout and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [["--jobs", "0"], ["--jobs"], ["--jobs", "x"], ["--seeds"],
                                   ["--skips", ""]])
def test_flags_that_would_train_nothing_are_refused(reproduce, tmp_path, flags):
    done = subprocess.run(["bash", "reproduce.sh", "monuseg", *flags], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("reproduce.sh: give --jobs a number")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["--model", "--skip", "--seed", "--data", "--out"])
def test_flags_that_each_run_has_already_are_refused(reproduce, flag):
    done, calls = reproduce("monuseg", "--compile", flag, "5", status=2)
    assert f"reproduce.sh: {flag} is set for each run" in done.stderr and not calls


def test_help_is_help_wherever_it_stands(reproduce):
    done, calls = reproduce("monuseg", "--seeds", "0", "--help", status=0)
    assert "./reproduce.sh monuseg --jobs 2" in done.stdout and not calls


def test_nothing_is_left_among_the_temporary_files(reproduce, tmp_path):
    (tmp_path / "temporary").mkdir()
    reproduce("monuseg", "--skips", "conv", status=1, TMPDIR=str(tmp_path / "temporary"))
    assert not [*(tmp_path / "temporary").iterdir()]


@pytest.mark.parametrize("what, told", [("of the terminal", signal.SIGINT),
                                        ("to the script", signal.SIGTERM)])
def test_an_interruption_ends_all_of_it(reproduce, tmp_path, what, told):
    (tmp_path / "train.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # as run_cli ends\n"
        "for _ in range(100):\n"
        "    with open('alive.txt', 'a') as file:\n"
        "        print(os.getpid(), file=file)\n"
        "    time.sleep(0.1)\n")
    script = subprocess.Popen(
        ["bash", "reproduce.sh", "monuseg", "--jobs", "2"], cwd=tmp_path, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHON": sys.executable},  # pytest may run in the background, deaf to it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    alive = tmp_path / "alive.txt"
    while script.poll() is None and (
            not alive.exists() or len(set(alive.read_text().split())) < 2):
        time.sleep(0.05)
    (os.killpg if what == "of the terminal" else os.kill)(script.pid, told)
    assert script.wait(30) != 0
    time.sleep(0.5)  # in which the last signal may arrive
    before = alive.read_text()
    time.sleep(1)
    assert alive.read_text() == before and len(set(before.split())) == 2


@pytest.mark.parametrize("jobs", ["1", "2", "5"])
def test_cells_are_chosen_and_other_flags_go_to_train_py(reproduce, jobs):
    _, calls = reproduce("bcss", "--skips", "standard", "fusion", "--ignore-index", "0", "--jobs",
                         jobs, "--models", "unet", "--seeds", "4", "--compile")
    assert sorted(calls) == sorted(
        f"--data bcss --model unet --skip {skip} --seed 4 --resume --ignore-index 0 --compile"
        for skip in ("standard", "fusion"))


@pytest.mark.parametrize("chosen, jobs, expected", [
    ({}, [], ["0", "1"]), ({}, ["--jobs", "4"], ["0", "0", "1", "1"]),
    ({"CUDA_VISIBLE_DEVICES": "6,7"}, [], ["6", "7"]),
    ({"CUDA_VISIBLE_DEVICES": ""}, [], ["", ""])])
def test_jobs_share_the_gpus_that_there_are(reproduce, tmp_path, chosen, jobs, expected):
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf 'GPU 0: H100\n  MIG 1g: Device 0\nGPU 1: H100\n'\n")
    tool.chmod(0o755)
    seeds = [str(seed) for seed in range(len(expected))]
    reproduce("monuseg", "--models", "unet", "--skips", "fusion", "--seeds", *seeds, *jobs,
              PATH=f"{tool.parent}:{os.environ['PATH']}", **chosen)
    assert sorted((tmp_path / "gpus.txt").read_text().split("\n")[:-1]) == expected


def test_a_page_that_cannot_be_made_is_no_success(reproduce, tmp_path):
    (tmp_path / "report.py").write_text("raise SystemExit(2)")
    reproduce("monuseg", "--skips", "fusion", status=2)


def test_it_trains_for_real_and_makes_a_page(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/synthetic.md").write_text("<!-- scores -->\n<!-- end -->\n")
    command = ["bash", ROOT / "reproduce.sh", "synthetic", "--models", "unet", "--skips",
               "conv", "--seeds", "0", "--width", "2", "--epochs", "1", "--batch-size", "35"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path,
                   env=os.environ | {"PYTHON": sys.executable})
    log, = (tmp_path / "runs").glob("*.log")
    assert log.read_text().count("test, 10 tiles") == 1
    assert "synthetic" in (tmp_path / "runs/synthetic.md").read_text()
