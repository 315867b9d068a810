"""Time and memory of everything in a training step, next to how it is commonly written.

    python benchmark.py --turns 4           # took five and a half minutes on 2 CPU cores
    python benchmark.py --compile           # on a GPU: batches of 8 and 50, as in the paper
    python benchmark.py --json speed.json

The baseline, defined below, is the same network as people commonly write it: float32, contiguous,
eager, Adam as it comes, fusion that convolves before it resizes, each sample augmented for itself
on the CPU. Both sides take turns in one run; a ratio is the median over turns of baseline / ours,
so above 1 we are faster or smaller, with its smallest and largest value behind it.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data import augment, draw_augmentation, get_batch, live, normalize, positive, run, synthetic
from losses import loss_for
from models import MODELS, SKIPS, FusionSkip, autocast, create_model, describe, pick_device

# -----------------------------------------------------------------------------
# The baseline


class NaiveFusion(FusionSkip):
    """The paper's order: convolve at the source's size, then resize, everywhere."""

    def forward(self, maps):
        fused = []
        for i, conv in enumerate(self.convs):
            total = maps[i]
            for j, x in enumerate(maps):
                if j != i:
                    total = total + F.interpolate(self.match[i][j](x), size=maps[i].shape[2:],
                                                  mode="bilinear", align_corners=False)
            fused.append(conv(total))
        return fused


def naive_augment(image, mask, rng):
    """One sample as people commonly augment it: one geometric step after the other.

    image (H, W, 3), mask (H, W), uint8. The six augmentations of `data.augment`, at its strength.
    """
    def warp(image, mask, x, y):  # each step interpolates anew
        grid = torch.from_numpy(np.stack((x, y), axis=2)).float()[None]
        picture = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        label = torch.from_numpy(mask)[None, None].float()
        picture = F.grid_sample(picture, grid, "bilinear", "reflection", align_corners=False)
        label = F.grid_sample(label, grid, "nearest", "reflection", align_corners=False)
        return picture[0].permute(1, 2, 0).byte().numpy(), label[0, 0].byte().numpy()

    size = len(image)
    centres = (2 * np.arange(size) + 1) / size - 1
    x, y = np.meshgrid(centres, centres)
    if rng.random() < 0.5:
        image, mask = image[:, ::-1].copy(), mask[:, ::-1].copy()
    if rng.random() < 0.5:
        image, mask = image[::-1].copy(), mask[::-1].copy()
    if rng.random() < 0.5:
        angle = rng.uniform(-math.pi, math.pi)
        image, mask = warp(image, mask, math.cos(angle) * x - math.sin(angle) * y,
                           math.sin(angle) * x + math.cos(angle) * y)
    if rng.random() < 0.5:  # elastic: blurred noise at full resolution
        shifts = []
        for _ in range(2):
            noise = torch.from_numpy(rng.standard_normal((1, 1, size, size))).float()
            taps = torch.exp(-(torch.arange(-48, 49) / 16)**2 / 2)
            taps = taps / taps.sum()
            noise = F.conv2d(noise, taps.view(1, 1, 1, -1), padding=(0, 48))
            noise = F.conv2d(noise, taps.view(1, 1, -1, 1), padding=(48, 0))[0, 0].numpy()
            shifts.append(noise / noise.std() * 4 * 2 / size)
        image, mask = warp(image, mask, x + shifts[0], y + shifts[1])
    if rng.random() < 0.5:  # grid distortion
        lines = [np.append(0, np.cumsum(1 + rng.uniform(-0.3, 0.3, 5))) for _ in range(2)]
        bent = [np.interp(centres, np.linspace(-1, 1, 6), 2 * line / line[-1] - 1)
                for line in lines]
        image, mask = warp(image, mask, *np.meshgrid(*bent))
    if rng.random() < 0.5:
        image = (image * rng.uniform(0.8, 1.2)).clip(0, 255).astype(np.uint8)
    return image, mask


# -----------------------------------------------------------------------------
# Measuring


def seconds(work, device):
    """Run work() once -> seconds until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours, baseline, device, turns):
    """Time both in turns, after one to warm up -> our median seconds, and the ratio's spread."""
    pairs = [(seconds(ours, device), seconds(baseline, device)) for _ in range(turns + 1)][1:]
    ratios = [b / a for a, b in pairs]
    return {"seconds": statistics.median(a for a, _ in pairs), "turns": turns,
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def peak_bytes(work, device):
    """The most memory that tensors take while work() runs, those from before it not counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the profiler chats there
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            work()
    finally:
        os.dup2(stderr, 2)
    events = [event for event in profile.profiler.kineto_results.events()
              if event.name() == "[memory]"]  # every allocation, and negative, every release
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


class Trainer:
    """One network with its optimiser: `step` trains it on a batch, `forward` only runs it."""

    def __init__(self, model, skip, batch, labels, device, naive, args):
        torch.manual_seed(0)
        network = create_model(model, skip, 1, args.width, args.checkpointing and not naive)
        if naive and skip == "fusion":
            plain, network.skip = network.skip, NaiveFusion([c.in_channels for c in
                                                             network.skip.convs])
            network.skip.load_state_dict(plain.state_dict())
        self.fast = fast = device.type == "cuda" and not naive
        self.format = torch.channels_last if fast else torch.contiguous_format
        self.network = network.to(device, memory_format=self.format)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3,
                                          fused=None if naive else True)
        self.run = torch.compile(self.network) if args.compile and not naive else self.network
        self.precision = autocast(device) if fast else torch.autocast(device.type, enabled=False)
        self.batch, self.labels, self.loss_fn = batch, labels, loss_for(1)

    def forward(self):
        torch.backends.cudnn.benchmark = self.fast
        with self.precision:
            return self.run(normalize(self.batch).contiguous(memory_format=self.format))

    def step(self):
        self.optimizer.zero_grad()
        self.loss_fn(self.forward(), self.labels).mean().backward()
        self.optimizer.step()

    def predict(self):
        with torch.inference_mode():
            self.forward()


def matmul_rate(device):
    """The most operations a second that matrices multiply at, in the precision that we train in."""
    size = 8192 if device.type == "cuda" else 2048
    with autocast(device):
        one, other = torch.randn(2, size, size, device=device)
        return 2 * size**3 / min(seconds(lambda: one @ other, device) for _ in range(10))


def show(name, result, *more):
    spread = f"{result['ratio']:6.2f} ({result['lowest']:.2f} to {result['highest']:.2f})"
    live(f"{name:36}{1000 * result['seconds']:9.1f} ms {result['images_per_second']:9.2f}   "
         f"{spread:24}{'  '.join(more)}\n")


def measure_network(model, skip, n, rate, device, args):
    """A training step and a forward pass of one network, on batches of n tiles -> dict of dicts."""
    images, masks, _ = synthetic(n)
    batch, labels = get_batch(images, masks, torch.arange(n), device)
    ours, baseline = (Trainer(model, skip, batch, labels, device, naive, args)
                      for naive in (False, True))
    step = compare(ours.step, baseline.step, device, args.turns)
    peaks = [peak_bytes(trainer.step, device) for trainer in (ours, baseline)]
    ours.run = ours.network  # operations of a compiled network would not be seen
    with FlopCounterMode(display=False) as counter:
        ours.step()
    share = counter.get_total_flops() / step["seconds"] / rate
    step |= {"images_per_second": n / step["seconds"], "peak_bytes": peaks[0],
             "peak_ratio": peaks[1] / peaks[0], "share_of_matmul_rate": share}
    show(f"{model} {skip}, batch {n}: step", step, f"{peaks[0] / 1e6:,.0f} MB, "
         f"{step['peak_ratio']:.2f}", f"{100 * share:.0f} % of the matmul rate")
    forward = compare(ours.predict, baseline.predict, device, args.turns)
    forward["images_per_second"] = n / forward["seconds"]
    show("    forward", forward)
    return {"step": step, "forward": forward}


def measure_data(device, turns):
    """Augmentation and reading of 50 tiles, the paper's larger batch -> dict of dicts."""
    n, rng, generator = 50, np.random.default_rng(0), torch.Generator().manual_seed(0)
    images, masks, _ = synthetic(n)
    batch, labels = get_batch(images, masks, torch.arange(n), device)
    augmentation = compare(lambda: augment(batch, labels, draw_augmentation(n, generator)),
                           lambda: [naive_augment(images[i].numpy(), masks[i].numpy(), rng)
                                    for i in range(n)], device, turns)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "images.npy"), images.numpy())
        np.save(Path(folder, "masks.npy"), masks.numpy())
        for i in range(n):
            Image.fromarray(images[i].numpy()).save(Path(folder, f"{i}.png"))
            Image.fromarray(masks[i].numpy()).save(Path(folder, f"{i}_mask.png"))
        mapped = [torch.from_numpy(np.load(Path(folder, f"{kind}.npy"), mmap_mode="c"))
                  for kind in ("images", "masks")]
        order = torch.randperm(n)
        reading = compare(lambda: [tensor.index_select(0, order) for tensor in mapped],
                          lambda: [np.asarray(Image.open(Path(folder, f"{i}{kind}.png")))
                                   for i in range(n) for kind in ("", "_mask")], device, turns)
        whole = statistics.median(seconds(lambda: get_batch(*mapped, order, device), device)
                                  for _ in range(turns))
    for name, result in ("augmentation", augmentation), ("reading tiles, against PNG", reading):
        result["images_per_second"] = n / result["seconds"]
        show(name, result)
    return {"augmentation": augmentation, "reading": reading,
            "seconds_per_image": (whole + augmentation["seconds"]) / n}


