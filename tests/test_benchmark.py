"""benchmark.py: the baseline computes what ours does, and the measuring measures."""

import inspect
import itertools
import json

import pytest
import torch

import benchmark
from benchmark import NaiveFusion, build_step, naive_batch
from data import (BRIGHTNESS, CHANCE, Tiles, augment, draw_augmentation, get_batch,
                  seeded_generator, synthetic_tiles)
from models import FusionSkip

CPU = torch.device("cpu")


def flags(text):
    return benchmark.parse_args(f"--models unet --repeats 1 --device cpu {text}".split())


def repeated(image, n):
    """n tiles of one image (H, W, 3) uint8; a mask labels what is bright."""
    masks = (image[..., 0] > 90).to(torch.uint8)
    return Tiles(image.repeat(n, 1, 1, 1), masks.repeat(n, 1, 1), [], {})


def test_naive_fusion_is_the_same_function():
    ours, naive = FusionSkip([4, 8, 16]).double(), NaiveFusion([4, 8, 16]).double()
    naive.load_state_dict(ours.state_dict())
    features = [torch.randn(2, c, size, size).double() for c, size in ((4, 16), (8, 8), (16, 4))]
    torch.testing.assert_close(naive(features), ours(features))


def test_a_product_of_square_matrices_takes_two_operations_a_step(monkeypatch):
    monkeypatch.setattr(benchmark, "seconds", lambda work, device: 4.0)
    assert benchmark.matmul_rate(CPU) == 2048**3 / 2


@pytest.mark.parametrize("skip", ["conv", "fusion"])
def test_the_baseline_learns_the_same_from_a_batch(skip, monkeypatch):
    calls, forward = [], NaiveFusion.forward
    monkeypatch.setattr(NaiveFusion, "forward",
                        lambda self, features: calls.append(1) or forward(self, features))
    batch = get_batch(synthetic_tiles(1), torch.arange(1), CPU)
    losses = []
    for naive in False, True:
        step = build_step(flags("--width 2"), "unet", skip, *batch, CPU, naive)
        losses.append(torch.stack([step() for _ in range(3)]))
        assert len(calls) == (3 if naive and skip == "fusion" else 0)
    assert losses[0][2] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_the_baseline_replaces_every_fusion_skip():
    batch = get_batch(synthetic_tiles(1), torch.arange(1), CPU)
    step = build_step(flags("--width 2"), "double_unet", "fusion", *batch, CPU, naive=True)
    network = inspect.getclosurevars(step).nonlocals["network"]
    assert [type(skip) for skip in network.skip] == [NaiveFusion, NaiveFusion]


