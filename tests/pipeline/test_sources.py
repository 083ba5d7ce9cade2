"""Sources and the writer: every image arrives untouched under its label, and the same source gives the same bytes."""

import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.shards import BadShards, Index, Sample
from pipeline.sources.ilsvrc2012 import DEVKIT, TRAIN, VAL, Ilsvrc2012
from pipeline.sources.imagefolder import ImageFolder
from pipeline.sources.rendered import Rendered
from pipeline.sources.torchvision import Torchvision
from pipeline.sources.writer import write_shards
from tests.conftest import ROOT, jpeg
from tests.tars import add


def read(index: Index) -> dict[str, dict[str, Sample]]:
    """Every sample of every split, by key."""
    return {split: {s.key: s for s in index.read(index.split(split))} for split in index.splits}


def content(folder: Path) -> dict[str, str]:
    """The bytes of every file in a folder, hidden ones too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def temporary(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if ".tmp-" in path.name]


# ----------------------------------------------------------------------------------------------------- imagefolder


@pytest.fixture
def make_folder(tmp_path):
    """A folder of JPEGs with these names (str or bytes), each of its own bytes."""

    def make(*names: str | bytes, folder: str = "photos") -> Path:
        root = tmp_path / folder
        for name in names:
            path = os.path.join(os.fsencode(root), os.fsencode(name))  # noqa: PTH118 (names that are not UTF-8)
            os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
            seed = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big")
            with open(path, "wb") as file:  # noqa: PTH123
                file.write(jpeg(np.random.default_rng(seed), 20, 24))
        return root

    return make


def write(folder: Path, out: Path, validation_share: float = 0.0, **options: int) -> Index:
    return write_shards(ImageFolder(folder=folder, validation_share=validation_share), str(out), **options)


def test_folders_are_classes_and_the_bytes_are_untouched(make_folder, tmp_path):
    photos = make_folder("cat/1.jpg", "cat/deep/er/2.JPG", "ant/3.jpeg", "dog/4.jpg")
    index = write(photos, tmp_path / "out")
    assert index.classes == ("ant", "cat", "dog")
    found = read(index)["train"]
    assert {key: s.label for key, s in found.items()} == {"cat/1": 1, "cat/deep/er/2": 1, "ant/3": 0, "dog/4": 2}
    for sample in found.values():
        about = json.loads(sample.members["json"])
        assert sample.image == (photos / about["source"]).read_bytes()
        assert about["label"] == index.classes[sample.label]
        assert (about["width"], about["height"], about["mode"]) == (24, 20, "RGB")


def test_images_directly_in_the_folder_mean_no_classes(make_folder, tmp_path):
    index = write(make_folder("cat/1.jpg", "2.jpg"), tmp_path / "out")
    assert index.classes == ()
    assert [s.label for s in read(index)["train"].values()] == [None, None]


def test_what_is_no_image_is_left_out(make_folder, tmp_path):
    photos = make_folder("a/1.jpg")
    (photos / "a" / "notes.txt").write_text("not an image")
    (photos / "a" / "Thumbs.db").write_bytes(b"x")
    assert write(photos, tmp_path / "out").splits == {"train": 1}


def test_adding_images_never_moves_one_to_another_split(make_folder, tmp_path):
    names = [f"{cls}/{i}.jpg" for cls in "ab" for i in range(40)]
    photos = make_folder(*names)
    before = read(write(photos, tmp_path / "before", 0.3))
    make_folder(*(f"{cls}/{i}.jpg" for cls in "bc" for i in range(100, 130)))
    after = read(write(photos, tmp_path / "after", 0.3))
    assert 10 <= len(before["val"]) <= 40
    for split, found in before.items():
        assert set(found) <= set(after[split])
    assert sum(map(len, after.values())) == 80 + 60


@pytest.mark.parametrize(("share", "splits"), [(0.0, {"train": 3}), (1.0, {"val": 3})])
def test_a_share_of_nothing_or_all_makes_one_split(make_folder, tmp_path, share, splits):
    assert write(make_folder("a/1.jpg", "a/2.jpg", "b/3.jpg"), tmp_path / "out", share).splits == splits


def test_dotted_and_clashing_names_are_all_kept(make_folder, tmp_path):
    names = ["a.b/x.y.z.jpg", "b/x.jpg", "b/x.png", "b/x.JPG", "b/.hidden.jpg", "b/new\nline.jpg", "b/<é😀>.jpg"]
    photos = make_folder(*names)
    found = read(write(photos, tmp_path / "out"))["train"]
    assert sorted(found) == ["a_b/x_y_z", "b/<é😀>", "b/_hidden", "b/new\nline", "b/x_JPG", "b/x_jpg", "b/x_png"]
    assert sorted(s.image for s in found.values()) == sorted((photos / name).read_bytes() for name in names)


def test_names_that_are_not_utf8_are_kept(make_folder, tmp_path):
    photos = make_folder(b"a/\xff\xfe.jpg", "a/fine.jpg")
    found = read(write(photos, tmp_path / "out"))["train"]
    assert sorted(found) == ["a/fine", "a/��"]


@pytest.mark.parametrize("names", [(b"a/\xff.jpg", b"a/\xfe.jpg"), ("a.b/x.jpg", "a_b/x.jpg")])
def test_names_that_give_one_key_are_refused(make_folder, tmp_path, names):
    with pytest.raises(BadShards, match="twice|same key"):
        write(make_folder(*names), tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_classes_whose_names_are_not_utf8_are_kept(make_folder, tmp_path):
    photos = make_folder(b"a\xff/1.jpg", "b/2.jpg")
    index = write(photos, tmp_path / "out")
    assert index.classes == ("a�", "b")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadShards, match=r"no images in .+empty: expected files ending in jpg, jpeg, png"):
        write(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(BadShards, match="there is no folder .+missing: give the folder"):
        write(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_share_above_one_is_refused(make_folder, tmp_path):
    with pytest.raises(BadShards, match="validation share is 20.0: give a share from 0 to 1"):
        write(make_folder("a/1.jpg"), tmp_path / "out", 20.0)


# ----------------------------------------------------------------------------------------------------- torchvision


def idx(array: np.ndarray) -> bytes:
    """The file format of MNIST: magic, sizes, bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    """FashionMNIST as torchvision keeps it, with a few images of noise: root, and images and labels of each split."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "downloads" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    data = {}
    for split, prefix, count in (("train", "train", 12), ("val", "t10k", 5)):
        pictures, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(idx(array))
            (raw / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
        data[split] = pictures, labels
    return tmp_path / "downloads", data


@pytest.fixture
def _no_network(monkeypatch):
    """Every download is refused at once, by a proxy that is not there."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.usefixtures("_no_network")
