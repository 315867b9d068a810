"""models.py: the paper's parameter counts, sizes, the skips' equations, checkpoints.

What holds for any network and skip is claimed of all in MODELS and SKIPS, yours included;
`python -m pytest tests -k skip` runs what concerns skips.
"""

import copy
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, fit, save_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import models
from losses import loss_for
from models import (MODELS, SKIPS, ConvSkip, FusionSkip, StandardSkip, build_model, create_model,
                    parameter_counts, print_parameters, returned_channels)
from utils import load_checkpoint

COUNTS = {  # one class; the first and the fifth are the paper's Table 1
    ("unet", "standard"): 31_043_521, ("unet", "conv"): 31_392_641,
    ("unet", "fusion"): 31_968_961, ("swin_unet", "standard"): 34_607_995,
    ("swin_unet", "conv"): 35_383_483, ("swin_unet", "fusion"): 36_418_363}
PAPERS_SKIPS = "standard", "conv", "fusion"
LEVELS = [([4, 8, 16, 32], [48, 24, 12, 6]), ([6, 12, 24], [28, 14, 7])]  # channels, sides
ALL_MODELS, ALL_SKIPS = (pytest.mark.parametrize(*names) for names in (("model", MODELS),
                                                                       ("skip", SKIPS)))


@pytest.fixture(scope="module")
def swin():
    """One Swin-UNet with fusion skips, random weights; tests that change it copy it."""
    torch.manual_seed(0)
    return create_model("swin_unet", "fusion", 1).eval()


def features_of(channels, sides, dtype=torch.float32):
    return [torch.randn(2, c, side, side, dtype=dtype) for c, side in zip(channels, sides)]


def side_of(model):
    """Pixels, the least at which every map of a network has several."""
    return MODELS[model].max_side or max(2 * MODELS[model].side_multiple, 32)


# The paper's Table 1


def test_table_1_parameter_counts():
    counts = parameter_counts()
    for pair, count in COUNTS.items():
        assert counts[pair] == [count, count + 2 * 65, count + 21 * 65]


def test_the_papers_two_counts_are_printed_next_to_ours(capsys):
    print_parameters()
    for line in capsys.readouterr().out.splitlines()[1:]:
        model, skip, *numbers = line.split()
        paper = ["31,043,521"] if (model, skip) == ("unet", "standard") else [
            "35,383,483"] if (model, skip) == ("swin_unet", "conv") else []
        counts = [f"{count:,}" for count in parameter_counts()[model, skip]]
        assert numbers == counts + paper and (not paper or counts[0] == paper[0])


@pytest.mark.parametrize("script", ["models.py", "related.py"])
def test_counting_parameters_takes_no_arguments(script):
    done = subprocess.run([sys.executable, ROOT / script, "--width", "16"], text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout) == (2, "") and "--width 16" in done.stderr


def test_swin_encoder_and_bare_decoder_counts():
    with torch.device("meta"):
        network = create_model("swin_unet", "standard", 1)
    encoder = sum(parameter.numel() for parameter in network.encoder.parameters())
    rest = sum(parameter.numel() for parameter in network.parameters()) - encoder
    assert (encoder, rest) == (27_519_354, 7_088_641)


# Skips


@ALL_SKIPS
@pytest.mark.parametrize("channels, sides", LEVELS)
def test_any_skip_returns_as_many_maps_of_the_same_sides_and_of_its_channels(skip, channels, sides):
    features = features_of(channels, sides)
    returned = SKIPS[skip](channels)(features)
    assert [y.shape[1] for y in returned] == returned_channels(SKIPS[skip], channels)
    assert [y.shape[2:] for y in returned] == [x.shape[2:] for x in features]


