"""README's tables say what the result files say."""

import json
import re
from pathlib import Path

import pytest
import tables
import yaml

ROOT = Path(__file__).parents[1]
WANTED = yaml.safe_load((ROOT / "benchmarks" / "tables.yaml").read_text())
FOLDERS = sorted((ROOT / "benchmarks" / "results").glob("*/results.json"))
METRICS = list(WANTED["columns"].values())


@pytest.fixture
def results(tmp_path):
    """Three seeds of each row, whose k-th row gains k points by every metric, give or take one."""
    for k, row in enumerate(WANTED["rows"]):
        for seed in range(3) if row["results"] else ():
            before = dict.fromkeys((f"eval/{name}" for name in METRICS), 50.0)
            after = dict.fromkeys(before, 50.0 + k + (seed - 1))
            folder = tmp_path / row["results"].replace("[0-9]", str(seed))
            folder.mkdir()
            told = {
                "seed": seed,
                "method": row["name"],
                "seconds": 60 * k,
                "scores": {"before": before, "after": after},
            }
            (folder / "results.json").write_text(json.dumps(told))
    return tmp_path


def test_rows_are_means_and_deviations_of_their_seeds(results):
    head, _, *rows = tables.methods(WANTED, results).splitlines()
    heads = [cell.strip() for cell in head.split("|")[3:7]]
    assert heads == ["look-alike pairs 50", "zero-shot shape 50", "long retrieval 50", "minutes"]
    told = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[2:5] for row in told] == [[f"+{k}.0 ± 1.0"] * 3 for k in range(6)] + [[""] * 3]
    assert [row[5] for row in told] == ["5", "5", "", "3", "4", "5", "230"]
    assert told[0][0] == "`diva`"
    assert told[0][6] == "[2407.20171](https://arxiv.org/abs/2407.20171)"


def test_a_changed_number_changes_the_readme_and_nothing_else(results):
    readme = (ROOT / "README.md").read_text()
    one = tables.rewritten(readme, tables.methods(WANTED, results))
    path = results / "fff-s1" / "results.json"
    path.write_text(path.read_text().replace('"eval/pairs/mean": 54.0', '"eval/pairs/mean": 83.0'))
    other = tables.rewritten(one, tables.methods(WANTED, results))
    changed = [(a, b) for a, b in zip(one.splitlines(), other.splitlines(), strict=True) if a != b]
    assert [(a.split("|")[3], b.split("|")[3]) for a, b in changed] == [(" +4.0 ± 1.0 ", " +13.7 ± 16.8 ")]
    outside = [re.sub(tables.BLOCK, "", text) for text in (readme, other)]
    assert outside[0] == outside[1]


def test_missing_and_mixed_files_are_named(results):
    (results / "diva-s0" / "results.json").unlink()
    with pytest.raises(ValueError, match=r"diva-s0/results\.json"):
        tables.methods(WANTED, results)
    facts = json.loads((results / "diva-s1" / "results.json").read_text())
    (results / "diva-s0" / "results.json").write_text(json.dumps(facts | {"seed": 0, "method": "another"}))
    with pytest.raises(ValueError, match=r"diva-s\[0-9\] \w+ 2 recipes"):
        tables.methods(WANTED, results)


@pytest.mark.skipif(not FOLDERS, reason="benchmarks/results holds no result file yet")
def test_the_readme_is_what_its_result_files_say():
    readme = (ROOT / "README.md").read_text()
    made = tables.rewritten(readme, tables.methods(WANTED, ROOT / "benchmarks" / "results"))
    assert made == readme, "run `make tables`"


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.parent.name)
def test_kept_results_name_no_folder_of_the_machine_that_made_them(path):
    assert not re.search(r'"/\w+/', path.read_text())
