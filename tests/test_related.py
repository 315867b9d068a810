"""related.py: the counts and equations of other papers' skips and networks.

What holds for every entry of SKIPS and MODELS is claimed in test_models.py.
"""

import pytest
import torch
from conftest import arguments, fit, refused, save_network
from PIL import Image
from torch import nn

import eval as evaluation
import predict
import train
from models import MODELS, SKIPS, build_model, create_model
from related import (ASPP, ChannelAttention, FuseNeighbour, FusionRound, FusionUNetSkip,
                     SqueezeExcite)
from utils import load_checkpoint


@pytest.fixture(scope="module")
def double():
    torch.manual_seed(0)
    return create_model("double_unet", "standard", 3).eval()


def parameters(model, skip, num_classes=1, width=64):
    with torch.device("meta"):
        network = create_model(model, skip, num_classes, width)
    return sum(parameter.numel() for parameter in network.parameters())


# U-Net++: equation 1 of Zhou et al.


def test_u_net_plus_plus_counts():
    """Five columns of the U-Net's blocks and transposed convolutions, without deep supervision."""
    assert parameters("unet", "nested") == 36_172_545
    assert parameters("unet", "nested", num_classes=3) == 36_172_545 + 2 * 65
    assert parameters("unet", "nested", width=32) == 9_049_473


def test_nested_skip_and_the_plain_decoder_are_u_net_plus_plus():
    network, images = create_model("unet", "nested", 1, width=4).eval(), torch.randn(2, 3, 32, 32)

    def node(i, j):  # x(i, j) by its definition, from the images on
        if j == 0:
            return network.encoder[i](nn.functional.max_pool2d(node(i - 1, 0), 2) if i else images)
        if i + j == 4:
            up, block = network.up[3 - i], network.decoder[3 - i]
        else:
            up, block = network.skip.up[f"{i}-{j}"], network.skip.blocks[f"{i}-{j}"]
        return block(torch.cat([*(node(i, k) for k in range(j)), up(node(i + 1, j - 1))], dim=1))

    torch.testing.assert_close(network(images), network.head(node(0, 4)))
    assert len(network.skip.blocks) == len(network.skip.up) == 6


# FusionU-Net


def test_fusion_u_net_counts():
    assert parameters("unet", "fusionunet") == parameters("unet", "standard") + 7_834_020
    assert parameters("swin_unet", "fusionunet") - parameters("swin_unet", "standard") == 16_708_248


def test_channel_attention_weighs_channels_by_their_neighbours_means():
    x, attention = torch.randn(2, 5, 4, 4), ChannelAttention()
    before, own, after = attention.conv.weight[0, 0]
    means = nn.functional.pad(x.mean(dim=(2, 3)), (1, 1))
    weights = torch.sigmoid(before * means[:, :-2] + own * means[:, 1:-1] + after * means[:, 2:])
    torch.testing.assert_close(attention(x), x * weights[:, :, None, None])


@pytest.mark.parametrize("neighbour, channels, scale", [(4, 8, 2), (8, 4, 0.5)])
def test_fusing_mixes_three_quarters_of_a_level_with_one_of_a_neighbour(neighbour, channels, scale):
    fuse, x = FuseNeighbour(neighbour, channels).eval(), torch.randn(2, channels, 8, 8)
    other = torch.randn(2, neighbour, int(8 * scale), int(8 * scale))
    brought = fuse.bring(other)
    assert brought.shape == x.shape
    expected = fuse.attention(x + fuse.block(0.75 * x + 0.25 * brought))
    torch.testing.assert_close(fuse(x, other), expected)
    assert (fuse(x, 0 * other) - expected).abs().max() > 1e-3


def test_fusion_rounds_bring_every_level_to_every_level():
    channels, sides = [4, 8, 16, 32], [48, 24, 12, 6]
    features = [torch.randn(2, c, side, side) for c, side in zip(channels, sides)]
    skip = FusionUNetSkip(channels).eval()
    before = skip(features)
    for j in range(4):
        changed = [x + 10 if i == j else x for i, x in enumerate(features)]
        assert all((y - x).abs().max() > 1e-4 for y, x in zip(skip(changed), before))


