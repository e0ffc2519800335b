"""The moving parts of a run: student, teacher, objective, optimizer, and one step. Knows no files but the model's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinosearch.pretrain.device import has_bf16
from dinosearch.pretrain.dino import WeightNormLinear, update_teacher
from dinosearch.pretrain.distill import Distillation, Mentor
from dinosearch.pretrain.distributed import ALONE, Team
from dinosearch.pretrain.health import Health, look
from dinosearch.pretrain.net import Net, create_backbone
from dinosearch.pretrain.objective import Forwarded, make_objective
from dinosearch.pretrain.optimizer import Optimizer
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.schedules import cosine
from dinosearch.pretrain.views import BatchGenerator, multi_crop
from dinosearch.vit.folder import ModelFacts, ModelFolder, create_vit, n_features, save_model

_SEEDS = 2**63
"""So many seeds does torch take."""


@dataclass
class Outcome:
    """What one step leaves behind; tensors stay on the device, so that nothing waits for it."""

    loss: Tensor
    """The method's first term (DINO's loss), a scalar."""
    terms: dict[str, Tensor]
    """Every term of the loss by name, without its weight."""
    teacher_logits: Tensor
    """[2, batch, out_dim], or what else the method's `assignments` are made from"""
    teacher_features: Tensor
    """[2 × batch, dim]"""
    teacher_temperature: float
    lr: float


