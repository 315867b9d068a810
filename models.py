"""The paper's two networks, U-Net and Swin-UNet, and its three skip connections (paper 2.2).

    python models.py        # parameter counts of every combination, and the paper's Table 1

Read the three skips first: their difference is the paper. Both networks use the very same ones.
related.py adds those of other papers.
"""

import inspect
from argparse import ArgumentParser
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrained import load_swin, misfits
from utils import first_line, run_cli


def resize(x, size):
    """Resize feature maps x (N, C, h, w) bilinearly to `size` (H, W)."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


# -----------------------------------------------------------------------------
# The three skip connections. Each maps the encoder's list of feature maps, finest first, to the
# list that the decoder concatenates: as many maps, of the same sizes. Level i's map is x_i, with
# C_i channels. What the skip returns for it, y_i, has as many, unless the skip's class has an
# `out_channels` (see `returned_channels`).


class StandardSkip(nn.Module):
    """y_i = x_i"""

    def __init__(self, channels):
        super().__init__()

    def forward(self, features):
        return features


def pointwise(channels, depth):
    """`depth` 1x1 convolutions with bias, ReLU between them (not in the paper: it has one)."""
    layers = [nn.Conv2d(channels, channels, 1)]
    for _ in range(depth - 1):
        layers += [nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1)]
    return nn.Sequential(*layers) if depth > 1 else layers[0]  # parameters: convs.0.weight


class ConvSkip(nn.Module):
    """y_i = W_i x_i, a 1x1 convolution with bias on every level, or `depth` of them in a row."""

    def __init__(self, channels, depth=1):
        super().__init__()
        self.convs = nn.ModuleList(pointwise(count, depth) for count in channels)

    def forward(self, features):
        return [conv(x) for conv, x in zip(self.convs, features)]


class FusionSkip(nn.Module):
    """y_i = W_i (x_i + sum over j != i of resize(W_ij x_j)), every W a 1x1 convolution with bias.

    A 1x1 convolution mixes channels and a bilinear resize mixes pixels, so the two commute; so does
    the bias, as the weights of a resized pixel sum to 1. Whichever leaves less work for the other
    goes first: a finer map is shrunk before its convolution, a coarser one is enlarged after it.
    The paper convolves first everywhere; the function is the same. W_i is convs[i], or `depth`
    convolutions in a row, and W_ij is match[i][j].
    """

    def __init__(self, channels, depth=1):
        super().__init__()
        self.convs = nn.ModuleList(pointwise(count, depth) for count in channels)
        self.match = nn.ModuleList(  # [i][j]: C_j -> C_i; [i][i] only fills its place
            nn.ModuleList(nn.Identity() if j == i else nn.Conv2d(channels[j], channels[i], 1)
                          for j in range(len(channels))) for i in range(len(channels)))

    def forward(self, features):
        fused = []
        for i, (x_i, match, conv) in enumerate(zip(features, self.match, self.convs)):
            total = x_i
            for j, x_j in enumerate(features):
                if j < i:  # finer
                    total = total + match[j](resize(x_j, x_i.shape[2:]))
                elif j > i:  # coarser
                    total = total + resize(match[j](x_j), x_i.shape[2:])
            fused.append(conv(total))
        return fused


SKIPS = {"standard": StandardSkip, "conv": ConvSkip, "fusion": FusionSkip}


def returned_channels(skip, channels):
    """How many channels a skip returns on each level -> list, given how many it is to receive.

    `skip` is a class from SKIPS. Only one that changes them has a static method `out_channels`.
    """
    if isinstance(skip, partial):  # create_model has set its depth
        skip = skip.func
    return skip.out_channels(channels) if hasattr(skip, "out_channels") else channels


# -----------------------------------------------------------------------------
# What both networks are made of


def double_conv(in_channels, out_channels, norm=True):
    """Two 3x3 convolutions, padded to keep the size, each with BatchNorm (if `norm`) and ReLU.

    (N, in_channels, H, W) -> (N, out_channels, H, W).
    """
    layers = []
    for channels in in_channels, out_channels:
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
        if norm:
            layers.append(nn.BatchNorm2d(out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def check_sides(network, name, images):
    """ValueError unless sides of images (N, 3, H, W) are multiples of what `network` asks for."""
    height, width = images.shape[2:]
    if height % network.side_multiple or width % network.side_multiple:
        raise ValueError(f"{name} takes images whose sides are multiples of "
                         f"{network.side_multiple}, not {height} x {width}: pad or crop them")


def he_init(blocks):
    """Draw 3x3 convolutions' weights as U-Net's authors did: Gaussian, std sqrt(2 / inputs).

    `inputs` counts all that a neuron sees, 9 a channel. The signal then keeps its size through the
    ReLUs, also where no BatchNorm follows; PyTorch's default shrinks it there. The paper does not
    say what it did.
    """
    for block in blocks:
        for layer in block:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)


# -----------------------------------------------------------------------------
# The two networks. Each gets its skip's class and creates the skip last: networks of one seed start
# from the same weights in all other layers, so that a comparison of skips, seed by seed, compares
# the skips alone. (If a skip returns more channels, decoder blocks differ, and so does what is
# drawn after them.)
# Another network takes the same four arguments and says the same three things about itself: whether
# it starts from pretrained weights (it then has a `load_pretrained`, and fixed widths), and which
# image sides it takes: multiples of `side_multiple` up to `max_side`, None for no limit.


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015; paper 2.2) with exchangeable skips.

    images (N, 3, H, W) float -> logits (N, num_classes, H, W). Raises ValueError unless H and W are
    multiples of 16.

    Unlike the original, convolutions are padded, so that the output has the input's size, and each
    is followed by BatchNorm, with which it has the paper's parameter count (Table 1). The skips
    take all maps but the bottleneck's. `width` is the channel count of the first level, 64 in the
    paper; `checkpointing` recomputes feature maps in the backward pass instead of keeping them.
    """

    pretrained = False
    side_multiple, max_side = 16, None  # pixels, of the images that it takes

    def __init__(self, skip, num_classes, width=64, checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        widths = [width * 2**level for level in range(5)]  # 64 128 256 512 1024
        downs = list(pairwise([3, *widths]))               # 3 -> 64, 64 -> 128 ... 512 -> 1024
        ups = list(pairwise(widths[::-1]))                 # 1024 -> 512 ... 128 -> 64
        skip_channels = returned_channels(skip, widths[:-1])[::-1]  # 512, 256, 128, 64
        self.encoder = nn.ModuleList(double_conv(*channels) for channels in downs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(*channels, 2, stride=2) for channels in ups)
        self.decoder = nn.ModuleList(double_conv(channels + from_skip, channels)
                                     for (_, channels), from_skip in zip(ups, skip_channels))
        self.head = nn.Conv2d(width, num_classes, 1)
        he_init([*self.encoder, *self.decoder])
        self.skip = skip(widths[:-1])

    def forward(self, images):
        check_sides(self, "U-Net", images)
        features, x = [], images                          # (N, 3, 224, 224)
        for block in self.encoder[:-1]:
            features.append(self.run_block(block, x))     # 64 @ 224, 128 @ 112, 256 @ 56, 512 @ 28
            x = F.max_pool2d(features[-1], 2)
        x = self.encoder[-1](x)                           # 1024 @ 14: too small to recompute
        for up, block, skip in zip(self.up, self.decoder, reversed(self.skip(features))):
            x = torch.cat([skip, up(x)], dim=1)
            x = self.run_block(block, x)                  # 512 @ 28, 256 @ 56, 128 @ 112, 64 @ 224
        return self.head(x)                               # (N, num_classes, 224, 224)

    def run_block(self, block, x):
        if self.checkpointing and self.training:
            return checkpointed(block, x)
        return block(x)


class SwinUNet(nn.Module):
    """Swin-UNet (after Cao et al., 2021; paper 2.2) with exchangeable skips.

    images (N, 3, 224, 224) float -> logits (N, num_classes, 224, 224).

    The encoder is timm's Swin-T without its classifier. Unlike the original's, the decoder is
    convolutional, and the skips leave the encoder right after each patch merging: with conv skips,
    that gives the count in the paper's Table 1, and the paper says no more of it. `width` and
    `checkpointing` mean nothing here, as Swin-T's widths are fixed. Raises ValueError for any other
    image size.
    """

    pretrained = True  # its encoder starts from ImageNet's weights
    side_multiple = max_side = 224

    def __init__(self, skip, num_classes, width=None, checkpointing=False):
        super().__init__()
        import timm  # here, as it takes seconds, which scripts with a U-Net need not wait for

        self.encoder = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
        fine, middle, coarse = returned_channels(skip, [192, 384, 768])
        self.decoder = nn.ModuleList(double_conv(*channels, norm=False) for channels in [
            (768, 384), (384 + coarse, 192), (192 + middle, 96), (96 + fine, 64)])
        self.head = nn.Conv2d(64, num_classes, 1)
        he_init(self.decoder)
        self.skip = skip([192, 384, 768])

    def load_pretrained(self, path=None):
        return load_swin(self.encoder, path)

    def encode(self, images):
        """images -> features [192 @ 28, 384 @ 14, 768 @ 7] and the bottleneck, 768 @ 7."""
        features, x = [], self.encoder.patch_embed(images)  # (N, 56, 56, 96): timm's Swin is NHWC
        for stage in self.encoder.layers:
            x = stage.downsample(x)                       # patch merging; nothing in stage 0
            features.append(x.permute(0, 3, 1, 2))
            x = stage.blocks(x)
        return features[1:], self.encoder.norm(x).permute(0, 3, 1, 2)

    def forward(self, images):
        if images.shape[2:] != (224, 224):
            height, width = images.shape[2:]
            raise ValueError(f"Swin-UNet takes 224 x 224 images, not {height} x {width}: "
                             "cut or resize them")
        features, x = self.encode(images)                 # 768 @ 7
        x = self.decoder[0](resize(x, (14, 14)))          # 384 @ 14
        for block, skip in zip(self.decoder[1:], reversed(self.skip(features))):
            size = (2 * skip.shape[2], 2 * skip.shape[3])  # as patch merging has halved it
            x = torch.cat([resize(x, size), resize(skip, size)], dim=1)
            x = block(x)                                  # 192 @ 14, 96 @ 28, 64 @ 56
        # 1x1 head and bilinear resize commute (see FusionSkip): the head is cheaper at 56.
        return resize(self.head(x), (224, 224))           # (N, num_classes, 224, 224)


MODELS = {"unet": UNet, "swin_unet": SwinUNet}
MAX_SKIP_DEPTH = 16  # so that no damaged checkpoint can ask for a million layers


def create_model(model, skip, num_classes, width=64, checkpointing=False, skip_depth=1):
    """Build a network: `model` from MODELS, `skip` from SKIPS. To add one, enter it there.

    `width` is the U-Net's first-level channel count (paper: 64); `checkpointing` makes training
    recompute feature maps instead of keeping them; `skip_depth` is the `depth` of skips that have
    one. Raises ValueError for an unknown name, and for a depth that is out of range or that the
    skip does not have.
    """
    for kind, table, name in ("network", MODELS, model), ("skip", SKIPS, skip):
        if name not in table:
            raise ValueError(f"no {kind} is called {name!r}: there are {', '.join(table)}")
    skip_class = SKIPS[skip]
    if skip_depth != 1:
        if "depth" not in inspect.signature(skip_class).parameters:
            raise ValueError(f"--skip-depth {skip_depth}: {skip} skips have no 1x1 convolution to "
                             "repeat, as conv and fusion skips have")
        if skip_depth not in range(1, MAX_SKIP_DEPTH + 1):
            raise ValueError(f"--skip-depth {skip_depth}: give 1 to {MAX_SKIP_DEPTH}")
        skip_class = partial(skip_class, depth=skip_depth)
    return MODELS[model](skip_class, num_classes, width, checkpointing)


def build_model(checkpoint, path):
    """The network that a checkpoint of train.py holds, in training mode.

    Raises ValueError if they do not fit.
    """
    args = checkpoint["args"]
    arguments = {name: args[name] for name in ("model", "skip", "width", "skip_depth")}
    arguments["num_classes"] = checkpoint["num_classes"]
    try:
        with torch.device("meta"):  # takes no memory, however large the file claims to be
            wrong = ", ".join(misfits(create_model(**arguments), checkpoint["model"])[:3])
    except (RuntimeError, ValueError) as error:  # there is no such network
        wrong = first_line(error)
    if wrong:
        raise ValueError(f"{path}: its weights do not fit the {args['model']} with {args['skip']} "
                         f"skips that it names ({wrong}): it was not written by this version")
    model = create_model(**arguments)
    model.load_state_dict(checkpoint["model"])
    return model


# -----------------------------------------------------------------------------
# Checkpointing: less memory, more time


@torch.compiler.disable
def checkpointed(block, x):
    """block(x), which recomputes its feature maps in the backward pass instead of keeping them.

    It is not compiled: torch.compile takes no context_fn, without which a block whose graph breaks,
    as it does at a SyncBatchNorm, would count each batch twice.
    """
    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (nullcontext(), statistics_off(block)))