@ALL_SKIPS
@ALL_MODELS
def test_any_skip_keeps_the_images_size_and_every_parameter_gets_a_gradient(model, skip,
                                                                            monkeypatch):
    for module in F, torch, torch.Tensor:  # so that none is off; nn.ReLU calls F.relu
        monkeypatch.setattr(module, "relu", F.leaky_relu)
    network, side = create_model(model, skip, 3, width=4).eval(), side_of(model)
    for parameter in network.parameters():  # what starts at 0 may hide others
        parameter.data += 0.01 * torch.randn_like(parameter)
    logits = network(torch.randn(1, 3, side, side))
    assert logits.shape == (1, 3, side, side)
    logits.square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("model, skip", [*(("unet", skip) for skip in SKIPS),
                                         *((name, "fusion") for name in MODELS if name != "unet")])
def test_two_tiles_are_overfitted_with_any_skip(model, skip, monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depths=(1, 1, 1, 1)))
    network, side, iou = create_model(model, skip, 1, width=8), side_of(model), 0
    masks = torch.zeros(2, side, side)
    masks[0, side // 5:-side // 8, 8:-side // 2] = masks[1, 2:side // 2, side // 3:-2] = 1
    images = 2 * masks[:, None] - 1 + 0.3 * torch.randn(2, 3, side, side)
    optimizer = torch.optim.Adam(network.parameters(), 3e-4 if network.pretrained else 1e-2)
    for _ in range(40):
        logits = network(images)
        found, true = logits[:, 0] > 0, masks > 0
        iou = max(iou, ((found & true).sum() / (found | true).sum()).item())
        if iou > 0.85:
            break
        optimizer.zero_grad()
        loss_for(1)(logits, masks).mean().backward()
        optimizer.step()
    assert iou > 0.85


def test_standard_skip_changes_nothing():
    features = features_of(*LEVELS[0])
    assert all(y is x for y, x in zip(StandardSkip(LEVELS[0][0])(features), features))


def test_conv_skip_is_one_linear_map_of_channels_per_level():
    features, skip = features_of(*LEVELS[0]), ConvSkip(LEVELS[0][0])
    for x, y, conv in zip(features, skip(features), skip.convs):
        expected = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], x)
        torch.testing.assert_close(y, expected + conv.bias[:, None, None])


@pytest.mark.parametrize("channels, sides", LEVELS)
def test_order_in_the_fusion_skip_changes_nothing_but_memory(channels, sides):
    """The paper convolves before it resizes, everywhere; ours must be the same function."""
    features, skip = features_of(channels, sides, torch.float64), FusionSkip(channels).double()
    for i, y in enumerate(skip(features)):
        total = features[i]
        for j, x in enumerate(features):
            if j != i:
                total = total + F.interpolate(skip.match[i][j](x), size=(sides[i], sides[i]),
                                              mode="bilinear", align_corners=False)
        torch.testing.assert_close(y, skip.convs[i](total), rtol=0, atol=1e-13)


@pytest.mark.parametrize("skip", ["conv", "fusion"])
def test_a_skip_of_depth_3_has_two_more_convolutions_per_level_with_relu_between(skip):
    def count(depth):
        with torch.device("meta"):
            network = create_model("unet", skip, 1, skip_depth=depth)
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(3) == COUNTS["unet", skip] + 2 * 349_120
    x, block = torch.randn(2, 4, 5, 5), models.pointwise(4, 3)
    matrices = [(layer.weight[:, :, 0, 0], layer.bias[:, None, None]) for layer in block[::2]]
    y = x
    for k, (weight, bias) in enumerate(matrices):
        y = torch.einsum("oi,nihw->nohw", weight, y.relu() if k else y) + bias
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("skip, depth, message", [
    ("standard", 2, "--skip-depth 2: standard skips have no 1x1 convolution to repeat"),
    ("nested", 3, "nested skips have no"), ("fusionunet", 2, "fusionunet skips have no"),
    ("conv", 10**9, "--skip-depth 1000000000: give 1 to 16"), ("fusion", "2", "give 1 to 16")])
def test_a_depth_that_a_skip_does_not_have_is_refused(skip, depth, message):
    with pytest.raises(ValueError, match=message):
        create_model("unet", skip, 1, 4, skip_depth=depth)


