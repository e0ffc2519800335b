"""The other sides of benchmarks/train.py: lightly-train, and the plain loop that people write. Knows no dinosearch.

Run by benchmarks/train.py with the Python that has the library: `python train_peers.py SIDE`, the job as JSON on stdin,
one JSON object as the last line of stdout.
"""

import copy
import json
import math
import sys
import time
from pathlib import Path

WARM_UP_STEPS = 3
"""Left out of the measurement: threads and workers start, memory is taken."""


def main() -> None:
    job = json.loads(sys.stdin.read())
    print(json.dumps({"lightly": lightly, "plain": plain}[sys.argv[1]](job)))


def vit(job: dict):
    import timm

    return timm.create_model(job["arch"], num_classes=0, dynamic_img_size=True, **job["arch_kwargs"])


def lightly(job: dict) -> dict:
    """lightly-train's own DINO, trainer and loader; crops, head and precision as the other sides have them."""
    import lightly_train
    from lightly_train._methods.dino.dino import DINO

    ended: list[float] = []
    original = DINO.on_train_batch_end

    def on_train_batch_end(self, *args, **kwargs):
        original(self, *args, **kwargs)
        ended.append(time.perf_counter())
        if ended[-1] - ended[0] > job["seconds"] and len(ended) > WARM_UP_STEPS:
            self.trainer.should_stop = True

    DINO.on_train_batch_end = on_train_batch_end
    out = Path(job["out"]) / "lightly"
    size, local = job["image_size"], job["local_size"]
    lightly_train.pretrain(
        out=out,
        data=job["images"],
        model=vit(job),
        method="dino",
        method_args={"hidden_dim": job["hidden"], "bottleneck_dim": job["bottleneck"], "output_dim": job["prototypes"]},
        epochs=job["epochs"],
        batch_size=job["batch"],
        precision=job["precision"],
        transform_args={
            "image_size": (size, size),
            "local_view": {"num_views": job["local_crops"], "view_size": (local, local)},
        },
    )
    return {"images_per_second": rate(ended, job["batch"]), "steps": len(ended), "weights": str(exported(out))}


def exported(out: Path) -> Path:
    return next((out / "exported_models").iterdir())


def rate(ended: list[float], batch: int) -> float:
    counted = ended[WARM_UP_STEPS - 1 :]
    return batch * (len(counted) - 1) / (counted[-1] - counted[0]) if len(counted) > 1 else float("nan")


def plain(job: dict) -> dict:
    """DINO as a straight script: torchvision's transforms in a DataLoader, a forward per resolution, autocast."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.data import DataLoader

    class Head(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            hidden, bottleneck = job["hidden"], job["bottleneck"]
            self.mlp = nn.Sequential(
                nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
            )
            self.last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, job["prototypes"], bias=False))
            self.last.parametrizations.weight.original0.data.fill_(1)
            self.last.parametrizations.weight.original0.requires_grad = False

        def forward(self, x):
            return self.last(functional.normalize(self.mlp(x), dim=-1))

    torch.manual_seed(0)
    backbone = vit(job)
    student = nn.Sequential(backbone, Head(backbone.num_features))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.04)
    center = torch.zeros(1, job["prototypes"])
    loader = DataLoader(
        crops(job), batch_size=job["batch"], shuffle=True, drop_last=True, num_workers=torch.get_num_threads()
    )
    ended: list[float] = []
    bf16 = job["precision"] == "bf16-mixed"
    while True:
        for views in loader:
            done = min(1.0, (ended[-1] - ended[0]) / job["seconds"]) if ended else 0.0
            if done >= 1.0 and len(ended) > WARM_UP_STEPS:
                weights = Path(job["out"]) / "plain.pt"
                torch.save(teacher[0].state_dict(), weights)
                return {"images_per_second": rate(ended, job["batch"]), "steps": len(ended), "weights": str(weights)}
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * min(1.0, 10 * done + 0.01) * (1 + math.cos(math.pi * done)) / 2
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                with torch.no_grad():
                    targets = teacher(torch.cat(views[:2])).float()
                logits = [student(torch.cat(views[:2]))]
                if job["local_crops"]:
                    logits.append(student(torch.cat(views[2:])))
            assigned = torch.softmax((targets - center) / 0.04, dim=-1).chunk(2)
            guesses = torch.log_softmax(torch.cat(logits).float() / 0.1, dim=-1).chunk(len(views))
            pairs = [(t, s) for i, t in enumerate(assigned) for j, s in enumerate(guesses) if i != j]
            loss = sum(-(t * s).sum(dim=-1).mean() for t, s in pairs) / len(pairs)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            with torch.no_grad():
                center = 0.9 * center + 0.1 * targets.mean(dim=0, keepdim=True)
                momentum = 1 - (1 - 0.99) * (1 + math.cos(math.pi * done)) / 2
                for kept, learnt in zip(teacher.parameters(), student.parameters(), strict=True):
                    kept.mul_(momentum).add_(learnt, alpha=1 - momentum)
            ended.append(time.perf_counter())


def crops(job: dict):
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    def transform(size: int, scale: tuple[float, float], blur: float, solarize: float):
        # a blur of 23 pixels is meant for 224; as wide as that on a small crop it would leave nothing
        width = max(3, size // 10 | 1)
        return v2.Compose(
            [
                v2.ToImage(),
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(width, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    size, local = job["image_size"], job["local_size"]
    transforms = [transform(size, (0.4, 1.0), 1.0, 0.0), transform(size, (0.4, 1.0), 0.1, 0.2)]
    transforms += [transform(local, (0.05, 0.4), 0.5, 0.0)] * job["local_crops"]
    paths = sorted(Path(job["images"]).iterdir())

    class Crops(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, i: int):
            image = Image.open(paths[i]).convert("RGB")
            return [make(image) for make in transforms]

    return Crops()


if __name__ == "__main__":
    main()
