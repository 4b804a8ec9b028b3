"""``hcma-fast generate``: prompts and layouts to image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hcma_fast.box_lists import SHARES, BoxNotation
from hcma_fast.cli.generate.jobs import Job, check_outputs, parse_request, read_requests
from hcma_fast.cli.generate.render import Plan, is_engine_folder, open_pipeline, render
from hcma_fast.cli.generate.sidecar import Sidecar, read_sidecar
from hcma_fast.cli.options import ClipSkip, Gligen, LoraFiles, Vae, model_options, precision_name
from hcma_fast.cli.output import output_folder, print_json, print_note
from hcma_fast.config import BACKENDS, GRAD_BACKENDS, MAX_SEED, check_backend
from hcma_fast.errors import UsageError
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.options import Lora, ModelOptions
from hcma_fast.sampling.savings import parse_savings

_DEFAULT_BACKEND = "onnxruntime"
_DEFAULT_STEPS = 50
_OWN = "the model's own"


def generate(
    *,
    prompt: Annotated[str | None, typer.Option(help="Caption of the image.")] = None,
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
            "boxes, seed, negative_prompt, id, box_format, box_units, box_size.",
        ),
    ] = None,
    from_sidecar: Annotated[
        Path | None,
        typer.Option(
            help="Make the image of this sidecar (.json) again, into --out like any other; all "
            "settings are the sidecar's."
        ),
    ] = None,
    allow_download: Annotated[
        bool,
        typer.Option(
            "--allow-download",
            help="Fetch the model that --from-sidecar names from the hub, if it is not here.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Preset, folder, single file, hub id or engine folder.", show_default="tiny"
        ),
    ] = None,
    aligner: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the aligner, for a model that has none.", show_default="the model's own"
        ),
    ] = None,
    gligen: Gligen = None,
    vae: Vae = None,
    clip_skip: ClipSkip = None,
    lora: LoraFiles = None,
    backend: Annotated[
        str | None,
        typer.Option(help=f"auto, or one of {', '.join(BACKENDS)}.", show_default="onnxruntime"),
    ] = None,
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
    precision: Annotated[
        str | None,
        typer.Option(
            callback=precision_name, help="float32, float16 or bfloat16.", show_default="float32"
        ),
    ] = None,
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
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_SEED,
            help="Seed of the first image; the others count up.",
            show_default="random",
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(min=1, help="Images per prompt, seeds counting up.", show_default="1"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, max=999, help="Sampling steps.", show_default="50")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=1, help="Weight of the guidance; 1 switches it off.", show_default=_OWN),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the image should not show.", show_default="nothing")
    ] = None,
    eta0: Annotated[
        float | None,
        typer.Option(min=0, help="Rate of the alignment; 0 switches it off.", show_default=_OWN),
    ] = None,
    align_window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="START END",
            help="When the alignment acts, in shares of the steps: 0.4 0.7.",
            show_default=_OWN,
        ),
    ] = None,
    grounding_beta: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of the steps that see the boxes.", show_default=_OWN
        ),
    ] = None,
    lambda_global: Annotated[
        float | None,
        typer.Option(min=0, help="Weight of the caption's alignment.", show_default=_OWN),
    ] = None,
    lambda_local: Annotated[
        float | None,
        typer.Option(min=0, help="Weight of the boxes' alignment.", show_default=_OWN),
    ] = None,
    saving: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Faster, for an approximate image: align_every=2, guidance_end=0.8, "
            "latent_dtype=bfloat16; repeat it. Slower, for the same image, to check the exact "
            "ones: skip_idle_alignment=false, contexts_once=false, skip_closed_gate=false (the "
            "last changes nothing where --grounding-beta is 1).",
            show_default="none, exact",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are computed at once.")] = 4,
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
    json_: Annotated[
        bool, typer.Option("--json", help="Print a JSON report instead of the paths.")
    ] = False,
) -> None:
    """Generate images; each gets a JSON sidecar with all that is needed to make it again.

    Prints one path per line. The model's own settings are those of its hcma.json.
    """
    overrides: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "eta0": eta0,
        "window": align_window,
        "grounding_beta": grounding_beta,
        "lambda_global": lambda_global,
        "lambda_local": lambda_local,
    }
    _check_combination(
        {"--prompt": prompt, "--input": input_, "--from-sidecar": from_sidecar},
        boxes={"--box": box, "--layout": layout},
        others={
            "--seed": seed,
            "--num-images": num_images,
            "--steps": steps,
            "--negative-prompt": negative_prompt,
            "--box-format": box_format,
            "--box-units": box_units,
            "--box-size": box_size,
            "--eta0": eta0,
            "--align-window": align_window,
            "--guidance-scale": guidance_scale,
            "--grounding-beta": grounding_beta,
            "--lambda-global": lambda_global,
            "--lambda-local": lambda_local,
            "--saving": saving,
        },
    )
    if allow_download and from_sidecar is None:
        raise UsageError(
            "--allow-download goes with --from-sidecar",
            remedy="Leave it out: a hub id that you give as --model is fetched anyway.",
        )
    savings = parse_savings(saving or ())
    original = read_sidecar(from_sidecar) if from_sidecar else None
    if original is not None:
        jobs = [_job_of(original)]
        plan = Plan(
            model=model or original.model,
            aligner=aligner or (Path(original.aligner) if original.aligner else None),
            backend=backend or (None if is_engine_folder(model or "") else original.backend),
            device=device or (original.device if backend in (None, original.backend) else None),
            precision=precision or original.precision,
            steps=original.num_inference_steps,
            overrides=original.settings.model_dump(exclude={"normalized"}),
            grad_backend=grad_backend or original.grad_backend,
            cuda_graphs=original.cuda_graphs if cuda_graphs is None else cuda_graphs,
            savings=original.savings,
            verify_key=verify_key,
            offline=model is None and not allow_download,
            options=ModelOptions(
                gligen or original.gligen,
                vae or original.vae,
                original.clip_skip if clip_skip is None else clip_skip,
                tuple(Lora.parse(text) for text in lora or original.loras),
            ),
        )
    else:
        notation = BoxNotation(box_format or "xyxy", box_units or "share", box_size)
        if input_ is not None:
            requests = read_requests(input_)
        else:
            given = _read_layout(box or [], layout, notation)
            notation = SHARES
            fields = {"phrases": list(given.phrases), "boxes": [list(b) for b in given.boxes]}
            requests = [("", parse_request({"prompt": prompt, **fields}))]
        jobs = [
            job
            for where, request in requests
            for job in request.jobs(
                num_images=num_images or 1,
                seed=seed,
                negative=negative_prompt or "",
                where=where,
                notation=notation,
            )
        ]
        name = model or "tiny"
        fallback = None if is_engine_folder(name) else _DEFAULT_BACKEND
        plan = Plan(
            name,
            aligner,
            backend or fallback,
            device,
            precision,
            steps or _DEFAULT_STEPS,
            overrides,
            grad_backend,
            bool(cuda_graphs),
            savings,
            verify_key,
            options=model_options(gligen, vae, clip_skip, lora),
        )
    if plan.backend is not None:
        check_backend(plan.backend, "auto")
    # the sidecar fixes the seed, and its own folder has the first image
    other = "another --out" + ("" if original is not None else " or --seed")
    check_outputs(jobs, out, force=force or skip_existing, other=other)
    with output_folder(out):
        pipe = open_pipeline(plan, jobs, original)
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
    if original is not None and written[0].record.image_sha256 != original.image_sha256:
        print_note(
            "note: the file differs from the sidecar's image_sha256. Another backend, version or "
            f"batch size (it was {original.batch_size}) can change the last bits of pixels."
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


def _job_of(sidecar: Sidecar) -> Job:
    return Job(
        stem=Path(sidecar.image).stem,
        prompt=sidecar.prompt,
        negative_prompt=sidecar.negative_prompt,
        layout=sidecar.layout,
        seed=sidecar.seed,
    )
