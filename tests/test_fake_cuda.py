"""What runs on a GPU, tested without one: fake tensors have a shape and a device, and no values.

As on a card, an operation on a CUDA tensor and one that was left on the CPU is an error. The
backward pass, half precision and torch.compile need a real card.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

import data
from eval import confusion_matrices, evaluate
from losses import loss_for
from models import MODELS, SKIPS, create_model
from raw import TileRow
from utils import autocast, to_device

with_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(),
                               reason="this build of PyTorch knows no CUDA devices")


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    """What asks for a real card is answered here."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)


def tiles(device="cpu"):
    images, masks = (torch.zeros(4, 224, 224, *channels, dtype=torch.uint8, device=device)
                     for channels in ((3,), ()))
    return data.Tiles(images, masks, [TileRow("a", 0, 0, "train")] * 4, {})


class OnCuda(torch.nn.Module):
    """A network whose parameters and buffers, but nothing else, are on CUDA."""

    def __init__(self, *names):
        super().__init__()
        with torch.device("meta"):
            self.network = create_model(*names, width=2)

    def forward(self, images):
        tensors = [*self.network.named_parameters(), *self.network.named_buffers()]
        return functional_call(self.network, {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            for name, tensor in tensors}, images)


def on_cuda(*tensors):
    return all(tensor.device.type == "cuda" for tensor in tensors)


@with_cuda
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_batch_is_augmented_where_it_is_trained(where):
    with FakeTensorMode():
        stored = data.read_tiles(tiles(where), torch.tensor([3, 1, 0]))
        assert [array.device.type for array in stored] == [where, where]  # not copied ahead
        draws = data.draw_augmentation(3, torch.Generator())
        assert not any(map(on_cuda, draws.values()))
        images, masks = data.augment(*data.to_batch(stored, "cuda"), draws)
        assert on_cuda(images, masks, data.normalize(images))


@with_cuda
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_windows_are_cut_where_the_set_lies_and_stained_where_they_are_trained(where):
    whole = data.WholeImage(torch.arange(4).view(2, 2), [0, 224], [0, 100])
    indices, places = torch.tensor([3, 1]), torch.rand(2, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stored = data.read_windows(tiles(where), {"a": whole}, indices, places, 0.25)
        assert [array.device.type for array in stored] == [where, where]
        draws = data.draw_augmentation(2, torch.Generator(), windows=0.25, stain=0.25)
        images, masks = data.augment(*data.to_batch(stored, "cuda"), draws)
        assert on_cuda(images, masks) and images.shape == (2, 3, 224, 224)


@with_cuda
@pytest.mark.parametrize("model, skip, num_classes", [
    ("unet", "standard", 1), *(("unet", skip, 3) for skip in SKIPS),
    *((model, "fusion", 3) for model in MODELS if model != "unet")])
def test_no_tensor_stays_on_the_cpu_between_a_batch_and_its_scores(model, skip, num_classes):
    network = OnCuda(model, skip, num_classes)
    with FakeTensorMode():
        images, masks = data.get_batch(tiles(), torch.tensor([3, 1, 0]), "cuda")
        logits = network(data.normalize(images))
        losses = loss_for(num_classes, ignore=[0])(logits, masks)
        assert on_cuda(logits, losses, confusion_matrices(logits, masks))
        assert logits.shape == (3, num_classes, 224, 224) and losses.shape == (3,)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@with_cuda
def test_evaluation_stays_on_its_device():
    network = OnCuda("unet", "conv", 3)
    with FakeTensorMode():
        confusions, losses = evaluate(network, tiles(), torch.tensor([3, 1, 0]), loss_for(3),
                                      torch.device("cuda"), batch_size=2)
        assert on_cuda(confusions, losses) and confusions.shape == (3, 3, 3)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_only_copies_to_cuda_are_not_waited_for(device):
    tensor = SimpleNamespace(to=lambda device, non_blocking: non_blocking)
    for name in device, torch.device(device):
        assert to_device(tensor, name) == (device == "cuda")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("supported, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_cards_without_bfloat16_compute_in_float16(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    assert autocast(torch.device("cuda")).fast_dtype == dtype
