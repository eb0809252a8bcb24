"""Packaging of lightdeco; the settings of its tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "examples": ["scikit-learn>=1.4", "matplotlib>=3.8", "torchvision>=0.21"],
    "deepspeed": ["deepspeed>=0.18"],
    "fp8": ["torchao>=0.15"],
    "plot": ["matplotlib>=3.8"],
    "report": ["plotly>=6.0"],
    "stats": ["psutil>=6.0", "nvidia-ml-py>=12.0"],
    "torchmetrics": ["torchmetrics>=1.4"],
    "vision": ["torchvision>=0.21"],
    "wandb": ["wandb>=0.31"],
    "comet": ["comet-ml>=3.58"],
    # Both `neptune` and `neptune-client` 1.14 provide the module `neptune`; two distributions of one module clash.
    "neptune": ["neptune-client>=1.14"],
    "mlflow": ["mlflow>=3.17"],
}

DEV = [
    "basedpyright>=1.29",
    "coverage>=7.6",
    "hypothesis>=6.100",
    "mypy>=1.15",
    "psutil>=6.0",
    "pytest>=8.3",
    "pytest-randomly>=3.16",
    "ruff>=0.11",
    *EXTRAS["examples"],
    *EXTRAS["fp8"],
    *EXTRAS["torchmetrics"],
    *EXTRAS["report"],
    *EXTRAS["wandb"],
    *EXTRAS["comet"],
    *EXTRAS["neptune"],
    *EXTRAS["mlflow"],
]

setup(
    name="lightdeco",
    version="0.1.0",
    description="Decorators on a plain nn.Module, and fit(): a PyTorch training library on top of accelerate",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["lightdeco", "lightdeco.*"]),
    package_data={"lightdeco": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.10",
        "numpy>=1.26",
        "rich>=13.7",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "torch>=2.6",
        "typing_extensions>=4.12",
        "xxhash>=3.5",
    ],
    extras_require={
        **EXTRAS,
        "dev": DEV,
        # DeepSpeed is built where it is installed: by its own name alone.
        "all": sorted({each for name, extra in EXTRAS.items() for each in extra if name != "deepspeed"}),
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
