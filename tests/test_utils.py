"""utils.py: files, what a user sees of any script, devices."""

import argparse
import errno
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, refused

import utils
from utils import (CHECKPOINT_SCHEMA, LOG_SCHEMA, first_mismatch, load_checkpoint, lock_folder,
                   number, on_rank_0, pick_device, print_progress, save_checkpoint,
                   setup_processes, write_atomic)

# Files


def test_a_file_that_cannot_be_written_wholly_leaves_the_old_one_and_no_partial(tmp_path):
    path = tmp_path / "scores.json"
    with write_atomic(path) as file:
        file.write(b"old")
    for error, raised in (KeyboardInterrupt(), KeyboardInterrupt), (
            OSError(28, "No space left on device"), OSError):
        with pytest.raises(raised) as stop, write_atomic(path) as file:
            file.write(b"half of the ne")
            raise error
        assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"old"
    assert str(stop.value).startswith(f"{path}: cannot be written (No space left on device)")
    with write_atomic(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"  # until it is whole
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"new"


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or fsync(number))
    monkeypatch.setattr(Path, "replace",
                        lambda path, name: calls.append("replace") or replace(path, name))
    with write_atomic(tmp_path / "last.pt") as file:
        file.write(b"new")
    assert calls == ["fsync", "replace"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for name in "none/scores.json", "folder.png", "file/log.csv":
        told = f"^{re.escape(str(tmp_path / name))}: cannot be written"
        with pytest.raises(OSError, match=told), write_atomic(tmp_path / name) as file:
            file.write(b"new")


def test_links_and_what_is_no_file_stay_what_they_are(posix, tmp_path):
    (tmp_path / "page.md").write_text("old")
    (tmp_path / "link.md").symlink_to("page.md")
    with write_atomic(tmp_path / "link.md") as file:
        file.write(b"new")
    assert (tmp_path / "link.md").is_symlink() and (tmp_path / "page.md").read_text() == "new"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        with write_atomic(tmp_path / "pipe") as file:
            file.write(b"new")
        assert os.read(reader, 9) == b"new" and (tmp_path / "pipe").is_fifo()
        os.close(reader)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")
def test_a_pipe_that_a_link_of_the_system_names_is_written_to():
    reader, writer = os.pipe()
    with write_atomic(f"/proc/self/fd/{writer}") as file:  # as /dev/stdout leads to one
        file.write(b"new")
    assert os.read(reader, 9) == b"new"
    os.close(reader), os.close(writer)


def test_what_a_file_behind_standard_output_held_before_stays(tmp_path):
    script = """import sys
from unittest.mock import MagicMock
sys.modules["torch"] = sys.modules["torch.distributed"] = MagicMock()  # takes seconds to import
sys.path.insert(0, sys.argv[1])
from utils import write_atomic
print("a table")
with write_atomic("/dev/stdout") as file:
    file.write(b"[]")
print(" and more")"""
    (tmp_path / "all.txt").write_text("before\n")
    with open(tmp_path / "all.txt", "a") as output:
        subprocess.run([sys.executable, "-c", script, ROOT], stdout=output, check=True)
    assert (tmp_path / "all.txt").read_text() == "before\na table\n[] and more\n"
    assert [*tmp_path.iterdir()] == [tmp_path / "all.txt"]


def leave_if_locked(folder):
    """The body of a process."""
    try:
        lock_folder(folder)
    except ValueError as error:
        sys.exit(7 if str(error).startswith(f"{folder}: another process is writing") else 1)


@pytest.mark.skipif(not utils.fcntl, reason="Windows has no locks")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_can_be_written_to(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "refused")
    monkeypatch.setattr(utils.fcntl, "lockf", refuse)
    utils.lock_folder(tmp_path / "run").close()


@pytest.mark.parametrize("value, missing", [({"a": None, "b": 1.0}, None), ({"b": 1.0}, "a"),
                                            ({"a": 1.0}, "b"), ([], "content")])
def test_a_name_must_be_there_even_if_its_value_may_be_none(value, missing):
    assert utils.first_mismatch(value, {"a": float | None, "b": float}) == missing


def test_a_folder_is_locked_against_other_processes_until_the_lock_is_closed(posix, tmp_path):
    def exit_code_of_another():
        process = multiprocessing.get_context("fork").Process(target=leave_if_locked,
                                                              args=(tmp_path / "run",))
        process.start()
        process.join(60)
        return process.exitcode

    lock = lock_folder(tmp_path / "run")
    assert exit_code_of_another() == 7
    lock.close()
    assert exit_code_of_another() == 0


def test_a_checkpoint_is_read_as_it_was_written(tmp_path, whole):
    checkpoint = load(whole.out / "last.pt")
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    again = load_checkpoint(tmp_path / "a.pt")
    assert again.keys() == checkpoint.keys() and again["args"] == checkpoint["args"]
    assert all(map(torch.equal, again["model"].values(), checkpoint["model"].values()))
    with pytest.raises(ValueError, match="a.pt: .* its 'chapters' is missing"):
        load_checkpoint(tmp_path / "a.pt", CHECKPOINT_SCHEMA | {"chapters": [str]})


ROW = {"train_loss": 0.5, "val_loss": 0.5, "val_iou_per_tile": 0.5}


@pytest.mark.parametrize("value, schema, wrong", [
    (3, int, None), (3, float, "content"), (None, float | None, None), (math.nan, float, "content"),
    (math.inf, float | None, "content"), ("3", int, "content"), ([], [str], None),
    (["a", 3], [str], "content"), ("ab", [str], "content"),
    ([ROW, ROW | {"more": 1}], LOG_SCHEMA, None),
    ([ROW, {"train_loss": 0.5}], LOG_SCHEMA, "val_loss"), ([[]], LOG_SCHEMA, "content"),
    ([ROW | {"val_loss": -math.inf}], LOG_SCHEMA, "val_loss"),
    ({"a": {"b": [3]}}, {"a": {"b": [int]}}, None),
    ({"a": {"b": [3, "c"]}}, {"a": {"b": [int]}}, "b"), ({"a": 3}, {"a": {"b": int}}, "a"),
    ([1], {"a": int}, "content"), ({}, {str: int}, None), ({"a": 1, "b": "c"}, {str: int}, "b"),
    ({"a": 1, 2: 3}, {str: int}, "content"), ({0: {"step": 1}}, {int: dict}, None)])
def test_the_first_part_that_is_not_as_the_schema_says_is_named(value, schema, wrong):
    assert first_mismatch(value, schema) == wrong


# The command line


@pytest.mark.parametrize("parse, good, bad", [
    (number(int), {"1": 1, "+07": 7}, "0 -3 1.5 a inf 1e3"),
    (number(float), {"1e-9": 1e-9, "3": 3.0}, "0 -1 nan inf -inf 1e999 a"),
    (number(int, minimum=0, maximum=9), {"0": 0, "9": 9}, "-1 10")])
def test_numbers_out_of_their_range_are_refused_by_name(parse, good, bad, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=parse)
    script = SimpleNamespace(main=print, parse_args=parser.parse_args)
    for text, value in good.items():
        assert parser.parse_args(["--rate", text]).rate == value
    for text in bad.split():
        line = refused(capsys, script, f"--rate={text}")
        assert "argument --rate" in line and text in line and "parse" not in line


def test_the_range_of_a_number_is_told_as_one_would_say_it():
    for parse, text, told in [(number(int), "0", "0 is not a number above 0"),
                              (number(float, minimum=0, maximum=1), "-1",
                               "-1 is not a number of at least 0 and at most 1")]:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert str(error.value) == told


def test_in_a_pipe_progress_is_a_line_after_some_seconds_and_then_one_a_minute(monkeypatch, capsys):
    start = utils.next_line_at - 5
    monkeypatch.setattr(utils, "next_line_at", start + 5)
    for second in range(200):
        monkeypatch.setattr(utils.time, "time", lambda: start + second)
        print_progress(f"{second} s")
        if second == 100:
            print_progress("an epoch\n")
            print_progress("")
    assert capsys.readouterr().out == "6 s\n67 s\nan epoch\n161 s\n"


def test_in_a_terminal_progress_is_one_line_that_changes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for line in "1 s", "2 s", "an epoch\n":
        print_progress(line)
    assert capsys.readouterr().out == "\r\x1b[K1 s\r\x1b[K2 s\r\x1b[Kan epoch\n"


SCRIPT = """import sys
from unittest.mock import MagicMock
sys.modules["torch"] = sys.modules["torch.distributed"] = MagicMock()  # takes seconds to import
from utils import run_cli


def main(kind):
    print("IoU 64.0 ± 0.5")
    for _ in range(100_000 if kind == "long" else 0):
        print("tile")


run_cli(main, lambda: sys.argv[1])
"""


@pytest.fixture
def shell(posix, tmp_path):
    """Run a shell command, in which {} stands for SCRIPT -> finished process."""
    def run(command, encoding="utf-8"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding,
                                    "PYTHONUNBUFFERED": ""}
        script = shlex.join([sys.executable, str(tmp_path / "script.py")])
        return subprocess.run(["bash", "-c", command.format(script)], env=environment, text=True,
                              capture_output=True, timeout=120)

    (tmp_path / "script.py").write_text(SCRIPT)
    return run


@pytest.mark.parametrize("command, output, status", [
    ("{} long | head -1; exit ${{PIPESTATUS[0]}}", "IoU 64.0 ± 0.5\n", 2),
    ("{} short | true", "", 0), ("{} long >&-", "", 0)],
    ids=["a reader that leaves", "no reader", "closed"])
def test_a_script_whose_output_nobody_reads_ends_without_a_word(shell, command, output, status):
    run = shell(command)
    assert (run.stdout, run.stderr, run.returncode) == (output, "", status)


def test_patterns_are_filled_in_and_other_words_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "b.pt", "a.pt", "c[1].pt":
        Path(name).touch()
    assert utils.expand_patterns(["[ab].pt", "--lr", "9", "c[1].pt", "", "none/*.pt"]) == [
        "a.pt", "b.pt", "--lr", "9", "c[1].pt", "", "none/*.pt"]


def test_a_character_that_the_terminal_lacks_is_replaced(shell):
    assert shell("{} short", "ascii").stdout == "IoU 64.0 ? 0.5\n"


def raise_(error):
    raise error


@pytest.mark.parametrize("error, line", [
    (ValueError("--lr 9: too high\nreally"), "--lr 9: too high"), (ValueError(), "ValueError"),
    (OSError("log.csv: cannot be read"), "log.csv: cannot be read"),
    (FileNotFoundError(2, "No such file or directory", "a.tif"),
     "a.tif: No such file or directory"),
    (MemoryError("Unable to allocate 9 GiB"), "out of memory (Unable to allocate 9 GiB): give less "
     "at a time, or use a smaller network"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "out of memory (CUDA out of memory. "
     "Tried): give less at a time, or use a smaller network"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
     "out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to): "
     "give less at a time, or use a smaller network")])
def test_what_the_user_can_mend_is_one_line(capsys, error, line):
    script = SimpleNamespace(main=lambda args: raise_(error), parse_args=list)
    assert refused(capsys, script).partition(": ")[2] == line


@pytest.mark.parametrize("rank, local_rank, error, told", [
    (8, 0, ValueError, True), (8, 1, ValueError, False), (9, 1, MemoryError, True)])
def test_one_process_of_every_node_tells_and_each_tells_that_its_memory_is_short(
        capsys, monkeypatch, rank, local_rank, error, told):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit) as end:
        utils.run_cli(lambda args: raise_(error("too much")), list)
    assert end.value.code == 2 and ("too much" in capsys.readouterr().err) == told


