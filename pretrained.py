"""ImageNet's weights for the encoders of Swin-UNet (paper 2.2) and of related.py's DoubleU-Net."""

import re
import socket
from pathlib import Path

import torch

from utils import first_line

HUB = "timm/swin_tiny_patch4_window7_224.ms_in1k"  # Microsoft's weights under timm's names
MICROSOFT = ("https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
             "swin_tiny_patch4_window7_224.pth")


def load_swin(encoder, path=None):
    """Load the weights of Swin's authors into a Swin-T -> a text that says where they came from.

    `path` is Microsoft's original file, timm's .safetensors or .pth, or a checkpoint of ours with a
    Swin-UNet; None takes timm's hub. Raises FileNotFoundError where there is nothing to load, and
    ValueError unless the file's names and shapes are exactly the encoder's.
    """
    source, hint = path or fetch_from_hub(), "`./prepare_data.sh weights` fetches the right file"
    tensors = read_weights(source, hint)
    tensors = strip_prefix(tensors, "encoder.") or tensors  # a checkpoint holds a whole network
    # Microsoft's file counts a patch merging to the stage before it, timm to the stage after it. It
    # also keeps buffers that timm computes. (timm's own conversion would resize tables that do not
    # fit, without a word.)
    if "layers.0.downsample.reduction.weight" in tensors:
        tensors = {re.sub(r"layers\.(\d)\.downsample",
                          lambda match: f"layers.{int(match[1]) + 1}.downsample", name): tensor
                   for name, tensor in tensors.items()
                   if not name.endswith(("attn_mask", "relative_position_index"))}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    load_exactly(encoder, tensors, f"{source}: not a Swin-T", hint)
    return f"encoder weights from {path or f'hub {HUB}'}"


def load_vgg19(encoder, path=None):
    """Load torchvision's weights into VGG-19's convolutions -> a text that says which.

    `path` is torchvision's vgg19 or a checkpoint of ours with a DoubleU-Net; None takes
    torchvision's download. Raises what `load_swin` does.
    """
    from torchvision.models import VGG19_Weights  # here, as timm in models.py

    url = VGG19_Weights.IMAGENET1K_V1.url
    hint = f"torchvision's file is at {url}"
    tensors = read_weights(path, hint) if path else download_vgg19(url)
    tensors = strip_prefix(tensors, "features.") or strip_prefix(tensors, "encoder.")
    load_exactly(encoder, tensors, f"{path or url}: not a VGG-19", hint)
    return f"encoder weights from {path or url}"


def read_weights(path, hint):
    """Read a file of weights -> {name: tensor}. Errors end in `hint`, what mends them."""
    import timm  # here, as in models.py

    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file of weights; {hint}")
    try:
        return timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # as in load_checkpoint
        raise ValueError(f"{path}: not weights, or damaged ({first_line(error)}); {hint}") from None


def strip_prefix(tensors, prefix):
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


def misfits(network, tensors):
    """Compare {name: tensor} with a network -> sorted list of the names that do not fit.

    They are missing, left over, or of another shape than the network's.
    """
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: getattr(tensor, "shape", None) for name, tensor in tensors.items()}
    return sorted({name for name, _ in expected.items() ^ found.items()})


def load_exactly(encoder, tensors, complaint, hint):
    """Load tensors; ValueError unless their names and shapes are exactly the encoder's."""
    if wrong := misfits(encoder, tensors):
        raise ValueError(f"{complaint}: {len(wrong)} tensors are missing, left over or of another "
                         f"shape, {', '.join(wrong[:3])} among them; {hint}")
    encoder.load_state_dict(tensors)


def fetch_from_hub():
    """timm's file of Swin-T, from its cache or the hub; FileNotFoundError within seconds."""
    from huggingface_hub import (get_hf_file_metadata, hf_hub_download, hf_hub_url,
                                 try_to_load_from_cache)  # what timm uses itself

    cached = try_to_load_from_cache(HUB, "model.safetensors")
    if isinstance(cached, str):
        return cached
    try:
        # Ask once, with a time limit: without a network, the download itself would retry for long.
        get_hf_file_metadata(hf_hub_url(HUB, "model.safetensors"), timeout=5)
        return hf_hub_download(HUB, "model.safetensors")
    except Exception as error:  # the hub's errors have no common base
        raise FileNotFoundError(
            f"no pretrained Swin-T, the hub does not give it ({first_line(error)}): where there is "
            f"a network, run `./prepare_data.sh weights` or download {MICROSOFT}, and give that "
            "file with --weights; or train from scratch with --no-pretrained") from None


def download_vgg19(url):
    """torchvision's weights, from torch.hub's cache or `url` -> {name: tensor}.

    Raises FileNotFoundError if they cannot be had, within half a minute if nobody answers.
    """
    socket.setdefaulttimeout(30)  # seconds: torch.hub itself would wait for a byte for ever
    try:
        return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
    except Exception as error:  # which has no common base
        raise FileNotFoundError(
            f"no pretrained VGG-19: the download failed ({first_line(error)}): where there is a "
            f"network, download {url}, and give that file with --weights; or train from scratch "
            "with --no-pretrained") from None
    finally:
        socket.setdefaulttimeout(None)
