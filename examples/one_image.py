"""One image from a caption and two boxes."""

from pathlib import Path

from hcma_fast import HCMAPipeline, Layout


def main(backend: str = "onnxruntime", steps: int = 50, out: Path = Path("example.png")) -> None:
    """Draw the image and print the losses of the last alignment."""
    pipe = HCMAPipeline.from_pretrained("tiny", backend=backend)
    layout = Layout(
        phrases=["dog", "pizza"],
        boxes=[[0.05, 0.25, 0.47, 0.67], [0.53, 0.45, 0.95, 0.87]],
    )
    result = pipe(
        "a dog to the left of a pizza on a green field",
        layout,
        seed=0,
        num_inference_steps=steps,
    )
    result.images[0].save(out)
    last = result.losses[-1]
    print("caption:", last.loss_global, "boxes:", last.loss_local[0, : len(layout)])


if __name__ == "__main__":
    main()