def test_naive_augmentation_moves_image_and_mask_alike_and_about_as_far_as_ours():
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    board = (255 * ((x // 56 + y // 56) % 2)).to(torch.uint8)
    tiles = repeated(board[..., None].repeat(1, 1, 3), 40)
    torch.manual_seed(0)
    images, masks = naive_batch(tiles, torch.arange(40), CPU)
    assert images.shape == (40, 3, 224, 224) and masks.dtype == torch.int64
    agree = ((images[:, 0] > 0.5) == masks.bool()).float().mean(dim=(1, 2))
    assert agree.min() > 0.95
    moved = (masks != tiles.masks).float().mean().item()
    batch = get_batch(tiles, torch.arange(40), CPU)
    augmented = augment(*batch, draw_augmentation(40, seeded_generator(0)))
    ours = (augmented[1] != tiles.masks).float().mean()
    assert 0.2 < moved < 0.8 and moved == pytest.approx(ours.item(), abs=0.12)


def test_naive_brightness_is_one_factor_a_tile_as_strong_as_ours():
    torch.manual_seed(0)
    tiles = repeated(torch.full((32, 32, 3), 150, dtype=torch.uint8), 200)
    before, _ = get_batch(tiles, torch.arange(200), CPU)
    after, _ = naive_batch(tiles, torch.arange(200), CPU)
    factors = (after / before)[..., 16, 16]  # the centre, into which no border is turned
    torch.testing.assert_close(factors, factors[:, :1].expand(-1, 3))
    ours = draw_augmentation(200, seeded_generator(0))["brightness"]
    for draws in factors, ours:
        lowest, highest = (draws - 1).min().item(), (draws - 1).max().item()
        assert (lowest, highest) == pytest.approx((-BRIGHTNESS, BRIGHTNESS), abs=0.02)
        assert ((draws - 1).abs() < 1e-5).float().mean() == pytest.approx(1 - CHANCE, abs=0.1)


def test_a_ratio_above_one_says_that_ours_is_faster(monkeypatch):
    clock = itertools.accumulate(itertools.cycle([0, 2, 0, 6]))  # ours takes 2 s, theirs 6
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    assert benchmark.compare(lambda: None, lambda: None, 4, CPU, 3) == {
        "seconds": 2, "images_per_second": 2, "ratio": 3, "lowest": 3, "highest": 3}


def test_a_ratio_is_the_median_over_repeats_after_a_warm_up(monkeypatch):
    clock = itertools.accumulate([0, 9, 0, 1] + [0, 1, 0, 2] + [0, 1, 0, 5] + [0, 1, 0, 3])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    result = benchmark.compare(lambda: None, lambda: None, 1, CPU, 3)
    assert (result["lowest"], result["ratio"], result["highest"]) == (2, 3, 5)


def test_peak_memory_is_of_what_lives_at_once():
    def work():
        one = torch.ones(1_000_000)  # 4 MB
        del one
        two, three = torch.ones(1_000_000), torch.ones(500_000)
        return two, three
    assert benchmark.peak_bytes(work, CPU) == pytest.approx(6e6, rel=0.01)


@pytest.fixture
def quick(monkeypatch):
    """Shorten what takes seconds: the rate of large matrices, and the augmentation of 50 tiles."""
    monkeypatch.setattr(benchmark, "matmul_rate", lambda device: 1e9)
    monkeypatch.setattr(benchmark, "DATA_TILES", 3)


def test_everything_is_measured_and_told(tmp_path, capsys, quick):
    results = benchmark.main(flags(f"--skips conv --width 2 --batch-size 1 2 "
                                   f"--json {tmp_path}/speed.json"))
    out = capsys.readouterr().out
    assert "reading and augmenting 3 tiles" in out and "1 thread" in out
    for n in 1, 2:
        step = results[f"unet conv, batch {n}"]
        assert step["images_per_second"] == pytest.approx(n / step["seconds"])
        assert 1e6 < step["peak_bytes"] < 1e9 and f"unet conv, batch {n} " in out
        assert step["data_share"] == pytest.approx(
            results["data"]["seconds"] / 3 * step["images_per_second"])
        # About 40 million multiply-adds forward at this width, thrice that with backward, twice
        # as operations.
        assert 2e8 < step["mfu"] * 1e9 * step["seconds"] / n < 5e8
    assert json.loads((tmp_path / "speed.json").read_text()) == results


def test_checkpointing_ours_saves_memory_and_counts_no_operation_twice(quick):
    plain, saving = (benchmark.main(flags(f"--skips standard --width 2 --batch-size 1 {flag}"))[
        "unet standard, batch 1"] for flag in ("", "--checkpointing"))
    assert saving["peak_bytes"] < 0.9 * plain["peak_bytes"]
    assert saving["peak_ratio"] > 1.1 * plain["peak_ratio"]
    assert saving["mfu"] * saving["seconds"] == pytest.approx(plain["mfu"] * plain["seconds"])


def test_what_does_not_fit_is_told_and_the_rest_goes_on(capsys, monkeypatch, quick):
    def cut(tiles, indices, device):
        if len(indices) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return get_batch(tiles, indices, device)
    monkeypatch.setattr(benchmark, "get_batch", cut)
    results = benchmark.main(flags("--skips conv --width 2 --batch-size 2 1"))
    assert "unet conv, batch 2: does not fit" in capsys.readouterr().out
    assert "unet conv, batch 1" in results and "unet conv, batch 2" not in results


def test_an_error_that_only_speaks_of_memory_is_not_taken_for_a_lack_of_it(monkeypatch, quick):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(benchmark, "get_batch", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        benchmark.main(flags("--skips conv --width 2 --batch-size 1"))
