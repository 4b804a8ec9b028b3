"""Requests become jobs: names, seeds, and every wrong line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcma_fast.box_lists import SHARES
from hcma_fast.cli.generate.jobs import STEM_BYTES, Job, check_name, check_outputs, slug
from hcma_fast.cli.generate.lines import Line, parse_line, read_lines
from hcma_fast.config import MAX_SEED, SettingsChange
from hcma_fast.errors import InputError, OutputError
from hcma_fast.layout import BoxNotation, Layout
from hcma_fast.runtime.request import Request
from hcma_fast.sampling.savings import Savings


def _jobs(line: Line, num_images: int = 1, notation: BoxNotation = SHARES, **options: Any) -> Any:
    return line.jobs(options, num_images=num_images, notation=notation)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog, beside a pizza!", "a-dog-beside-a-pizza"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "image"),
        ("🐶", "image"),
        ("ein Bär", "ein-bär"),
        ("x" * 300, "x" * 48),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert slug(text) == expected


@given(st.text(max_size=200))
def test_a_slug_is_one_safe_file_name(text: str) -> None:
    name = slug(text)
    assert Path(name).name == name and not name.startswith((".", "-"))
    assert len(f"{name}-{MAX_SEED}-overlay.png".encode()) <= 255


def test_seeds_count_up_and_a_line_has_precedence() -> None:
    line = parse_line('{"prompt": "a dog"}', "line 1")
    jobs = _jobs(line, num_images=3, seed=5)
    assert [(job.request.seed, job.stem) for job in jobs] == [
        (5, "a-dog-5"),
        (6, "a-dog-6"),
        (7, "a-dog-7"),
    ]
    own = parse_line(
        '{"prompt": "a dog", "seed": 9, "negative_prompt": "n", "id": "x.1", "num_inference_steps":'
        ' 7, "settings": {"eta0": 3}, "savings": {"align_every": 2}}'
    )
    options = {"settings": SettingsChange(eta0=1, guidance_scale=2), "num_inference_steps": 4}
    (job,) = _jobs(own, seed=5, negative_prompt="default", **options)
    request = job.request
    assert (request.seed, request.negative_prompt, job.stem) == (9, "n", "x.1-9")
    # of the settings, too, a line replaces those that it names
    assert request.settings.given == {"eta0": 3.0, "guidance_scale": 2.0}
    assert (request.num_inference_steps, request.savings) == (7, Savings(align_every=2))
    (job,) = _jobs(line, seed=5, **options)
    assert job.request.num_inference_steps == 4 and job.request.settings == options["settings"]


def test_a_drawn_seed_is_in_the_name() -> None:
    (job,) = _jobs(parse_line('{"prompt": "a dog"}'))
    assert job.stem == f"a-dog-{job.request.seed}" and 0 <= job.request.seed < 2**31 and job.drawn


def test_lines_keep_their_numbers_over_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n  \n{"prompt": "b", "phrases": ["c"], "boxes": [[0,0,1,1]]}'
    )
    found = read_lines(path)
    assert [line.where for line in found] == ["line 1", "line 4"]
    assert _jobs(found[1])[0].request.layout == Layout(["c"], [(0, 0, 1, 1)])


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "prompt"),
        ('{"prompt": 1}', "prompt"),
        ('{"prompt": "a", "promt": "b"}', "promt"),
        ('{"prompt": "a", "self": "b"}', "self"),
        ('{"prompt": "a", "settings": {"self": 1}}', "self"),
        ('{"prompt": "a", "num_inference_steps": 1}', "from 2 to 999"),
        ('{"prompt": "a", "sampler": "magic"}', "sampler"),
        ('{"prompt": "a", "settings": {"eta0": -1}}', "eta0"),
        ('{"prompt": "a", "settings": 3}', "settings"),
        ('{"prompt": "a", "savings": {"align_every": 0}}', "align_every"),
        ('{"prompt": "a", "seed": "1"}', "seed"),
        ('{"prompt": "a", "seed": true}', "seed"),
        ('{"prompt": "a", "seed": -1}', "seed"),
        (json.dumps({"prompt": "a", "seed": 2**64}), "seed"),
        ('{"prompt": "a", "id": "../x"}', "file name"),
        ('{"prompt": "a", "id": ""}', "file name"),
        ('{"prompt": "a", "phrases": ["dog"]}', "phrases"),
        ('{"prompt": "a", "phrases": ["dog"], "boxes": [[0.5, 0, 0.1, 1]]}', "inverted"),
        ('{"prompt": "a", "phrases": ["dog"], "boxes": [[0, 0, 1, NaN]]}', "finite"),
        ('{"prompt": "a", "phrases": ["dog"], "boxes": [[0, 0, 1]]}', "four numbers"),
        ('{"prompt": "\\ud800"}', ""),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"^line 2: ") as caught:
        _read_all(path)
    assert word in str(caught.value)


def _read_all(path: Path) -> list[Job]:
    return [job for line in read_lines(path) for job in _jobs(line)]


def test_the_longest_id_has_a_sidecar_name() -> None:
    (job,) = _jobs(parse_line(json.dumps({"prompt": "a", "id": "x" * 120, "seed": MAX_SEED})))
    assert check_name(job.stem, STEM_BYTES) == job.stem
    with pytest.raises(InputError, match="file name"):
        _jobs(parse_line(json.dumps({"prompt": "a", "id": "x" * 121})))


def test_input_that_is_not_text_or_empty_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match="line 1"):
        read_lines(path)
    path.write_bytes(b"\n\n")
    with pytest.raises(InputError, match="no lines"):
        read_lines(path)
    with pytest.raises(InputError, match="No such file"):
        read_lines(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="directory"):
        read_lines(tmp_path)


def _job(stem: str, where: str = "") -> Job:
    return Job(stem, Request("p"), where)


@pytest.mark.parametrize("second", ["a-1", "A-1", "a-1-overlay"])
def test_two_jobs_may_not_share_a_file(tmp_path: Path, second: str) -> None:
    with pytest.raises(InputError, match=r"line 2 and line 1 would both write"):
        check_outputs([_job("a-1", "line 1"), _job(second, "line 2")], tmp_path, force=True)


@pytest.mark.parametrize("suffix", [".png", ".json", "-overlay.png"])
def test_existing_files_need_force(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a-1.json").write_text(json.dumps({"image": "a-1.png", "image_sha256": "0"}))
    (tmp_path / f"a-1{suffix}").touch()
    with pytest.raises(OutputError, match="exists already") as caught:
        check_outputs([_job("a-1")], tmp_path, force=False)
    assert caught.value.exit_code == 3
    check_outputs([_job("a-1")], tmp_path, force=True)


def test_files_of_others_under_our_names_are_never_replaced(tmp_path: Path) -> None:
    """A sidecar and an overlay are removed with the image: by what they are, not by their names."""
    (tmp_path / "a-1.png").touch()
    check_outputs([_job("a-1")], tmp_path, force=True)  # as a killed process leaves it
    for content in ("", "[]", "{}", '{"image": "b-1.png", "image_sha256": "0"}', "[" * 10**5):
        (tmp_path / "a-1.json").write_text(content)
        with pytest.raises(OutputError, match=r"in the way[\s\S]*a-1\.json"):
            check_outputs([_job("a-1")], tmp_path, force=True)
    (tmp_path / "a-1.json").unlink()
    (tmp_path / "a-1-overlay.png").touch()
    check_outputs([_job("a-1")], tmp_path, force=True)  # killed before the sidecar, which is last
    (tmp_path / "a-1.png").unlink()
    with pytest.raises(OutputError, match=r"in the way[\s\S]*a-1-overlay\.png"):
        check_outputs([_job("a-1")], tmp_path, force=True)


def test_a_folder_in_the_way_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a-1.png").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        check_outputs([_job("a-1")], tmp_path, force=True)


def _lines(path: Path, content: bytes | str) -> list[Line]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_lines(path)


def _request(line: Line) -> Request:
    (job,) = _jobs(line)
    assert isinstance(job, Job)
    return job.request


def test_what_pandas_and_editors_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    line = {"prompt": "a dog", "seed": 7.0, "id": 17.0, "negative_prompt": None, "phrases": None}
    for content in (
        json.dumps(line),
        b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\r\n",
        json.dumps([line]),
        json.dumps([line], indent=2),
        json.dumps(line, indent=2),
        json.dumps({**line, "id": 17, "boxes": None}),
    ):
        (found,) = _lines(path, content)
        assert _request(found) == Request("a dog", seed=7) and found.boxes.id == "17"
    two = fault_of(path, [{"prompt": "a"}, {"prompt": "b", "seed": "1"}])
    assert two == "item 2: a seed must be a whole number from 0 to 2**64 - 1"
    with pytest.raises(InputError, match="the input file is UTF-16"):
        _lines(path, json.dumps(line).encode("utf-16"))
    with pytest.raises(InputError, match="the input file must be JSON"):
        _lines(path, '[\n{"prompt": "a"},\n{"prompt"}\n]')
    # U+2028 is a letter of a JSON string, not the end of a line
    assert _request(_lines(path, '{"prompt": "a\u2028b"}')[0]).prompt == "a\u2028b"


def fault_of(path: Path, data: object) -> str:
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        _read_all(path)
    return caught.value.what


def test_boxes_in_pixels_or_with_sizes(tmp_path: Path) -> None:
    expected = Layout(["dog"], [(0.25, 0.5, 0.75, 1.0)])
    pixels = {"prompt": "a", "phrases": ["dog"], "boxes": [[160, 240, 320, 240]]}
    notation = {"box_format": "xywh", "box_units": "pixel", "box_size": [640, 480]}
    (own,) = _lines(tmp_path / "in", json.dumps({**pixels, **notation}))
    (bare,) = _lines(tmp_path / "in", json.dumps(pixels))
    assert _request(own).layout == expected
    given = BoxNotation("xywh", "pixel", (640, 480))
    assert _jobs(bare, notation=given)[0].request.layout == expected
    with pytest.raises(InputError, match=r"^line 1: boxes in pixels need the size"):
        _jobs(parse_line({**pixels, "box_units": "pixel"}, "line 1"))


def test_requests_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "in"
    boxes = [["a dog", [128, 256, 256, 256]]]
    record = {"prompt": "a dog in a park", "gen_boxes": boxes, "bg_prompt": "p", "neg_prompt": "n"}
    answer = "[('a dog', [128, 256, 256, 256])]\nBackground prompt: p\nNegative prompt: n"
    link = ["1", 0]
    comfy = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog in a park"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "n"}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512}},
        "4": {
            "class_type": "GLIGENTextBoxApply",
            "inputs": {
                **{"text": "a dog", "x": 128, "y": 256, "width": 256, "height": 256},
                "conditioning_to": link,
            },
        },
        "5": {"class_type": "KSampler", "inputs": {"positive": ["4", 0], "negative": ["2", 0]}},
    }
    for content in (
        json.dumps(record),
        json.dumps({"a dog in a park": [answer]}),
        json.dumps({"a dog in a park": [answer]}, indent=4),
        json.dumps(comfy, indent=2),
    ):
        request = _request(_lines(path, content)[0])
        assert (request.prompt, request.negative_prompt) == ("a dog in a park", "n")
        assert request.layout == Layout(["a dog"], [(0.25, 0.5, 0.75, 1.0)])
    link[0] = "4"  # a chain that never ends
    assert "caption of this ComfyUI workflow" in fault_of(path, comfy)
