"""The moving parts of a run: student, teacher, loss, optimizer, and one step. Knows no files but the model's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinosearch.pretrain.dino import DINOHead, DINOLoss, update_teacher
from dinosearch.pretrain.dinov2 import koleo_loss
from dinosearch.pretrain.health import Health, look
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.schedules import cosine, linear_then_constant
from dinosearch.pretrain.views import multi_crop
from dinosearch.vit.folder import ModelFacts, ModelFolder, create_vit, n_features, save_model

FUSED_ATTENTION_TOKENS = 64
"""On a CPU, plain matrix products beat torch's fused attention on shorter sequences; its backward is slow there."""


class Net(nn.Module):
    """A backbone and its projection head: images [n, 3, size, size] → features [n, dim], logits [n, out_dim]."""

    def __init__(self, recipe: Recipe, *, drop_path_rate: float, device: torch.device) -> None:
        super().__init__()
        facts = recipe.model_facts()
        # local crops are smaller than global ones: position embeddings are resampled on the way
        flexible = replace(facts, arch_kwargs=facts.arch_kwargs | {"dynamic_img_size": True})
        self.backbone = create_vit(flexible, drop_path_rate=drop_path_rate)
        self.head = DINOHead(
            n_features(self.backbone),
            recipe.out_dim,
            hidden_dim=recipe.head_hidden_dim,
            bottleneck_dim=recipe.head_bottleneck_dim,
        )
        n_tokens = (recipe.image_size // recipe.patch_size) ** 2
        if device.type == "cpu" and n_tokens <= FUSED_ATTENTION_TOKENS:
            attentions: list[Any] = [m for m in self.backbone.modules() if hasattr(m, "fused_attn")]
            for attention in attentions:
                attention.fused_attn = False
        self.to(device)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return features, self.head(features)


@dataclass
class Outcome:
    """What one step leaves behind; tensors stay on the device, so that nothing waits for it."""

    loss: Tensor
    """DINO loss, a scalar."""
    teacher_logits: Tensor
    """[2, batch, out_dim]"""
    teacher_features: Tensor
    """[2 × batch, dim]"""
    teacher_temperature: float
    lr: float


class Run:
    """A student that learns from its teacher, step by step. All that is random comes from (seed, step)."""

    def __init__(self, recipe: Recipe, *, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.recipe = recipe
        self.seed = seed
        self.device = device
        self.student = Net(recipe, drop_path_rate=recipe.drop_path_rate, device=device)
        self.teacher = Net(recipe, drop_path_rate=0.0, device=device).requires_grad_(False).eval()
        self.teacher.load_state_dict(self.student.state_dict())
        self.loss = DINOLoss(
            recipe.out_dim, student_temperature=recipe.student_temperature, center_momentum=recipe.center_momentum
        ).to(device)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=device.type in ("cpu", "cuda"))
        self._forward = self._forward_crops

    def compile(self) -> None:
        """Let torch fuse the forward and backward pass; worth its minute in long runs only."""
        self._forward = torch.compile(self._forward_crops)

    def step(self, pixels: np.ndarray, aspect: np.ndarray, *, step: int, done: float) -> Outcome:
        """Learn from one batch: uint8 [batch, channels, side, side], and [batch] width / height.

        step: its number, which seeds the crops. done: share of the run that is over, which sets the schedules.
        """
        recipe = self.recipe
        torch.manual_seed(self.seed * 1_000_003 + step)  # stochastic depth
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        global_views, local_views = multi_crop(
            self._to_device(pixels), torch.from_numpy(aspect), recipe.views, generator=generator
        )
        teacher_features, teacher_logits, features, logits = self._forward(global_views, local_views)
        temperature = linear_then_constant(
            recipe.warmup_teacher_temperature, recipe.teacher_temperature, done, warmup=recipe.temperature_warmup
        )
        loss = self.loss(logits, teacher_logits, teacher_temperature=temperature)
        total = loss
        if recipe.koleo_weight > 0:
            n_globals = global_views.shape[0] * global_views.shape[1]
            total = loss + recipe.koleo_weight * sum(koleo_loss(view) for view in features[:n_globals].chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if done < recipe.freeze_last_layer:
            self.student.head.prototypes.weight_v.grad = None
        self._clip()
        lr = self._set_schedules(done)
        self.optimizer.step()
        update_teacher(self.teacher, self.student, momentum=cosine(recipe.teacher_momentum, 1.0, done))
        return Outcome(loss.detach(), teacher_logits, teacher_features, temperature, lr)

    def adopt(self, recipe: Recipe) -> None:
        """Go on by another recipe for the same architecture."""
        self.recipe = recipe
        self.loss.center_momentum = recipe.center_momentum
        self.loss.student_temperature = recipe.student_temperature

    def look(self, outcome: Outcome, *, loss: float) -> Health:
        """The teacher's health at a step; loss: mean of the last steps."""
        assignments = self.loss.assignments(
            outcome.teacher_logits.flatten(0, 1), teacher_temperature=outcome.teacher_temperature
        )
        return look(assignments, outcome.teacher_features, center=self.loss.center, loss=loss)

    @torch.no_grad()
    def finite(self) -> bool:
        """No weight of student, teacher or center is infinite or no number."""
        tensors = [tensor for module in self._modules().values() for tensor in module.state_dict().values()]
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(tensors))).all())

    def state(self) -> dict[str, Tensor]:
        """A copy of every tensor that the run consists of, in the CPU's memory, by name."""
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, module in self._modules().items()
            for name, tensor in module.state_dict().items()
        }
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return {name: tensor.detach().clone().contiguous().cpu() for name, tensor in tensors.items()}

    def put_back(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` copied, bit for bit."""
        for prefix, module in self._modules().items():
            module.load_state_dict(_below(state, prefix))
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(state, "optimizer").items():
            index, key = name.split(".", 1)
            states.setdefault(int(index), {})[key] = tensor.clone()  # load_state_dict would keep the tensor itself
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})

    def export(self, folder: Path, *, trained: Mapping[str, Any]) -> ModelFolder:
        """Write the teacher's backbone as a model folder."""
        return save_model(folder, self.teacher.backbone, self.facts, trained=trained)

    @property
    def facts(self) -> ModelFacts:
        return self.recipe.model_facts()

    def _modules(self) -> dict[str, nn.Module]:
        return {"student": self.student, "teacher": self.teacher, "loss": self.loss}

    def _to_device(self, pixels: np.ndarray) -> Tensor:
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def _forward_crops(self, global_views: Tensor, local_views: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Teacher features and logits of the global crops; student features and logits of all crops."""
        batch = global_views.shape[1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device)):
            with torch.no_grad():
                teacher_features, teacher_logits = self.teacher(global_views.flatten(0, 1))
            features = self.student.backbone(global_views.flatten(0, 1))
            if len(local_views):
                features = torch.cat([features, self.student.backbone(local_views.flatten(0, 1))])
            logits = self.student.head(features)
        return (
            teacher_features.float(),
            teacher_logits.float().unflatten(0, (2, batch)),
            features.float(),
            logits.float().unflatten(0, (-1, batch)),
        )

    def _clip(self) -> None:
        """Bound each parameter's gradient by itself, as main_dino.py does, without asking the device for a norm."""
        if self.recipe.clip_grad <= 0:
            return
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients)
        factors = [(self.recipe.clip_grad / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, factors)

    def _set_schedules(self, done: float) -> float:
        recipe = self.recipe
        lr = cosine(recipe.lr, recipe.final_lr, done, warmup=recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        start, end = recipe.weight_decay
        self.optimizer.param_groups[0]["weight_decay"] = cosine(start, end, done)
        return lr


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def has_bf16(device: torch.device) -> bool:
    """The device multiplies bfloat16 matrices in hardware."""
    if device.type == "cpu":
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older torch
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
