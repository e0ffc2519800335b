"""Patches by a matrix product against the convolution that they replace."""

import pytest
import torch
from torch import nn

from dinosearch.pretrain.net import create_backbone
from dinosearch.pretrain.patch_projection import PatchProjection, can_project
from dinosearch.pretrain.recipe import Recipe


@pytest.mark.parametrize(("patch", "size"), [((7, 7), (28, 28)), ((4, 2), (16, 12)), ((5, 5), (23, 17))])
@pytest.mark.parametrize("bias", [True, False])
def test_tokens_and_gradients_are_those_of_the_convolution(
    patch: tuple[int, int], size: tuple[int, int], *, bias: bool
) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, patch, stride=patch, bias=bias).double()
    assert can_project(convolution)
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    made = []
    for layer in (convolution, PatchProjection(convolution)):
        tokens = layer(images)
        loss = (tokens * torch.arange(tokens.numel(), dtype=torch.float64).view(tokens.shape).cos()).sum()
        made.append([tokens, *torch.autograd.grad(loss, [images, *layer.parameters()])])
    for expected, ours in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 4, stride=2),
        nn.Conv2d(3, 8, 4, stride=4, padding=1),
        nn.Conv2d(3, 9, 4, stride=4, groups=3),
        nn.Conv2d(3, 8, 2, stride=2, dilation=2),
        nn.Identity(),
        None,
    ],
)
def test_other_layers_are_left_alone(layer: nn.Module | None) -> None:
    assert not can_project(layer)


def test_a_backbone_on_a_processor_has_it_and_keeps_its_names() -> None:
    recipe = Recipe(arch="vit_tiny_patch16_224", arch_kwargs={"img_size": 32}, image_size=32, patch_size=16)
    processor = create_backbone(recipe, drop_path_rate=0.0, device=torch.device("cpu"))
    accelerator = create_backbone(recipe, drop_path_rate=0.0, device=torch.device("cuda"))
    assert isinstance(processor.patch_embed.proj, PatchProjection)
    assert isinstance(accelerator.patch_embed.proj, nn.Conv2d)
    shapes = [{name: p.shape for name, p in backbone.state_dict().items()} for backbone in (processor, accelerator)]
    assert shapes[0] == shapes[1]
