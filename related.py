"""Skips and networks of other papers, to be compared with this paper's under the same training.

    python train.py --skip nested              # U-Net++ (Zhou et al., 2018)
    python train.py --skip fusionunet          # FusionU-Net (Li et al., 2023)
    python train.py --model double_unet        # DoubleU-Net (Jha et al., 2020)
    python related.py                          # parameter counts beside the paper's networks

Importing this file, as every script does that builds networks, enters them in SKIPS and MODELS.
"""

from argparse import ArgumentParser
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from models import (MODELS, SKIPS, check_sides, double_conv, he_init, print_parameters, resize,
                    returned_channels)
from pretrained import load_vgg19
from utils import run_cli

# -----------------------------------------------------------------------------
# U-Net++


class NestedSkip(nn.Module):
    """U-Net++ as a skip (Zhou et al., 2018, section 3.1, equation 1).

    x(i, j) = H([x(i, 0), ..., x(i, j - 1), U(x(i + 1, j - 1))]); x(i, 0) is the encoder's map x_i.

    H is the U-Net's block of two convolutions, U its transposed convolution to twice the side.
    Level i returns x(i, 0), x(i, 1), ... concatenated, as far as they can be computed without the
    bottleneck. The decoder, which concatenates them to what it has enlarged, computes the last x(i,
    j) of each level. It takes levels of which each has half the side of the one before. The
    original's deep supervision, a head for each x(0, j), is left out: its authors have results with
    and without it.
    """

    def __init__(self, channels):
        super().__init__()
        levels = len(channels)
        self.up, self.blocks = nn.ModuleDict(), nn.ModuleDict()
        for j in range(1, levels):
            for i in range(levels - j):
                fine, coarse = channels[i], channels[i + 1]
                self.up[f"{i}-{j}"] = nn.ConvTranspose2d(coarse, fine, 2, stride=2)
                self.blocks[f"{i}-{j}"] = double_conv((j + 1) * fine, fine)
        he_init(self.blocks.values())

    @staticmethod
    def out_channels(channels):
        return [(len(channels) - i) * count for i, count in enumerate(channels)]

    def forward(self, features):
        rows = [[x] for x in features]                    # rows[i][j] is x(i, j)
        for j in range(1, len(rows)):
            for i in range(len(rows) - j):
                enlarged = self.up[f"{i}-{j}"](rows[i + 1][j - 1])
                rows[i].append(self.blocks[f"{i}-{j}"](torch.cat([*rows[i], enlarged], dim=1)))
        return [torch.cat(row, dim=1) for row in rows]


# -----------------------------------------------------------------------------
# FusionU-Net


