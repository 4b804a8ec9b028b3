"""What an image with torch and Triton of its own lacks, from the packages' metadata."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hcma_fast.bench.gpu_check import pack
from hcma_fast.bench.gpu_check.missing import missing, missing_here, parse_freeze, requires_here
from hcma_fast.errors import InputError, OutputError

ROOT = Path(__file__).parents[3]
#: an image of NVIDIA for Python 3.12, with torch 2.11 and Triton 3.6; and what these need
IMAGE = """
accelerate==1.15.0
filelock==3.20.0
huggingface_hub==1.33.0
numpy==2.5.2
onnx==1.23.1
onnx-ir==1.0.0
onnxscript==0.7.2
packaging==26.0
pillow==12.2.0
psutil==7.2.0
rich==14.3.0
safetensors==0.8.0
tokenizers==0.23.2
torch==2.11.0
transformers==5.17.0
triton==3.6.0
typer==0.26.0
""" + "".join(
    f"{name}==99\n"
    for name in (
        *("annotated-doc", "anyio", "certifi", "click", "fsspec", "h11", "hf-xet", "httpcore"),
        *("httpx", "idna", "jinja2", "markdown-it-py", "mdurl", "ml-dtypes", "pygments"),
        *("pyyaml", "regex", "requests", "shellingham", "tqdm", "typing_extensions", "urllib3"),
    )
)


def names(lines: list[str]) -> list[str]:
    return [Requirement(line).name for line in lines]


def test_an_image_of_nvidia_lacks_diffusers_and_pydantic() -> None:
    found = pack.wanted(IMAGE, (ROOT / "constraints.txt").read_text(), "3.12")
    assert {"diffusers", "pydantic", "pydantic-core", "platformdirs"} <= set(names(found))
    # its own builds stay
    assert not {"torch", "triton", "numpy", "transformers", "onnx"} & set(names(found)), found
    pinned = metadata.version("diffusers")
    assert f"diffusers=={pinned}" in found
    # the line of docs/gpu.md
    page = (ROOT / "docs" / "gpu.md").read_text()
    line = re.search(r"pip install --no-deps ((?:[a-z][a-z0-9_.=-]+ ?)+)", page)
    assert line is not None
    told = {canonicalize_name(word.partition("==")[0]) for word in line[1].split()}
    assert told == set(names(found))


def test_requirements_are_followed_where_they_are_missing() -> None:
    graph = {
        "hcma-fast": [
            "a>=2", "b", 'c; python_version < "3.12"', 'triton>=3; extra == "gpu"',
            'extra-only; extra == "gpu"',
        ],
        "a": ["d>=1", "b"],
        "b": ["e"],
        "d": [],
    }  # fmt: skip

    def requires(name: str) -> list[str]:
        return graph.get(name, [])

    # b is there, so that what b needs is not asked for; a is too old
    assert missing({"a": "1", "b": "1"}, requires, python="3.12") == ["a>=2", "d>=1", "triton>=3"]
    assert missing({"a": "2", "b": "1", "triton": "3.1"}, requires, python="3.12") == []
    pins = {"a": "2.5"}
    found = missing({"triton": "3.6"}, requires, python="3.11", pins=pins)
    assert found == ["a==2.5", "b", "c", "d>=1", "e"]


def test_nothing_is_missing_here() -> None:
    assert missing_here() == []
    assert list(requires_here("no-such-distribution")) == []


def test_a_list_of_packages() -> None:
    assert parse_freeze("Torch==2.11.0+cu130\n# x\ny @ file:///y\n") == {"Torch": "2.11.0+cu130"}
    with pytest.raises(InputError, match="lists no installed package"):
        parse_freeze("Package Version\n")


def test_what_pip_is_asked_for(tmp_path: Path) -> None:
    command = pack.download_command(["a==1"], tmp_path, "3.12")
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "3.12", "a==1"} <= set(command)
    assert "--no-deps" in pack.wheel_command(ROOT, tmp_path)


def test_more_than_fits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.whl").write_bytes(b"1" * 2**20)
    assert pack.check_size(tmp_path) == 1
    with (tmp_path / "large.whl").open("wb") as file:
        file.truncate(64 * 2**20)
    with pytest.raises(OutputError, match="larger than 64 MiB"):
        pack.check_size(tmp_path)
    listed = tmp_path / "list.txt"
    listed.write_text(IMAGE)
    with pytest.raises(OutputError, match="not empty"):
        pack.pack(listed, tmp_path, "3.12", ROOT)
