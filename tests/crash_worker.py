"""Two ways to die in the middle of work, for test_crash.py.

crash_worker.py run IMAGES INDEX: index a folder with a slow encoder, until killed from outside.

crash_worker.py SCENE IMAGES FOLDER: do SCENE on a copy of FOLDER/before, and be killed by SIGKILL before
its first step, then on another copy before its second one, and so on until it comes to its end. A step is what changes
something on the disk: a commit, a checkpoint, a file made, filled, named or removed. The copies stay as FOLDER/1 and so
on, what killed them as FOLDER/1.txt, and the last line printed is their number.
"""

import os
import shutil
import signal
import sqlite3
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from indexing import ProjectingEncoder, a_model, last

from dinosearch.images.sources import known_source
from dinosearch.index import embed
from dinosearch.index.catalog import Catalog
from dinosearch.index.forget import forget
from dinosearch.index.merge import merge_indexes
from dinosearch.index.relocate import relocate
from dinosearch.index.sync import sync_index


def sync(images, index, *, seed=0, seconds=0.0, **options):
    model = a_model(seed)
    encoder = ProjectingEncoder(model, seconds_per_batch=seconds)
    source = known_source("folder", str(images))
    last(sync_index([source], index_path=index, model=model, encoder_for=lambda _: encoder, workers=2, **options))


def migrate(_images, folder):
    with Catalog.open(folder / "index"):
        pass


SCENES = {
    "create": lambda images, folder: sync(images, folder / "index"),
    "grow": lambda images, folder: sync(images, folder / "index", allow_deletions=True),
    "switch": lambda images, folder: sync(images, folder / "index", seed=1),
    "prune": lambda images, folder: sync(images, folder / "index", prune=True),
    "forget": lambda images, folder: forget(folder / "index", [str(images / "0003.png"), str(images / "0004.png")]),
    "relocate": lambda images, folder: relocate(folder / "index", str(images.parent / "was-here"), str(images)),
    "merge": lambda _, folder: list(merge_indexes([folder / "part1", folder / "part2"], into=folder / "index")),
    "migrate": migrate,
}


class Killer:
    """Counts the steps of this process and kills it before one of them."""

    def __init__(self, deadly, log):
        self.n = 0
        self.deadly = deadly
        self.log = log

    def step(self, what):
        self.n += 1
        if self.n == self.deadly:
            self.log.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self):
        import faiss

        killer, connect, fsync, write_index = self, sqlite3.connect, os.fsync, faiss.write_index

        class Connection(sqlite3.Connection):
            def execute(self, statement, *arguments):
                if statement.startswith(("COMMIT", "VACUUM", "PRAGMA wal_checkpoint", "PRAGMA journal_mode")):
                    killer.step(statement)
                return super().execute(statement, *arguments)

        def write_half_and_whole(index, path):
            killer.step(f"write {path}")
            write_index(index, path)
            size = Path(path).stat().st_size
            data = Path(path).read_bytes()
            os.truncate(path, size // 2)
            killer.step(f"write half of {path}")
            Path(path).write_bytes(data)

        def audit(event, arguments):
            if event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
                killer.step(f"{event} {arguments[:2]}")
            elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                killer.step(f"open {arguments[0]}")

        def fsync_later(descriptor):
            killer.step("fsync")
            fsync(descriptor)

        sqlite3.connect = lambda *arguments, **options: connect(*arguments, factory=Connection, **options)
        os.fsync = fsync_later
        faiss.write_index = write_half_and_whole
        sys.addaudithook(audit)


def die_at_every_step(scene, images, folder):
    step = 0
    while True:
        step += 1
        here = folder / str(step)
        shutil.copytree(folder / "before", here)
        child = os.fork()
        if child == 0:
            killer = Killer(step, folder / f"{step}.txt")
            killer.install()
            SCENES[scene](images, here)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            print(step - 1)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, status


if __name__ == "__main__":
    embed.SAVE_FILES = 16
    images, folder = Path(sys.argv[2]), Path(sys.argv[3])
    if sys.argv[1] == "run":
        print("ready", flush=True)
        sync(images, folder, seconds=0.01)
    else:
        die_at_every_step(sys.argv[1], images, folder)
