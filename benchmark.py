"""Time and memory of a training step, next to the same network as it is commonly written.

    python benchmark.py                     # batches of 2 on a CPU (minutes), 8 and 50 on a GPU
    python benchmark.py --compile           # the same, with our side compiled
    python benchmark.py --json speed.json

The baseline is float32, contiguous and eager, with Adam's defaults, a fusion skip that convolves
before it resizes, and tiles augmented one by one on the CPU. Both sides take turns in one run; a
ratio is the median over repeats of baseline / ours, with its smallest and largest. Peak memory
leaves out weights and Adam's moments; on a CPU it depends on the number of threads. mfu (model
FLOPs utilization) is the share of the rate at which large matrices multiply on the same device.
"""

import argparse
import itertools
import os
import statistics
import time
from functools import reduce

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

from data import (BRIGHTNESS, CHANCE, augment, draw_augmentation, get_batch, normalize,
                  seeded_generator, synthetic_tiles)
from losses import loss_for
from models import MODELS, SKIPS, FusionSkip, create_model, resize
from raw import TILE
from recipes import COMMON
from train import build_training, wrap
from utils import (autocast, device_name, is_out_of_memory, memory_format_for, number, output_file,
                   pick_device, run_cli, write_json)

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to the terminal
DATA_TILES = 50  # augmented together: the paper's larger batch
ROW = "{:29}{:>9}{:>10}   {:21}{:>9}{:>14}{:>6}{:>8}"

# -----------------------------------------------------------------------------
# The baseline


class NaiveFusion(FusionSkip):
    """The same function in the paper's order: convolve at the source's size, then resize."""

    def forward(self, features):
        fused = []
        for x, match, conv in zip(features, self.match, self.convs):  # its own match is Identity
            matched = (resize(layer(other), x.shape[2:]) for layer, other in zip(match, features))
            fused.append(conv(reduce(torch.add, matched)))
        return fused


# Torchvision's own transforms at our strength; it has no grid distortion. Elastic shifts are of
# its default smoothness, and with this alpha they have a standard deviation of 4 pixels, as ours.
transform = v2.Compose([
    v2.RandomHorizontalFlip(CHANCE), v2.RandomVerticalFlip(CHANCE),
    v2.RandomApply([v2.RandomRotation(180, v2.InterpolationMode.BILINEAR)], CHANCE),
    v2.RandomApply([v2.ElasticTransform(alpha=250.0, sigma=5.0)], CHANCE),
    v2.RandomApply([v2.ColorJitter(brightness=BRIGHTNESS)], CHANCE)])


def naive_batch(tiles, indices, device):
    """What `get_batch` and then `augment` give, by one tile after the other on the CPU."""
    stored = (get_batch(tiles, index, "cpu") for index in indices.split(1))
    samples = [transform(tv_tensors.Image(image), tv_tensors.Mask(mask)) for image, mask in stored]
    return [torch.cat(tensors).to(device) for tensors in zip(*samples)]


# -----------------------------------------------------------------------------
# Measuring


def build_step(args, model, skip, images, masks, device, naive=False):
    """Build a network -> step(), which trains it on a batch and returns the loss.

    The step is train.py's or the baseline's: the same function of the same weights, on CUDA in
    another precision.
    """
    fast = device.type == "cuda" and not naive
    loss_fn = loss_for(1)
    memory_format = torch.contiguous_format if naive else memory_format_for(device, bf16=False)
    if naive:
        torch.manual_seed(0)
        network = create_model(model, skip, 1, args.width).to(device)
        for module in network.modules():
            if type(module) is FusionSkip:
                module.__class__ = NaiveFusion  # with the very weights that it has
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        scaler = torch.amp.GradScaler(enabled=False)
    else:
        flags = argparse.Namespace(**COMMON, **vars(args), model=model, skip=skip, seed=0, lr=1e-3)
        network, _, optimizer, scaler = build_training(flags, 1, device)
        network = wrap(network, args.compile, device, world_size=1)

    def step():
        # The baseline has PyTorch's defaults: TF32 in cuDNN's convolutions, not in other products.
        torch.backends.cudnn.benchmark = fast
        torch.set_float32_matmul_precision("high" if fast else "highest")
        with autocast(device) if fast else torch.autocast(device.type, enabled=False):
            logits = network(normalize(images).contiguous(memory_format=memory_format))
        loss = loss_fn(logits, masks).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()
    return step