def test_fusion_skip_multiplies_less_than_convolving_first():
    (channels, sides), flops = LEVELS[0], []
    features, skip = features_of(channels, sides), FusionSkip(channels)

    def convolve_first(features):
        for match, conv, x in zip(skip.match, skip.convs, features):
            conv(sum(models.resize(match[j](features[j]), x.shape[2:])
                     for j in range(len(features))))

    for function in skip, convolve_first:
        with FlopCounterMode(display=False) as counter:
            function(features)
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.6 * flops[1]


def test_fusion_skip_brings_every_level_to_every_level():
    channels, sides = LEVELS[0]
    features, skip = features_of(channels, sides), FusionSkip(channels)
    before = skip(features)
    for j in range(len(channels)):
        changed = [x + 1 if i == j else x for i, x in enumerate(features)]
        assert all((y - x).abs().max() > 1e-3 for y, x in zip(skip(changed), before))


@ALL_MODELS
def test_every_map_that_the_skip_returns_matters_to_the_logits(model, monkeypatch):
    class OneLevelLost(StandardSkip):
        def forward(self, features):
            levels.update(range(len(features)))
            return [0 * x if i == lost else x for i, x in enumerate(features)]

    monkeypatch.setitem(SKIPS, "one level lost", OneLevelLost)
    lost, levels, side = None, set(), side_of(model)
    network = create_model(model, "one level lost", 1, width=4)
    if model == "swin_unet":  # elsewhere, batch statistics keep signals alive
        network.eval()
    images = torch.randn(1, 3, side, side)
    before = network(images)
    assert levels
    for lost in [*levels]:
        assert (network(images) - before).abs().max() > 1e-4, lost


@pytest.mark.parametrize("model", ["unet", "swin_unet", "double_unet"])
def test_networks_of_one_seed_share_all_weights_but_the_skips(model):
    """So that a pair of skips, compared seed by seed, differs by the skip alone."""
    def weights(skip):
        torch.manual_seed(0)
        return create_model(model, skip, 1, width=4).state_dict()

    drawn = {skip: weights(skip) for skip in PAPERS_SKIPS}
    for tensors in drawn.values():
        plain = {name for name in tensors if not name.startswith("skip.")}
        assert plain == drawn["standard"].keys()
        assert all(torch.equal(tensors[name], drawn["standard"][name]) for name in plain)
    assert model == "double_unet" or all(  # its second skip is drawn after its first
        torch.equal(drawn["fusion"][name], drawn["conv"][name]) for name in drawn["conv"])


class Halved(nn.Module):
    """A skip of one's own: y_i = x_i / 2"""
    def __init__(self, channels):
        super().__init__()

    def forward(self, features):
        return [x / 2 for x in features]


class Flat(nn.Module):
    """A network of one's own, one level deep."""
    pretrained, side_multiple, max_side = False, 1, None

    def __init__(self, skip, num_classes, width=64, checkpointing=False):
        super().__init__()
        self.encoder, self.skip = nn.Conv2d(3, width, 3, padding=1), skip([width])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        return self.head(*self.skip([self.encoder(images)]))


@pytest.mark.usefixtures("tiny_set")
def test_a_network_and_a_skip_of_ones_own_train_and_score(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "flat", Flat)
    monkeypatch.setitem(SKIPS, "halved", Halved)
    path = tmp_path / "run/best.pt"
    score = fit(path.parent, "--model", "flat", "--skip", "halved")
    network = build_model(load_checkpoint(path), path)
    assert (type(network), type(network.skip)) == (Flat, Halved)
    result, = evaluation.main(evaluation.parse_args([str(path), "--device", "cpu"]))
    assert result["per_tile"]["iou"] == score


# Networks


