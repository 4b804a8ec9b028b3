"""docs/train.md cannot go stale: each of its commands is parsed by what would parse it for real."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from typer.main import get_command

from hcma_fast.cli.app import app, main
from hcma_fast.config import PRESETS
from hcma_fast.models.checkpoint.info import read_info
from hcma_fast.train.data.emoji_scenes import write_coco

PAGE = Path(__file__).parents[2] / "docs" / "train.md"
CARD = PRESETS["tiny"] / "README.md"
#: of other people's programs, whose options we do not check
FOREIGN = ("pip", "curl", "unzip")


def blocks(page: Path) -> list[list[str]]:
    """The commands of each block of shell lines."""
    found = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [
        [line for line in block.splitlines() if line and not line.startswith("#")]
        for block in found
    ]


LINES = [line for block in blocks(PAGE) for line in block]


class Parsed(BaseException):
    """Ends a program once it has its options; no ``except Exception`` of the program stops it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options


Parse = Callable[[str], dict[str, Any]]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Options of a line as its own program parses them; nothing is run."""
    real = argparse.ArgumentParser.parse_args

    def command(arguments: list[str]) -> dict[str, Any]:
        group: Any = get_command(app)
        while hasattr(group, "commands"):
            name, *arguments = arguments
            group = group.commands[name]
        return dict(group.make_context(name, arguments).params)

    def module(name: str, arguments: list[str]) -> dict[str, Any]:
        if name == "hcma_fast.cli.app":
            return command(arguments)

        def stop(self: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
            raise Parsed(vars(real(self, *given)))

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [name, *arguments])
            with pytest.raises(Parsed) as caught:
                importlib.import_module(name).main()
        return caught.value.options

    def launched(parser: argparse.ArgumentParser, arguments: list[str]) -> dict[str, Any]:
        found = parser.parse_args(arguments)
        assert found.module, "-m is missing"
        inner = module(found.training_script, found.training_script_args)
        return vars(found) | {"launched": inner}

    def line(text: str) -> dict[str, Any]:
        head, *arguments = shlex.split(text)
        if head == "hcma-fast":
            return command(arguments)
        if head == "torchrun":
            return launched(get_args_parser(), arguments)
        if head == "accelerate":
            assert arguments.pop(0) == "launch"
            return launched(launch_command_parser(), arguments)
        assert head == "python" and arguments.pop(0) == "-m", f"whose command is this? {text}"
        return module(arguments[0], arguments[1:])

    return line


def one_node(line: str, rank: int = 0) -> str:
    """A line of many machines with its placeholders filled in, all on this machine."""
    return line.replace("RANK", str(rank)).replace("FIRST", "127.0.0.1")


@pytest.mark.parametrize("line", [line for line in LINES if line.split()[0] not in FOREIGN])
def test_every_line_of_the_page_parses(line: str, parse: Parse) -> None:
    assert parse(one_node(line))


def test_the_page_has_what_it_is_for() -> None:
    heads = {line.split()[0] for line in LINES} - set(FOREIGN)
    assert heads == {"hcma-fast", "python", "torchrun", "accelerate"}
    assert sum("hcma_fast.train." in line for line in LINES) >= 3
    assert sum("train text" in line or "train vae" in line for line in LINES) == 3
    assert sum("--nnodes 2" in line or "--num_machines 2" in line for line in LINES) == 2


@pytest.mark.parametrize(
    "line",
    [
        "hcma-fast train aligner --cache x --out y --epoch-count 3",
        "hcma-fast train cache --out y",
        "hcma-fast train vae --step-count 3",
        "python -m hcma_fast.train.tiny.unet --steps 0",
        "python -m hcma_fast.train.tiny.pack --rate 30",
        "torchrun --node-count 2 -m hcma_fast.cli.app train aligner --cache x --out y",
        "torchrun --nnodes 2 -m hcma_fast.cli.app train aligner --cache x --output y",
        "accelerate launch --machines 2 -m hcma_fast.cli.app train aligner --cache x --out y",
    ],
)
def test_a_stale_line_would_be_found(line: str, parse: Parse) -> None:
    with pytest.raises((SystemExit, Exception)) as caught:
        parse(line)
    # argparse's way to end, and click's usage errors, whose base class typer hides
    code = caught.value.code if isinstance(caught.value, SystemExit) else caught.value.exit_code
    assert code == 2


def test_the_recipe_is_the_model_cards_and_gives_the_embedded_settings(parse: Parse) -> None:
    (recipe,) = [block for block in blocks(PAGE) if "train text" in block[0]]
    (cards,) = [block for block in blocks(CARD) if "train text" in block[0]]
    assert recipe == cards
    (line,) = [line for line in recipe if "tiny.pack" in line]
    options, info = parse(line), read_info(PRESETS["tiny"])
    assert info is not None
    settings = info.alignment.model_dump()
    given = {name: value for name, value in options.items() if name in settings}
    assert len(given) == 6
    assert {name: settings[name] for name in given} == given | {"window": tuple(given["window"])}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_the_line_for_two_machines_runs_as_two_nodes_on_this_one(tmp_path: Path) -> None:
    """The dry run: the page's torchrun line twice, as ranks 0 and 1, one CPU process each."""
    write_coco(tmp_path / "data", "train", 50)
    cache = tmp_path / "latents"
    made = ["--data", tmp_path / "data", "--split", "train", "--out", cache, "--no-flip"]
    assert main(["train", "cache", *map(str, made)]) == 0
    small = f"--cache {cache} --cpu --batch 16 --micro-batch 4 --max-steps 2 --log-every 1"
    (line,) = [line for line in LINES if line.startswith("torchrun") and "--nnodes" in line]
    # later options win; GPUs, data and length are all that differs from the page
    launcher, module, arguments = line.partition(" -m ")
    launcher += f" --nproc-per-node 1 --master-port {free_port()}"
    arguments += f" {small} --workers 1 --out {tmp_path / 'two'}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    nodes = []
    for rank in (0, 1):
        words = shlex.split(one_node(launcher + module + arguments, rank))
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        nodes.append(
            subprocess.Popen(
                command,
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        ends = [node.communicate(timeout=1200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], ends
    # the first rank alone prints where the best aligner is
    assert [out.strip() for out, _ in ends] == [str(tmp_path / "two" / "aligner"), ""]

    alone = ["train", "aligner", *small.split(), "--bf16", "--out", str(tmp_path / "one")]
    assert main(alone) == 0
    losses = []
    for name in ("two", "one"):
        log = (tmp_path / name / "aligner-run" / "log.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, log)])
    assert len(losses[0]) == 3
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    # after a step, bfloat16 rounds weights that differ in their last bit
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
