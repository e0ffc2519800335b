"""The command line as programs and people meet it: real processes, exit codes, stdout and stderr."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
COMMANDS = [
    "train", "index", "forget", "relocate", "merge", "query", "probe", "compare", "info", "failures", "export",
    "attention", "models", "demo",
]  # fmt: skip


def environment(**more):
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    unset = ("DINOSEARCH", "NO_COLOR", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "80"} | more


def dinosearch(*arguments, cwd, check=0, **more):
    """Run a command; `check` is the exit code that it must have."""
    done = subprocess.run(
        [sys.executable, "-m", "dinosearch", *map(str, arguments)],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=300,
    )
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def json_of(*arguments, cwd, check=0):
    """What a command prints with --json: each line an object, and nothing else on stdout."""
    return [json.loads(line) for line in dinosearch(*arguments, "--json", cwd=cwd, check=check).stdout.splitlines()]


def draw(path, *, kind, seed):
    """A 32-pixel image of noisy stripes: kind 0 lie, kind 1 stand."""
    random = np.random.default_rng((kind, seed))
    wave = 127 + 90 * np.sin(np.arange(32) / random.uniform(1, 2) + random.uniform(0, 6))
    stripes = np.tile(wave[:, None] if kind == 0 else wave[None, :], (1, 32) if kind == 0 else (32, 1))
    pixels = stripes[..., None] + random.normal(0, 20, (32, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def lay_out(folder, *, n_images=24, n_catalog=30):
    """images/, catalog/, cat.jpg and labels.csv; cat.jpg is also catalog/0.jpg."""
    for i in range(n_images):
        draw(folder / f"images/{i}.png", kind=i % 2, seed=1000 + i)
    for i in range(n_catalog):
        draw(folder / f"catalog/{i}.jpg", kind=i % 2, seed=i)
    shutil.copy(folder / "catalog/0.jpg", folder / "cat.jpg")
    lines = [f"catalog/{i}.jpg,{('lying', 'standing')[i % 2]}" for i in range(n_catalog)]
    (folder / "labels.csv").write_text("\n".join(["path,label", *lines]) + "\n")


@pytest.fixture(scope="session")
def indexed(tmp_path_factory, tiny_model):
    """A working folder with an untrained model and an index of 30 images. Do not write to it."""
    folder = tmp_path_factory.mktemp("work")
    lay_out(folder)
    shutil.copytree(tiny_model.path, folder / "models/tiny")
    dinosearch("index", "catalog", cwd=folder)
    return folder


@pytest.fixture
def work(indexed, tmp_path):
    """A copy of `indexed`, to be spoilt. Its index still follows the first folder's catalog."""
    shutil.copytree(indexed, tmp_path / "work")
    return tmp_path / "work"


def test_the_four_commands_verbatim_in_an_empty_folder(tmp_path):
    lay_out(tmp_path)
    told = [
        dinosearch(*line.split()[1:], cwd=tmp_path)
        for line in (
            "dinosearch train ./images",
            "dinosearch index ./catalog",
            "dinosearch query cat.jpg --top 10",
            "dinosearch probe --labels labels.csv",
        )
    ]
    assert (tmp_path / "models/images/model.json").is_file()
    assert (tmp_path / "indexes/catalog/catalog.sqlite").is_file()
    header, *rows = [line.split("\t") for line in told[2].stdout.splitlines()]
    assert header == ["rank", "score", "path"]
    assert rows[0][2] == "catalog/0.jpg"
    scores = [float(row[1]) for row in rows]
    assert scores[0] >= 0.999
    assert len(scores) == 10
    assert scores == sorted(scores, reverse=True)
    assert told[3].stdout.splitlines()[-1].startswith("all\t24\t6\t")
    for line, default in zip(told[1:], ("model: models/images", "index: indexes/catalog", "index: "), strict=True):
        assert default in line.stderr, "what was chosen by default is printed"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_sentence_and_an_example(command, tmp_path):
    told = dinosearch(command, "--help", cwd=tmp_path).stdout
    assert f"Example: dinosearch {command}" in re.sub(r"\s+", " ", told)