def test_a_torchvision_set_keeps_every_pixel_and_label(fashion, tmp_path):
    root, data = fashion
    before = content(root)
    index = write_shards(Torchvision(name="FashionMNIST", root=root), str(tmp_path / "out"))
    assert index.splits == {"train": 12, "val": 5}
    assert index.classes[:3] == ("T-shirt/top", "Trouser", "Pullover")
    for split, found in read(index).items():
        pictures, labels = data[split]
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            sample = found[f"{split}-{number:07d}"]
            image = Image.open(io.BytesIO(sample.members["png"]))
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), picture)
            assert sample.label == label
    assert content(root) == before, "nothing is downloaded or changed"


@pytest.mark.usefixtures("_no_network")
def test_a_torchvision_set_with_pickles_is_read_too(tmp_path, monkeypatch):
    """CIFAR10's batches, checked by torchvision against its own MD5 sums: those of ours are put in their place."""
    from torchvision import datasets

    base, rng = tmp_path / "root" / "cifar-10-batches-py", np.random.default_rng(1)
    base.mkdir(parents=True)
    pixels = rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)

    def file(name: str, entry: dict[str, Any]) -> str:
        data = pickle.dumps(entry)
        (base / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    batch = {"data": pixels.reshape(3, -1), "labels": [1, 0, 2]}
    sums = [[name, file(name, batch)] for name in ("data_batch_1", "test_batch")]
    meta = file("batches.meta", {"label_names": ["plane", "car", "bird"]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:1])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[1:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    index = write_shards(Torchvision(name="CIFAR10", root=tmp_path / "root"), str(tmp_path / "out"))
    assert index.splits == {"train": 3, "val": 3}
    assert index.classes == ("plane", "car", "bird")
    sample = read(index)["val"]["val-0000002"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), pixels[2].transpose(1, 2, 0))
    assert sample.label == 2


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR11", "torchvision.datasets has no 'CIFAR11': give a class of it, for example CIFAR10"),
        ("cifar", "has no 'cifar'"),
        ("MNIST", "MNIST cannot be opened in .+root .+download it by hand into --root"),
        ("ImageNet", "ImageNet cannot be opened in .+root .+download it by hand into --root"),
        ("ImageFolder", "ImageFolder cannot be opened .+it has no splits.+jobs/shards.py imagefolder"),
    ],
)
def test_a_torchvision_set_that_cannot_be_had_is_refused(tmp_path, name, message):
    with pytest.raises(BadShards, match=f"(?s){message}"):
        write_shards(Torchvision(name=name, root=tmp_path / "root"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "index.json").exists()


# ------------------------------------------------------------------------------------------------------ ilsvrc2012

SYNSETS = [  # ILSVRC2012_ID, WNID, words, children: the kit's order is neither that of the wnids nor only of leaves
    (1, "n03", "crane, big bird", 0),
    (2, "n01", "tench, Tinca tinca", 0),
    (3, "n02", "crane", 0),
    (4, "n09", "entity", 2),
]
TRUTH = [3, 1, 1, 2, 3]


def archive(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


@pytest.fixture
def imagenet(tmp_path):
    """A folder with the official archives, in small: wnid -> training images, and validation images in order."""
    from scipy.io import savemat

    rng = np.random.default_rng(2)
    train = {wnid: {f"{wnid}_{i}.JPEG": jpeg(rng, 20, 24) for i in (10, 2, 1)} for _, wnid, _, children in SYNSETS[:3]}
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(rng, 20, 24) for i in range(1, len(TRUTH) + 1)}
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([[(i, wnid, words, "", children)] for i, wnid, words, children in SYNSETS], dtype=kinds)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    folder = tmp_path / "imagenet"
    folder.mkdir()
    (folder / TRAIN).write_bytes(archive({f"{wnid}.tar": archive(files) for wnid, files in train.items()}))
    (folder / VAL).write_bytes(archive(dict(sorted(val.items(), reverse=True))))
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, TRUTH)).encode(),
    }
    (folder / DEVKIT).write_bytes(archive(kit, "w:gz"))
    return folder, train, val


