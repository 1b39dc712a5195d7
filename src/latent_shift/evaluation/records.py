"""Records: one measured number with its interval and everything it was measured with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from latent_shift.evaluation.statistics import Estimate
from latent_shift.files import check_schema, read_json_object

OPTIONAL = ("average", "noise", "more")
JSON_KEYS = {"native_size": "made_at"}
"""Fields that results files call by another name."""
JSON_AVERAGES = {"r_squared": "found"}
"""Averages that results files call by another name, the only one that readers of version 0.1.0 know."""


@dataclass(frozen=True, kw_only=True)
class Record(Estimate):
    """One number of an evaluation: an `Estimate` and what it was measured with.

    Attributes:
        measure: its name; "_real" at the end marks the same measure of the real clips.
        system, protocol: their names.
        complete: whether all clips of the protocol were measured.
        clips, seeds: how many clips, and the seeds that they were generated with (None: real clips).
        num_frames, fps: frames a clip and frames a second.
        native_size, measured_at: (height, width) at which clips were generated (None: real clips) and measured.
        extractor: the network whose features were measured, with its preprocessing and the hash of its
            weights.
        reference: the real clips that were compared with, with their hash.
        average: name of the average over clips, one of `statistics.AVERAGES`; None: the number is no average.
        noise: (shared noise, noise correlation) under which a model was shown real clips.
        more: the paired difference from another system, an `Estimate` with the name of that system under
            "than".
    """

    measure: str
    system: str = ""
    protocol: str = ""
    complete: bool = True
    clips: int = 0
    seeds: str | None = None
    num_frames: int = 0
    fps: float = 0.0
    native_size: list[int] | None = None
    measured_at: list[int] | None = None
    extractor: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    average: str | None = None
    noise: list[float] | None = None
    more: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Record:
        """Read a record of a results file; keys of other versions are ignored."""
        return cls(**_field_values(record))

    def to_json(self) -> dict[str, Any]:
        """Return the record as a results file holds it: without the optional fields that are None."""
        values = {"measure": self.measure, **asdict(self)}
        values["average"] = JSON_AVERAGES.get(self.average or "", self.average)
        return {
            JSON_KEYS.get(name, name): value
            for name, value in values.items()
            if name not in OPTIONAL or value is not None
        }

    @property
    def difference(self) -> Estimate | None:
        """The paired difference from another system."""
        if self.more is None:
            return None
        return Estimate(**{key: value for key, value in self.more.items() if key != "than"})


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class SystemSchema(_Schema):
    system: str
    title: str
    parameters: Annotated[float, Field(ge=0)]
    fps: Annotated[float, Field(gt=0)]
    num_inference_steps: Annotated[int, Field(ge=1)]
    guidance_scale: float


class ProtocolSchema(_Schema):
    protocol: str
    complete: bool
    clips: Annotated[int, Field(ge=1)]
    num_frames: Annotated[int, Field(ge=1)]
    fps: Annotated[float, Field(gt=0)] | None


class ResultsSchema(_Schema):
    system: SystemSchema
    protocol: ProtocolSchema
    made_at: Annotated[list[int], Field(min_length=2, max_length=2)]
    records: list[dict[str, Any]]
    skipped: dict[str, str]


def read_results(path: Path) -> dict[str, Any]:
    """Read the results.json of a system.

    Raises:
        ValueError: damaged, or the file of another program; the message names the file and the place in it.
    """
    result = read_json_object(path)
    check_schema(result, ResultsSchema, path)
    check_schema([_field_values(record) for record in result["records"]], list[Record], path)
    return result


def _field_values(record: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `Record` in a record of a results file."""
    keys = {JSON_KEYS.get(field.name, field.name): field.name for field in fields(Record)}
    values = {keys[key]: value for key, value in record.items() if key in keys}
    for average, name in JSON_AVERAGES.items():
        if values.get("average") == name:
            values["average"] = average
    return values


def read_records(result: dict[str, Any]) -> dict[str, Record]:
    """Return the records of one system's results file by measure."""
    return {record["measure"]: Record.from_json(record) for record in result["records"]}
