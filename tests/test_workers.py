"""Decoding in processes: the same squares as here, and no file that can hang, crash or eat memory harms the rest."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded
from PIL import Image

from dinosearch.errors import DinosearchError
from dinosearch.images import BadImage, Fit, content_hash, decode
from dinosearch.images.workers import DecodePool

FIT = Fit(image_size=48)


def pool_of(workers: int = 1, *, fit: Fit = FIT, max_pixels: int = 10_000_000, **options) -> DecodePool:
    return DecodePool(fit, workers=workers, max_pixels=max_pixels, **options)


def worker_pids(pool: DecodePool) -> list[int]:
    return [worker._process.pid for worker in pool._all]


def wait_until(true, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def slow_image() -> bytes:
    """A PNG of 9 megapixels, which takes a tenth of a second or more."""
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "PNG", compress_level=1)


def test_a_process_makes_the_square_that_decode_makes(jpeg_folder):
    with pool_of(2) as pool:
        for path in sorted(jpeg_folder.rglob("*.jpg")):
            data = path.read_bytes()
            wanted = decode(data, FIT)
            for opened in (pool.read(str(path)), pool.take(data)):
                with opened as file:
                    assert (file.content_hash, file.size) == (content_hash(data), len(data))
                    picture = file.decode()
                assert (picture.pixels == wanted.pixels).all()
                assert (picture.width, picture.height) == (wanted.width, wanted.height)
        assert pool.times.reading > 0
        assert pool.times.decoding > 0


def test_paths_that_are_no_text_and_times_pass_through(tmp_path, photos):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n\x1b.png")
    photos[0].save(path, "PNG")
    os.utime(path, ns=(10**18, 10**18 + 123))
    with pool_of() as pool, pool.read(path) as file:
        assert file.mtime_ns == 10**18 + 123
        assert file.decode().width == 640


def test_the_older_hash_is_had_by_its_name(photos):
    data = encoded(photos[0], "JPEG")
    with pool_of(algorithm="blake2b") as pool, pool.take(data) as file:
        assert file.content_hash == content_hash(data, "blake2b") != content_hash(data)


def test_bad_files_have_their_status_and_the_process_goes_on(tmp_path, photos):
    jpeg = encoded(photos[0], "JPEG")
    with pool_of() as pool:
        for data, status in [
            (b"", "corrupt"),
            (b"text", "corrupt"),
            (jpeg[:5000], "truncated"),
            (b"%PDF", "unsupported"),
        ]:
            with pytest.raises(BadImage) as caught, pool.take(data) as file:
                file.decode()
            assert caught.value.status == status
        with pytest.raises(BadImage, match="No such file"), pool.read(str(tmp_path / "none.jpg")):
            pass
        (pid,) = worker_pids(pool)
        with pool.take(jpeg) as file:
            file.decode()
        assert worker_pids(pool) == [pid]


def test_what_was_not_asked_for_is_not_decoded(photos):
    with pool_of() as pool:
        with pool.take(encoded(photos[0], "JPEG")):
            pass
        assert pool.times.decoding == 0
        with pool.take(encoded(photos[1], "JPEG")) as file:
            assert (file.decode().pixels == decode(encoded(photos[1], "JPEG"), FIT).pixels).all()


def test_frames_come_one_by_one(photos):
    frames = [photos[0].resize((64, 64)).point(lambda x, k=k: x // (k + 1)) for k in range(5)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    with pool_of() as pool, pool.take(data) as file:
        first, n_frames = file.decode_and_count()
        found = [first.pixels, *(file.decode_frame(k).pixels for k in range(1, n_frames))]
        with pytest.raises(BadImage):
            file.decode_frame(n_frames)
    wanted = [decode(encoded(frame, "PNG"), FIT).pixels for frame in frames]
    assert (np.stack(found) == np.stack(wanted)).all()


def test_a_decode_beyond_the_time_limit_is_cut_off(photos):
    vast = encoded(Image.new("L", (12_000, 12_000)), "PNG")  # small to send, slow to decode
    with pool_of(seconds=0.25, max_pixels=200_000_000) as pool:
        with pool.take(encoded(photos[0], "JPEG")) as file:
            file.decode()
        before = worker_pids(pool)
        with pytest.raises(BadImage, match=r"not decoded within 0\.25 s") as caught, pool.take(vast) as file:
            file.decode()
        assert caught.value.status == "too-large"
        with pool.take(encoded(photos[0], "JPEG")) as file:
            assert file.decode().width == 640
        assert worker_pids(pool) != before
        assert wait_until(lambda: not is_running(before[0]))


def test_a_file_beyond_the_memory_limit_is_too_large(photos):
    """Its pixels fit the budget, its 400 MB do not."""
    bomb = encoded(photos[0], "JPEG") + b"\0" * (400 << 20)
    with pool_of(max_pixels=1_000_000) as pool:
        with pytest.raises(BadImage) as caught, pool.take(bomb):
            pass
        assert caught.value.status == "too-large"
        with pool.take(encoded(photos[0], "JPEG")) as file:
            assert file.decode().width == 640


def kill_each(pool: DecodePool, signal_name: str, times: int) -> None:
    """End one process after the other while they decode."""

    def kill():
        killed = set()
        while len(killed) < times:
            for worker in list(pool._all):
                if worker._deadline and worker._process.pid not in killed:
                    time.sleep(0.03)
                    worker._process.send_signal(getattr(signal, signal_name))
                    killed.add(worker._process.pid)
            time.sleep(0.001)

    threading.Thread(target=kill, daemon=True).start()


@pytest.mark.parametrize(("signal_name", "status"), [("SIGSEGV", "corrupt"), ("SIGKILL", "unreadable")])
def test_a_file_that_ends_two_processes_has_that_as_its_state(photos, signal_name, status):
    with pool_of() as pool:
        with pool.take(slow_image()) as file:
            kill_each(pool, signal_name, 2)
            with pytest.raises(BadImage, match=signal_name) as caught:
                file.decode()
        assert caught.value.status == status
        with pool.take(encoded(photos[0], "JPEG")) as file:
            assert file.decode().width == 640


@pytest.mark.parametrize("signal_name", ["SIGSEGV", "SIGKILL"])
def test_a_file_whose_process_dies_once_is_tried_again(signal_name):
    data = slow_image()
    with pool_of() as pool, pool.take(data) as file:
        before = worker_pids(pool)
        kill_each(pool, signal_name, 1)
        assert (file.decode().pixels == decode(data, FIT).pixels).all()
        assert worker_pids(pool) != before
        assert len(worker_pids(pool)) == 1


def test_a_process_that_dies_at_rest_costs_no_file_anything(photos):
    with pool_of() as pool:
        with pool.take(encoded(photos[0], "JPEG")) as file:
            file.decode()
        (worker,) = pool._all
        worker._process.kill()
        worker._process.wait()
        with pool.take(encoded(photos[1], "JPEG")) as file:
            assert file.decode().width == 640
        assert worker not in pool._all


def test_time_in_which_everything_was_stopped_does_not_count(tmp_path):
    """As Ctrl-Z and fg do: longer than a file may take, and than a process that lost its parent may."""
    (tmp_path / "slow.png").write_bytes(slow_image())
    code = f"""
