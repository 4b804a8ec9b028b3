"""Many requests with different settings, in shared batches."""

from pathlib import Path

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.runtime.generator import BatchGenerator, Request


def main(backend: str = "onnxruntime", steps: int = 50, out: Path = Path("example-batch")) -> None:
    """Write an image per request into the folder."""
    out.mkdir(exist_ok=True)
    pipe = HCMAPipeline.from_pretrained("tiny", backend=backend)
    cat = Layout(phrases=["cat"], boxes=[[0.15, 0.15, 0.85, 0.85]])
    requests = [
        Request("a cat on a pink table", cat, seed=1, num_inference_steps=steps),
        Request(
            "a cat on a pink table", cat, seed=1, num_inference_steps=steps, negative_prompt="a dog"
        ),
        Request("a dog", seed=2, num_inference_steps=steps + 2),
    ]
    for result in BatchGenerator(pipe, max_batch=8).generate(requests):
        if result.image is None:
            print(f"request {result.index} failed: {result.error}")
        else:
            result.image.save(out / f"{result.index}.png")


if __name__ == "__main__":
    main()
