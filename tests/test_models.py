"""models.py: the paper's parameter counts, shapes, the skips' equations, pretrained weights."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import models
from losses import loss_for
from models import (MODELS, SKIPS, ConvSkip, FusionSkip, StandardSkip, SwinUNet, UNet, build_model,
                    create_model, load_checkpoint, load_encoder)

COUNTS = {  # one class; the first and the fifth are the paper's Table 1
    ("unet", "standard"): 31_043_521, ("unet", "conv"): 31_392_641,
    ("unet", "fusion"): 31_968_961, ("swin_unet", "standard"): 34_607_995,
    ("swin_unet", "conv"): 35_383_483, ("swin_unet", "fusion"): 36_418_363}


@pytest.fixture(scope="module")
def swin():
    """One Swin-UNet with fusion skips, random weights; tests that change it copy it."""
    torch.manual_seed(0)
    return create_model("swin_unet", "fusion", 1).eval()


def maps_of(channels, sizes, n=2, dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(n, c, s, s, dtype=dtype) for c, s in zip(channels, sizes)]


@pytest.mark.parametrize("num_classes", [1, 3, 22])
@pytest.mark.parametrize("model, skip", COUNTS)
def test_table_1_parameter_counts(model, skip, num_classes):
    with torch.device("meta"):
        network = create_model(model, skip, num_classes)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == COUNTS[model, skip] + 65 * (num_classes - 1)


def test_swin_encoder_and_bare_decoder_counts():
    with torch.device("meta"):
        network = create_model("swin_unet", "standard", 1)
    encoder = sum(parameter.numel() for parameter in network.encoder.parameters())
    rest = sum(parameter.numel() for parameter in network.parameters()) - encoder
    assert (encoder, rest) == (27_519_354, 7_088_641)


@pytest.mark.parametrize("skip", SKIPS)
def test_unet_returns_input_resolution_for_multiples_of_16(skip):
    network = UNet(skip, num_classes=3, width=4).eval()
    for height, width in (16, 16), (48, 80), (224, 224):
        assert network(torch.randn(1, 3, height, width)).shape == (1, 3, height, width)
    with pytest.raises(ValueError, match="multiples of 16, not 40 x 48"):
        network(torch.randn(1, 3, 40, 48))


@pytest.mark.parametrize("skip", SKIPS)
def test_swin_unet_returns_input_resolution_and_every_parameter_gets_a_gradient(skip, swin):
    network = copy.deepcopy(swin)
    network.skip = SKIPS[skip]([192, 384, 768])
    logits = network(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 1, 224, 224)
    logits.square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("skip", SKIPS)
def test_every_unet_parameter_gets_a_gradient(skip):
    network = UNet(skip, num_classes=2, width=4)
    network(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_swin_unet_says_which_size_it_takes(swin):
    with pytest.raises(ValueError, match="224 x 224 images, not 256 x 224"):
        swin(torch.randn(1, 3, 256, 224))


def test_standard_skip_changes_nothing():
    maps = maps_of([4, 8], [8, 4])
    assert all(a is b for a, b in zip(StandardSkip([4, 8])(maps), maps))


def test_conv_skip_is_one_linear_map_of_channels_per_level():
    maps, skip = maps_of([4, 8], [8, 4]), ConvSkip([4, 8])
    for x, y, conv in zip(maps, skip(maps), skip.convs):
        expected = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], x)
        torch.testing.assert_close(y, expected + conv.bias[:, None, None])


@pytest.mark.parametrize("channels, sizes", [([4, 8, 16, 32], [48, 24, 12, 6]),
                                             ([6, 12, 24], [28, 14, 7])])
def test_fusion_order_changes_nothing_but_memory(channels, sizes):
    """The paper convolves before it resizes, everywhere; ours must be the same function."""
    maps, skip = maps_of(channels, sizes, dtype=torch.float64), FusionSkip(channels).double()
    for i, y in enumerate(skip(maps)):
        total = maps[i]
        for j, x in enumerate(maps):
            if j != i:
                total = total + F.interpolate(skip.match[i][j](x), size=(sizes[i], sizes[i]),
                                              mode="bilinear", align_corners=False)
        torch.testing.assert_close(y, skip.convs[i](total), rtol=0, atol=1e-13)


def test_fusion_brings_every_level_to_every_level():
    channels, sizes = [2, 4, 8], [16, 8, 4]
    maps, skip = maps_of(channels, sizes), FusionSkip(channels)
    before = skip(maps)
    for j in range(3):
        changed = [x + 1 if i == j else x for i, x in enumerate(maps)]
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(skip(changed), before))


def test_unet_concatenates_what_the_skip_returns():
    network = UNet("standard", num_classes=1, width=4)  # batch statistics keep signals alive
    images = torch.randn(1, 3, 32, 32)
    before = network(images)
    for level in range(4):
        network.skip.forward = lambda maps: [0 * x if i == level else x for i, x in enumerate(maps)]
        assert (network(images) - before).abs().max() > 1e-4, level


def test_3x3_convolutions_start_as_u_nets_authors_drew_them(swin):
    torch.manual_seed(0)
    network, seen = UNet("conv", 1, width=16), 0
    for block in [*network.encoder, *network.decoder, *swin.decoder]:
        for layer in block[::3] if len(block) == 6 else block[::2]:
            std = (2 / (9 * layer.in_channels)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()
            seen += 1
    assert seen == 2 * (5 + 4 + 4)


@pytest.mark.parametrize("model", MODELS)
def test_networks_of_one_seed_share_the_weights_they_have_in_common(model):
    """So that a pair of skips, compared seed by seed, differs by the skip alone."""
    def weights(skip):
        torch.manual_seed(0)
        return create_model(model, skip, 1, width=4).state_dict()

    standard, conv, fusion = map(weights, ("standard", "conv", "fusion"))
    assert standard.keys() < conv.keys() < fusion.keys()
    for fewer, more in (standard, conv), (conv, fusion):
        assert all(torch.equal(fewer[name], more[name]) for name in fewer)


def kept_for_backward(network, images, loss=lambda logits: logits):
    """Bytes of the distinct tensors that a forward pass keeps, weights aside, and its output."""
    weights, kept = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = loss(network(images))
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items()
               if address not in weights), output


def test_checkpointing_changes_nothing_but_memory():
    torch.manual_seed(0)
    plain = UNet("fusion", num_classes=3, width=8)
    saving = UNet("fusion", num_classes=3, width=8, checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images, kept = torch.randn(2, 3, 64, 64), []
    for network in plain, saving:
        size, logits = kept_for_backward(network, images)
        logits.square().mean().backward()
        kept.append(size)
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(plain.buffers(), saving.buffers()):  # counted once, though computed twice
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.55 * kept[0]


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("model", MODELS)
def test_batch_50_in_half_precision_and_checkpointed_fits_8_gb(model, skip):
    """The paper could not train the U-Net with fusion. Counted on the meta device, which computes
    nothing; on top of it comes the block being computed anew, below 2 GB."""
    with torch.device("meta"):
        network = create_model(model, skip, 22, checkpointing=True).bfloat16()
        images, masks = torch.empty(50, 3, 224, 224).bfloat16(), torch.empty(50, 224, 224).long()
        kept, _ = kept_for_backward(network, images, lambda x: loss_for(22)(x, masks).mean())
    weights = sum(16 * p.numel() for p in network.parameters())  # gradients and Adam's two as well
    assert 2e9 < kept < 8e9 - 2e9 - weights


def test_fusion_multiplies_less_than_convolving_first():
    channels, maps = [8, 16, 32], maps_of([8, 16, 32], [64, 32, 16])
    skip = FusionSkip(channels)
    flops = []
    for order in ("cheap", "naive"):
        with FlopCounterMode(display=False) as counter:
            if order == "cheap":
                skip(maps)
            else:
                for i in range(3):
                    for j in range(3):
                        if j != i:
                            models.resize(skip.match[i][j](maps[j]), maps[i].shape[2:])
                    skip.convs[i](maps[i])
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.6 * flops[1]


def test_swin_taps_equal_timm_stage_by_stage(swin):
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        maps, bottleneck = swin.encode(images)
        x = swin.encoder.patch_embed(images)
        for stage, tap in zip(swin.encoder.layers, [None, *maps]):
            if tap is not None:
                torch.testing.assert_close(stage.downsample(x).permute(0, 3, 1, 2), tap)
            x = stage(x)
        torch.testing.assert_close(swin.encoder.forward_features(images).permute(0, 3, 1, 2),
                                   bottleneck)
    assert [tuple(x.shape[1:]) for x in maps] == [(192, 28, 28), (384, 14, 14), (768, 7, 7)]


def test_swin_head_may_come_before_the_last_resize(swin):
    features = torch.randn(1, 64, 56, 56, dtype=torch.float64)
    head = copy.deepcopy(swin.head).double()
    torch.testing.assert_close(models.resize(head(features), (224, 224)),
                               head(models.resize(features, (224, 224))))


# -----------------------------------------------------------------------------
# Pretrained weights


def in_microsofts_layout(encoder):
    """A state dict as Microsoft's file has it, from a timm encoder."""
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        if ".downsample." in name:
            number = int(name.split(".")[1])
            name = name.replace(f"layers.{number}.", f"layers.{number - 1}.")
        tensors[name] = tensor
    tensors["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    tensors["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    return tensors | {"head.weight": torch.zeros(1000, 768), "head.bias": torch.zeros(1000)}


@pytest.mark.parametrize("layout", ["microsoft", "timm.pth", "timm.safetensors", "ours"])
def test_weights_of_every_layout_load_to_the_same_function(layout, swin, tmp_path):
    path, tensors = tmp_path / layout, dict(swin.encoder.state_dict())
    if layout == "microsoft":
        torch.save({"model": in_microsofts_layout(swin.encoder)}, path)
    elif layout == "timm.pth":
        torch.save(tensors | {"head.fc.weight": torch.zeros(1000, 768)}, path)
    elif layout == "timm.safetensors":
        from safetensors.torch import save_file  # comes with timm
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save({"model": swin.state_dict(), "epoch": 3}, path)
    other = copy.deepcopy(swin.encoder)
    for parameter in other.parameters():
        parameter.data.zero_()
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = swin.encoder(images)
        assert (other(images) - expected).abs().max() > 0.1  # it started elsewhere
        assert str(path) in load_encoder(other, path)
        torch.testing.assert_close(other(images), expected)


def test_weights_that_fit_only_partly_are_refused_by_name(swin, tmp_path):
    tensors = dict(swin.encoder.state_dict())
    lacking = {name: t for name, t in tensors.items() if not name.startswith("norm.")}
    reshaped = tensors | {"patch_embed.proj.weight": torch.zeros(96, 3, 8, 8)}
    for wrong, named in [(lacking, "missing 2 .norm.weight"), (tensors | {"extra": torch.ones(1)},
                          "left over or of another shape 1 .extra"),
                         (reshaped, "shape 1 .patch_embed.proj.weight"),
                         (UNet("standard", 1, 4).state_dict(), "not a Swin-T")]:
        before = copy.deepcopy(swin.encoder)
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=named):
            load_encoder(before, tmp_path / "wrong.pth")
        assert all(map(torch.equal, before.state_dict().values(), tensors.values()))  # unharmed


