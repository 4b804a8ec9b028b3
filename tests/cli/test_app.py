"""The frame around all commands: exit codes, messages, and what start-up may import."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hcma_fast import __version__
from hcma_fast.cli import doctor
from hcma_fast.errors import BackendError, EngineError, HcmaError, InputError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, cli: Any) -> Callable[[BaseException], Any]:
    """Run a command that raises the given error."""

    def run(error: BaseException) -> Any:
        def examine() -> None:
            raise error

        monkeypatch.setattr(doctor, "examine", examine)
        return cli("doctor")

    return run


def test_version_and_help(cli: Any) -> None:
    result = cli("--version")
    assert (result.code, result.out.strip()) == (0, f"hcma-fast {__version__}")
    result = cli("generate", "--help")
    assert result.code == 0 and "--from-sidecar" in result.out


def test_the_module_runs_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hcma_fast.cli.app", "generate", "--prompt", "a", "--box=x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: a box must read") and done.stderr.count("\n") == 1


def test_what_light_commands_import() -> None:
    """Start-up time is that of the imports: the library's, the help's, the commands'."""
    code = """
import contextlib, io, sys
HEAVY = {"torch", "diffusers", "transformers", "onnxruntime"}
LATER = HEAVY | {"numpy", "pydantic", "rich", "PIL", "typer"}

def own():
    return {name for name in sys.modules if name.startswith("hcma_fast.")}

import hcma_fast
assert not LATER & set(sys.modules) and not own(), own()
from hcma_fast.cli.app import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["--version"]) == 0 and main(["--help"]) == 0
    assert not (LATER - {"typer"}) & set(sys.modules)
    assert own() <= {
        "hcma_fast.cli", "hcma_fast.errors", "hcma_fast.program",
        *(f"hcma_fast.cli.{name}" for name in ("app", "hints", "verbs")),
    }, own()
    assert main(["generate", "--help"]) == 0 and main(["doctor"]) == 0
    assert not HEAVY & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["generate", "--prompt"],
        ["generate", "--prompt", "x", "--seed", "-1"],
        ["generate", "--prompt", "x", "--steps", "1"],
        ["generate", "--prompt", "x", "--guidance-scale", "0.5"],
        ["generate", "--prompt", "x", "--eta0", "nan"],
        ["generate", "--prompt", "x", "--nonsense"],
    ],
)
def test_wrong_usage_is_exit_2(cli: Any, argv: list[str]) -> None:
    cli(*argv).failed(2)


def test_the_parser_s_errors_are_like_ours(cli: Any) -> None:
    cli("generate", "--promt", "x").failed(2, "--promt", "--prompt", "See hcma-fast generate -h.")
    cli("bench", "rn").failed(2, "'rn'", "Did you mean 'run'?", "See hcma-fast bench -h.")
    for words in (["--" + "x" * 5_000], ["--\x1b[31mred"], ["generate", "--steps", "\x1b]0;t\x07"]):
        result = cli(*words)
        result.failed(2)
        line = result.err.strip()
        assert len(line) <= len("error: ") + 500 and line.isprintable()
    for words in ([], ["bench"]):
        result = cli(*words)
        assert result.code == 2 and result.err.startswith("Usage: hcma-fast")


@pytest.mark.parametrize("kind", [HcmaError, InputError, BackendError, EngineError])
def test_a_known_error_is_one_line_with_its_own_code(failing: Any, kind: type[HcmaError]) -> None:
    message = "a [bold]word[/bold]\nand more " + "x" * 200
    result = failing(kind(message, value=[1, 2], remedy="Do [this]."))
    result.failed(kind.exit_code, "a [bold]word[/bold] and more", "[1, 2]", "Do [this].")
    assert len(result.err.splitlines()) == 1


def test_a_full_disk_is_exit_3(failing: Any) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/some/file")
    failing(error).failed(3, "No space left on device", "/some/file")


def test_no_memory_is_exit_5(failing: Any) -> None:
    failing(MemoryError()).failed(5, "out of memory", "--batch-size")


@pytest.mark.parametrize("error", [ZeroDivisionError("by [zero]"), OSError("no errno")])
def test_a_bug_asks_for_a_report(failing: Any, error: Exception) -> None:
    failing(error).failed(1, "bug", str(error), "HCMA_FAST_DEBUG=1")


def test_debug_shows_the_traceback(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCMA_FAST_DEBUG", "1")
    for error, code in ((ZeroDivisionError("oops"), 1), (InputError("bad", remedy="No."), 3)):
        result = failing(error)
        assert result.code == code
        assert "Traceback" in result.err and str(error) in result.err


def test_an_interrupt_is_exit_130(failing: Any) -> None:
    result = failing(KeyboardInterrupt())
    assert result.code == 130
    assert "Traceback" not in result.err


def test_bench_replaces_its_own_files_only(cli: Any, tmp_path: Path) -> None:
    for name in ("overhead.md", "bench.json"):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_text("{}")
        command = ("bench", "run", "overhead", "--quick", "--out", folder)
        cli(*command, "--model", "sd14").failed(3, name, "not replaced", "--out")
        assert (folder / name).read_text() == "{}" and len(list(folder.iterdir())) == 1


def test_options_of_other_programs_get_a_hint(cli: Any) -> None:
    for words, hint in {
        ("a dog",): 'Write a caption as --prompt "a dog".',
        ("--prompt", "a", "--cfg", "7"): "Use --guidance-scale.",
        ("--prompt", "a", "--cfg=7"): "Use --guidance-scale.",
        ("--prompt", "a", "--width", "512"): "hcma-fast build --height H --width W",
        ("--prompt", "a", "--loras", "x"): "Use --lora FILE:SCALE",
        ("--prompt", "a", "--scheduler", "ddim"): "Use --sampler.",
    }.items():
        cli("generate", *words).failed(2, hint)


def test_an_unknown_backend_is_wrong_usage(cli: Any) -> None:
    for command in (("generate", "--prompt", "a"), ("build",)):
        cli(*command, "--backend", "magic").failed(2, "unknown backend", "magic", "onnxruntime")
