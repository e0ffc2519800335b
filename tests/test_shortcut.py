"""The last block's shortcut changes no vector, and is left where it would."""

import pytest
import torch

from dinosearch.encoder.shortcut import skip_unread_tokens
from dinosearch.vit.folder import ModelFacts, create_vit

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def vectors_and_shortcuts(facts: ModelFacts) -> tuple[torch.Tensor, torch.Tensor, bool]:
    torch.manual_seed(0)
    vit = create_vit(facts).eval()
    for name, parameter in vit.named_parameters():
        if "gamma" in name:  # at their initial 1e-5 the blocks would hardly count
            torch.nn.init.constant_(parameter, 0.7)
    images = torch.randn(3, 3, facts.image_size, facts.image_size)
    with torch.inference_mode():
        before = vit(images)
        skips = skip_unread_tokens(vit, image_size=facts.image_size)
        return before, vit(images), skips


@pytest.mark.parametrize(
    "facts",
    [
        ModelFacts("vit_small_patch16_224", TINY | {"img_size": 64}, 64),
        ModelFacts("vit_small_patch14_reg4_dinov2", TINY | {"img_size": 56}, 56),
        ModelFacts("vit_small_patch16_dinov3", TINY, 64),
    ],
    ids=lambda facts: facts.arch,
)
def test_a_class_tokens_vector_is_the_same_with_less_work(facts):
    before, after, skips = vectors_and_shortcuts(facts)
    assert skips
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.999999


def test_an_average_of_all_tokens_keeps_all_its_work():
    before, after, skips = vectors_and_shortcuts(
        ModelFacts("vit_small_patch16_224", TINY | {"img_size": 64}, 64, pooling="avg")
    )
    assert not skips
    assert torch.equal(before, after)


def test_a_network_without_blocks_is_left_alone():
    assert not skip_unread_tokens(torch.nn.Linear(3, 3), image_size=8)
