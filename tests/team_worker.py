"""One process of `test_distributed.py`: some steps on its part of every batch, then the leader's state in a file."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import dinosearch.pretrain.run as run_module
from dinosearch.pretrain.distill import Mentor
from dinosearch.pretrain.distributed import teamwork
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.run import Run
from dinosearch.pretrain.views import ViewSettings
from dinosearch.vit.folder import create_vit

BATCH = 8
RECIPE = Recipe(
    arch="vit_tiny_patch16_224",
    arch_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
    image_size=16,
    patch_size=4,
    views=ViewSettings(global_size=16, local_size=8, n_local=2),
    batch_size=BATCH,
    out_dim=64,
    head_hidden_dim=32,
    head_bottleneck_dim=16,
    lr=1e-2,
    warmup=0.0,
    freeze_last_layer=0.0,
    koleo_weight=0.3,
)


DISTILL = replace(RECIPE, method="distill", views=replace(RECIPE.views, n_local=0), teacher_temperature=0.1)


def mentor() -> Mentor:
    facts = RECIPE.model_facts()
    torch.manual_seed(9)
    return Mentor(create_vit(facts), facts)


def main(path: Path, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    run_module.has_bf16 = lambda _device: False  # rounding to 8 bits would hide mistakes of 1 %
    with teamwork("cpu") as team:
        teacher = mentor() if recipe.method == "distill" else None
        run = Run(recipe, seed=3, device=torch.device("cpu"), mentor=teacher, team=team)
        for group in run.optimizer.param_groups:
            group["eps"] = (
                1e-4  # Adam would blow up the rounding of gradients that are zero, such as those of key biases
            )
        pixels = np.random.default_rng(0).integers(0, 256, (6, BATCH, 3, 16, 16), dtype=np.uint8)
        aspect = np.linspace(0.5, 2.0, BATCH, dtype=np.float32)
        for step, batch in enumerate(pixels):
            outcome = run.step(team.part(batch), team.part(aspect), step=step, done=step / 6)
        health = run.look(outcome, loss=outcome.loss.item())
        told = {"health": torch.tensor(list(health.facts().values())), "loss": outcome.loss}
        if team.leads:
            save_file(run.state() | told, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), DISTILL if "distill" in sys.argv else RECIPE)