def test_help_names_every_command_and_nothing_else(tmp_path):
    told = dinosearch("--help", cwd=tmp_path).stdout
    assert sorted(re.findall(r"^│ (\w+)  ", told, re.MULTILINE)) == sorted(COMMANDS)


def test_the_version(tmp_path):
    assert re.fullmatch(r"dinosearch \d+\.\d+\.\d+\n", dinosearch("--version", cwd=tmp_path).stdout)


@pytest.mark.slow
def test_help_answers_in_a_third_of_a_second(tmp_path):
    times = []
    for _ in range(5):
        began = time.monotonic()
        dinosearch("--help", cwd=tmp_path)
        times.append(time.monotonic() - began)
    assert sorted(times)[2] < 0.35


class TestIndex:
    def test_json(self, indexed, work):
        (row,) = json_of("index", indexed / "catalog", cwd=work)
        assert list(row) == [
            *("index", "model", "new", "changed", "moved", "unchanged", "deleted", "failed", "embedded", "images"),
            *("images_per_second", "seconds"),
        ]
        assert (row["index"], row["model"], row["unchanged"], row["images"]) == ("catalog", "tiny", 30, 30)
        assert row["new"] == row["changed"] == row["deleted"] == row["failed"] == row["embedded"] == 0

    def test_some_failed_is_exit_3_on_every_run(self, work):
        (work / "more").mkdir()
        shutil.copy(work / "cat.jpg", work / "more/good.jpg")
        (work / "more/bad.jpg").write_bytes((work / "cat.jpg").read_bytes()[:200])
        for new in (1, 0):
            (row,) = json_of("index", "more", cwd=work, check=3)
            assert (row["new"], row["failed"], row["images"]) == (new, 1, 1)
        (failure,) = json_of("failures", "--index", "more", cwd=work)
        assert list(failure) == ["path", "status", "reason"]
        assert (failure["path"], failure["status"]) == ("more/bad.jpg", "truncated")
        assert "more/bad.jpg\ttruncated\t" in dinosearch("failures", "--index", "more", cwd=work).stdout

    def test_a_mass_deletion_needs_yes(self, work):
        for i in range(4):
            draw(work / f"few/{i}.png", kind=0, seed=i)
        dinosearch("index", "few", cwd=work)
        (work / "few/0.png").unlink()
        told = dinosearch("index", "few", cwd=work, check=1)
        assert told.stdout == ""
        assert one_error(told)
        (row,) = json_of("index", "few", "-y", cwd=work)
        assert (row["deleted"], row["images"]) == (1, 3)

    def test_a_missing_folder_is_an_error(self, work):
        assert "nowhere" in one_error(dinosearch("index", "nowhere", cwd=work, check=1))

    def test_a_lock_is_exit_5_and_names_the_holder(self, indexed, work):
        from dinosearch.index.lock import writer_lock

        with writer_lock(work / "indexes/catalog"):
            told = dinosearch("index", indexed / "catalog", cwd=work, check=5)
        assert f"process {os.getpid()}" in one_error(told)

    def test_an_unknown_model_is_exit_1(self, indexed, work):
        assert "tiny" in one_error(dinosearch("index", indexed / "catalog", "--model", "huge", cwd=work, check=1))

    def test_folders_move_by_environment(self, indexed, work, tmp_path):
        places = {"DINOSEARCH_MODELS": str(work / "models"), "DINOSEARCH_INDEXES": str(tmp_path / "elsewhere")}
        dinosearch("index", indexed / "catalog", cwd=tmp_path, **places)
        assert (tmp_path / "elsewhere/catalog/catalog.sqlite").is_file()