@ALL_MODELS
def test_networks_take_the_sides_that_they_name_and_no_others(model):
    network, multiple = create_model(model, "conv", 3, width=4).eval(), MODELS[model].side_multiple
    for height, width in ([(multiple, multiple)] if network.max_side else
                          [(multiple, multiple), (3 * multiple, 5 * multiple)]):
        assert network(torch.randn(1, 3, height, width)).shape == (1, 3, height, width)
    ours = model in ("unet", "swin_unet", "double_unet")  # whose docstrings promise the error
    for height, width in [(multiple + 1, multiple), (multiple, multiple + 1)] * ours:
        with pytest.raises(ValueError, match=f"not {height} x {width}: "):
            network(torch.randn(1, 3, height, width))


@pytest.mark.parametrize("names, told", [
    (("no network", "conv"), "no network is called 'no network': there are unet, "),
    (("unet", "no skip"), "no skip is called 'no skip': there are standard, ")])
def test_a_name_in_no_table_is_refused(names, told):
    with pytest.raises(ValueError, match=told):
        create_model(*names, 1)


@pytest.mark.parametrize("model, skip, number", [
    ("unet", "conv", 18), ("swin_unet", "conv", 8), ("unet", "nested", 30),
    ("unet", "fusionunet", 42), ("double_unet", "standard", 40)])
def test_3x3_convolutions_start_as_u_nets_authors_drew_them(model, skip, number):
    drawn = [layer for layer in create_model(model, skip, 1, width=16).modules()
             if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
             and layer.dilation == (1, 1)]  # those of DoubleU-Net's ASPP are PyTorch's
    for layer in drawn:
        std = (2 / layer.weight[0].numel()) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()
    assert len(drawn) == number


def test_swin_taps_equal_timm_stage_by_stage(swin):
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        features, bottleneck = swin.encode(images)
        x = swin.encoder.patch_embed(images)
        for stage, tap in zip(swin.encoder.layers, [None, *features]):
            if tap is not None:
                torch.testing.assert_close(stage.downsample(x).permute(0, 3, 1, 2), tap)
            x = stage(x)
        torch.testing.assert_close(swin.encoder.forward_features(images).permute(0, 3, 1, 2),
                                   bottleneck)
    assert [x.shape[1:] for x in features] == [(192, 28, 28), (384, 14, 14), (768, 7, 7)]


def test_swin_decoder_enlarges_concatenates_the_skip_behind_and_convolves(swin):
    def enlarge(x, factor=2):
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        features, bottleneck = swin.encode(images)
        fine, middle, coarse = map(enlarge, swin.skip(features))
        x = swin.decoder[0](enlarge(bottleneck))
        x = swin.decoder[1](torch.cat((x, coarse), dim=1))
        x = swin.decoder[2](torch.cat((enlarge(x), middle), dim=1))
        x = swin.decoder[3](torch.cat((enlarge(x), fine), dim=1))
        torch.testing.assert_close(swin(images), enlarge(swin.head(x), 4))


def test_swin_drops_paths_as_its_authors_do(swin):
    rates = [layer.drop_prob for layer in swin.encoder.modules()
             if type(layer).__name__ == "DropPath" and layer.drop_prob]
    assert rates == sorted(rates) and rates[0] < 0.01 and rates[-1] == pytest.approx(0.1)


def test_swin_head_may_come_before_the_last_resize(swin):
    network, last = copy.deepcopy(swin), []
    network.head.register_forward_pre_hook(lambda head, inputs: last.append(inputs[0]))
    with torch.inference_mode():
        logits = network(torch.randn(1, 3, 224, 224))
        assert last[0].shape == (1, 64, 56, 56)
        enlarged = F.interpolate(last[0], size=(224, 224), mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, network.head(enlarged), rtol=1e-4, atol=1e-5)


# Checkpointing


def kept_for_backward(network, images, loss=lambda logits: logits):
    """Bytes of the distinct tensors that a forward pass keeps, weights aside, and its output."""
    def pack(tensor):
        kept.add(tensor.untyped_storage())
        return tensor

    weights, kept = {p.untyped_storage() for p in network.parameters()}, set()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = loss(network(images))
    return sum(storage.nbytes() for storage in kept - weights), output


