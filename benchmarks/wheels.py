"""Download the packages that `gpu.py` needs beside torch, torchvision, Lightning, timm and transformers.

    python benchmarks/wheels.py FOLDER              # for Python 3.12 on Linux, x86-64
    python -m pip install --no-index --no-deps --target SITE FOLDER/*.whl       # there; then PYTHONPATH=SITE:src

Versions are those of constraints.txt. The script prints the size of each file; all together have less than 20 MB.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WANTED = (
    "hydra-core", "omegaconf", "antlr4-python3-runtime", "open-clip-torch", "ftfy", "wcwidth", "diffusers",
    "webdataset",
    "braceexpand", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "importlib-metadata",
    "beartype",  # tests/conftest.py
)  # fmt: skip
OPTIONAL = ("memeff", "siglip-kernel")  # fff.py and contrastive.py compare with them if they are installed
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main(folder: Path, python: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower(): line.partition(" ")[0] for line in lines if "==" in line}
    wheels = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    wheels += [word for platform in PLATFORMS for word in ("--platform", platform)]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as environment:  # environments created by uv have no pip
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [f"{environment}/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        for name in (*WANTED, *OPTIONAL):
            what = ["--no-deps", pins.get(name, name)]
            if name == "antlr4-python3-runtime":  # published only as source
                subprocess.run([*pip, "wheel", *what, "-w", str(folder)], check=True)
            else:
                subprocess.run([*pip, "download", *what, *wheels, "-d", str(folder)], check=True)
    sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:6.2f} MB  {name}")
    print(f"{sum(sizes.values()):6.2f} MB in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    args = parser.parse_args()
    main(args.folder, args.python)
