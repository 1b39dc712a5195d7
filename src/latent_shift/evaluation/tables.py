from __future__ import annotations

import json
from typing import Any

from latent_shift.files import markdown_table


def table_of(results: list[dict[str, Any]]) -> tuple[list[str], list[str], list[list[dict[str, Any] | None]]]:
    """What a table of results holds: systems and "real clips", measures, and for each measure the records.

    Raises:
        ValueError: results that cannot stand beside each other: of different protocols, clips, sizes, extractors or noise.
    """
    for result in results[1:]:
        for key in ("protocol", "clips", "num_frames", "prompts_sha256", "reference", "size"):
            if result["protocol"][key] != results[0]["protocol"][key]:
                raise ValueError(f"results of different {key} cannot stand in one table: {result['system']['system']}")
    values = [{record["measure"]: record for record in result["records"]} for result in results]
    names = list(dict.fromkeys(name for each in values for name in each))
    for name in names:
        for key, told in (("extractor", "with different weights"), ("noise", "through different noise")):
            taken = {json.dumps(each[name].get(key)) for each in values if name in each}
            if len(taken) > 1:
                raise ValueError(f"{name} was taken {told}: {', '.join(sorted(taken))}")
    shown = [name for name in names if not name.endswith("_real")]
    cells = [
        [*(each.get(name) for each in values), next((each[name + "_real"] for each in values if name + "_real" in each), None)]
        for name in shown
    ]
    return [*(result["system"]["system"] for result in results), "real clips"], shown, cells


def table(results: list[dict[str, Any]]) -> str:
    """`table_of` as Markdown, under a line that says what the numbers are of."""
    head, names, cells = table_of(results)
    rows = ([name, *map(_shown, row)] for name, row in zip(names, cells, strict=True))
    told = results[0]["protocol"]
    part = "" if told["complete"] else ", a part of the protocol"
    line = f"protocol {told['protocol']}: {told['clips']} clips of {told['num_frames']} frames{part}; in brackets 95 % by bootstrap"
    if any(record and "more" in record for row in cells for record in row):
        line += f"; with a sign what is more than of {head[0]}, of the same clips"
    return line + "\n\n" + markdown_table(["measure", *head], rows)


def lacking(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What was not measured and why: of all systems, or with the names of those that it was not measured of."""
    systems: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for measure, reason in result["skipped"].items():
            systems.setdefault((measure, reason), []).append(result["system"]["system"])
    return [
        (measure if len(names) == len(results) else f"{measure} of {', '.join(names)}", reason)
        for (measure, reason), names in systems.items()
    ]


def _shown(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    shown = f"{record['value']:.4g} ({'biased; ' if record.get('biased') else ''}{record['low']:.4g} to {record['high']:.4g})"
    return shown if "more" not in record else shown + "; {value:+.3g} ({low:+.3g} to {high:+.3g})".format(**record["more"])
