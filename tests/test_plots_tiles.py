"""plots.py: the colours of labels, and the outlines of regions."""

import numpy as np
import pytest

import plots

# Machado et al. 2009, complete protanopia, deuteranopia, tritanopia; on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}


def cielab(rgb, sight):
    """Colours (n, 3), 0..1, as an eye of this sight sees them -> L*, a*, b* (n, 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055)**2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                       [0.0193, 0.1192, 0.9505]])
    xyz = (linear @ np.transpose(sight)).clip(0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), 1)


@pytest.mark.parametrize("sight", SIGHT.values(), ids=SIGHT)
def test_colours_are_told_apart_by_every_eye(sight):
    lab = cielab(plots.PALETTE / 255, sight)
    distance = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(len(lab))
    assert len(lab) == 22 and distance.min() > 17 and distance[:3, :3].min() > 70
    lines = cielab(np.array(plots.LINES) / 255, sight)
    distance = np.linalg.norm(lines[:, None] - lines, axis=2) + 1000 * np.eye(len(lines))
    assert len(lines) == 12 and distance.min() > 16


def test_outline_is_the_inner_border_of_each_region():
    mask = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [0, 0, 0, 0, 0]])
    assert plots.outline(mask).tolist() == [
        [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