class TestQuery:
    def test_json(self, indexed):
        rows = json_of("query", "cat.jpg", "catalog/3.jpg", "--top", "7", cwd=indexed)
        assert [row["query"] for row in rows] == ["cat.jpg", "catalog/3.jpg"]
        for row in rows:
            assert list(row) == ["query", "matches"]
            assert [match["rank"] for match in row["matches"]] == list(range(1, 8))
            assert all(list(match) == ["rank", "path", "score"] for match in row["matches"])
            assert all((indexed / match["path"]).is_file() for match in row["matches"])
            assert row["matches"][0]["score"] >= 0.999
        assert rows[1]["matches"][0]["path"] == "catalog/3.jpg"

    @pytest.mark.parametrize("option", ["--top", "-t", "-n", "-k"])
    def test_top_by_any_of_its_names(self, indexed, option):
        (row,) = json_of("query", "cat.jpg", option, "3", cwd=indexed)
        assert len(row["matches"]) == 3

    def test_more_than_there_are(self, indexed):
        (row,) = json_of("query", "cat.jpg", "--top", "1000", cwd=indexed)
        assert len(row["matches"]) == 30

    def test_bare_paths(self, indexed):
        lines = dinosearch("query", "cat.jpg", "--paths", "-t", "2", cwd=indexed).stdout
        ended = dinosearch("query", "cat.jpg", "--null", "-t", "2", cwd=indexed).stdout
        assert lines.startswith("catalog/0.jpg\n")
        assert ended == lines.replace("\n", "\0")

    def test_paths_outside_the_current_folder_are_absolute(self, indexed, tmp_path):
        (tmp_path / "indexes").symlink_to(indexed / "indexes")
        (tmp_path / "models").symlink_to(indexed / "models")
        told = dinosearch("query", indexed / "cat.jpg", "-f", "-t1", cwd=tmp_path)
        assert told.stdout == f"{(indexed / 'catalog/0.jpg').resolve()}\n"

    @pytest.mark.parametrize("words", [["red car"], ["sunset"], ["cat.jpg", "a dog"], ["long words " * 40]])
    def test_words_get_one_line(self, indexed, words):
        told = dinosearch("query", *words, cwd=indexed, check=2)
        assert "no text search" in one_error(told)
        assert told.stdout == ""

    def test_an_unreadable_query_is_told_and_the_others_are_answered(self, indexed):
        rows = json_of("query", "gone.jpg", "cat.jpg", "labels.csv", cwd=indexed, check=3)
        assert [list(row) for row in rows] == [["query", "error"], ["query", "matches"], ["query", "error"]]
        told = dinosearch("query", "gone.jpg", cwd=indexed, check=3)
        assert told.stdout == ""
        assert "gone.jpg: No such file or directory. Check the path" in told.stderr

    def test_no_index_is_exit_4(self, indexed, tmp_path):
        shutil.copy(indexed / "cat.jpg", tmp_path)
        assert "dinosearch index" in one_error(dinosearch("query", "cat.jpg", cwd=tmp_path, check=4))
        assert "other" in one_error(dinosearch("query", "cat.jpg", "--index", "other", cwd=indexed, check=4))

    def test_a_model_that_is_gone_or_another_is_exit_4(self, work):
        (work / "models/tiny").rename(work / "kept")
        assert "--model" in one_error(dinosearch("query", "cat.jpg", cwd=work, check=4))
        dinosearch("query", "cat.jpg", "--model", "./kept", cwd=work)
        dinosearch("train", "images", "--steps", "0", "--seed", "5", "--name", "other", cwd=work)
        assert "was made with model" in one_error(dinosearch("query", "cat.jpg", "--model", "other", cwd=work, check=4))

    def test_neither_torch_nor_timm_is_loaded(self, indexed):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "dinosearch", "query", "cat.jpg", "--json"],
            cwd=indexed,
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        loaded = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
        assert not loaded & {"torch", "timm", "torchvision", "sklearn", "scipy", "rich.console"}

    def test_a_closed_pipe_ends_quietly(self, indexed):
        command = f"{sys.executable} -m dinosearch query {'cat.jpg ' * 400} --json | head -n 1; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=indexed, env=environment(), capture_output=True, text=True, check=True
        )
        first, code = done.stdout.splitlines()
        assert json.loads(first)["query"] == "cat.jpg"
        assert code == "0"
        assert "Traceback" not in done.stderr
        assert "Broken" not in done.stderr

    def test_names_of_any_bytes(self, work):
        name = os.fsdecode(b"caf\xe9 \n.jpg")
        draw(work / "odd" / name, kind=0, seed=0)
        dinosearch("index", "odd", cwd=work)
        assert dinosearch("query", "cat.jpg", "-0", cwd=work).stdout == f"odd/{name}\0"
        (row,) = json_of("query", "cat.jpg", cwd=work)
        assert row["matches"][0]["path"] == f"odd/{name}"
        assert "odd/caf\\udce9 \\n.jpg" in dinosearch("query", "cat.jpg", cwd=work).stdout