class Run:
    """A student that learns from its teacher, step by step. All that is random comes from (seed, step)."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        start: nn.Module | None = None,
        mentor: Mentor | None = None,
        team: Team = ALONE,
    ) -> None:
        """start: a backbone of the recipe's architecture whose weights student and teacher begin with.

        mentor: the frozen model that a distillation learns from. team: the processes that share every batch.
        """
        torch.manual_seed(seed)
        self.recipe = recipe
        self.seed = seed
        self.device = device
        self.mentor = mentor
        self.team = team
        self.objective = (Distillation(recipe, mentor.to(device)) if mentor else make_objective(recipe)).to(device)
        self.objective.join(team)
        self.student = self._net(drop_path_rate=recipe.drop_path_rate)
        self.teacher = self._net(drop_path_rate=0.0).requires_grad_(False).eval()
        if start is not None:
            self.student.backbone.load_state_dict(start.state_dict())
        self.teacher.load_state_dict(self.student.state_dict())
        self.start = self._as_exported(start)
        self.optimizer = Optimizer(self.student, recipe, device=device)
        self._last_layers = [m for m in self.student.modules() if isinstance(m, WeightNormLinear)]
        self._forward = self._forward_crops

    def compile(self) -> None:
        """Let torch fuse the forward and backward pass; worth its minute in long runs only."""
        self._forward = torch.compile(self._forward_crops)

    def step(self, pixels: np.ndarray, aspect: np.ndarray, *, step: int, done: float) -> Outcome:
        """Learn from one batch: uint8 [batch, channels, side, side], and [batch] width / height; of a team, from its
        part of the batch, which all parts have the size of.

        step: its number, which seeds the crops. done: share of the run that is over, which sets the schedules.
        """
        seed = (self.seed * 1_000_003 + step) % _SEEDS
        torch.manual_seed((seed * self.team.size + self.team.rank) % _SEEDS)  # stochastic depth
        generator = BatchGenerator()
        generator.team = self.team
        generator.manual_seed(seed)
        crops = self.objective.view_settings
        views = multi_crop(self._to_device(pixels), torch.from_numpy(aspect), crops, generator=generator)
        forwarded = self._forward(*self.objective.extend(views, generator=generator))
        terms = self.objective.terms(forwarded, done=done)
        self.optimizer.zero_grad()
        terms.total.backward()
        self._freeze(done)
        parts = {name: part.detach() for name, part in terms.parts.items()}
        self.team.average([*(p.grad for p in self.student.parameters() if p.grad is not None), *parts.values()])
        self._clip()
        lr = self._set_schedules(done)
        self.optimizer.step()
        update_teacher(self.teacher, self.student, momentum=cosine(self.recipe.teacher_momentum, 1.0, done))
        return Outcome(
            loss=next(iter(parts.values())),
            terms=parts,
            teacher_logits=forwarded["teacher_logits"],
            teacher_features=forwarded["teacher_features"],
            teacher_temperature=terms.teacher_temperature,
            lr=lr,
        )

    def adopt(self, recipe: Recipe) -> None:
        """Go on by another recipe for the same architecture."""
        self.recipe = recipe
        self.objective.adopt(recipe)

    def look(self, outcome: Outcome, *, loss: float) -> Health:
        """The teacher's health at a step, over the whole batch; loss: mean of the last steps."""
        logits = self.team.gather(outcome.teacher_logits, dim=1)
        features = self.team.gather(outcome.teacher_features)
        assignments = self.objective.assignments(logits.flatten(0, 1), teacher_temperature=outcome.teacher_temperature)
        return look(assignments, features, center=self.objective.center, loss=loss)

    @torch.no_grad()
    def finite(self) -> bool:
        """No tensor of student, teacher or objective is infinite or no number."""
        tensors = [tensor for module in self._modules().values() for tensor in module.state_dict().values()]
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(tensors))).all())

    def state(self) -> dict[str, Tensor]:
        """A copy of every tensor that the run consists of, in the CPU's memory, by name."""
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, module in self._modules().items()
            for name, tensor in module.state_dict().items()
        }
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        return {name: tensor.detach().clone().contiguous().cpu() for name, tensor in tensors.items()}

    def put_back(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` copied, bit for bit."""
        for prefix, module in self._modules().items():
            module.load_state_dict(_below(state, prefix))
        self.optimizer.put_back(_below(state, "optimizer"))

    def export(self, folder: Path, *, trained: Mapping[str, Any]) -> ModelFolder:
        """Write the teacher's backbone as a model folder."""
        return save_model(folder, self.teacher.backbone, self.facts, trained=trained)

    @property
    def facts(self) -> ModelFacts:
        return self.recipe.model_facts()

    def _as_exported(self, start: nn.Module | None) -> nn.Module | None:
        """The start as what is trained will be: with as many stripes, which a recipe may change."""
        if start is None:
            return None
        with torch.random.fork_rng(devices=[]):
            backbone = create_vit(self.facts)
        backbone.load_state_dict(start.state_dict())
        return backbone.requires_grad_(False).eval()

    def _modules(self) -> dict[str, nn.Module]:
        return {"student": self.student, "teacher": self.teacher, "objective": self.objective}

    def _to_device(self, pixels: np.ndarray) -> Tensor:
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def _net(self, *, drop_path_rate: float) -> Net:
        backbone = create_backbone(self.recipe, drop_path_rate=drop_path_rate, device=self.device)
        heads = self.objective.heads(n_features(backbone))
        return Net(backbone, heads, parts=self.recipe.accumulate).to(self.device)

    def _forward_crops(self, *views: Tensor) -> Forwarded:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device)):
            return self.objective.forward_crops(self.student, self.teacher, *views)

    def _freeze(self, done: float) -> None:
        """Drop the gradients of what is not to move yet: optimizers leave alone what has none."""
        frozen: list[nn.Parameter] = []
        if done < self.recipe.freeze_last_layer:
            frozen += [parameter for layer in self._last_layers for parameter in layer.parameters()]
        if done < self.recipe.freeze_backbone:
            frozen += self.student.backbone.parameters()
        for parameter in frozen:
            parameter.grad = None

    def _clip(self) -> None:
        """Bound each parameter's gradient by itself, as main_dino.py does, without asking the device for a norm."""
        if self.recipe.clip_grad <= 0:
            return
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        factors = (self.recipe.clip_grad / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))

    def _set_schedules(self, done: float) -> float:
        recipe = self.recipe
        lr = cosine(recipe.lr, recipe.final_lr, done, warmup=recipe.warmup)
        weight_decay = cosine(*recipe.weight_decay, done)
        self.optimizer.set(lr=lr, weight_decay=weight_decay, muon_lr=recipe.muon_lr)
        return lr


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