def test_imagenet_is_read_in_place_with_the_right_labels(imagenet, tmp_path):
    folder, train, val = imagenet
    index = write_shards(Ilsvrc2012(folder=folder), str(tmp_path / "out"))
    assert index.splits == {"train": 9, "val": 5}
    assert len(index.classes) == 3
    assert [name.split(",")[0] for name in index.classes] == ["tench", "crane", "crane"]
    wnids = ["n01", "n02", "n03"]
    found = read(index)
    for wnid, files in train.items():
        for name, data in files.items():
            sample = found["train"][name.removesuffix(".JPEG")]
            assert sample.image == data
            assert sample.label == wnids.index(wnid)
            assert json.loads(sample.members["json"])["wnid"] == wnid
    by_id = {number: wnid for number, wnid, _, _ in SYNSETS}
    for number, (name, data) in zip(TRUTH, val.items(), strict=True):
        sample = found["val"][name.removesuffix(".JPEG")]
        assert sample.image == data
        assert sample.label == wnids.index(by_id[number])


def test_imagenet_without_an_archive_is_refused_by_its_name(imagenet, tmp_path):
    folder, _, _ = imagenet
    (folder / VAL).unlink()
    with pytest.raises(BadShards, match=f"lacks {VAL}: give the folder with the official archives"):
        Ilsvrc2012(folder=folder)


def test_imagenet_with_more_validation_images_than_truths_is_refused(imagenet, tmp_path):
    folder, _, val = imagenet
    extra = {"ILSVRC2012_val_00000006.JPEG": b"x"}
    (folder / VAL).write_bytes(archive(val | extra))
    with pytest.raises(BadShards, match=f"{VAL} holds image 6; the kit knows 5: do they belong together"):
        write_shards(Ilsvrc2012(folder=folder), str(tmp_path / "out"))