class TestProbe:
    def test_json(self, indexed):
        (row,) = json_of("probe", "--labels", "labels.csv", cwd=indexed)
        assert {"knn", "linear", "classes", "n_train", "n_test", "per_class"} <= row.keys()
        assert {"top1", "k"} <= row["knn"].keys()
        assert (row["classes"], row["n_train"], row["n_test"], row["knn"]["k"]) == (2, 24, 6, 12)
        assert [entry["label"] for entry in row["per_class"]] == ["lying", "standing"]
        assert 0 <= row["linear"]["top1"] <= 1

    def test_neither_an_image_nor_a_model_is_opened(self, work):
        shutil.rmtree(work / "models")
        shutil.rmtree(work / "images")
        labels = (work / "labels.csv").read_text().replace("catalog/", "")  # relative to the catalog's root
        (work / "labels.csv").write_text(labels)
        first = json_of("probe", "--labels", "labels.csv", "--seed", "3", cwd=work)
        lines = (work / "labels.csv").read_text().splitlines()
        (work / "labels.csv").write_text("\n".join([*lines, "catalog/none.jpg,lying"]))
        (again,) = json_of("probe", "--labels", "labels.csv", "--seed", "3", cwd=work)
        assert again == first[0] | {"unmatched": 1}

    def test_equal_files_count_as_labelled_files(self, work):
        (work / "twice").mkdir()
        for i in range(8):
            for copy in "ab":
                shutil.copy(work / f"images/{i}.png", work / f"twice/{i}{copy}.png")
        dinosearch("index", "twice", cwd=work)
        lines = [f"{i}{copy}.png,{i % 2}" for i in range(8) for copy in "ab"]
        (work / "twice.csv").write_text("\n".join(["path,label", *lines]))
        (row,) = json_of("probe", "--labels", "twice.csv", "--index", "twice", cwd=work)
        assert row["n_train"] + row["n_test"] == 16

    def test_folders_are_labels_as_a_csv_of_them_is(self, work):
        for i in range(16):
            folder = work / "sorted" / ("odd" if i % 2 else "even")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(work / f"images/{i}.png", folder)
        shutil.copy(work / "images/20.png", work / "sorted")
        dinosearch("index", "sorted", cwd=work)
        shutil.copytree(work / "indexes/sorted", work / "indexes/copy")
        lines = [f"{'odd' if i % 2 else 'even'}/{i}.png,{'odd' if i % 2 else 'even'}" for i in range(16)]
        (work / "sorted.csv").write_text("\n".join(["path,label", *lines]))
        chosen = ("--index", "sorted")
        (by_folder,) = json_of("probe", "--labels", "folders", *chosen, cwd=work)
        (by_csv,) = json_of("probe", "--labels", "sorted.csv", *chosen, cwd=work)
        assert by_folder == by_csv
        assert by_folder["n_train"] + by_folder["n_test"] == 16
        assert "1 indexed images" in dinosearch("probe", "--labels", "folders", *chosen, cwd=work).stderr
        (row,) = json_of("compare", "--labels", "folders", *chosen, "--index", "copy", cwd=work)
        assert (row["classes"], row["n_train"] + row["n_test"]) == (2, 16)

    def test_folders_are_no_labels_where_there_are_none(self, indexed):
        assert "CSV" in one_error(dinosearch("probe", "--labels", "folders", cwd=indexed, check=2))

    def test_labels_of_other_images_are_an_error(self, indexed, tmp_path):
        (tmp_path / "labels.csv").write_text("path,label\nx.jpg,a\n")
        assert "x.jpg" in one_error(dinosearch("probe", "--labels", tmp_path / "labels.csv", cwd=indexed, check=1))


