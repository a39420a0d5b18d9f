"""The audit that `make check` ends with."""

import json
import subprocess

import audit
import pytest

PINS = """pillow==12.0.0
Torch_Vision==0.28.0
colorama==0.4.6 ; sys_platform == 'win32'
triton==3.7 ; sys_platform != 'win32'
"""
INSTALLED = {"pillow": "12.0.0", "torch-vision": "0.28.0+cpu", "triton": "3.7"}


def test_what_is_installed_is_what_is_pinned():
    pins = audit.pinned(PINS)
    assert pins == {"pillow": "12.0.0", "torch-vision": "0.28.0", "triton": "3.7"}
    assert not audit.unpinned(pins, INSTALLED)
    wrong = audit.unpinned(pins, INSTALLED | {"pillow": "11.9.0", "colorama": "0.4.6"})
    assert wrong == ["colorama 0.4.6 is pinned to nothing", "pillow 11.9.0 is pinned to 12.0.0"]


@pytest.mark.parametrize(
    ("knows", "ends"), [({}, "Not audited"), ({"pillow"}, "No known holes"), ({"pillow", "torch"}, "torch 2.0: CVE-1")]
)
def test_a_hole_fails_and_silence_is_no_pass(knows, ends, monkeypatch, capsys):
    """`knows`: what the advisories have holes of."""

    def pip_audit(command, **_):
        asked = ["torch"] if "--path" in command else ["pillow"]
        told = [{"name": name, "version": "2.0", "vulns": [{"id": "CVE-1"}] * (name in knows)} for name in asked]
        return subprocess.CompletedProcess(command, 0, json.dumps({"dependencies": told}), "")

    monkeypatch.setattr(audit, "unpinned", lambda *_: [])
    monkeypatch.setattr(subprocess, "run", pip_audit)
    if "torch" in knows:
        with pytest.raises(SystemExit, match=ends):
            audit.main()
    else:
        audit.main()
        assert ends in capsys.readouterr().out
