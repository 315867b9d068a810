"""pretrained.py: weights load exactly or not at all, and nobody waits for a dead network."""

import copy
import socket
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from torchvision.models import vgg19

from models import create_model
from pretrained import load_swin


@pytest.fixture(scope="module")
def swin():
    """Random weights; tests that change them copy it."""
    torch.manual_seed(0)
    return create_model("swin_unet", "fusion", 1).eval()


@pytest.fixture(scope="module")
def double():
    torch.manual_seed(0)
    return create_model("double_unet", "standard", 3).eval()


# Swin-T


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


def save_weights(layout, swin, path):
    tensors = swin.encoder.state_dict()
    if layout == "timm.safetensors":
        from safetensors.torch import save_file  # comes with timm
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save({"microsoft": {"model": in_microsofts_layout(swin.encoder)},
                    "timm.pth": tensors | {"head.fc.weight": torch.zeros(1000, 768)},
                    "ours": {"model": swin.state_dict(), "epoch": 3}}[layout], path)


@pytest.mark.parametrize("layout", ["microsoft", "timm.pth", "timm.safetensors", "ours"])
def test_weights_of_every_layout_load_to_the_same_function(layout, swin, tmp_path):
    path, other = tmp_path / layout, copy.deepcopy(swin.encoder).eval()
    save_weights(layout, swin, path)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert str(path) in load_swin(other, path)
    assert all(map(torch.equal, other.state_dict().values(), swin.encoder.state_dict().values()))
    images, encoder = torch.randn(1, 3, 224, 224), copy.deepcopy(swin.encoder).eval()
    assert all(map(torch.equal, other(images), encoder(images)))


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
@pytest.mark.parametrize("change, message", [
    (lambda tensors: {name: tensors[name] for name in tensors if not name.startswith("norm.")},
     "2 tensors are missing, .*, norm.bias, norm.weight among"),
    (lambda tensors: tensors | {"extra": torch.ones(1)}, "1 tensors .* left over .*, extra among"),
    (lambda tensors: tensors | {"patch_embed.proj.weight": torch.zeros(96, 3, 8, 8)},
     "1 tensors .* another shape, patch_embed.proj.weight among"),
    (lambda tensors: {name: torch.zeros(23 * 23, tensor.shape[1]) if "bias_table" in name else
                      tensor for name, tensor in tensors.items()}, "12 tensors .* another shape"),
    (lambda tensors: create_model("unet", "conv", 1, 4).state_dict(), "not a Swin-T"),
    (lambda tensors: {"net": tensors, "epoch": 3}, "not a Swin-T: .* epoch")],
    ids=["missing", "left over", "reshaped", "windows of 12", "a U-Net's", "another project's"])
def test_weights_that_fit_only_partly_are_refused_by_name(swin, tmp_path, change, message):
    encoder, tensors = copy.deepcopy(swin.encoder), in_microsofts_layout(swin.encoder)
    torch.save(change(tensors), tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=f"wrong.pth: .*{message}"):
        load_swin(encoder, tmp_path / "wrong.pth")
    assert all(map(torch.equal, encoder.state_dict().values(), swin.encoder.state_dict().values()))


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_are_missing_or_damaged_are_named(swin, tmp_path, monkeypatch):
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    with pytest.raises(ValueError, match="page.pth: not weights"):
        load_swin(swin.encoder, tmp_path / "page.pth")
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        load_swin(swin.encoder, tmp_path / "none.pth")
    original = timm.models.load_state_dict  # with the default of our oldest timm, which runs code
    monkeypatch.setattr(timm.models, "load_state_dict", lambda path, weights_only=False: original(
        path, weights_only=weights_only))
    torch.save({"model": RunsCode(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth: not weights"):
        load_swin(swin.encoder, tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()


ASK = """import time
import huggingface_hub
from pretrained import fetch_from_hub
ask = huggingface_hub.get_hf_file_metadata  # the same with a tenth of the patience
huggingface_hub.get_hf_file_metadata = lambda url, timeout: ask(url, timeout=timeout / 10)
start = time.time()
try:
    fetch_from_hub()
except FileNotFoundError as error:
    print(time.time() - start, error)
"""


def test_without_the_hub_one_sentence_says_what_to_download(script, tmp_path):
    (tmp_path / "ask.py").write_text(ASK)  # huggingface_hub reads its environment once
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        port = server.getsockname()[1]
        run = script(tmp_path / "ask.py", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="0", NO_PROXY="*",
                     HF_HOME=str(tmp_path), HF_ENDPOINT=f"http://127.0.0.1:{port}")
    line, = run.stdout.splitlines()
    assert float(line.split()[0]) < 25  # seconds
    for part in "no pretrained Swin-T", "prepare_data.sh weights", ".pth", "--weights":
        assert part in line


# VGG-19


@pytest.mark.parametrize("layout", ["torchvision's", "ours"])
def test_weights_of_vgg_load_from_either_layout(layout, double, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in double.encoder.state_dict().items()}
    with torch.device("meta"):
        names = [name for name in vgg19().state_dict() if name.startswith("features.")]
    torch.save({"model": double.state_dict()} if layout == "ours" else {
        **dict(zip(names, tensors.values(), strict=True)), "classifier.6.bias": torch.zeros(1000)},
        tmp_path / "vgg.pth")
    for parameter in double.encoder.parameters():
        parameter.data.zero_()
    assert str(tmp_path / "vgg.pth") in double.load_pretrained(tmp_path / "vgg.pth")
    assert all(map(torch.equal, double.encoder.state_dict().values(), tensors.values()))


def test_files_that_hold_no_vgg_are_named(double, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth: no such file .*vgg19-dcbb9e9d.pth"):
        double.load_pretrained(tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    with pytest.raises(ValueError, match="page.pth: not weights"):
        double.load_pretrained(tmp_path / "page.pth")
    torch.save(create_model("unet", "conv", 1, 4).state_dict(), tmp_path / "unet.pth")
    with pytest.raises(ValueError, match="unet.pth: not a VGG-19: .* tensors are missing, "):
        double.load_pretrained(tmp_path / "unet.pth")


def test_without_a_network_one_sentence_says_what_to_download(double, monkeypatch):
    def refuse(*args, **more):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(FileNotFoundError) as error:
        double.load_pretrained()
    assert len(str(error.value).splitlines()) == 1
    for part in "no route to host", "vgg19-dcbb9e9d.pth", "--weights", "--no-pretrained":
        assert part in str(error.value)


def test_a_server_that_never_answers_is_not_waited_for(double, tmp_path, monkeypatch):
    download, limit = torch.hub.load_state_dict_from_url, socket.setdefaulttimeout
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: limit(seconds and 0.1))
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}/vgg19-dcbb9e9d.pth"
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **more: download(
            address, tmp_path, **more))
        with pytest.raises(FileNotFoundError, match="the download failed .*timed out"):
            double.load_pretrained()
    assert socket.getdefaulttimeout() is None