def test_info(indexed):
    (row,) = json_of("info", cwd=indexed)
    assert list(row) == [
        "index",
        "images",
        "vectors",
        "failed",
        "model",
        "fingerprint",
        "roots",
        "sources",
        "metadata",
        "shard",
        "faiss",
    ]
    assert (row["index"], row["images"], row["failed"], row["roots"]) == ("catalog", 30, 0, ["catalog"])
    assert row["faiss"].keys() >= {"type", "recall_at_10", "bytes_per_image", "exact", "p50_ms", "p95_ms", "parameters"}
    assert (row["faiss"]["type"], row["faiss"]["exact"], row["faiss"]["recall_at_10"]) == ("Flat", True, 1.0)
    assert "images\t30\n" in dinosearch("info", cwd=indexed).stdout


def test_models(indexed, tmp_path):
    (row,) = json_of("models", cwd=indexed)
    (facts,) = json_of("info", cwd=indexed)
    assert (row["model"], row["fingerprint"]) == ("tiny", facts["fingerprint"])
    assert "dinosearch train" in dinosearch("models", cwd=tmp_path).stderr


def test_compare_of_an_index_and_its_copy(indexed, work):
    shutil.copytree(work / "indexes/catalog", work / "indexes/copy")
    arguments = ("compare", "--labels", indexed / "labels.csv", "--index", "catalog", "--index", "copy")
    told = dinosearch(*arguments, cwd=work)
    assert told.stdout.splitlines()[0] == "index\tk-NN\tlinear"
    assert "k-NN: the data cannot tell (catalog − copy = +0.0 points" in told.stdout
    (row,) = json_of(*arguments, cwd=work)
    assert [difference["better"] for difference in row["differences"]] == [None, None]
    assert row["n_train"] + row["n_test"] == 30
    one_error(dinosearch(*arguments[:-2], cwd=work, check=2))


@pytest.mark.slow
def test_export_of_a_model_and_of_the_wrong_thing(work):
    (row,) = json_of("export", "tiny", "--to", "openvino", "--out", "out/tiny", cwd=work)
    assert row["files"] == ["out/tiny.bin", "out/tiny.json", "out/tiny.xml"]
    assert row["cosine"] > 0.999
    told = dinosearch("export", "models/tiny", "--to", "hf", cwd=work)
    assert "tiny-hf/config.json" in told.stdout
    one_error(dinosearch("export", "models/tiny", "--to", "csv", cwd=work, check=2))
    one_error(dinosearch("export", "models/tiny", "--to", "pdf", cwd=work, check=2))
    one_error(dinosearch("export", "catalog", "--to", "onnx", cwd=work, check=1))


@pytest.mark.slow
def test_attention_draws_a_picture(work):
    told = dinosearch("attention", "cat.jpg", "--size", "48", cwd=work)
    assert told.stdout == "cat-attention.png\n"
    assert "model: models/tiny" in told.stderr
    assert Image.open(work / "cat-attention.png").format == "PNG"
    assert "labels.csv" in one_error(dinosearch("attention", "labels.csv", cwd=work, check=1))


def test_released_weights_become_a_model(tiny_model, tmp_path):
    words = ("models", "import", tiny_model.weights_path, "--name", "mine")
    (row,) = json_of(*words, "--image-size", "16", cwd=tmp_path)
    assert (row["model"], row["image_size"], row["trained"]["method"]) == ("mine", 16, "imported")
    assert json_of("models", cwd=tmp_path) == [row]
    assert (
        "exists" in dinosearch("models", "import", "dino.safetensors", "--name", "mine", cwd=tmp_path, check=2).stderr
    )


@pytest.mark.parametrize("arguments", [["query"], ["query", "cat.jpg", "--topp", "3"], ["fly"], ["probe"], ["--no"]])
def test_wrong_usage_is_exit_2(indexed, arguments):
    assert dinosearch(*arguments, cwd=indexed, check=2).stdout == "" or arguments == ["query"]