@contextmanager
def statistics_off(block):
    """While a block is recomputed, keep BatchNorm from counting the same batch twice.

    Recomputing must save the same tensors as the first pass did, so BatchNorm has its running
    statistics as before; a momentum of 0 leaves their values alone, and the counter of batches is a
    copy that is thrown away.
    """
    norms = [layer for layer in block if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, batches


# -----------------------------------------------------------------------------
# Parameter counts

TABLE_1 = {("unet", "standard"): 31_043_521, ("swin_unet", "conv"): 35_383_483}  # the paper's


@cache
def parameter_counts():
    """{(model, skip): [parameters for 1, 3 and 22 classes]} of every network."""
    with torch.device("meta"):  # counts need no memory
        return {(model, skip): [sum(parameter.numel() for parameter in
                                    create_model(model, skip, num_classes).parameters())
                                for num_classes in (1, 3, 22)]
                for model in MODELS for skip in SKIPS}


def print_parameters():
    """Print the counts of every network and, in the last column, the paper's two."""
    print("parameters                    1 class    3 classes   22 classes  paper, 1 class")
    for network, counts in parameter_counts().items():
        print("{:13}{:11}".format(*network) + "".join(f"{count:>13,}" for count in counts)
              + (f"{TABLE_1[network]:>17,}" if network in TABLE_1 else ""))


if __name__ == "__main__":
    parser = ArgumentParser(description="Print the parameter counts of every combination.")
    run_cli(lambda _: print_parameters(), parser.parse_args)
