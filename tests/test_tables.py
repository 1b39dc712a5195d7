"""Labels, records and tables of results, and the tables of the documentation."""

import importlib.util
import sys
from pathlib import Path

import pytest

from latent_shift.evaluation import measures
from latent_shift.evaluation.measures import MEASURES
from latent_shift.evaluation.records import Record
from latent_shift.evaluation.statistics import AVERAGES
from latent_shift.evaluation.tables import find_seeds, make_table, parse_seeds
from latent_shift.files import read_json

ROOT = Path(__file__).parent.parent


def test_label_of_fills_in_the_timestep_and_accepts_other_versions():
    assert measures.label_of("motion_seen_at_375")[:2] == ("motion R² at t = 375", "higher")
    assert measures.label_of("motion_seen_at_375_frame_by_frame")[:2] == (
        "per-frame motion R² at t = 375",
        "",
    )
    assert measures.label_of("flicker_real") == measures.label_of("flicker")
    assert measures.label_of("older_measure")[:2] == ("older measure", "")


def test_labels_are_short_and_defined():
    labels = [label for measure in MEASURES.values() for label in measure.labels.values()]
    assert all(
        len(label.text.replace("at t = {timestep}", "").split()) <= 5 and label.definition for label in labels
    )
    assert len({label.text for label in labels}) == len(labels)


@pytest.mark.parametrize("name", ["seeds", "compare", "compare-earlier", "systems", "emoji"])
def test_record_reads_published_results(name):
    (path,) = (ROOT / "docs" / "results").rglob(f"{name}.json")
    results = read_json(path)
    for result in results:
        for record in result["records"]:
            read = Record.from_json(record)
            assert list(read.to_json().items()) == list(record.items())
            assert read.average is None or read.average in AVERAGES
    make_table(results)


def test_record_is_readable_by_version_0_1_0():
    """That version knows the average of R² by one name alone."""
    written = Record(
        1.0, 0.0, 2.0, 3, 9, measure="flicker", average="r_squared", native_size=[8, 8]
    ).to_json()
    assert written["average"] == "found" and written["made_at"] == [8, 8]
    assert Record.from_json({**written, "average": "r_squared"}).average == "r_squared"


def test_find_seeds_groups_systems_by_name():
    names = ["shift", "seed-1", "none", "none-seed-1", "none-seed-12", "seed-2", "other-seed-1", "seedling"]
    assert find_seeds(names) == {"none": ["none-seed-1", "none-seed-12"]}
    assert find_seeds(["attention", "seed-1", "shift"]) == {}  # of which system, only its author knows


def test_parse_seeds_reads_groups():
    assert parse_seeds(["a=b,c", "d=e"]) == {"a": ["b", "c"], "d": ["e"]}
    with pytest.raises(ValueError, match="--seeds a: expected SYSTEM=OTHER"):
        parse_seeds(["a"])


def tiny_results(values_of: dict[str, float], first: str) -> list[dict]:
    """Results of one measure, with differences from the first system."""
    protocol = dict(
        protocol="own", clips=3, num_frames=4, prompts_sha256="", reference={}, size=[8, 8], complete=True
    )
    results = []
    for name, value in values_of.items():
        difference = value - values_of[first]
        more = {
            "than": first,
            "value": difference,
            "low": difference - 1,
            "high": difference + 1,
            "samples": 3,
            "resamples": 9,
        }
        record = Record(
            value, value - 1, value + 1, 3, 9, measure="flicker", more=None if name == first else more
        )
        real = Record(9.0, 8.0, 10.0, 3, 9, measure="flicker_real")
        records = [record.to_json(), real.to_json()]
        results.append(
            {
                "system": {"system": name, "parameters": 2e6},
                "protocol": protocol,
                "records": records,
                "skipped": {},
            }
        )
    return results


def test_make_table_merges_training_seeds():
    results = tiny_results(
        {"shift": 1.0, "seed-1": 3.0, "none": 5.0, "none-seed-1": 9.0, "vdm": 7.0}, "shift"
    )
    table = make_table(results, {"shift": ["seed-1"], "none": ["none-seed-1"]})
    assert (table.names, table.num_seeds, table.measures) == (
        ["shift", "none", "vdm"],
        [2, 2, 1],
        ["flicker"],
    )
    shift, none, vdm, real = table.cells[0]
    assert (shift.seeds.mean, shift.seeds.least, shift.seeds.greatest, shift.more) == (2, 1, 3, None)
    assert (none.seeds.mean, none.seeds.least, none.seeds.greatest) == (7, 5, 9)
    assert (none.more.mean, none.more.least, none.more.greatest) == (6, 4, 8)
    assert vdm.seeds is vdm.more is None and vdm.record.difference.low == 5
    assert real.record.value == 9
    assert make_table(results).names == ["shift", "seed-1", "none", "none-seed-1", "vdm"]
    with pytest.raises(ValueError, match="--seeds: no results of seed-3; expected some of shift, seed-1"):
        make_table(results, {"shift": ["seed-3"]})


@pytest.fixture
def docs_tables():
    """docs/tables.py."""
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def docs_cells(docs_tables, monkeypatch):
    """docs/cells.py with the results of five tiny systems."""
    names = {"shift": 1.0, "shift-seed-1": 3.0, "none": 5.0, "none-seed-1": 9.0, "vdm": 7.0}
    files = {
        "tiny": tiny_results(names, "shift"),
        "tiny-training": [{"run": f"runs/{name}", "val_loss": loss / 10} for name, loss in names.items()],
    }
    module = sys.modules["cells"]
    monkeypatch.setattr(module, "read_result", files.__getitem__)
    return module


def test_docs_tables_show_range_over_training_seeds(docs_cells):
    results, form = docs_cells.Results("tiny"), docs_cells.decimals(1)
    assert results.table.names == ["shift", "none", "vdm"]
    shift, none, vdm = (results.cells[name]["flicker"] for name in ("shift", "none", "vdm"))
    assert docs_cells.value(shift, form) == "2.0 (1.0 to 3.0)" and docs_cells.point(shift, form) == "2.0"
    assert docs_cells.value(vdm, form) == "7.0 (6.0 to 8.0)"
    assert [docs_cells.difference(cell, 1) for cell in (none, vdm)] == [
        "+6.0 (+4.0 to +8.0)",
        "+6.0 (+5.0 to +7.0)",
    ]
    assert results.losses(["shift", "vdm"]) == ["0.2000 (0.1000 to 0.3000)", "0.7000"]
    assert (
        "trained with 2 seeds the mean" in results.caption()
        and "from shift, first seed," in results.caption(differences=True)
    )
    assert results.real("flicker", form) == "9.0 (8.0 to 10.0)" and results.real("motion_error", form) == ""


def test_docs_tables_can_show_each_training_seed(docs_cells):
    assert docs_cells.Results("tiny", merge_seeds=False).table.num_seeds == [1] * 5


def test_docs_tables_replace_marked_tables(docs_tables, tmp_path, monkeypatch):
    monkeypatch.setattr(docs_tables, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- table: measures -->\nold\n<!-- end of table -->\nafter\n")
    text = docs_tables.with_tables("page.md")
    assert (
        "| flicker, grey levels | `flicker` | close to real clips |  | mean absolute second difference"
        in text
    )
    assert text.startswith("before\n\n<!-- table: measures -->\n\n| measure |") and text.endswith(
        "<!-- end of table -->\nafter\n"
    )
    page.write_text("<!-- table: nothing -->\n<!-- end of table -->")
    with pytest.raises(ValueError, match=r"page\.md: no table nothing; expected one of ideas, "):
        docs_tables.with_tables("page.md")
