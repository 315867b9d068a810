"""losses.py: values worked out by hand, torch's as reference, half precision, order."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import (LOSSES, ONE_CLASS, SEVERAL_CLASSES, bce_loss, dice_loss, focal_loss,
                    loss_for)

ce_dice_loss = LOSSES["ce+dice"]


def fitting(*class_counts):
    """Every loss with every number of classes that it fits -> [(name, number)]."""
    return [(name, k) for name in LOSSES for k in class_counts
            if name not in (SEVERAL_CLASSES if k == 1 else ONE_CLASS)]


def certain(masks, num_classes, strength=30.0):
    """Logits that predict `masks` with near certainty."""
    return strength * F.one_hot(masks, num_classes).permute(0, 3, 1, 2).float()


def test_bce_matches_value_by_hand():
    logits = torch.tensor([[[[0.0, math.log(3)]]]])  # probabilities 1/2 and 3/4
    masks = torch.tensor([[[1, 0]]])
    expected = (math.log(2) + math.log(4)) / 2
    torch.testing.assert_close(bce_loss(logits, masks), torch.tensor([expected]))


def test_bce_matches_torch_one_value_per_tile():
    logits, masks = torch.randn(3, 1, 5, 7), torch.randint(2, (3, 5, 7))
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], masks.float(), reduction="none")
    torch.testing.assert_close(bce_loss(logits, masks), expected.mean(dim=(1, 2)))


def test_cross_entropy_and_dice_match_values_by_hand():
    # Two pixels, uniform over two classes, one of each: cross-entropy log 2, and for each class
    # 2 * 0.5 / (1 + 1) = 0.5.
    loss = ce_dice_loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]]))
    torch.testing.assert_close(loss, torch.tensor([math.log(2) + 0.5]))
    # Three classes, one pixel of class 2: only class 2 is present, 2 * 1/3 / (1/3 + 1) = 0.5.
    loss = ce_dice_loss(torch.zeros(1, 3, 1, 1), torch.tensor([[[2]]]))
    torch.testing.assert_close(loss, torch.tensor([math.log(3) + 0.5]))


def test_cross_entropy_and_dice_match_torch():
    logits, masks = torch.randn(4, 5, 6, 6), torch.randint(5, (4, 6, 6))
    p, y = logits.softmax(1), F.one_hot(masks, 5).permute(0, 3, 1, 2)
    dice = 2 * (p * y).sum((2, 3)) / (p.sum((2, 3)) + y.sum((2, 3)))
    present = y.sum((2, 3)) > 0
    dice_loss = torch.stack([(1 - d)[is_there].mean() for d, is_there in zip(dice, present)])
    expected = F.cross_entropy(logits, masks, reduction="none").mean((1, 2)) + dice_loss
    torch.testing.assert_close(ce_dice_loss(logits, masks), expected)


def test_dice_and_focal_of_one_class_match_values_by_hand():
    logits, masks = torch.tensor([[[[0.0, math.log(3)]]]]), torch.tensor([[[1, 0]]])
    p = 1 / 2, 3 / 4  # the foreground is the first pixel
    torch.testing.assert_close(dice_loss(logits, masks), torch.tensor([1 - 2 * p[0] / (5/4 + 1)]))
    assert dice_loss(logits, torch.zeros_like(masks)).item() == 0  # nothing to overlap
    expected = (-math.log(p[0]) * (1 - p[0])**2 - math.log(1 - p[1]) * p[1]**2) / 2
    torch.testing.assert_close(focal_loss(logits, masks), torch.tensor([expected]))
    both = bce_loss(logits, masks) + dice_loss(logits, masks)
    torch.testing.assert_close(LOSSES["bce+dice"](logits, masks), both)


@pytest.mark.parametrize("name, num_classes", fitting(1, 3))
def test_every_loss_falls_as_the_prediction_gets_better(name, num_classes):
    masks = torch.randint(max(2, num_classes), (2, 8, 8),
                          generator=torch.Generator().manual_seed(0))
    right = (masks[:, None] * 2.0 - 1 if num_classes == 1 else
             F.one_hot(masks, 3).permute(0, 3, 1, 2).float())
    strength = torch.tensor(1.0, requires_grad=True)
    loss = loss_for(num_classes, (), name)
    values = [loss(factor * strength * right, masks) for factor in (-2, 0, 2)]
    assert all(value.shape == (2,) and value.dtype == torch.float32 for value in values)
    means = [value.mean().item() for value in values]
    assert means == sorted(means, reverse=True) and means[-1] < 0.5 * means[0]
    values[2].sum().backward()
    assert strength.grad < 0


@pytest.mark.parametrize("name, num_classes", fitting(1, 3))
def test_every_gradient_is_the_slope_of_its_loss(name, num_classes):
    logits, masks = torch.randn(1, num_classes, 2, 2), torch.tensor([[[0, 1], [1, 0]]])
    loss = loss_for(num_classes, (), name)
    loss(logits.requires_grad_(), masks).sum().backward()
    steps = 0.01 * torch.eye(logits.numel()).view(-1, 1, *logits.shape[1:])
    slopes = [(loss(logits + step, masks) - loss(logits - step, masks)).item() / 0.02
              for step in steps]
    assert logits.grad.flatten().tolist() == pytest.approx(slopes, abs=1e-3)


@pytest.mark.parametrize("name, num_classes", fitting(1, 3))
def test_no_loss_of_a_tile_depends_on_its_batch_or_on_ignored_pixels(name, num_classes):
    torch.manual_seed(0)
    logits = torch.randn(3, num_classes, 6, 6)
    masks = torch.randint(max(2, num_classes), (3, 6, 6))
    loss = loss_for(num_classes, (), name)
    one_by_one = torch.cat([loss(logits[i:i + 1], masks[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(logits, masks), one_by_one)
    if num_classes > 1:  # a tile whose lower half is ignored has the loss of its upper half
        masks = torch.cat((masks[:, :3].clamp(max=1), torch.full((3, 3, 6), 2)), dim=1)
        torch.testing.assert_close(loss_for(num_classes, (2,), name)(logits, masks),
                                   loss(logits[:, :, :3], masks[:, :3]))


def test_absent_classes_add_nothing():
    masks = torch.zeros(1, 8, 8, dtype=torch.int64)
    assert ce_dice_loss(certain(masks, 22), masks).item() < 1e-3


def test_ignored_pixels_change_nothing():
    logits, masks = torch.randn(2, 4, 8, 8), torch.randint(4, (2, 8, 8))
    noise = torch.where(torch.isin(masks, torch.tensor([0, 3]))[:, None], torch.randn(2, 4, 8, 8),
                        torch.zeros(()))
    torch.testing.assert_close(ce_dice_loss(logits, masks, ignore=(0, 3)),
                               ce_dice_loss(logits + noise, masks, ignore=(0, 3)))
    assert not torch.allclose(ce_dice_loss(logits, masks), ce_dice_loss(logits, masks, ignore=(0,)))


def test_a_tile_of_ignored_pixels_has_no_loss_and_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = ce_dice_loss(logits, torch.zeros(1, 4, 4, dtype=torch.int64), ignore=(0,))
    loss.sum().backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, num_classes", fitting(1, 22))
def test_losses_are_stable_in_half_precision(dtype, name, num_classes):
    masks = torch.randint(2, (2, 224, 224))
    scale = torch.tensor([1.0, 1000.0]).view(2, 1, 1, 1)  # one to be rounded, one to overflow
    logits = (scale * torch.randn(2, num_classes, 224, 224)).to(dtype).requires_grad_()
    function = loss_for(num_classes, (), name)
    loss = function(logits, masks)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and logits.grad.isfinite().all()
    assert torch.equal(loss, function(logits.detach().float(), masks))


def test_one_class_takes_bce_more_take_cross_entropy_and_dice():
    logits, masks = torch.randn(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
    assert torch.equal(loss_for(1)(logits[:, :1], masks), bce_loss(logits[:, :1], masks))
    assert torch.equal(loss_for(3)(logits, masks), ce_dice_loss(logits, masks))
    assert torch.equal(loss_for(3, [0])(logits, masks), ce_dice_loss(logits, masks, ignore=[0]))
