"""Packaging of hcma-fast: the top-level folders become sub-packages of ``hcma_fast``."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

#: package -> folder: every folder with an ``__init__.py``, those beside ``hcma_fast`` below it
PACKAGE_DIR = {
    ".".join(
        folder.parts if folder.parts[0] == "hcma_fast" else ("hcma_fast", *folder.parts)
    ): folder.as_posix()
    for top in ("hcma_fast", "kernels", "export", "train", "bench")
    for folder in sorted(
        init.parent.relative_to(ROOT) for init in (ROOT / top).rglob("__init__.py")
    )
}

PACKAGE_DATA = {
    "hcma_fast": [f"assets/**/*.{suffix}" for suffix in ("safetensors", "json", "txt", "md")],
    "hcma_fast.bench.quality.metrics.judge": ["assets/*"],
    "hcma_fast.bench.quality.metrics.likeness": ["assets/*"],
    "hcma_fast.train.data": ["assets/*"],
}

# Lower bounds are the releases of constraints-oldest.txt (`make test-oldest`); constraints.txt has
# those that are developed with.
INSTALL_REQUIRES = [
    # diffusers warns at every load, and holds the weights twice, where accelerate is missing
    "accelerate>=1.15,<2",
    "diffusers>=0.42,<1",
    "filelock>=3.16,<5",
    "huggingface_hub>=1.33,<3",
    "numpy>=2.2,<3",
    "onnx>=1.23,<2",
    "onnx-ir>=1.0,<2",
    "onnxscript>=0.7.2,<1",
    "packaging>=24,<27",
    "pillow>=11,<14",
    "platformdirs>=4.3,<5",
    "psutil>=6,<8",
    "pydantic>=2.10,<3",
    "rich>=13.9,<16",
    "safetensors>=0.8,<1",
    "torch>=2.11,<3",
    "transformers>=5.17,<6",
    "typer>=0.20,<1",
]

# `gpu` excludes `cpu` and `onnxruntime`: the wheels onnxruntime and onnxruntime-gpu write into the
# same folder, and the one installed last wins. pip cannot express this; README and
# `hcma-fast doctor` say it too. All other extras go together.
EXTRAS_REQUIRE = {
    # smaller than `cpu`: all that `make demo` needs
    "onnxruntime": ["onnxruntime>=1.24.1,<2"],
    "cpu": ["onnxruntime>=1.24.1,<2", "openvino>=2026.0"],
    # CUDA builds of torch pin their own triton (torch 2.13.0: 3.7.1), hence the wide range
    "gpu": ["onnxruntime-gpu>=1.24,<2", "triton>=3.6,<4"],
    "tensorrt": ["tensorrt>=11,<12"],
    "rtx": ["tensorrt-rtx-cu13>=1.7,<2"],
    # `build --sign-key`, `generate --verify-key`
    "sign": ["cryptography>=45,<51"],
    # optuna and matplotlib: `hcma-fast train tune-alignment`
    "train": [
        "matplotlib>=3.11,<4",
        "optuna>=5.0,<6",
        "tensorboard>=2.19,<3",
        "tokenizers>=0.22,<1",
    ],
    # draws EmojiScenes' art anew, for who changes it
    "art": ["resvg-py>=0.5,<1"],
    # torchmetrics' FID needs scipy
    "eval": [
        "faster-coco-eval>=1.7,<2",
        "matplotlib>=3.11,<4",
        "pyyaml>=6,<7",
        "scipy>=1.15,<2",
        "torchmetrics>=1.8,<2",
    ],
    "dev": [
        "cryptography>=45,<51",
        "hypothesis>=6.130,<7",
        # the notebook of examples/, run by a test
        "ipykernel>=7,<8",
        "nbclient>=0.11,<1",
        # make docs
        "pdoc>=16,<17",
        "mypy>=2.1,<3",
        # the reference for the COCO reader
        "pycocotools>=2.0.10,<3",
        "pytest>=9,<10",
        "pytest-timeout>=2.4,<3",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17,<0.18",
        "setuptools>=77",
        # engines are built, and kernels interpreted and compiled, without a GPU
        "tensorrt-rtx-cu13>=1.7,<2",
        "triton>=3.6,<4",
        "matplotlib>=3.11,<4",
        "optuna>=5.0,<6",
        "tensorboard>=2.19,<3",
        "tokenizers>=0.22,<1",
        # hcma-fast eval
        "faster-coco-eval>=1.7,<2",
        "pyyaml>=6,<7",
        "scipy>=1.15,<2",
        "torchmetrics>=1.8,<2",
    ],
}

setup(
    name="hcma-fast",
    version="0.1.0",
    description="Train, compile and serve grounded text-to-image generation with HCMA",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "train/data/assets/LICENSE*"],
    python_requires=">=3.11",
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data=PACKAGE_DATA,
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["hcma-fast = hcma_fast.cli.app:main"]},
)
