"""doctor: finds what is there, says why the rest is not, and never fails."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from hcma_fast.cli import doctor
from hcma_fast.config import BACKENDS


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The only distributions that are found; a test adds to it."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    return versions


def test_json_is_valid_and_complete(cli: Any) -> None:
    result = cli("doctor", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert set(report["backends"]) == set(BACKENDS)
    assert report["backends"]["eager"]["version"] == metadata.version("torch")
    assert set(report["libraries"]) == {"triton"}
    assert report["cpu_count"] >= 1


def test_text_names_what_json_holds(cli: Any) -> None:
    out = cli("doctor").out
    for word in ("python", "torch", "onnxruntime", "openvino", "GPU", "engine cache", "note: "):
        assert word in out


def test_missing_packages_have_a_reason_and_a_remedy(installed: dict[str, str]) -> None:
    installed["torch"] = "2.13.0"
    backends = doctor.examine().backends
    assert backends["eager"].version is None
    assert backends["eager"].problem == "diffusers, transformers not installed"
    assert backends["onnxruntime"].remedy == 'pip install "hcma-fast[cpu]"'
    libraries = doctor.examine().libraries
    assert backends["tensorrt-rtx"].remedy == 'pip install "hcma-fast[rtx]"'
    assert libraries["triton"].remedy == 'pip install "hcma-fast[gpu]"'


def test_the_gpu_build_serves_onnxruntime_and_both_conflict(installed: dict[str, str]) -> None:
    installed |= {"torch": "2", "onnx": "1", "onnxscript": "1", "onnxruntime-gpu": "1.32"}
    assert doctor.examine().backends["onnxruntime"].version == "1.32"
    assert doctor.examine().conflicts == []
    installed["onnxruntime"] = "1.32"
    assert "onnxruntime-gpu" in doctor.examine().conflicts[0]


def test_the_extras_exist_in_setup_py(installed: dict[str, str]) -> None:
    setup = Path(__file__).parents[2].joinpath("setup.py").read_text()
    report = doctor.examine()
    needed = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
    for found in [*report.libraries.values(), *(report.backends[name] for name in needed)]:
        assert found.remedy is not None
        extra = found.remedy.split("[")[1].split("]")[0]
        assert f'"{extra}": [' in setup


def test_gpus_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 580.1, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert doctor.examine().gpus == ["NVIDIA H100, 81559 MiB, 580.1, 9.0"]
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert doctor.examine().gpus == []


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("cuda: Optional[str] = None", None),
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ("cuda = '12.8'", "12.8"),
        ("hip: Optional[str] = '7.1'", None),
    ],
)
def test_it_says_what_torch_was_built_for_without_its_import(
    line: str,
    version: str | None,
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    installed["torch"] = "2.13.0"
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('a broken torch')")
    (package / "version.py").write_text(f"__version__ = '2.13.0'\ndebug = False\n{line}\n")
    spec = spec_from_file_location("torch", package / "__init__.py")
    monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor, "_gpus", lambda: ["NVIDIA A100"])
    report = doctor.examine()
    assert report.torch_cuda == version
    # a GPU beside a torch that cannot use it is what users ask about most
    assert any("without CUDA" in text for text in report.notes) == (version is None)


def test_a_hanging_nvidia_smi_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **options: Any) -> None:
        assert options["timeout"] > 0
        raise subprocess.TimeoutExpired("nvidia-smi", options["timeout"])

    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.examine().gpus == []


def test_cache_is_measured_and_not_created(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv("HCMA_FAST_CACHE", str(folder))
    cache = doctor.examine().cache
    assert (cache.exists, cache.writable, cache.size_bytes) == (False, True, 0)
    assert not folder.parent.exists()
    for name in ("onnxruntime-1", "onnxruntime-2", ".onnxruntime-3.part-x"):
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")
    cache = doctor.examine().cache
    assert (cache.exists, cache.engine_folders, cache.size_bytes) == (True, 2, 6)


def test_a_file_as_cache_is_not_writable(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "file"))
    assert not doctor.examine().cache.writable
    result = cli("doctor")
    assert result.code == 0 and "NOT WRITABLE" in result.out


@pytest.mark.parametrize("given", [None, "~/somewhere", "/tmp/elsewhere"])
def test_cache_is_where_the_builder_keeps_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    from hcma_fast.config import cache_root

    monkeypatch.delenv("HCMA_FAST_CACHE", raising=False)
    if given is not None:
        monkeypatch.setenv("HCMA_FAST_CACHE", given)
    assert doctor.examine().cache.folder == str(cache_root())