class ChannelAttention(nn.Module):
    """Efficient channel attention, ECA (Wang et al., 2020): x times a weight for each channel.

    The weight is the sigmoid of a 1-D convolution over the neighbouring channels' means.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        means = x.mean(dim=(2, 3))                        # (N, C)
        weights = self.conv(means[:, None])[:, 0].sigmoid()
        return x * weights[:, :, None, None]


class FuseNeighbour(nn.Module):
    """x <- attention(x + B(3/4 x + 1/4 d)), d the neighbouring level's map brought to x's shape.

    B is a 3x3 convolution, BatchNorm and ReLU. To bring a map one level down, pixel-unshuffle turns
    each 2 x 2 square into 4 channels; to bring it up, pixel-shuffle turns 4 channels into a square.
    A grouped 3x3 convolution, BatchNorm and ReLU then give it x's channels. x (N, C, H, W), its
    neighbour (N, C', 2H, 2W) or (N, C', H / 2, W / 2) -> (N, C, H, W).
    """

    def __init__(self, neighbour_channels, channels):
        super().__init__()
        if channels > neighbour_channels:  # one group for every channel of the finer map
            groups, shuffle = neighbour_channels, nn.PixelUnshuffle(2)
            shuffled = 4 * neighbour_channels
        else:                              # one group for every channel that the shuffle leaves
            groups = shuffled = neighbour_channels // 4
            shuffle = nn.PixelShuffle(2)
        self.bring = nn.Sequential(shuffle, nn.Conv2d(shuffled, channels, 3, padding=1,
                                                      groups=groups),
                                   nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1),
                                   nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.attention = ChannelAttention()
        he_init([self.bring, self.block])

    def forward(self, x, neighbour):
        return self.attention(x + self.block(0.75 * x + 0.25 * self.bring(neighbour)))


class FusionRound(nn.Module):
    """Normalise every level, then pass information down level by level, and up again."""

    def __init__(self, channels):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(count) for count in channels)
        self.down = nn.ModuleList(FuseNeighbour(*pair) for pair in pairwise(channels))
        self.up = nn.ModuleList(FuseNeighbour(*pair) for pair in pairwise(channels[::-1]))

    def forward(self, features):
        x = [norm(level) for norm, level in zip(self.norms, features)]
        for i, fuse in enumerate(self.down):
            x[i + 1] = fuse(x[i + 1], x[i])
        for i, fuse in zip(reversed(range(len(self.up))), self.up):
            x[i] = fuse(x[i], x[i + 1])
        return x


class FusionUNetSkip(nn.Sequential):
    """FusionU-Net's skip (Li et al., 2023): two rounds of fusion between neighbours.

    It takes levels of which each has half the side and twice the channels of the one before.
    The original's decoder also weighs the skips' channels; that is left out, as ours stays plain.
    Raises ValueError for other channels, and for odd ones, as pixel-shuffle makes 4 channels one.
    """

    def __init__(self, channels):
        if any(coarse != 2 * fine or fine % 2 for fine, coarse in pairwise(channels)):
            raise ValueError("fusionunet skips take levels of even and doubling numbers of "
                             f"channels, not {' '.join(map(str, channels))}: give an even --width")
        super().__init__(FusionRound(channels), FusionRound(channels))


# -----------------------------------------------------------------------------
# DoubleU-Net


def vgg19_encoder():
    """VGG-19 (Simonyan and Zisserman, 2015, column E) up to its last pooling, 512 @ 1/16 side."""
    from torchvision.models.vgg import cfgs, make_layers  # here, as timm in models.py

    return make_layers(cfgs["E"])[:-1]


class SqueezeExcite(nn.Module):
    """Squeeze and excitation (Hu et al., 2018): x times sigmoid(V relu(W mean(x))), per channel."""

    def __init__(self, channels):
        super().__init__()
        self.weigh = nn.Sequential(
            nn.Conv2d(channels, channels // 8, 1, bias=False), nn.ReLU(inplace=True),
            nn.Conv2d(channels // 8, channels, 1, bias=False), nn.Sigmoid())

    def forward(self, x):
        return x * self.weigh(x.mean(dim=(2, 3), keepdim=True))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al., 2017): one place seen at five scales.

    Beside the mean over the map there are a 1x1 convolution and three of 3x3, whose taps are 6, 12
    and 18 pixels apart. Unlike the original's, the mean has no BatchNorm: a batch of one image
    would leave nothing to normalise.
    """

    def __init__(self, in_channels, channels=64):
        super().__init__()

        def conv(in_channels, size, dilation=1):
            return nn.Sequential(
                nn.Conv2d(in_channels, channels, size, padding=dilation * (size // 2),
                          dilation=dilation, bias=False),
                nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, channels, 1),
                                  nn.ReLU(inplace=True))
        self.scales = nn.ModuleList([conv(in_channels, 1),
                                     *(conv(in_channels, 3, dilation) for dilation in (6, 12, 18))])
        self.join = conv(5 * channels, 1)

    def forward(self, x):
        mean = self.mean(x).expand(-1, -1, *x.shape[2:])
        return self.join(torch.cat([mean, *(scale(x) for scale in self.scales)], dim=1))


