"""``hcma-fast generate``: prompts and layouts to image files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hcma_fast.box_lists import BoxNotation
from hcma_fast.cli.generate.jobs import Job, check_outputs
from hcma_fast.cli.generate.lines import Line, read_lines
from hcma_fast.cli.generate.render import Plan, is_engine_folder, open_pipeline, render
from hcma_fast.cli.generate.sidecar import read_sidecar
from hcma_fast.cli.options import (
    Aligner,
    BatchSize,
    ClipSkip,
    Gligen,
    LoraFiles,
    Vae,
    backend_option,
    json_option,
    model_option,
    model_options,
    precision_option,
)
from hcma_fast.cli.output import output_folder, print_json, print_note
from hcma_fast.cli.request_options import request_options, request_values, with_request_options
from hcma_fast.config import GRAD_BACKENDS, check_backend
from hcma_fast.errors import UsageError
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.options import Lora, ModelOptions
from hcma_fast.runtime.request import Request

_DEFAULT_BACKEND = "onnxruntime"
_FIELDS = ", ".join(name for name in Request.model_fields if name not in ("prompt", "layout"))


def _generate(
    *,
    request_type: type[Request],
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PHRASE:X0,Y0,X1,Y1",
            help="In shares of the image, such as dog:0.05,0.3,0.45,0.9; repeat it for more boxes.",
        ),
    ] = None,
    layout: Annotated[
        Path | None, typer.Option(help="JSON file with phrases and boxes, instead of --box.")
    ] = None,
    box_format: Annotated[
        Literal["xyxy", "xywh"] | None,
        typer.Option(help="What the four numbers of a box are.", show_default="xyxy"),
    ] = None,
    box_units: Annotated[
        Literal["share", "pixel"] | None,
        typer.Option(help="Shares of the image, or pixels.", show_default="share"),
    ] = None,
    box_size: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="WIDTH HEIGHT",
            help="Size of the image that boxes in pixels belong to.",
            show_default="none",
        ),
    ] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="JSONL file (a line per image) or JSON array: prompt, and if wanted phrases, "
            f"boxes, id, box_format, box_units, box_size, {_FIELDS}.",
        ),
    ] = None,
    from_sidecar: Annotated[
        Path | None,
        typer.Option(
            help="Reproduce an image from its sidecar (.json), into --out; all settings are the "
            "sidecar's."
        ),
    ] = None,
    allow_download: Annotated[
        bool,
        typer.Option(
            "--allow-download",
            help="Fetch the model that --from-sidecar names from the hub, if it is not here.",
        ),
    ] = False,
    model: Annotated[str | None, model_option("tiny")] = None,
    aligner: Aligner = None,
    gligen: Gligen = None,
    vae: Vae = None,
    clip_skip: ClipSkip = None,
    lora: LoraFiles = None,
    backend: Annotated[str | None, backend_option("onnxruntime")] = None,
    verify_key: Annotated[
        Path | None,
        typer.Option(
            help="Public key (PEM) that must have signed the engine folder of --model.",
            show_default="none",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu or cuda.", show_default="cuda for TensorRT and engines built for it, else cpu"
        ),
    ] = None,
    precision: Annotated[str | None, precision_option("float32")] = None,
    grad_backend: Annotated[
        str | None,
        typer.Option(
            help=f"What computes the alignment gradient: {', '.join(GRAD_BACKENDS)}.",
            show_default="the backend",
        ),
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Replay one captured CUDA graph per evaluation. Not yet run on a GPU.",
            show_default="no",
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(min=1, help="Images per prompt, seeds counting up.", show_default="1"),
    ] = None,
    batch_size: BatchSize = 4,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write a picture with the boxes drawn in.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the images.", show_default="the current one")
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Leave out images that are in --out already, whole and of the same request and "
            "settings: to go on after an interruption.",
        ),
    ] = False,
    json_: Annotated[bool, json_option("the paths")] = False,
    **arguments: Any,
) -> None:
    """Generate images; each gets a JSON sidecar with all that is needed to make it again.

    Prints one path per line. The model's own settings are those of its hcma.json.
    """
    options = request_values(arguments, request_type)
    prompt = options.pop("prompt", None)
    given = {
        option.flag: arguments[option.name]
        for option in request_options(request_type)
        if option.name != "prompt"
    }
    _check_combination(
        {"--prompt": prompt, "--input": input_, "--from-sidecar": from_sidecar},
        boxes={"--box": box, "--layout": layout},
        others={
            "--num-images": num_images,
            "--box-format": box_format,
            "--box-units": box_units,
            "--box-size": box_size,
            **given,
        },
    )
    if allow_download and from_sidecar is None:
        raise UsageError(
            "--allow-download goes with --from-sidecar",
            remedy="Leave it out: a hub id that you give as --model is fetched anyway.",
        )
    # checked once, before a file is read
    checked = request_type("", **options)
    options = {name: getattr(checked, name) for name in options}
    original = read_sidecar(from_sidecar, request_type) if from_sidecar else None
    if original is not None:
        origin = original.origin
        jobs = [Job(Path(origin.image).stem, original.request)]
        plan = Plan(
            model=model or origin.model,
            aligner=aligner or (Path(origin.aligner) if origin.aligner else None),
            backend=backend or (None if is_engine_folder(model or "") else origin.backend),
            device=device or (origin.device if backend in (None, origin.backend) else None),
            precision=precision or origin.precision,
            grad_backend=grad_backend or origin.grad_backend,
            cuda_graphs=origin.cuda_graphs if cuda_graphs is None else cuda_graphs,
            verify_key=verify_key,
            offline=model is None and not allow_download,
            options=ModelOptions(
                gligen or origin.gligen,
                vae or origin.vae,
                origin.clip_skip if clip_skip is None else clip_skip,
                tuple(Lora.parse(text) for text in lora or origin.loras),
            ),
        )
    else:
        notation = BoxNotation(box_format or "xyxy", box_units or "share", box_size)
        if input_ is not None:
            lines = read_lines(input_)
        else:
            lines = [Line({"prompt": prompt, "layout": _read_layout(box or [], layout, notation)})]
        jobs = [
            job
            for line in lines
            for job in line.jobs(
                options,
                num_images=num_images or 1,
                notation=notation,
                request_type=request_type,
            )
        ]
        name = model or "tiny"
        plan = Plan(
            name,
            aligner,
            backend or (None if is_engine_folder(name) else _DEFAULT_BACKEND),
            device,
            precision,
            grad_backend,
            bool(cuda_graphs),
            verify_key,
            options=model_options(gligen, vae, clip_skip, lora),
        )
    if plan.backend is not None:
        check_backend(plan.backend, "auto")
    # the sidecar fixes the seed, and its own folder has the first image
    other = "another --out" + ("" if original is not None else " or --seed")
    check_outputs(jobs, out, force=force or skip_existing, other=other)
    with output_folder(out):
        pipe = open_pipeline(plan, original)
        written = render(
            pipe,
            plan,
            jobs,
            out,
            batch_size=batch_size,
            overlay=overlay,
            skip_existing=skip_existing,
            force=force,
        )
    if original is not None and written[0].record.origin.image_sha256 != origin.image_sha256:
        print_note(
            "note: the file differs from the sidecar's image_sha256. Another backend, version or "
            f"batch size (it was {origin.batch_size}) can change the last bits of pixels."
        )
    if json_:
        print_json({"images": [entry.as_json() for entry in written]})
    else:
        for entry in written:
            typer.echo(entry.image)


def _check_combination(
    sources: dict[str, object], boxes: dict[str, object], others: dict[str, object]
) -> None:
    """One source of prompts, one of boxes, and nothing that a sidecar already fixes."""
    chosen = [name for name, value in sources.items() if value is not None]
    shapes = [name for name, value in boxes.items() if value]
    if len(chosen) != 1:
        raise UsageError(
            "give exactly one of --prompt, --input and --from-sidecar",
            value=" ".join(chosen) or None,
            remedy="See hcma-fast generate --help.",
        )
    if len(shapes) > 1:
        raise UsageError(
            "--box and --layout exclude each other",
            remedy="Put all boxes into the layout file, or all on the command line.",
        )
    fixed = shapes + [name for name, value in others.items() if value is not None]
    if chosen == ["--input"] and shapes:
        raise UsageError(
            "the lines of --input bring their own boxes", value=shapes[0], remedy="Leave it out."
        )
    if chosen == ["--from-sidecar"] and fixed:
        raise UsageError(
            "the sidecar fixes this already",
            value=fixed[0],
            remedy="Leave it out, or use --prompt to make another image.",
        )


def _read_layout(boxes: Sequence[str], path: Path | None, notation: BoxNotation) -> Layout:
    if path is not None:
        return Layout.from_file(path, notation)
    parsed = [Layout.parse_box(text, notation) for text in boxes]
    return Layout([phrase for phrase, _ in parsed], [box for _, box in parsed])


def generate_command(request_type: type[Request] = Request) -> Callable[..., None]:
    """The command, with an option for every field of ``request_type``."""
    return with_request_options(_generate, request_type)


generate = generate_command()