@pytest.mark.parametrize("cut", [0.5, 0.0])
@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_a_damaged_imagenet_archive_is_refused_by_its_name(imagenet, tmp_path, name, cut):
    folder, _, _ = imagenet
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(BadShards, match=name):
        write_shards(Ilsvrc2012(folder=folder), str(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------------- writer


@dataclass(frozen=True)
class Numbers:
    """A source of tiny PNGs; it can fail, or die, at one of them, and counts how often it is sent to a process."""

    count: int = 60
    fails_at: int | None = None
    dies_at: int | None = None
    pickled: str | None = None
    classes = ["even", "odd"]  # noqa: RUF012

    @property
    def splits(self) -> dict[str, int]:
        return {"train": self.count, "val": 10}

    def about(self) -> dict[str, Any]:
        return {"kind": "numbers", "count": self.count}

    def sample(self, split: str, number: int) -> dict[str, Any]:
        if split == "train" and number == self.fails_at:
            raise BadShards("the power went")
        if split == "train" and number == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(buffer, "PNG")
        return {"__key__": f"{split}-{number:04d}", "png": buffer.getvalue(), "cls": number % 2, "json": {"n": number}}

    def __getstate__(self) -> dict[str, Any]:
        if self.pickled:
            with Path(self.pickled).open("a") as file:
                file.write("x")
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def write_numbers(out: Path, *, seed: int = 0, samples_per_shard: int = 25, **source: Any) -> Index:
    return write_shards(Numbers(**source), str(out), seed=seed, samples_per_shard=samples_per_shard)


def tars(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in content(folder).items() if name.endswith(".tar")}


def test_the_same_seed_gives_the_same_bytes_and_another_another_order(tmp_path):
    one, two, other = (write_numbers(tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4)))
    assert content(tmp_path / "0") == content(tmp_path / "1")
    assert sorted(tars(tmp_path / "0")) == [f"train-{i:06d}.tar" for i in range(3)] + ["val-000000.tar"]
    assert one.data_id("train") == two.data_id("train") != other.data_id("train")
    keys = [index.split("train")["key"].to_pylist() for index in (one, other)]
    assert keys[0] != keys[1] != sorted(keys[1])
    assert sorted(keys[0]) == sorted(keys[1])
    assert [shard["samples"] for shard in one.shards["train"]] == [25, 25, 10]


def test_classes_are_mixed_within_every_shard(tmp_path):
    index = write_numbers(tmp_path / "out")
    rows = index.split("train").to_pylist()
    for shard in ("train-000000.tar", "train-000001.tar"):
        assert min(Counter(row["label"] for row in rows if row["shard"] == shard).values()) >= 5


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    write_numbers(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = write_numbers(tmp_path / "out", fails_at=0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert again.splits == {"train": 60, "val": 10}


@pytest.mark.parametrize("other", [{"count": 61}, {"seed": 1}, {"samples_per_shard": 24}])
def test_a_folder_of_another_source_is_refused(tmp_path, other):
    write_numbers(tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(BadShards, match="already holds shards of another source.+give another --out"):
        write_numbers(tmp_path / "out", **other)
    assert content(tmp_path / "out") == before


def test_the_index_lists_what_lies_there(tmp_path):
    index = write_numbers(tmp_path / "out")
    for shard in (shard for listed in index.shards.values() for shard in listed):
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert (tmp_path / "out" / "classes.txt").read_text() == "even\nodd\n"
    assert sorted(content(tmp_path / "out")) == sorted(
        ["classes.txt", "index.json", "samples.parquet", *tars(tmp_path / "out")]
    )
    assert not temporary(tmp_path)


def test_an_error_in_the_middle_leaves_no_index_and_the_rerun_gives_the_same_bytes(tmp_path):
    write_numbers(tmp_path / "whole")
    with pytest.raises(BadShards, match="the power went"):
        write_numbers(tmp_path / "broken", fails_at=42)
    assert not (tmp_path / "broken" / "index.json").exists()
    assert not temporary(tmp_path)
    with pytest.raises(BadShards, match="there is no index.json"):
        Index.load(str(tmp_path / "broken"))
    write_numbers(tmp_path / "broken")
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def kill_in_the_middle(out: Path) -> None:
    script = f"from tests.pipeline.test_sources import *\nwrite_numbers(Path({str(out)!r}), dies_at=42)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_kill_in_the_middle_leaves_no_index_and_the_rerun_gives_the_same_bytes(tmp_path):
    write_numbers(tmp_path / "whole")
    kill_in_the_middle(tmp_path / "killed")
    assert not (tmp_path / "killed" / "index.json").exists()
    write_numbers(tmp_path / "killed")
    visible = {name: digest for name, digest in content(tmp_path / "killed").items() if ".tmp-" not in name}
    assert visible == content(tmp_path / "whole")


def test_a_rerun_clears_what_a_killed_writer_left(tmp_path):
    kill_in_the_middle(tmp_path / "killed")
    write_numbers(tmp_path / "killed")
    assert not temporary(tmp_path)


def test_many_images_are_made_by_several_processes_with_the_same_bytes(tmp_path, monkeypatch):
    write_numbers(tmp_path / "many", count=520, samples_per_shard=100)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    write_numbers(tmp_path / "one", count=520, samples_per_shard=100)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_a_source_is_sent_to_each_process_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    write_numbers(tmp_path / "out", count=520, pickled=str(tmp_path / "pickled"))
    assert len((tmp_path / "pickled").read_text()) <= 4


def test_a_source_without_images_is_refused(tmp_path):
    with pytest.raises(BadShards, match="has no images: nothing to write"):
        write_shards(Rendered(train=0, val=0), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rendered_shards_can_be_read_with_boxes_and_masks(tmp_path):
    source = Rendered(train=14, val=5)
    index = write_shards(source, str(tmp_path / "out"), samples_per_shard=6)
    assert index.splits == {"train": 14, "val": 5}
    assert list(index.classes) == source.classes
    for found in read(index).values():
        for sample in found.values():
            about = json.loads(sample.members["json"])
            image, mask = (Image.open(io.BytesIO(sample.members[name])) for name in ("jpg", "mask.png"))
            assert image.format == "JPEG"
            assert image.size == mask.size == (about["width"], about["height"])
            (box,) = about["boxes"]
            left, top, right, bottom = box["xyxy"]
            assert 0 <= left < right <= image.width
            assert 0 <= top < bottom <= image.height
            assert mask.getbbox() == (left, top, right, bottom)
            assert index.classes[sample.label] == about["label"] == box["label"]