def main(args):
    device = pick_device(args.device)
    sizes = args.batch_size or ([8, 50] if device.type == "cuda" else [2])
    rate = matmul_rate(device)
    print(f"torch {torch.__version__}, {describe(device)}, width {args.width}, {args.turns} turns, "
          f"matmul {rate / 1e12:.3g} TFLOP/s")
    print(f"{'ours':>48} {'images/s':>9}   {'baseline / ours':24}peak memory, baseline / ours")
    results = {"torch": torch.__version__, **vars(args), "device": describe(device),
               "matmul_rate": rate, "data": measure_data(device, max(args.turns, 10))}
    for n in sizes:
        for model in args.models:
            for skip in args.skips:
                name = f"{model} {skip}, batch {n}"
                try:
                    results[name] = measure_network(model, skip, n, rate, device, args)
                except torch.OutOfMemoryError:
                    live(f"{name}: does not fit, ours or the baseline\n")
                    continue
                share = (results["data"]["seconds_per_image"]
                         * results[name]["step"]["images_per_second"])
                results[name]["data_share"] = share
                live(f"    data and augmentation: {100 * share:.2f} % of a step\n")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return results


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--skips", nargs="+", choices=SKIPS, default=list(SKIPS))
    parser.add_argument("--batch-size", type=positive(int), nargs="+", metavar="TILES",
                        help="one or several (default: 8 50 on CUDA, 2 elsewhere)")
    parser.add_argument("--width", type=positive(int), default=64, help="of the U-Net")
    parser.add_argument("--turns", type=positive(int), default=5, help="measurements of each")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours")
    parser.add_argument("--checkpointing", action="store_true", help="recompute maps in ours")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
