"""run=workspace, as far as the wire: what a W&B server is sent. What it makes of that was not seen."""

import json
import sys

import pytest
import wandb
from wandb_api import server

from clipfix.__main__ import main


@pytest.fixture
def clipfix(tmp_path, monkeypatch):
    """The command in an empty folder, on a machine whose user W&B does not know."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # `main` sets it

    def command(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["clipfix", "run=workspace", *arguments])
        wandb.teardown()  # it keeps the settings of its first use
        try:
            main()
        finally:
            wandb.teardown()

    return command


def test_the_workspace_is_sent_as_a_new_view(clipfix, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with server() as (address, sent):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        clipfix("logger.wandb.project=repairs", "eval=long", "eval.shards=x")
        clipfix("logger.wandb.entity=team")
    assert f"Workspace: {address}/me/repairs?nw=v\n" in capsys.readouterr().out
    view, of_team = sent
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "repairs", "clipfix")
    assert "id" not in view
    assert of_team["entityName"] == "team"

    section = json.loads(view["spec"])["section"]
    (runs,) = section["runSets"]
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [
        ("config", "choices.value.method"),
        ("config", "choices.value.backbone"),
    ]
    panels = {
        each["name"]: [panel["config"] for panel in each["panels"]] for each in section["panelBankConfig"]["sections"]
    }
    assert list(panels)[:3] == ["selection", "eval", "report"]
    assert panels["selection"][0]["metrics"] == ["selection/retrieval_long/mean"]
    assert [panel["metricRegex"] for panel in panels["eval"]] == [
        "^eval/[^/]+/mean$",
        "^eval/retrieval_short/",
        "^eval/retrieval_long/",
        "^eval/lengths/",
    ]
    assert panels["reconstructions"][0]["mediaKeys"] == ["reconstructions/grid"]
    drawn = [panel for found in panels.values() for panel in found if "metrics" in panel]
    assert {(panel["xAxis"], panel["groupAgg"], panel["groupArea"]) for panel in drawn} == {
        ("trainer/global_step", "mean", "stddev")
    }
    assert not list(tmp_path.glob("outputs/*/*"))


def test_what_a_new_method_logs_has_a_section_of_its_own(clipfix, monkeypatch, tmp_path):
    """From the files of the runs in outputs/; names that a section is for already add none."""
    run = tmp_path / "outputs" / "a" / "0"
    images = run / "wandb" / "offline-run-1" / "files" / "media" / "images"
    for name in ("mood/grid_5_970e98cf9d", "sketch/grid_7_0a1b2c", "report/scores_1_ff"):
        (images / name).parent.mkdir(parents=True)
        (images / f"{name}.png").touch()
    (run / "metrics.csv").write_text("step,epoch,mood/high,train/loss,trainer/global_step\n1,0,1,1,1\n")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with server() as (address, sent):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        clipfix("eval=none")
    sections = json.loads(sent[0]["spec"])["section"]["panelBankConfig"]["sections"]
    panels = {each["name"]: [panel["config"] for panel in each["panels"]] for each in sections}
    assert len(panels) == len(sections)
    assert list(panels)[-2:] == ["mood", "sketch"]
    assert panels["mood"][0]["metricRegex"] == "^mood/"
    assert panels["mood"][1]["mediaKeys"] == ["mood/grid"]
    assert [panel["mediaKeys"] for panel in panels["sketch"]] == [["sketch/grid"]]
    assert "trainer" not in panels


@pytest.mark.parametrize(
    ("arguments", "installed", "words"),
    [
        ([], True, "`wandb login` or set WANDB_API_KEY."),
        ([], False, "pip install 'clipfix[workspace]'"),
        (["logger=csv"], True, "set logger=wandb."),
    ],
)
def test_what_keeps_it_from_being_saved_is_told_in_one_line(arguments, installed, words, clipfix, monkeypatch):
    if not installed:
        monkeypatch.setattr("clipfix.cli.verbs.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        clipfix(*arguments)
    first, last = str(exit_.value.code).splitlines()
    assert first.endswith(words)
    assert "HYDRA_FULL_ERROR" in last
