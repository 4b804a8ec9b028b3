"""The cache: it holds what the encoders give, goes on after a kill, and refuses to be mixed."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hcma_fast.errors import InputError, OutputError
from hcma_fast.layout import Layout
from hcma_fast.train.data.coco import open_image, read_split
from hcma_fast.train.data.emoji_scenes import write_coco
from hcma_fast.train.data.encode import CacheReport, make_cache
from hcma_fast.train.data.encoders import Encoders
from hcma_fast.train.data.image_files import ORIENTED, SCALED
from hcma_fast.train.data.latent_cache import HEADER_FILE, LatentCache, shard_file
from hcma_fast.train.data.views import crop_image, crop_layout, flip_layout, mentions_side, part_of

SHARD = 25


def make(data: Path, encoders: Encoders, out: Path, **options: object) -> CacheReport:
    settings = {"shard_size": SHARD, **options}
    return make_cache(data, "train", encoders, out, **settings)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_what_the_encoders_give(
    emoji_coco: Path, encoders: Encoders, small_cache: Path, flip: bool
) -> None:
    cache = LatentCache(small_cache)
    examples = read_split(emoji_coco, "train")
    assert len(cache) == len(examples) == 60
    # from the second and third shard too, in any order
    chosen = np.array([30, 2, 59, 25])
    count = len(chosen)
    batch = cache.batch(chosen, np.full(count, 0.99), np.full(count, 0.2 if flip else 0.7))
    for row, index in enumerate(chosen):
        example = examples[index]
        caption = example.captions[-1]
        mirrored = flip and not mentions_side(caption)
        pixels = torch.from_numpy(np.array(crop_image(open_image(example), 16))).permute(2, 0, 1)
        pixels = pixels.flip(-1) if mirrored else pixels
        posterior = encoders.posterior(pixels.unsqueeze(0))[0]
        # in another batch, the last bit of float16 may differ
        torch.testing.assert_close(batch.mean[row], posterior[0], atol=1e-3, rtol=2e-3)
        torch.testing.assert_close(batch.std[row], posterior[1], atol=1e-3, rtol=2e-3)
        torch.testing.assert_close(batch.caption[row], encoders.embed([caption])[0][0])
        layout = crop_layout(example.layout, example.width, example.height)
        layout = flip_layout(layout) if mirrored else layout
        assert batch.mask[row].sum() == len(layout)
        boxes = batch.boxes[row, : len(layout)]
        torch.testing.assert_close(boxes, torch.tensor(layout.boxes))
        assert not batch.boxes[row, len(layout) :].any()
        names = [cache.header.labels[i] for i in batch.labels[row, : len(layout)]]
        assert names == list(layout.phrases)
    for name in cache.header.labels[:3]:
        place = cache.header.labels.index(name)
        torch.testing.assert_close(cache.label_table[place], encoders.embed([name])[0][0])


def test_first_captions_and_no_mirror_without_draws(small_cache: Path) -> None:
    cache = LatentCache(small_cache)
    every = np.arange(len(cache))
    plain, drawn = cache.batch(every), cache.batch(every, np.zeros(60), np.ones(60))
    assert all(
        torch.equal(a, b) for a, b in zip(vars(plain).values(), vars(drawn).values(), strict=True)
    )


def test_parts_are_by_image_id(small_cache: Path) -> None:
    cache = LatentCache(small_cache)
    for part in ("train", "val"):
        indices = cache.indices_of(part)
        assert {part_of(number) for number in cache.image_ids[indices].tolist()} == {part}
    assert len(cache.indices_of("train")) + len(cache.indices_of("val")) == 60


def test_stopped_and_resumed_gives_the_same_bytes(
    emoji_coco: Path, encoders: Encoders, small_cache: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done > SHARD:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(emoji_coco, encoders, tmp_path, progress=stop)
    assert (tmp_path / shard_file(0)).exists() and not (tmp_path / shard_file(1)).exists()
    with pytest.raises(InputError, match="not finished"):
        LatentCache(tmp_path)
    # killed while it wrote
    (tmp_path / f".{shard_file(1)}.123.part").write_bytes(b"half")
    report = make(emoji_coco, encoders, tmp_path)
    assert (report.images, report.encoded) == (60, 35)
    (tmp_path / f".{shard_file(1)}.123.part").unlink()
    assert contents(tmp_path) == contents(small_cache)
    assert make(emoji_coco, encoders, tmp_path).encoded == 0


def test_shares_make_one_cache(
    emoji_coco: Path, encoders: Encoders, small_cache: Path, tmp_path: Path
) -> None:
    reports = [make(emoji_coco, encoders, tmp_path, share=(index, 2)) for index in (1, 0)]
    assert [report.encoded for report in reports] == [25, 35]
    assert contents(tmp_path) == contents(small_cache)


def test_without_mirrors_it_is_half_the_size(
    emoji_coco: Path, encoders: Encoders, small_cache: Path, tmp_path: Path
) -> None:
    make(emoji_coco, encoders, tmp_path, flip=False)
    cache, both = LatentCache(tmp_path), LatentCache(small_cache)
    every = np.arange(60)
    assert torch.equal(cache.batch(every, flip_draws=np.zeros(60)).mean, both.batch(every).mean)


def test_another_cache_in_the_folder_is_refused(
    emoji_coco: Path, encoders: Encoders, small_cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(small_cache, folder)
    with pytest.raises(InputError, match="its image_size is 16, not 32"):
        make(emoji_coco, encoders, folder, image_size=32)
    with pytest.raises(InputError, match="its views is 2, not 1"):
        make(emoji_coco, encoders, folder, flip=False)
    tiny = Encoders.load("tiny", torch.device("cpu"))
    tiny.preset = encoders.preset
    with pytest.raises(InputError, match="its vae_sha256") as caught:
        make(emoji_coco, tiny, folder, image_size=16)
    assert str(caught.value.value) == str(folder / HEADER_FILE)
    assert contents(folder) == contents(small_cache)


def test_a_shard_of_another_cache_is_refused(
    emoji_coco: Path, encoders: Encoders, small_cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make(emoji_coco, encoders, other, flip=False)
    folder = tmp_path / "cache"
    shutil.copytree(small_cache, folder)
    shutil.copy(other / shard_file(1), folder)
    with pytest.raises(InputError, match="of another cache") as caught:
        LatentCache(folder)
    assert caught.value.value == str(folder / shard_file(1))


@pytest.mark.parametrize("name", [HEADER_FILE, "labels.safetensors", shard_file(2)])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_damaged_files_are_named(small_cache: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(small_cache, folder)
    path = folder / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(InputError) as caught:
        LatentCache(folder)
    assert caught.value.value == str(path)


def test_bad_images_stop_or_are_skipped_and_listed(
    emoji_coco: Path, encoders: Encoders, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(emoji_coco, data)
    examples = read_split(data, "train")
    cut, wrong, gone = examples[3].path, examples[40].path, examples[41].path
    cut.write_bytes(cut.read_bytes()[:60])
    Image.new("RGB", (9, 9)).save(wrong)
    with pytest.raises(InputError, match="cannot read image 3") as caught:
        make(data, encoders, tmp_path / "strict", workers=1)
    assert caught.value.value == str(cut) and "--skip-bad" in caught.value.remedy
    gone.unlink()
    with pytest.raises(InputError, match="the file of image 41 is missing"):
        make(data, encoders, tmp_path / "strict")

    report = make(data, encoders, tmp_path / "cache", skip_bad=True)
    assert sorted(record.id for record in report.skipped if record.id is not None) == [3, 40, 41]
    assert {record.path for record in report.skipped} == {str(cut), str(wrong), str(gone)}
    assert report.images == 57
    cache = LatentCache(tmp_path / "cache")
    assert cache.image_ids.tolist() == [i for i in range(60) if i not in (3, 40, 41)]
    # the neighbours of a skipped image keep their own boxes
    batch = cache.batch(np.array([3]))
    assert batch.image_ids.tolist() == [4]
    wanted: Layout = crop_layout(examples[4].layout, 24, 24)
    torch.testing.assert_close(batch.boxes[0, : len(wanted)], torch.tensor(wanted.boxes))
    # a finished cache still says what was left out
    again = make(data, encoders, tmp_path / "cache", skip_bad=True)
    assert (again.encoded, len(again.skipped)) == (0, 3)


def test_long_captions_are_cut_and_counted(
    emoji_coco: Path, encoders: Encoders, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(emoji_coco, data)
    path = data / "annotations" / "captions_train.json"
    document = json.loads(path.read_text())
    for record in document["annotations"]:
        record["caption"] = "a" if record["image_id"] != 7 else "ab " * 200
    path.write_text(json.dumps(document))
    report = make(data, encoders, tmp_path / "cache")
    assert report.cut_captions == sum(r["image_id"] == 7 for r in document["annotations"])


def test_a_full_disk_is_named(
    emoji_coco: Path, encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        make(emoji_coco, encoders, tmp_path / "cache")
    assert caught.value.value == str(tmp_path / "cache" / HEADER_FILE)
    assert list((tmp_path / "cache").iterdir()) == []


def test_images_that_are_turned_or_deep_are_counted_and_an_empty_cache_is_refused(
    encoders: Encoders, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    write_coco(data, "train", 3, 24)
    examples = read_split(data, "train")
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(examples[0].path) as file:
        upright = file.convert("RGB")
    upright.transpose(Image.Transpose.ROTATE_180).save(examples[0].path, exif=exif)
    Image.fromarray(np.full((24, 24), 32768, np.uint16)).save(examples[1].path)
    assert np.array_equal(np.asarray(open_image(examples[0])), np.asarray(upright))
    report = make(data, encoders, tmp_path / "cache")
    assert report.changes == {ORIENTED: 1, SCALED: 1} and report.images == 3
    # told again when the cache is there already
    assert make(data, encoders, tmp_path / "cache").changes == report.changes
    for example in examples:
        example.path.write_bytes(b"no image")
    with pytest.raises(InputError, match="no image of this split can be used") as caught:
        make(data, encoders, tmp_path / "empty", skip_bad=True)
    assert caught.value.exit_code == 3
    with pytest.raises(InputError, match="the cache has no image"):
        LatentCache(tmp_path / "empty")
