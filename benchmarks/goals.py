"""Every goal of pretraining that docs/benchmarks.md names, on this machine and this code, by one command.

    python -m venv lightly && lightly/bin/pip install lightly-train timm
    python benchmarks/goals.py --idx fashion-mnist --peer-python lightly/bin/python --out goals

Two hours on two cores, one thing after another, the quick ones first; `--only` takes some. Each goal is printed when it
is measured and written to OUT/goals.json, so that a run cut short has told what it knows; `--go-on` measures what is
missing there of this commit on this machine. Ends with 1 when a goal is missed. What each part said is in OUT/*.log.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from train import read_images, read_labels

HERE = Path(__file__).parent
Goals = dict[str, tuple[float, float]]
"""What was measured and what it must reach, by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idx", type=Path, required=True, help="folder with Fashion-MNIST's IDX files")
    parser.add_argument("--peer-python", type=Path, required=True, help="Python that has lightly-train and timm")
    parser.add_argument("--out", type=Path, required=True, help="folder for images, models, logs and goals.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--go-on", action="store_true", help="leave out what OUT/goals.json has for this code")
    options = parser.parse_args()
    options.out, options.idx = options.out.resolve(), options.idx.resolve()
    options.peer_python = options.peer_python.absolute()  # a link into a virtual environment
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"code": code(), "machine": machine()}
    kept = options.out / "goals.json"
    known = json.loads(kept.read_text()) if options.go_on and kept.exists() else {}
    if {name: known.get(name) for name in facts} != facts or facts["code"].endswith("-dirty"):
        known = facts | {"goals": {}}
    print(*facts.values(), sep="\n", flush=True)
    for part in options.only:
        if part not in known["goals"]:
            known["goals"][part] = PARTS[part](options)
            kept.write_text(json.dumps(known, indent=1))
        for name, (found, least) in known["goals"][part].items():
            print(f"{'met ' if found >= least else 'MISSED'}  {name}: {found:.4g}, goal {least:g}", flush=True)
    goals = [goal for part in options.only for goal in known["goals"][part].values()]
    sys.exit(any(found < least for found, least in goals))


def code() -> str:
    """The commit, and whether something is changed beside it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.strip()


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    wanted = {"amx_bf16", "avx512_bf16"}
    has = sorted(wanted & set(facts.get("flags", "").split()))
    return f"{facts.get('model name', platform.processor())} {' '.join(has)}, {os.cpu_count()} cores"


def times_lightly(options: argparse.Namespace, shape: str, seconds: int, rounds: int, images: int) -> Goals:
    arguments = ["--shape", shape, "--seconds", seconds, "--rounds", rounds, "--images", images]
    found = beside_lightly(options, shape, *arguments)["images_per_second"]
    return {f"images/s, times lightly-train's, {shape}": (found["ours"] / found["lightly"], 3.0)}


def more_learnt(options: argparse.Namespace) -> Goals:
    found = beside_lightly(options, "learnt", "--minutes", 3, "--images", 20_000)["knn"]
    return {"k-NN after 3 minutes, against lightly-train's": (found["ours"], found["lightly"])}


def beside_lightly(options: argparse.Namespace, name: str, *arguments: object) -> dict:
    report = options.out / f"{name}.json"
    fixed = ["--idx", options.idx, "--peer-python", options.peer_python, "--sides", "ours", "lightly"]
    logged(options, name, HERE / "train.py", *fixed, *arguments, "--json", report)
    return json.loads(report.read_text())


def accuracy(options: argparse.Namespace, minutes: int, knn: float, linear: float) -> Goals:
    """Of `train`, `index` and `probe` and nothing else."""
    images, name = laid_out(options), f"minutes-{minutes}"
    dinosearch = ("-m", "dinosearch")
    logged(options, name, *dinosearch, "train", images / "train", "--minutes", minutes, "--name", name, "--overwrite")
    shutil.rmtree(options.out / "indexes" / name, ignore_errors=True)  # of an earlier model
    logged(options, f"{name}-index", *dinosearch, "index", images, "--model", name, "--name", name)
    labels = ("--labels", images / "labels.csv")
    report = json.loads(logged(options, f"{name}-probe", *dinosearch, "probe", *labels, "--index", name, "--json"))
    found = {"k-NN": (report["knn"]["top1"], knn), "linear": (report["linear"]["top1"], linear)}
    return {f"{probe} after {minutes} minutes": goal for probe, goal in found.items()}


def laid_out(options: argparse.Namespace) -> Path:
    """Fashion-MNIST as PNGs in train/ and test/, and labels.csv."""
    folder = options.out / "fm"
    if (folder / "labels.csv").exists():
        return folder
    rows = ["path,label,split"]
    for split, name in (("train", "train"), ("test", "t10k")):
        (folder / split).mkdir(parents=True, exist_ok=True)
        pairs = zip(read_images(options.idx, name), read_labels(options.idx, name), strict=True)
        for i, (pixels, label) in enumerate(pairs):
            Image.fromarray(pixels).save(folder / split / f"{i:05}.png", compress_level=1)
            rows.append(f"{split}/{i:05}.png,{label},{split}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def tests(options: argparse.Namespace, name: str, *arguments: object) -> Goals:
    """1 when all have passed. The collapses read Fashion-MNIST where Debian's package has it."""
    said = logged(options, name, "-m", "pytest", "-n", "2", *arguments, check=False, OMP_NUM_THREADS="1")
    last = (said.strip().splitlines() or ["nothing was said"])[-1]
    outcomes = set(re.findall(r"\d+ (passed|failed|skipped|errors?)", last))
    return {f"{name}, {last}": (float(outcomes == {"passed"}), 1.0)}


def logged(options: argparse.Namespace, name: str, *arguments: object, check: bool = True, **environment: str) -> str:
    """What Python with these arguments writes to stdout; all of it is in OUT/NAME.log."""
    kept_in = {"DINOSEARCH_MODELS": str(options.out / "models"), "DINOSEARCH_INDEXES": str(options.out / "indexes")}
    with (options.out / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=HERE.parent,
            env=os.environ | (environment or kept_in),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
        )
        log.write(done.stdout)
    if check and done.returncode != 0:
        sys.exit(f"{name} ended with {done.returncode}; see {log.name}")
    return done.stdout


PARTS: dict[str, Callable[[argparse.Namespace], Goals]] = {
    "resume": lambda options: tests(options, "kill -9 and resume", "tests/test_train_cli.py", "-k", "killed"),
    "tiny": lambda options: times_lightly(options, "tiny", 90, 2, 2_000),
    "small": lambda options: times_lightly(options, "small", 30, 3, 6_000),
    "collapse": lambda options: tests(options, "collapse provoked", "tests/test_collapse.py"),
    "learnt": more_learnt,
    "minutes-20": lambda options: accuracy(options, 20, 0.87, 0.88),
    "minutes-60": lambda options: accuracy(options, 60, 0.89, 0.89),
}


if __name__ == "__main__":
    main()
