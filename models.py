"""The paper's two networks, U-Net and Swin-UNet, and its three skip connections (paper 2.2).

    python models.py        # parameter counts of every combination, beside the paper's Table 1

Read the three skips first: their difference is the paper. Both networks use the very same ones.
"""

import os
import platform
import re
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager, nullcontext

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def resize(x, size):
    """Resize maps x (N, C, h, w) bilinearly to `size` (H, W)."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


# -----------------------------------------------------------------------------
# The three skip connections. Each maps the encoder's list of maps, finest first, to the list that
# the decoder concatenates: same number, same shapes. Level i's map is x_i with C_i channels.


class StandardSkip(nn.Module):
    """y_i = x_i"""

    def __init__(self, channels):
        super().__init__()

    def forward(self, maps):
        return maps


class ConvSkip(nn.Module):
    """y_i = W_i x_i, a 1x1 convolution with bias on every level."""

    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels)

    def forward(self, maps):
        return [conv(x) for conv, x in zip(self.convs, maps)]


class FusionSkip(nn.Module):
    """y_i = W_i (x_i + sum over j != i of resize(W_ij x_j)), every W a 1x1 convolution with bias.

    A 1x1 convolution mixes channels and a bilinear resize mixes pixels with weights that sum to 1,
    so the two commute, bias included. Whichever leaves less work for the other goes first: a finer
    map is shrunk before its convolution, a coarser one is enlarged after it. The paper convolves
    first everywhere; the function is the same.
    """

    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels)  # as ConvSkip draws them
        self.match = nn.ModuleList(  # match[i][j]: C_j -> C_i
            nn.ModuleList(nn.Identity() if j == i else nn.Conv2d(channels[j], channels[i], 1)
                          for j in range(len(channels))) for i in range(len(channels)))

    def forward(self, maps):
        fused = []
        for i, (match, conv) in enumerate(zip(self.match, self.convs)):
            size, total = maps[i].shape[2:], maps[i]
            for j in range(len(maps)):
                if j < i:  # finer
                    total = total + match[j](resize(maps[j], size))
                elif j > i:  # coarser
                    total = total + resize(match[j](maps[j]), size)
            fused.append(conv(total))
        return fused


SKIPS = {"standard": StandardSkip, "conv": ConvSkip, "fusion": FusionSkip}


def he_init(blocks):
    """Draw 3x3 convolutions' weights as U-Net's authors did: Gaussian, std sqrt(2 / inputs).

    The signal then keeps its size through the ReLUs, where PyTorch's default shrinks it. The paper
    does not say what it did.
    """
    for block in blocks:
        for layer in block:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)


# -----------------------------------------------------------------------------
# U-Net


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015; paper 2.2) with exchangeable skips.

    images (N, 3, H, W) float -> logits (N, num_classes, H, W), H and W multiples of 16.

    Unlike the original, convolutions are padded, so that the output has the input's size, and each
    is followed by BatchNorm: that is what the paper's parameter count (Table 1) amounts to.
    `width` is the channel count of the first level, 64 in the paper. Raises ValueError for sides
    that are not multiples of 16.
    """

    def __init__(self, skip, num_classes, width=64, checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        widths = [width * 2**level for level in range(5)]  # 64 128 256 512 1024
        ups = list(zip(widths[:0:-1], widths[-2::-1]))  # 1024 -> 512 ... 128 -> 64
        self.encoder = nn.ModuleList(self.block(c, d) for c, d in zip([3] + widths, widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, d, 2, stride=2) for c, d in ups)
        self.decoder = nn.ModuleList(self.block(c, d) for c, d in ups)
        self.head = nn.Conv2d(width, num_classes, 1)
        he_init([*self.encoder, *self.decoder])
        self.skip = SKIPS[skip](widths[:-1])  # drawn last: a seed's other weights are the same

    @staticmethod
    def block(c, d):
        return nn.Sequential(
            nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU(inplace=True),
            nn.Conv2d(d, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU(inplace=True))

    def forward(self, images):
        height, width = images.shape[2:]
        if height % 16 or width % 16:
            raise ValueError(f"U-Net takes images whose sides are multiples of 16, not {height} x "
                             f"{width}: pad or crop them")
        maps, x = [], images                              # (N, 3, 224, 224)
        for block in self.encoder[:-1]:
            maps.append(self.call(block, x))              # 64 @ 224, 128 @ 112, 256 @ 56, 512 @ 28
            x = F.max_pool2d(maps[-1], 2)
        x = self.encoder[-1](x)                           # 1024 @ 14
        for up, block, skip in zip(self.up, self.decoder, reversed(self.skip(maps))):
            x = torch.cat([skip, up(x)], dim=1)
            x = self.call(block, x)                       # 512 @ 28, 256 @ 56, 128 @ 112, 64 @ 224
        return self.head(x)                               # (N, num_classes, 224, 224)

    def call(self, block, x):
        """block(x); with checkpointing, what it keeps for the backward pass is computed anew."""
        if not (self.checkpointing and self.training):
            return block(x)
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False,
                          context_fn=lambda: (nullcontext(), statistics_off(block)))


@contextmanager
def statistics_off(block):
    """While a block is computed anew, keep BatchNorm from counting the same batch twice."""
    norms = [module for module in block if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, count


# -----------------------------------------------------------------------------
# Swin-UNet


class SwinUNet(nn.Module):
    """Swin-UNet (after Cao et al., 2021; paper 2.2) with exchangeable skips.

    images (N, 3, 224, 224) float -> logits (N, num_classes, 224, 224).

    The encoder is timm's Swin-T without its classifier. Unlike the original's, the decoder is
    convolutional: that is what the paper's parameter count (Table 1) amounts to. The skips leave
    the encoder right after each patch merging. Raises ValueError for any other image size.
    """

    def __init__(self, skip, num_classes):
        super().__init__()
        self.encoder = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
        self.decoder = nn.ModuleList(self.block(c, d) for c, d in [
            (768, 384), (384 + 768, 192), (192 + 384, 96), (96 + 192, 64)])
        self.head = nn.Conv2d(64, num_classes, 1)
        he_init(self.decoder)
        self.skip = SKIPS[skip]([192, 384, 768])  # drawn last, as in UNet

    @staticmethod
    def block(c, d):
        return nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True),
                             nn.Conv2d(d, d, 3, padding=1), nn.ReLU(inplace=True))

    def encode(self, images):
        """images -> skip maps [192 @ 28, 384 @ 14, 768 @ 7] and the bottleneck, 768 @ 7."""
        maps, x = [], self.encoder.patch_embed(images)    # (N, 56, 56, 96): timm's Swin is NHWC
        for stage in self.encoder.layers:
            x = stage.downsample(x)                       # patch merging; nothing in stage 0
            maps.append(x.permute(0, 3, 1, 2))
            x = stage.blocks(x)
        return maps[1:], self.encoder.norm(x).permute(0, 3, 1, 2)

    def forward(self, images):
        if images.shape[2:] != (224, 224):
            height, width = images.shape[2:]
            raise ValueError(f"Swin-UNet takes 224 x 224 images, not {height} x {width}: "
                             "cut or resize them")
        maps, x = self.encode(images)                     # 768 @ 7
        x = self.decoder[0](resize(x, (14, 14)))          # 384 @ 14
        for block, skip in zip(self.decoder[1:], reversed(self.skip(maps))):
            size = (2 * skip.shape[2], 2 * skip.shape[3])
            x = torch.cat([resize(x, size), resize(skip, size)], dim=1)
            x = block(x)                                  # 192 @ 14, 96 @ 28, 64 @ 56
        # 1x1 head and bilinear resize commute (see FusionSkip): the head is cheaper at 56.
        return resize(self.head(x), (224, 224))           # (N, num_classes, 224, 224)