def attended_conv(in_channels, out_channels):
    """The U-Net's two convolutions, then squeeze and excitation."""
    return nn.Sequential(*double_conv(in_channels, out_channels), SqueezeExcite(out_channels))


def decode(blocks, x, *skips):
    """Enlarge x to the next finer level, concatenate the skips' maps, convolve; and so on up.

    x (N, C, h, w); skips: lists of features, finest first -> (N, C', H, W), as large as the finest.
    """
    for block, *features in zip(blocks, *map(reversed, skips)):
        x = block(torch.cat([resize(x, features[0].shape[2:]), *features], dim=1))
    return x


class DoubleUNet(nn.Module):
    """DoubleU-Net (Jha et al., 2020, section III): a U-Net that shows a second one where to look.

    images (N, 3, H, W) float -> logits (N, num_classes, H, W). Raises ValueError unless H and W are
    multiples of 16.

    The first U-Net's encoder is VGG-19 without its classifier. The second U-Net sees the image
    times the first one's mask, after a sigmoid; its decoder takes the skips of both encoders. The
    mask has one channel, however many classes there are: it says where to look, not what is there.
    Loss and scores are of the second U-Net's output alone; the original has a loss on the mask,
    too. Any skip of SKIPS may stand between; `width` and `checkpointing` mean nothing here, as
    VGG's widths are fixed. ASPP's convolutions keep PyTorch's initial weights.
    """

    pretrained = True
    side_multiple, max_side = 16, None

    def __init__(self, skip, num_classes, width=None, checkpointing=False):
        super().__init__()
        one, two, widths = [64, 128, 256, 512], [32, 64, 128, 256], [256, 128, 64, 32]
        returned = [returned_channels(skip, channels)[::-1] for channels in (one, two)]
        self.encoder = vgg19_encoder()
        self.encoder2 = nn.ModuleList(attended_conv(*pair) for pair in pairwise([3, *two]))
        self.aspp, self.aspp2 = ASPP(512), ASPP(256)
        # Per level, coarsest first: channels from below, channels out, channels of either skip.
        ups = list(zip([64, *widths], widths, *returned))
        self.decoder = nn.ModuleList(attended_conv(up + first, out) for up, out, first, _ in ups)
        self.decoder2 = nn.ModuleList(attended_conv(up + first + second, out)
                                      for up, out, first, second in ups)
        self.mask, self.head = nn.Conv2d(32, 1, 1), nn.Conv2d(32, num_classes, 1)
        he_init([self.encoder, *self.encoder2, *self.decoder, *self.decoder2])
        self.skip = nn.ModuleList([skip(one), skip(two)])

    def forward(self, images):
        check_sides(self, "DoubleU-Net", images)
        features, x = [], images                          # (N, 3, 224, 224)
        for layer in self.encoder:
            if isinstance(layer, nn.MaxPool2d):
                features.append(x)                        # 64 @ 224, 128 @ 112, 256 @ 56, 512 @ 28
            x = layer(x)                                  # 512 @ 14
        skips = self.skip[0](features)
        x = decode(self.decoder, self.aspp(x), skips)     # 64 @ 14, 32 @ 224
        features, x = [], images * self.mask(x).sigmoid()
        for block in self.encoder2:
            features.append(block(x))                     # 32 @ 224, 64 @ 112, 128 @ 56, 256 @ 28
            x = F.max_pool2d(features[-1], 2)             # 256 @ 14
        x = decode(self.decoder2, self.aspp2(x), skips, self.skip[1](features))
        return self.head(x)                               # (N, num_classes, 224, 224)

    def load_pretrained(self, path=None):
        return load_vgg19(self.encoder, path)


SKIPS.update(nested=NestedSkip, fusionunet=FusionUNetSkip)
MODELS.update(double_unet=DoubleUNet)


if __name__ == "__main__":
    parser = ArgumentParser(description="Print the parameter counts of every combination.")
    run_cli(lambda _: print_parameters(), parser.parse_args)