def test_a_fusion_round_normalises_goes_down_level_by_level_and_up_again():
    turn, features = FusionRound([4, 8, 16]).eval(), [torch.randn(2, 4 * 2**i, 16 // 2**i,
                                                                  16 // 2**i) for i in range(3)]
    fine, middle, coarse = (2 * x for x in features)
    for norm in turn.norms:
        norm.running_var[:] = 1 / 4 - norm.eps
    middle = turn.down[0](middle, fine)
    coarse = turn.down[1](coarse, middle)
    middle = turn.up[0](middle, coarse)
    for x, expected in zip(turn(features), (turn.up[1](fine, middle), middle, coarse)):
        torch.testing.assert_close(x, expected)


@pytest.mark.usefixtures("tiny_set")
def test_fusion_u_net_of_an_odd_width_is_refused(tmp_path, capsys):
    line = refused(capsys, train, *arguments(tmp_path / "run", "--skip", "fusionunet", "--width",
                                             "3"))
    assert "not 3 6 12 24: give an even --width" in line and not (tmp_path / "run").exists()


# DoubleU-Net


def test_double_u_net_counts():
    """The paper's code has 29,297,570: these, 7,296 running statistics of BatchNorm, which are no
    parameters, and 256 of the BatchNorm that ours leaves out after ASPP's mean."""
    assert parameters("double_unet", "standard") == 29_297_570 - 7_296 - 256
    assert parameters("double_unet", "standard", num_classes=3) == 29_290_018 + 2 * 33


def test_double_u_net_takes_vggs_maps_from_before_each_pooling(double):
    images, shown = torch.randn(1, 3, 32, 32), []
    hook = double.skip[0].register_forward_pre_hook(lambda skip, inputs: shown.extend(inputs[0]))
    with torch.inference_mode():
        double(images)
        hook.remove()
        for x, last in zip(shown, (4, 9, 18, 27), strict=True):
            torch.testing.assert_close(x, double.encoder[:last](images))
    assert [tuple(x.shape[1:]) for x in shown] == [(64, 32, 32), (128, 16, 16), (256, 8, 8),
                                                   (512, 4, 4)]


def test_second_u_net_sees_the_image_times_one_mask_for_all_classes(double):
    images, seen = torch.randn(1, 3, 32, 32), {}
    hooks = [module.register_forward_hook(
        lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        for name, module in (("mask", double.mask), ("second", double.encoder2[0]))]
    with torch.inference_mode():
        assert double(images).shape == (1, 3, 32, 32)
    mask = seen["mask"][1].sigmoid()
    assert mask.shape == (1, 1, 32, 32) and mask.std() > 1e-4
    torch.testing.assert_close(seen["second"][0], images * mask)
    for hook in hooks:
        hook.remove()


def test_both_decoders_enlarge_concatenate_the_skips_behind_and_convolve(double):
    def decode(blocks, x, *skips):
        for block, *features in zip(blocks, *(skip[::-1] for skip in skips)):
            x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, *features], dim=1))
        return x

    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        one = [double.encoder[:last](images) for last in (4, 9, 18, 27)]
        x = decode(double.decoder, double.aspp(double.encoder(images)), one)
        two, x = [], images * double.mask(x).sigmoid()
        for block in double.encoder2:
            two.append(block(x))
            x = nn.functional.max_pool2d(two[-1], 2)
        x = decode(double.decoder2, double.aspp2(x), one, two)
        torch.testing.assert_close(double(images), double.head(x))


def test_aspp_sees_the_mean_and_taps_that_are_6_12_and_18_pixels_apart():
    aspp, x = ASPP(4, 2).eval(), torch.zeros(1, 4, 41, 41)
    x[:, :, 20, 20] = 1
    reach = [(scale(x) != scale(0 * x)).any(dim=1).nonzero()[:, 1:] - 20 for scale in aspp.scales]
    assert [places.abs().max().item() for places in reach] == [0, 6, 12, 18]
    torch.testing.assert_close(aspp.mean(x), aspp.mean(x.mean(dim=(2, 3), keepdim=True)))


def test_squeeze_and_excite_weighs_channels_by_the_means_of_all():
    x, block = torch.randn(2, 16, 5, 5), SqueezeExcite(16)
    squeeze, excite = (block.weigh[i].weight[:, :, 0, 0] for i in (0, 2))
    weights = torch.sigmoid(torch.relu(x.mean(dim=(2, 3)) @ squeeze.T) @ excite.T)
    torch.testing.assert_close(block(x), x * weights[:, :, None, None])


# Runs


@pytest.mark.usefixtures("tiny_set")
@pytest.mark.parametrize("flags", ["--skip nested", "--skip fusionunet",
                                   "--skip fusion --skip-depth 2"])
def test_a_run_trains_scores_and_is_recorded(flags, tmp_path):
    path = tmp_path / "run/best.pt"
    score = fit(path.parent, "--epochs", "1", *flags.split())
    network = build_model(load_checkpoint(path), path)
    assert type(network.skip) is SKIPS[flags.split()[1]]
    result, = evaluation.main(evaluation.parse_args([str(path), "--device", "cpu"]))
    assert result["per_tile"]["iou"] == score
    assert result["args"]["skip_depth"] == (2 if "depth" in flags else 1)


@pytest.mark.usefixtures("tiny_set")
def test_resume_knows_the_skip_depth_and_a_run_from_before_a_flag_has_its_default(tmp_path, capsys):
    out, last = tmp_path / "run", tmp_path / "run/last.pt"
    score = fit(out, "--epochs", "1", "--skip", "conv")
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["args"].pop("augment") == "all"
    torch.save(checkpoint, last)
    flags = arguments(out, "--epochs", "1", "--skip", "conv", "--resume")
    assert train.main(train.parse_args(flags)) == score
    assert "trained with all" in refused(capsys, train, *flags, "--augment", "none")
    line = refused(capsys, train, *flags, "--skip-depth", "2")
    assert f"--skip-depth 2: {last} was trained with 1; give the same" in line
    line = refused(capsys, train, *arguments(tmp_path / "new", "--skip-depth", "2"))
    assert "--skip-depth 2: standard skips have no 1x1 convolution to repeat" in line


@pytest.mark.parametrize("model, skip", [("unet", "nested"), ("unet", "fusionunet"),
                                         ("double_unet", "fusion")])
def test_checkpoints_predict_an_image_of_any_size(model, skip, tmp_path):
    path = save_network(tmp_path / "best.pt", model, skip, 3, width=4, name="bcss")
    assert type(build_model(load_checkpoint(path), path)) is MODELS[model]
    Image.effect_noise((50, 30), 90).convert("RGB").save(tmp_path / "a.png")
    predict.main(predict.parse_args([str(path), str(tmp_path / "a.png"), "--device", "cpu",
                                     "--out", str(tmp_path / "out")]))
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (50, 30)