class TestTrain:
    def test_no_steps_make_an_untrained_model(self, work):
        (row,) = json_of("train", "images", "--steps", "0", cwd=work)
        assert list(row) == [
            *("model", "fingerprint", "steps", "epochs", "images", "images_per_second", "seconds", "loss", "knn_top1"),
            *("resumed_from_step", "health"),
        ]
        assert (row["model"], row["steps"], row["images"], row["knn_top1"]) == ("images", 0, 24, None)
        (again,) = json_of("train", "images", "--steps", "0", cwd=work)
        assert (again["model"], again["fingerprint"]) == ("images-2", row["fingerprint"])
        assert json_of("models", cwd=work)[0]["model"] == "images-2", "newest first"

    def test_images_may_be_padded(self, work):
        (row,) = json_of("train", "images", "--steps", "0", "--fit", "pad", cwd=work)
        assert json.loads((work / "models" / row["model"] / "model.json").read_text())["fit"] == "pad"

    def test_a_taken_name_is_an_error(self, work):
        told = dinosearch("train", "images", "--steps", "0", "--name", "tiny", cwd=work, check=2)
        assert "--overwrite" in one_error(told)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_stopped_run_is_saved_and_goes_on(self, work, number, code):
        arguments = [sys.executable, "-m", "dinosearch", "train", "images", "--batch-size", "8", "--name", "mine"]
        with subprocess.Popen(
            [*arguments, "--steps", "2000"], cwd=work, env=environment(), stderr=subprocess.PIPE, text=True
        ) as process:
            wait_for(work / "models/mine/training/metrics.jsonl", process)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        assert "--resume" in stderr
        assert "Traceback" not in stderr
        assert (work / "models/mine/model.json").is_file()
        with subprocess.Popen(
            [*arguments, "--steps", "2000", "--resume", "--json"],
            cwd=work,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            time.sleep(0.5)
            wait_for(work / "models/mine/training/metrics.jsonl", process)
            process.send_signal(signal.SIGINT)
            stdout, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert stdout == "" or json.loads(stdout)["resumed_from_step"] > 0


def test_a_terminal_gets_a_table_and_a_red_error(indexed):
    shown = re.sub(r"\x1b\[\d*m", "", on_a_terminal("query", "cat.jpg", "--top", "2", cwd=indexed))
    assert re.search(r"rank +score +path", shown)
    assert re.search(r"1 +1\.0000 +catalog/0\.jpg", shown)
    assert "\x1b[1;31merror:\x1b[0m no file" in on_a_terminal("query", "red car", cwd=indexed)
    assert "\x1b[1;31m" not in on_a_terminal("query", "red car", cwd=indexed, NO_COLOR="1")


def test_a_pipe_gets_no_escape_codes(indexed):
    for arguments in (["query", "cat.jpg"], ["info"], ["models"], ["failures"], ["probe", "--labels", "labels.csv"]):
        done = dinosearch(*arguments, cwd=indexed)
        assert "\x1b" not in done.stdout + done.stderr


def one_error(done):
    """The last line of stderr, which is the only one that says error."""
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    return lines[-1]


def wait_for(path, process):
    while not path.exists() or not path.stat().st_size:  # it is made before the first step
        assert process.poll() is None, "ended too early"
        time.sleep(0.05)


def on_a_terminal(*arguments, cwd, **more):
    """What a terminal of 80 columns is sent."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dinosearch", *arguments],
        cwd=cwd,
        env=environment(TERM="xterm", **more),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    sent = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux reports the end of a terminal as EIO
            break
        if not part:
            break
        sent += part
    process.wait(timeout=60)
    os.close(ours)
    return sent.decode()


def test_a_missing_folder_is_told_before_a_model_is_fetched(tmp_path):
    done = dinosearch("index", "nowhere", cwd=tmp_path, check=1)
    assert "no folder or file nowhere" in one_error(done)
    assert "fetching" not in done.stderr
