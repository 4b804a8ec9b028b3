"""A field that a request gets is an option, a key of a line, and a field of the sidecar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from hcma_fast import Request, Result
from hcma_fast.cli.generate.command import generate_command
from hcma_fast.cli.generate.sidecar import read_sidecar
from hcma_fast.cli.request_options import request_options
from hcma_fast.config import Asked
from hcma_fast.errors import HcmaError, InputError, OutputError, UsageError
from hcma_fast.runtime.generator import BatchGenerator


class Styled(Request):
    """A request as it may look one day."""

    style: Literal["plain", "sketch"] = Field("plain", description="How it is drawn.")
    strength: Annotated[float, Asked("--style-strength")] = Field(
        0.5, ge=0, le=1, description="How much of it."
    )


@pytest.fixture
def run(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """``run("--prompt", "a")`` with the option of the new fields; stdout, or its own error."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(rich_markup_mode=None)
    app.command()(generate_command(Styled))

    def call(*argv: object) -> str:
        fixed = ("--model", random_checkpoint, "--backend", "eager", "--out", "out")
        words = [str(word) for word in (argv if "--help" in argv else (*fixed, *argv))]
        found = CliRunner().invoke(app, words, env={"COLUMNS": "100"})
        if isinstance(found.exception, HcmaError):
            raise found.exception
        assert found.exit_code == 0, found.output
        return found.stdout

    return call


def record(path: str) -> dict[str, Any]:
    found = json.loads(Path(path).read_text())
    assert isinstance(found, dict)
    return found


def test_a_new_field_is_found_everywhere(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []
    generate = BatchGenerator.generate

    def watched(self: BatchGenerator, requests: Any, *rest: Any) -> Any:
        asked.extend(requests)
        return generate(self, requests, *rest)

    monkeypatch.setattr(BatchGenerator, "generate", watched)
    # the command line, with its text, its limits and its default
    page = " ".join(run("--help").split())
    assert "--style <plain|sketch>" in page and "How it is drawn. [default: (plain)]" in page
    assert "--style-strength <float range>" in page and "0<=x<=1" in page
    run("--prompt", "a", "--seed", 1, "--steps", 2, "--style", "sketch", "--style-strength", 0.25)
    assert asked == [
        Styled("a", seed=1, num_inference_steps=2, style="sketch", strength=0.25).resolved(
            asked[0].settings
        )
    ]
    # the sidecar, which reads back to the same request
    assert (record("out/a-1.json")["style"], record("out/a-1.json")["strength"]) == ("sketch", 0.25)
    assert read_sidecar(Path("out/a-1.json"), Styled).request == asked[0]
    with pytest.raises(InputError, match=r"not a sidecar of hcma-fast: st"):
        read_sidecar(Path("out/a-1.json"))  # of a version without it, that would be another image
    # a line, which goes before the option
    lines = [{"prompt": "b", "style": "sketch"}, {"prompt": "c", "strength": 1}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("--input", "in.jsonl", "--seed", 1, "--steps", 2, "--style-strength", 0.75)
    found = [
        (record(f"out/{n}-1.json")["style"], record(f"out/{n}-1.json")["strength"]) for n in "bc"
    ]
    assert found == [("sketch", 0.75), ("plain", 1.0)]
    # an image again from its sidecar, and an interrupted run
    run("--from-sidecar", "out/b-1.json", "--out", "again")
    assert Path("again/b-1.json").exists()
    assert asked[-1] == asked[1] and record("again/b-1.json")["style"] == "sketch"
    same = ("--prompt", "a", "--seed", 1, "--steps", 2, "--style-strength", 0.25)
    report = json.loads(run(*same, "--style", "sketch", "--skip-existing", "--json"))
    assert report["images"][0]["skipped"] and report["images"][0]["record"]["style"] == "sketch"
    with pytest.raises(OutputError, match="with another style"):
        run(*same, "--skip-existing")


def test_a_wrong_value_is_told_in_the_words_of_who_asked(run: Callable[..., str]) -> None:
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "strength": 2}\n')
    with pytest.raises(InputError, match=r"^line 2: strength cannot have this value"):
        run("--input", "in.jsonl")
    with pytest.raises(UsageError, match=r"fixes this already.*--style-strength"):
        run("--from-sidecar", "in.jsonl", "--style-strength", 0)
    assert not Path("out").exists()


def test_every_field_has_one_option_and_says_what_it_is() -> None:
    options = request_options()
    names = [option.name for option in options]
    assert len(set(names)) == len(names)
    assert all(option.field.description and option.default for option in options)
    asked = {option.path[0] for option in options}
    # boxes have options of their own: --box, --layout
    assert asked == set(Request.model_fields) - {"layout"}
    assert {"steps", "align_window", "saving"} < set(names) and "normalized" not in names
    assert {"image", "seed", "losses", "error"} < set(Result.__dataclass_fields__)