def seconds(work, device):
    """Run work() once -> seconds until the device has finished it."""
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def compare(ours, baseline, n, device, repeats):
    """Time both in turns on n tiles, after a warm-up -> our speed, and the spread of the ratio."""
    pairs = [(seconds(ours, device), seconds(baseline, device)) for _ in range(1 + repeats)][1:]
    ratios, median = [b / a for a, b in pairs], statistics.median(a for a, _ in pairs)
    return {"seconds": median, "images_per_second": n / median,
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def peak_bytes(work, device):
    """The most memory that tensors take while work() runs, those from before it not counted."""
    if device.type == "mps":
        return float("nan")  # it keeps no account
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = sorted((event.start_ns(), event.nbytes())  # negative where memory is given back
                    for event in profiler.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


def matmul_rate(device):
    """Operations a second at which large matrices multiply, in the precision that we train in."""
    size = 8192 if device.type == "cuda" else 2048
    with autocast(device):
        matrix = torch.randn(size, size, device=device)
        matrix = matrix @ matrix / size  # now of that precision: nothing is converted below
        return 2 * size**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(10))


def measure(args, model, skip, n, tiles, device, rate, loading):
    """Time and memory of one network's training step on n tiles -> dict."""
    if args.compile:
        torch.compiler.reset()  # else a second batch size would be compiled for any size
    batch = get_batch(tiles, torch.arange(n), device)
    ours, baseline = (build_step(args, model, skip, *batch, device, naive)
                      for naive in (False, True))
    result = compare(ours, baseline, n, device, args.repeats)
    peak, baseline_peak = peak_bytes(ours, device), peak_bytes(baseline, device)
    # Counted without values, and without checkpointing, whose second computation is no progress.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(model, skip, 1, args.width)(torch.empty(n, 3, TILE, TILE)).sum().backward()
    return result | {"peak_bytes": peak, "peak_ratio": baseline_peak / peak,
                     "mfu": counter.get_total_flops() / result["seconds"] / rate,
                     "data_share": result["images_per_second"] / loading["images_per_second"]}


def spread(result):
    return f"{result['ratio']:.2f} ({result['lowest']:.2f} to {result['highest']:.2f})"


def main(args):
    """Measure and print everything -> {"unet conv, batch 8": its numbers, ...}, as in the JSON."""
    device = pick_device(args.device)
    sizes = args.batch_size or ([8, 50] if device.type == "cuda" else [2])
    rate, tiles = matmul_rate(device), synthetic_tiles(max(DATA_TILES, *sizes))
    indices, rng = torch.arange(DATA_TILES), seeded_generator(0)
    loading = compare(lambda: augment(*get_batch(tiles, indices, device),
                                      draw_augmentation(DATA_TILES, rng)),
                      lambda: naive_batch(tiles, indices, device), DATA_TILES, device, args.repeats)
    print(f"torch {torch.__version__}, {device_name(device)}, U-Net of width {args.width}, matmul "
          f"{rate / 1e12:.3g} TFLOP/s, repeats {args.repeats}; ratio: baseline / ours\n"
          f"reading and augmenting {DATA_TILES} tiles: {1000 * loading['seconds']:.1f} ms, time "
          f"ratio {spread(loading)}; \"data\" is its share of a step's time")
    print(ROW.format("", "ms", "images/s", "time ratio", "peak MB", "memory ratio", "mfu", "data"))
    results = {"torch": torch.__version__, **vars(args), "device": device_name(device),
               "matmul_rate": rate, "data": loading}
    for n, model, skip in itertools.product(sizes, args.models, args.skips):
        name = f"{model} {skip}, batch {n}"
        try:
            step = results[name] = measure(args, model, skip, n, tiles, device, rate, loading)
            print(ROW.format(name, f"{1000 * step['seconds']:.1f}",
                             f"{step['images_per_second']:.2f}", spread(step),
                             f"{step['peak_bytes'] / 1e6:,.0f}", f"{step['peak_ratio']:.2f}",
                             f"{step['mfu']:.0%}", f"{step['data_share']:.2%}"), flush=True)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"{name}: does not fit into memory, ours or the baseline", flush=True)
        if args.json:
            write_json(args.json, results)
    return results


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["unet", "swin_unet"],
                        help="networks (default: the paper's two)")
    parser.add_argument("--skips", nargs="+", choices=SKIPS,
                        default=["standard", "conv", "fusion"],
                        help="skip connections (default: the paper's three)")
    parser.add_argument("--batch-size", type=number(int), nargs="+", metavar="TILES",
                        help="batch sizes (default: 8 50 on CUDA, 2 elsewhere)")
    parser.add_argument("--width", type=number(int, maximum=1024), default=64,
                        help="channels of the U-Net's first level (default: 64)")
    parser.add_argument("--repeats", type=number(int), default=5, help="timings of each step, "
                        "of which the median counts (default: 5)")
    parser.add_argument("--compile", action="store_true", help="torch.compile our side")
    parser.add_argument("--checkpointing", action="store_true", help="recompute feature maps "
                        "on our side")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--json", type=output_file, metavar="FILE",
                        help="also write all numbers to FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main, parse_args)