import time
from dinosearch.images import Fit
from dinosearch.images.workers import DecodePool
with DecodePool(Fit(48), workers=1, max_pixels=10**7, seconds=1) as pool:
    with pool.read({str(tmp_path / "slow.png")!r}) as file:
        (before,) = pool._all
        print("at work", flush=True)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            file.decode()
        assert pool._all == {{before}}
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout.readline() == "at work\n"
        time.sleep(0.3)
        os.killpg(parent.pid, signal.SIGSTOP)
        time.sleep(3.5)
        os.killpg(parent.pid, signal.SIGCONT)
    assert parent.returncode == 0


def test_interrupts_leave_the_processes_to_the_parent(photos):
    with pool_of() as pool, pool.take(encoded(photos[0], "JPEG")) as file:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            os.kill(worker_pids(pool)[0], getattr(signal, name))
        assert file.decode().width == 640


def test_closing_ends_processes_at_work_and_at_rest_at_once():
    pool = pool_of(2)
    raised = []

    def work():
        try:
            with pool.take(slow_image()) as file:
                while True:
                    file.decode_frame(0)
        except BadImage as bad:
            raised.append(bad.status)

    with pool.take(b"x"):
        thread = threading.Thread(target=work)
        thread.start()
        assert wait_until(lambda: len(worker_pids(pool)) == 2)
    pids = worker_pids(pool)
    pool.close()
    thread.join(5)
    assert raised == ["unreadable"]
    assert wait_until(lambda: not any(map(is_running, pids)))


def test_processes_die_with_a_killed_parent(tmp_path):
    (tmp_path / "slow.png").write_bytes(slow_image())
    code = f"""
import threading
from dinosearch.images import Fit
from dinosearch.images.workers import DecodePool
pool = DecodePool(Fit(48), workers=2, max_pixels=10**7)
def work():
    while True:
        with pool.read({str(tmp_path / "slow.png")!r}) as file:
            print(file._worker._process.pid, flush=True)
            file.decode()
threading.Thread(target=work).start()
work()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pids = set()
        while len(pids) < 2:
            pids.add(int(parent.stdout.readline()))
        parent.kill()
        parent.communicate()
    assert wait_until(lambda: not any(map(is_running, pids)))


def test_a_module_beside_the_images_is_not_imported(tmp_path, monkeypatch, photos):
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with pool_of() as pool, pool.take(encoded(photos[0], "JPEG")) as file:
        assert file.decode().width == 640


def test_a_process_that_cannot_start_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho no such luck >&2; exit 7\n")
    (tmp_path / "python").chmod(0o755)
    with pool_of() as pool, pytest.raises(DinosearchError, match="no such luck"), pool.take(b""):
        pass


def test_pillows_own_limit_binds_no_process(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    large = encoded(Image.new("L", (14_000, 13_000)), "TIFF", compression="packbits")
    with pool_of(max_pixels=200_000_000) as pool, pool.take(large) as file:
        assert file.decode().width == 14_000
