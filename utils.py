"""Helpers that several scripts share: files, the command line, devices, processes.

Nothing here knows a data set or the inside of a network.
"""

import errno
import glob
import io
import json
import math
import os
import platform
import sys
import time
from argparse import ArgumentTypeError
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# -----------------------------------------------------------------------------
# Files


@contextmanager
def write_atomic(path):
    """Open a binary file for writing that gets its name only once it is complete.

    It is written beside that name, flushed and renamed. Raises OSError naming it if that fails; an
    earlier file of that name is then untouched. Links stay links. Devices are written to directly,
    and so is /dev/stdout, whatever it is: a file there may hold what others wrote before. (An error
    there names no file.)
    """
    if str(path) == "/dev/stdout":
        print(end="", flush=True)  # what was printed comes first
        with open(os.dup(1), "wb") as file:
            yield file
        return
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        with open(path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno is None or isinstance(error, BrokenPipeError):
            raise  # of another file, or of our output
        raise OSError(f"{path}: cannot be written ({error.strerror or error}); if there was one "
                      "before, it is untouched") from None
    finally:
        if os.path.exists(partial):  # something has failed
            partial.unlink()


def read_json(path):
    """The content of a JSON file; None if it is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def write_json(path, content):
    """Write plain values as JSON; as `write_atomic` does it."""
    with write_atomic(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def lock_folder(folder):
    """Create a folder and keep other processes from writing there -> the lock, an open file.

    It holds until that file is closed. Raises ValueError if another process has the lock, OSError
    if the folder cannot be written to. (Windows has no such locks, nor have some clusters' disks.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}: another process is writing there: wait until it has finished, "
                         "or name another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return lock


def first_mismatch(value, schema, name="content"):
    """Name the first part of `value` that is not as `schema` says; None if all of it is.

    A schema is a type, [schema] for a list of any length, {name: schema} for a dict that holds at
    least these names, or {type: schema} for a dict of any names of that type. Floats are finite.
    """
    if isinstance(schema, (dict, list)) and not isinstance(value, type(schema)):
        return name
    if isinstance(schema, list):
        parts = [(item, schema[0], name) for item in value]
    elif isinstance(schema, dict):
        kind, part = next(iter(schema.items()))
        if isinstance(kind, type):  # names of one type, all with parts of one schema
            parts = [pair for key, item in value.items()
                     for pair in ((key, kind, name), (item, part, key))]
        else:  # names that must be there
            if missing := next((key for key in schema if key not in value), None):
                return missing
            parts = [(value[key], part, key) for key, part in schema.items()]
    else:
        infinite = isinstance(value, float) and not math.isfinite(value)
        return name if infinite or not isinstance(value, schema) else None
    return next((wrong for part in parts if (wrong := first_mismatch(*part))), None)


# What files must hold, as `first_mismatch` takes it; train.py writes more.
LOG_SCHEMA = [{"train_loss": float, "val_loss": float, "val_iou_per_tile": float}]  # by epoch
ARGS_SCHEMA = {"model": str, "skip": str, "data": str, "split": str, "seed": int, "epochs": int,
               "batch_size": int, "lr": float, "width": int, "ignore_index": [int],
               "recipe": str, "skip_depth": int}
CHECKPOINT_SCHEMA = {"model": {str: torch.Tensor}, "args": ARGS_SCHEMA, "num_classes": int,
                     "set": dict, "split": str,  # the fingerprint of the parts' tiles
                     "data_root": str, "recipe_version": int,
                     "weights": str,  # where the initial ones came from
                     "log": LOG_SCHEMA}


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values; there is a whole file under this name at any time.

    torch.save reports a full disk as an error of its own, so it writes to memory first.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with write_atomic(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path, schema=CHECKPOINT_SCHEMA):
    """Read a checkpoint that train.py wrote -> dict of plain values and tensors on the CPU.

    Raises FileNotFoundError or another OSError if it cannot be read, ValueError if it is damaged or
    not as `schema` says (see `first_mismatch`). Code that a file may carry is never run.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a folder: give the best.pt in it")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file: give the best.pt of a run")
    content = Path(path).read_bytes()
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        raise ValueError(f"{path}: not a checkpoint of train.py, or damaged "
                         f"({first_line(error)})") from None
    wrong = first_mismatch(checkpoint, schema)
    if wrong:
        raise ValueError(f"{path}: not a checkpoint of train.py, or of another version: its "
                         f"{wrong!r} is missing or not as it should be")
    return checkpoint


# -----------------------------------------------------------------------------
# The command line

next_line_at = time.time() + 5  # seconds; when a pipe or file gets its next line of progress


def print_progress(line):
    """Show progress: a line that ends in a newline stays, any other is replaced by the next one.

    Where standard output is no terminal, the latter appear as plain lines: the first after five
    seconds, then one a minute.
    """
    global next_line_at
    if sys.stdout is None:  # closed
        return
    if sys.stdout.isatty():
        print("\r\x1b[K" + line, end="", flush=True)
    elif line.endswith("\n") or line and time.time() > next_line_at:
        print(line.removesuffix("\n"), flush=True)
        next_line_at = time.time() + 60


def number(kind, minimum=None, maximum=math.inf):
    """An argparse type: a finite number from `minimum` (None: above 0) to `maximum`, inclusive."""
    def parse(text):
        value = kind(text)
        large_enough = value > 0 if minimum is None else value >= minimum
        if not large_enough or value > maximum or value == math.inf:
            lower = "above 0" if minimum is None else f"of at least {minimum}"
            upper = f" and at most {maximum}" if maximum < math.inf else ""
            raise ArgumentTypeError(f"{text} is not a number {lower}{upper}")
        return value
    parse.__name__ = kind.__name__  # argparse names it in its own errors
    return parse


PICTURES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".bmp", ".pdf")


def output_file(text):
    """An argparse type: the name of a file to write, in a folder that exists."""
    if not Path(text).name or not Path(text).parent.is_dir() or Path(text).is_dir():
        raise ArgumentTypeError(f"{text} cannot be written: name a file in a folder that exists")
    return text


def output_folder(text):
    """An argparse type: a folder to write to, which need not exist -> Path."""
    if not text or Path(text).exists() and not Path(text).is_dir():
        raise ArgumentTypeError(f"{text!r} is not a folder: name one, or a name that is free")
    return Path(text)


def output_picture(text):
    """An argparse type: the name of a picture to write."""
    if Path(text).suffix.lower() not in PICTURES:
        raise ArgumentTypeError(f"{text} is not the name of a picture: let it end in "
                                f"{', '.join(PICTURES)}")
    return output_file(text)


def expand_patterns(words):
    """Replace patterns such as runs/*/best.pt by the files that they fit: Windows' shells do not.

    words: list of text -> list of text. What fits no file stays as it is.
    """
    return [name for word in words for name in sorted(glob.glob(word)) or [word]]


def run_cli(main, parse_args, after_interrupt="nothing unfinished was kept"):
    """Run a script: main(parse_args()).

    Bad input and lack of memory end it with one line and exit status 2, Ctrl-C with one that ends
    in `after_interrupt` and status 130. A bug keeps its traceback.
    """
    name = Path(sys.argv[0]).name
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0  # of this node's processes
    if os.name == "nt":
        sys.argv[1:] = expand_patterns(sys.argv[1:])
    if hasattr(sys.stdout, "reconfigure"):  # not if it is closed, or a notebook's
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that names have
    try:
        main(parse_args())
        if sys.stdout:
            sys.stdout.flush()  # now, as Python itself would tell of a closed pipe with a traceback
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text, lacks_memory = first_line(error), is_out_of_memory(error)
        if isinstance(error, OSError) and error.filename:  # the system's own
            text = f"{error.filename}: {error.strerror}"
        if lacks_memory:
            text = f"out of memory ({text}): give less at a time, or use a smaller network"
        elif isinstance(error, RuntimeError):
            raise  # a bug: show the traceback
        if is_first or lacks_memory:  # else one process speaks for all of its node
            print_progress("")
            print(f"{name}: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; {after_interrupt}", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error):
    """Whether memory ran out: a MemoryError, or PyTorch's, which on a CPU is a RuntimeError."""
    words = ("out of memory", "allocate memory", "enough memory", "ALLOC_FAILED",
             "unable to find an engine")  # cuDNN, whose engines need memory of their own
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and
                                              any(some in first_line(error) for some in words))


def first_line(error):
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# -----------------------------------------------------------------------------
# Devices


def pick_device(name=None):
    """The device called `name`, or the best there is: CUDA, Apple's MPS, the CPU.

    Raises ValueError if it does not work here, or has fewer cards than torchrun has processes.
    """
    is_one_of_several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name is None:
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() and not is_one_of_several else "cpu")
    if name.startswith("mps") and is_one_of_several:
        raise ValueError("--device mps: nothing connects processes there: give torchrun "
                         "train.py --device cpu, or leave out torchrun")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # each of torchrun's processes has a card
        processes, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if 0 < cards < processes:  # so that the first process finds it, too, which alone prints
            raise ValueError(f"{processes} processes, but {cards} GPU{'s' if cards > 1 else ''}: "
                             f"give torchrun --nproc-per-node {cards}, or train.py --device cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} does not work here: {first_line(error)}") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {name}: give cuda, mps or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which calls that name no device mean from now on
    return device


def device_name(device):
    """What a measurement was made on: the card's name, or the kind of CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return (f"{device.type}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
            f"{threads} thread{'s' if threads > 1 else ''}")


def autocast(device, bf16=False):
    """Autocast to bfloat16 on CUDA (float16 where a GPU lacks it), and on a CPU if `bf16`.

    On MPS it changes nothing: that trains in float32.
    """
    if device.type != "cuda":
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16 if bfloat16 else torch.float16)


def memory_format_for(device, bf16):
    """Channels last on CUDA, in bfloat16 and on CPUs with AVX-512; elsewhere slower or untried."""
    faster = bf16 or device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.channels_last if faster else torch.contiguous_format


def to_device(tensor, device):
    """Copy to `device`, on CUDA without waiting. (MPS could read the source after it was freed.)"""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


# -----------------------------------------------------------------------------
# Several processes, as torchrun starts them. Rank 0 alone prints, reads and writes a run's folder,
# and sends the others what they need: nodes do not share a disk.


def setup_processes(device):
    """Join torchrun's processes, if there are any -> rank of this one, how many there are.

    They communicate by NCCL on CUDA, one GPU each, and by gloo on any other device.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))  # while rank 0 downloads, others wait
    if rank > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")  # as in run_cli
    return rank, world_size


def leave_processes():
    """Take the group of processes apart, when all have come here.

    gloo's threads give back the tensors of earlier exchanges, for which they need Python's lock. If
    one is late, the end of the group, which holds that lock, would wait for it for ever.
    """
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.1)  # seconds in which the lock is free
        dist.destroy_process_group()


def on_rank_0(function, *args):
    """Call the function on rank 0 alone; every process returns its result.

    If it raises a ValueError or OSError, every process raises it.
    """
    if not dist.is_initialized():
        return function(*args)
    answer = [None]
    if dist.get_rank() == 0:
        try:
            answer = [function(*args)]
        except (ValueError, OSError) as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        leave_processes()
        raise answer[0]
    return answer[0]
