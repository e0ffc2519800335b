"""The smallest recipe that trains, for tests of its parts."""

from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.views import ViewSettings

TINY = Recipe(
    arch="vit_tiny_patch16_224",
    arch_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
    image_size=16,
    patch_size=4,
    views=ViewSettings(global_size=16, local_size=8, n_local=2),
    batch_size=8,
    out_dim=64,
    head_hidden_dim=32,
    head_bottleneck_dim=16,
    warmup=0.0,
)