def test_lack_of_memory_is_one_line(capsys):
    script = SimpleNamespace(main=lambda args: torch.empty(10**15), parse_args=list)
    line = refused(capsys, script).partition(": ")[2]
    assert line.startswith("out of memory (") and line.endswith("or use a smaller network")
    for words in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                  "FIND was unable to find an engine to execute this computation"):
        script.main = lambda args, words=words: raise_(RuntimeError(words))
        assert words in refused(capsys, script)


def test_a_mistake_of_ours_keeps_its_traceback(capsys):
    for error in (RuntimeError("sizes do not match"), KeyError("weights"), TypeError("no list"),
                  RuntimeError("CUDA error: an illegal memory access was encountered")):
        with pytest.raises(type(error)):
            utils.run_cli(lambda args: raise_(error), list)


# Devices and processes


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", "hpu", ""])
def test_a_device_that_does_not_work_here_is_named(name):
    with pytest.raises(ValueError, match=f"--device {name}"):
        pick_device(name)


def test_more_processes_than_cards_are_refused_by_the_one_that_speaks(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes, but 1 GPU: .* --nproc-per-node 1, or"):
        pick_device("cuda")


def test_several_processes_do_not_take_mps_which_cannot_connect_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pick_device().type == "cpu"
    with pytest.raises(ValueError, match="--device mps: nothing connects processes"):
        pick_device("mps")


def test_without_a_name_there_is_always_a_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type in ("cuda", "mps", "cpu")
    assert pick_device().type in utils.device_name(pick_device()) or torch.cuda.is_available()


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda:0", "nccl")])
def test_several_processes_talk_by_what_their_device_has(device, backend, monkeypatch):
    asked = []
    monkeypatch.setattr("torch.distributed.init_process_group",
                        lambda backend, timeout: asked.append(backend))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert setup_processes(torch.device(device)) == (0, 2)
    assert asked == [backend]  # gloo on a CPU even where there are GPUs, which PyTorch would prefer


def test_what_rank_0_can_print_ends_no_other_process(monkeypatch):
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("sys.stdout", sys.stdout)  # put back at the end
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert setup_processes(torch.device("cpu")) == (1, 2)
    print("writing runs/\udcff", flush=True)  # a name that no encoding has


def test_a_notebook_whose_output_cannot_be_reconfigured_runs_a_script(monkeypatch):
    lines = []
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=lines.append, flush=lambda: None))
    utils.run_cli(lambda args: print("done"), list)
    assert lines[0] == "done"


def test_one_process_is_rank_0_and_does_what_rank_0_does(monkeypatch):
    for name in "RANK", "WORLD_SIZE":
        monkeypatch.delenv(name, raising=False)
    assert setup_processes(torch.device("cpu")) == (0, 1)
    assert on_rank_0(math.gcd, 12, 18) == 6
    with pytest.raises(ValueError, match="mended"):
        on_rank_0(raise_, ValueError("to be mended"))