MODELS = {"unet": UNet, "swin_unet": SwinUNet}


def create_model(model, skip, num_classes, width=64, checkpointing=False):
    """Build one of the paper's networks: `model` from MODELS, `skip` from SKIPS.

    `width` is the U-Net's first-level channel count (paper: 64), `checkpointing` has its training
    recompute activations in place of keeping them; both mean nothing to Swin-UNet.
    """
    if model == "unet":
        return UNet(skip, num_classes, width, checkpointing)
    return SwinUNet(skip, num_classes)


# -----------------------------------------------------------------------------
# Pretrained weights of Swin-UNet's encoder (paper 2.2: "provided by the original authors")

HUB = "timm/swin_tiny_patch4_window7_224.ms_in1k"  # Microsoft's weights under timm's names
MICROSOFT = ("https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
             "swin_tiny_patch4_window7_224.pth")


def load_encoder(encoder, path=None):
    """Load ImageNet weights into a Swin-T -> a text that says which.

    `path` is Microsoft's original file, timm's .safetensors or .pth, or a checkpoint of ours with a
    Swin-UNet; None takes timm's hub. Raises FileNotFoundError where there is nothing to load, and
    ValueError unless the file's names and shapes are all the encoder's, no more and no less.
    """
    origin = str(path or f"hub {HUB}")
    path = path or fetch_from_hub()
    try:
        tensors = timm.models.load_state_dict(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of weights") from None
    except Exception as error:  # as in load_checkpoint
        raise ValueError(f"{path}: not weights, or damaged ({first_line(error)})") from None

    # Microsoft counts a patch merging to the stage before it, timm to the stage after it. Both
    # files hold a classifier, Microsoft's also buffers; a checkpoint of ours holds a whole network.
    if any(name.startswith("encoder.") for name in tensors):
        tensors = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()
                   if name.startswith("encoder.")}
    if "layers.0.downsample.reduction.weight" in tensors:
        tensors = {re.sub(r"^layers\.(\d)\.downsample", lambda match:
                          f"layers.{int(match[1]) + 1}.downsample", name): tensor
                   for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")
               and not name.endswith(("relative_position_index", "attn_mask"))}

    expected = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    wrong = [name for name in tensors if tensors[name].shape != expected.get(name)]
    if missing or wrong:
        def few(names):
            return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        raise ValueError(f"{path}: not a Swin-T: missing {few(missing)}, left over or of another "
                         f"shape {few(wrong)}; `./prepare_data.sh weights` fetches the right file")
    encoder.load_state_dict(tensors)
    return f"encoder weights from {origin}"


