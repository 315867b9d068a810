"""benchmark.py: the baseline computes what ours does, and the measuring measures."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmark
from benchmark import NaiveFusion, Trainer, naive_augment
from data import augment, get_batch, synthetic
from models import FusionSkip

CPU = torch.device("cpu")


def test_naive_fusion_is_the_same_function():
    ours, naive = FusionSkip([4, 8, 16]).double(), NaiveFusion([4, 8, 16]).double()
    naive.load_state_dict(ours.state_dict())
    maps = [torch.randn(2, c, size, size).double() for c, size in ((4, 16), (8, 8), (16, 4))]
    for one, other in zip(ours(maps), naive(maps), strict=True):
        torch.testing.assert_close(one, other)


def test_the_baseline_learns_the_same_from_a_batch():
    images, masks, _ = synthetic(1)
    batch, labels = get_batch(images, masks, torch.arange(1), CPU)
    args = SimpleNamespace(width=2, checkpointing=False, compile=False)
    pair = [Trainer("unet", "fusion", batch, labels, CPU, naive, args) for naive in (False, True)]
    assert [type(trainer.network.skip) for trainer in pair] == [FusionSkip, NaiveFusion]
    before = pair[0].network.head.weight.clone()
    pair[0].step(), pair[1].step()
    assert not torch.equal(before, pair[0].network.head.weight)
    torch.testing.assert_close(pair[0].network.head.weight, pair[1].network.head.weight)


def test_naive_augmentation_moves_image_and_mask_alike_and_about_as_far_as_ours():
    y, x = np.mgrid[:224, :224]
    mask = ((x // 56 + y // 56) % 2).astype(np.uint8)
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    rng, moved = np.random.default_rng(0), []
    for _ in range(20):
        picture, label = naive_augment(image, mask, rng)
        assert ((picture[..., 0] > 90) == label).mean() > 0.9
        moved.append((label != mask).mean())
    assert 0.2 < np.mean(moved) < 0.8
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].repeat(40, 1, 1, 1) / 255
    labels = torch.from_numpy(mask).repeat(40, 1, 1)
    draws = benchmark.draw_augmentation(40, torch.Generator().manual_seed(0))
    ours = (augment(batch, labels, draws)[1] != labels).float().mean()
    assert np.mean(moved) == pytest.approx(ours.item(), abs=0.12)


def test_a_ratio_above_one_says_that_ours_is_faster(monkeypatch):
    clock = itertools.accumulate(itertools.cycle([0, 2, 0, 6]))  # ours takes 2 s, theirs 6
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    result = benchmark.compare(lambda: None, lambda: None, CPU, 3)
    assert result == {"seconds": 2, "turns": 3, "ratio": 3, "lowest": 3, "highest": 3}


def test_peak_memory_is_of_what_lives_at_once():
    def work():
        one = torch.ones(1_000_000)  # 4 MB
        del one
        two, three = torch.ones(1_000_000), torch.ones(500_000)
        return two, three
    assert benchmark.peak_bytes(work, CPU) == pytest.approx(6e6, rel=0.01)


def test_everything_is_measured_and_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_rate", lambda device: 1e9)
    flags = (f"--models unet --skips conv --width 2 --turns 1 --batch-size 1 2 --device cpu "
             f"--json {tmp_path}/speed.json")
    results = benchmark.main(benchmark.parse_args(flags.split()))
    out = capsys.readouterr().out
    for n in 1, 2:
        step = results[f"unet conv, batch {n}"]["step"]
        assert step["images_per_second"] == pytest.approx(n / step["seconds"])
        assert 1e6 < step["peak_bytes"] < 1e9 and f"unet conv, batch {n}: step" in out
        # About 40 million multiply-adds forward at this width, thrice that with backward, twice
        # as operations.
        operations = step["share_of_matmul_rate"] * 1e9 * step["seconds"] / n
        assert 2e8 < operations < 5e8
    assert json.loads((tmp_path / "speed.json").read_text())["data"] == results["data"]
    assert 0 < results["unet conv, batch 1"]["data_share"]
