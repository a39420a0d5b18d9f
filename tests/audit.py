"""Dependencies of `make check`: each installed one is pinned, and none has a known hole, where that can be asked.

    python tests/audit.py

Holes are looked up by pip-audit in the package index's advisories. Whether it can reach them is told by a release that
is known to have some; where it cannot, the pins stand alone as the bill of materials.
"""

import json
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.markers import Marker
from packaging.utils import canonicalize_name

PINS = Path(__file__).parents[1] / "constraints.txt"
PIP_AUDIT = "pip-audit@2.10.1"
WITH_HOLES = "pillow==9.0.0"  # CVE-2022-22817 among others
INSTALLERS = {"pip", "setuptools", "uv", "wheel"}  # of the environment itself


def pinned(text: str) -> dict[str, str]:
    """The versions of a file of pins, those of this platform and Python."""
    found = {}
    for line in text.splitlines():
        release, _, marker = line.partition(";")
        if not marker or Marker(marker.strip()).evaluate():
            name, _, version = release.strip().partition("==")
            found[canonicalize_name(name)] = version
    return found


def unpinned(pins: dict[str, str], installed: dict[str, str]) -> list[str]:
    """What is installed in another version than its pin, or without one."""
    wrong = []
    for name, version in sorted(installed.items()):
        plain = version.partition("+")[0]  # a build is not a release: torch 2.13.0+cpu is 2.13.0
        if plain != pins.get(name, "").partition("+")[0]:
            wrong.append(f"{name} {version} is pinned to {pins.get(name, 'nothing')}")
    return wrong


def holes(*what: str) -> list[str]:
    """What pip-audit knows of these releases; empty also where its data is out of reach."""
    command = [str(Path(sys.executable).parent / "uvx"), PIP_AUDIT, "--format", "json", "--progress-spinner", "off"]
    said = subprocess.run([*command, *what], capture_output=True, text=True, check=False).stdout
    found = json.loads(said)["dependencies"] if said.startswith("{") else []
    return [f"{one['name']} {one['version']}: {hole['id']}" for one in found for hole in one.get("vulns", [])]


def main() -> None:
    installed = {canonicalize_name(one.name): one.version for one in distributions()}
    installed = {name: version for name, version in installed.items() if name not in {*INSTALLERS, "clipfix"}}
    if wrong := unpinned(pinned(PINS.read_text()), installed):
        sys.exit("\n".join([*wrong, "`make pins` moves constraints.txt; `make clean install` installs by it."]))
    print(f"{len(installed)} packages, each of the version that constraints.txt pins.")
    with TemporaryDirectory() as folder:
        control = Path(folder, "control.txt")
        control.write_text(WITH_HOLES + "\n")
        if not holes("--requirement", str(control), "--no-deps", "--disable-pip"):
            print(f"Not audited: advisories cannot be reached from here ({WITH_HOLES} would have some).")
            return
    if found := holes("--path", sysconfig.get_path("purelib")):
        sys.exit("\n".join(found))
    print("No known holes.")


if __name__ == "__main__":
    main()