def fetch_from_hub():
    """timm's file of the weights, from its cache or the hub; FileNotFoundError within seconds."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # what timm uses itself

    cached = try_to_load_from_cache(HUB, "model.safetensors")
    if isinstance(cached, str):
        return cached
    answers = []

    def ask():  # in a thread, as looking up a host name has no time limit; the hub retries a minute
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
                                   timeout=4).close()
            answers.append("yes")
        except urllib.error.HTTPError:
            answers.append("yes, with a status that is not our concern")
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(4)
    reason = "the hub cannot be reached"
    try:
        if answers:
            return hf_hub_download(HUB, "model.safetensors")
    except Exception as error:  # the hub's errors have no common base
        reason = first_line(error)
    raise FileNotFoundError(
        f"no pretrained Swin-T, {reason}: where there is a network, run `./prepare_data.sh "
        f"weights` or download {MICROSOFT}, and give the file with --weights; or train from "
        "scratch with --no-pretrained")


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# -----------------------------------------------------------------------------
# Where networks run, and how they come back from disk.


def pick_device(name=None):
    """The device called `name`, or the best there is: CUDA, Apple's MPS, the CPU."""
    if name is None:
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} does not work here: {first_line(error)}") from None


def describe(device):
    """What a measurement was made on: the card's name, or the kind of CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (f"{device.type}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
            f"{torch.get_num_threads()} threads")


def autocast(device):
    """Half precision on CUDA, bfloat16 or, where a card has none, float16; elsewhere nothing."""
    if device.type != "cuda":
        return torch.autocast(device.type, enabled=False)
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16 if bfloat16 else torch.float16)


def load_checkpoint(path):
    """Read a checkpoint written by train.py -> dict of plain values and tensors on the CPU.

    Raises ValueError if it is not one; code that a file may carry is never run.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "args", "num_classes", "split", "epoch", "log"} - set(checkpoint)
    except OSError:
        raise
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        raise ValueError(f"{path}: not a checkpoint of train.py, or damaged "
                         f"({first_line(error)})") from None
    if missing:
        raise ValueError(f"{path}: not a checkpoint of train.py: it holds no {missing.pop()}")
    return checkpoint


def build_model(checkpoint, path):
    """The trained network that a checkpoint holds; ValueError if its weights do not fit."""
    args = checkpoint["args"]
    model = create_model(args["model"], args["skip"], checkpoint["num_classes"], args["width"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise ValueError(f"{path}: its weights do not fit the {args['model']} with {args['skip']} "
                         "skips that it names: it was not written by this version") from None
    return model


def table_1():
    """Parameter counts of every combination beside the paper's Table 1, as text for people."""
    paper = {("unet", "standard"): "31,043,521", ("swin_unet", "conv"): "35,383,483"}
    lines = ["parameters             1 class    3 classes   22 classes   paper, Table 1"]
    for model in MODELS:
        for skip in SKIPS:
            with torch.device("meta"):  # counts need no memory
                networks = [create_model(model, skip, num_classes) for num_classes in (1, 3, 22)]
            counts = [sum(p.numel() for p in network.parameters()) for network in networks]
            lines.append(f"{model:10}{skip:8}" + "".join(f"{count:>13,}" for count in counts)
                         + f"{paper.get((model, skip), '-'):>17}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_1())
