"""Images from an engine folder, such as hcma-fast build --out engine makes.

hcma-fast build --model tiny --backend onnxruntime --out engine
python examples/engine_folder.py engine
"""

import sys
from pathlib import Path

from hcma_fast import HCMAPipeline, Layout


def main(folder: Path, steps: int = 50, out: Path = Path("example.png")) -> None:
    """The backend is the folder's own; its files are checked against their hashes."""
    pipe = HCMAPipeline.from_pretrained(folder)
    layout = Layout(phrases=["dog"], boxes=[[0.1, 0.2, 0.6, 0.9]])
    result = pipe("a dog on a green field", layout, seed=0, num_inference_steps=steps)
    result.images[0].save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