def assert_same_step(network, other):
    """Gradients and BatchNorm's statistics are equal: each batch was counted once."""
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    buffers = dict(network.named_buffers())
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])
        assert "num_batches" not in name or buffer == 1


@pytest.mark.parametrize("convert", [nn.Module.train, nn.SyncBatchNorm.convert_sync_batchnorm],
                         ids=["BatchNorm", "SyncBatchNorm"])
def test_checkpointing_changes_nothing_but_memory(convert):
    plain = create_model("unet", "fusion", 3, width=8)
    saving = create_model("unet", "fusion", 3, width=8, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images, sizes = torch.randn(2, 3, 64, 64), []
    for network in plain, convert(saving):
        size, logits = kept_for_backward(network, images)
        logits.square().mean().backward()
        sizes.append(size)
    assert_same_step(plain, saving)
    assert sizes[1] < 0.55 * sizes[0]


def test_statistics_count_again_after_a_recomputation_that_fails():
    block, images = models.double_conv(3, 4), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(RuntimeError, match="memory"), models.statistics_off(block):
        block(images)
        raise RuntimeError("out of memory")
    assert all(map(torch.equal, block.state_dict().values(), before.values()))
    block(images)
    assert block[1].num_batches_tracked == 1 and block[4].running_mean.any()


class Break(nn.Module):
    """Breaks torch.compile's graph, as SyncBatchNorm does, and changes nothing."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def test_a_compiled_checkpointed_step_is_a_plain_one():
    plain = create_model("unet", "conv", 1, width=2)
    saving = create_model("unet", "conv", 1, width=2, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    saving.encoder[0].append(Break())
    images = torch.randn(2, 3, 32, 32)
    for network in plain, torch.compile(saving, backend="aot_eager"):
        network(images).square().mean().backward()
    assert_same_step(plain, saving)


@pytest.mark.parametrize("model, skip", COUNTS)
def test_batch_50_in_half_precision_and_checkpointed_fits_8_gb(model, skip):
    """The paper could not train the U-Net with fusion. Counted on the meta device, which computes
    nothing; on top of it comes the block being computed anew, below 2 GB."""
    with torch.device("meta"):
        network = create_model(model, skip, 22, checkpointing=True).bfloat16()
        images, masks = torch.empty(50, 3, 224, 224).bfloat16(), torch.empty(50, 224, 224).long()
        kept, _ = kept_for_backward(network, images, lambda x: loss_for(22)(x, masks).mean())
    weights = sum(16 * p.numel() for p in network.parameters())  # gradients and Adam's two as well
    assert 2e9 < kept < 8e9 - 2e9 - weights


# Trained weights


def test_checkpoint_rebuilds_the_network(tmp_path):
    network = create_model("unet", "fusion", 3, width=4).eval()  # of seed 0, as save_network's
    path = save_network(tmp_path / "best.pt", "unet", "fusion", 3, 4, "bcss")
    rebuilt = build_model(load_checkpoint(path), path).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(rebuilt(images), network(images))


def test_a_checkpoint_knows_its_skip_depth(tmp_path):
    path = save_network(tmp_path / "best.pt", "unet", "conv", 1, 4)
    checkpoint = load_checkpoint(path)
    assert "skip.convs.3.bias" in checkpoint["model"]  # so it is called with a depth of 1
    deep = create_model("unet", "conv", 1, 4, skip_depth=2)
    build_model(checkpoint, path)
    checkpoint["args"]["skip_depth"] = 2
    with pytest.raises(ValueError, match="best.pt: its weights do not fit"):
        build_model(checkpoint, path)
    rebuilt = build_model(checkpoint | {"model": deep.state_dict()}, path)
    assert torch.equal(rebuilt.skip.convs[3][2].weight, deep.skip.convs[3][2].weight)