def test_weights_that_are_missing_or_damaged_are_named(swin, tmp_path):
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    with pytest.raises(ValueError, match="page.pth: not weights"):
        load_encoder(swin.encoder, tmp_path / "page.pth")
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        load_encoder(swin.encoder, tmp_path / "none.pth")


def test_without_network_and_file_one_sentence_says_what_to_download(swin, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.time()
    with pytest.raises(FileNotFoundError, match=r"prepare_data.sh weights.*\.pth.*--weights"):
        load_encoder(swin.encoder)
    assert time.time() - start < 5


# -----------------------------------------------------------------------------
# Checkpoints, devices, learning


def test_checkpoint_rebuilds_the_network(tmp_path):
    network = UNet("fusion", num_classes=3, width=4).eval()
    torch.save({"args": {"model": "unet", "skip": "fusion", "width": 4}, "num_classes": 3,
                "model": network.state_dict(), "split": "", "epoch": 1, "log": []},
               tmp_path / "best.pt")
    rebuilt = build_model(load_checkpoint(tmp_path / "best.pt"), "best.pt").eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(rebuilt(images), network(images))


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="--device abacus"):
        models.pick_device("abacus")
    assert models.pick_device("cpu") == torch.device("cpu")


def test_swin_unet_overfits_two_tiles(swin):
    masks = torch.zeros(2, 224, 224)
    masks[0, 40:200, 30:130] = masks[1, 10:120, 90:210] = 1
    images = 2 * masks[:, None] - 1 + 0.3 * torch.randn(2, 3, 224, 224)
    network = copy.deepcopy(swin)
    optimizer = torch.optim.Adam(network.parameters(), 3e-4, fused=True)
    best = 0
    for _ in range(6):
        logits = network(images)
        found, true = logits[:, 0] > 0, masks > 0
        best = max(best, ((found & true).sum() / (found | true).sum()).item())
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits[:, 0], masks).backward()
        optimizer.step()
    assert best > 0.8
