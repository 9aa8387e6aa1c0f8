"""DICOM objects by an allow-list of tags: what is not listed is not read into a record.

The patient's id becomes the unit. Of the other tags only the listed ones (by keyword) become metadata; those that name a
person directly cannot be listed. Names burnt into the pixels cannot be found here: look at the pictures.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.data import media
from sfumato.data.entries import Columns, Entries, Entry, missing_column, stay_inside
from sfumato.errors import DataError, MissingDependency, UsageError

PERSONAL = (
    "PatientName", "PatientID", "OtherPatientIDs", "OtherPatientIDsSequence", "OtherPatientNames", "PatientBirthName",
    "PatientBirthDate", "PatientBirthTime", "PatientAddress", "PatientTelephoneNumbers", "PatientMotherBirthName",
    "MilitaryRank", "IssuerOfPatientID", "MedicalRecordLocator", "ReferringPhysicianName", "PerformingPhysicianName",
    "OperatorsName", "NameOfPhysiciansReadingStudy", "RequestingPhysician", "PhysiciansOfRecord", "ResponsiblePerson",
    "AccessionNumber", "InstitutionAddress", "PersonName", "PersonAddress", "PersonTelephoneNumbers",
)  # fmt: skip
_NEEDED = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")  # looked at, not kept
UNIT = "PatientID"


class Dicom(Entries):
    """A folder of DICOM files (``.dcm``, or any file with the mark DICM), or one file.

    Args: tags: keywords, for example "Modality"; columns.unit: another tag than PatientID; columns.text: a tag.
    """

    def __init__(self, path: Path | str, *, tags: tuple[str, ...], columns: Columns | None = None) -> None:
        self.path, self.how, self.tags = Path(path), columns or Columns(), tags
        self.name = self.path.resolve().stem
        self._pydicom = _pydicom()
        for keyword in (*tags, *([self.how.text] if self.how.text else [])):
            if self._pydicom.datadict.tag_for_keyword(keyword) is None:
                raise UsageError(
                    f"tag = {keyword!r} · is no keyword of the DICOM dictionary",
                    next="Write it as the standard does, for example BodyPartExamined.",
                )
            if keyword in PERSONAL:
                raise UsageError(
                    f"tag = {keyword} · names a person directly and cannot be listed",
                    next="Take it out. The unit is PatientID, or the tag in data.unit_column.",
                )
        self.root = self.path if self.path.is_dir() else self.path.parent
        self.files = _files(self.path)
        if not self.files:
            raise DataError(f"path = {path} · has no DICOM files", next="Check data.path.", code="missing_file")

    def __len__(self) -> int:
        return len(self.files)

    def entries(self) -> Iterator[Entry]:
        unit = self.how.unit or UNIT
        for file in self.files:
            name = file.relative_to(self.root).as_posix()
            try:
                stay_inside(self.root, file, name)
                told = self._header(file, name, (unit, *self.tags, *([self.how.text] if self.how.text else [])))
            except DataError as problem:
                yield Entry(id=name, unit=None, problem=problem)
                continue
            values: dict[str, Any] = {}
            if self.how.text is not None and "text" in self.how.modalities:
                text = str(told.get(self.how.text) or "")
                if text or not self.how.may_lack:
                    values["text"] = text
            if "image" in self.how.modalities:
                values["image"] = lambda file=file, name=name: self._picture(file, name)
            metadata = {tag: told[tag] for tag in self.tags if tag in told and tag != self.how.text}
            yield Entry(id=name, unit=str(told.get(unit) or ""), metadata=metadata, **values)

    def _header(self, file: Path, name: str, tags: tuple[str, ...]) -> dict[str, Any]:
        """Only these tags, and their values as plain ones (they are decoded when they are asked for); no pixels."""
        try:
            with _quiet():
                header = self._pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(tags))
                return {tag: _plain(header[tag].value) for tag in tags if tag in header}
        except Exception as error:  # a damaged file can raise nearly anything inside the parser
            raise _unreadable(name, error) from None

    def _picture(self, file: Path, name: str) -> np.ndarray:
        """(H, W, 1 or 3) uint8: rescaled, windowed as the file says, else from its darkest to its brightest value."""
        size = self._header(file, name, _NEEDED)
        if not isinstance(size.get("Rows"), int) or not isinstance(size.get("Columns"), int):
            raise missing_column("PixelData", ["no picture in it"], name)
        media.refuse_size(size["Columns"], size["Rows"], name)
        frames = str(size.get("NumberOfFrames", 1))
        if frames not in ("1", "None", ""):
            raise DataError(
                f"{name}: frames = {frames} · a record is one picture",
                next="Save each frame as an object of its own.",
                code="frames",
            )
        try:
            with _quiet():
                return self._window(self._pydicom.dcmread(file))
        except Exception as error:
            raise _unreadable(name, error) from None

    def _window(self, whole: Any) -> np.ndarray:
        from pydicom.pixels import pixel_array  # pyright: ignore[reportMissingImports]
        from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut  # pyright: ignore[reportMissingImports]

        pixels = pixel_array(whole)  # colour as RGB
        if pixels.ndim == 3:
            return np.ascontiguousarray(pixels if pixels.dtype == np.uint8 else _to_bytes(pixels))
        values = np.asarray(apply_modality_lut(pixels, whole), np.float64)
        centre, width = _first(whole.get("WindowCenter")), _first(whole.get("WindowWidth"))
        if centre is not None and width is not None and width > 1:
            share = (values - (centre - 0.5)) / (width - 1) + 0.5  # PS3.3, C.11.2.1.2
            grey = (share.clip(0, 1) * 255).round().astype(np.uint8)
        elif "VOILUTSequence" in whole:
            grey = _to_bytes(
                np.asarray(apply_voi_lut(np.asarray(apply_modality_lut(pixels, whole)), whole), np.float64)
            )
        else:
            grey = _to_bytes(values)
        inverted = str(whole.get("PhotometricInterpretation")) == "MONOCHROME1"
        return (255 - grey if inverted else grey)[:, :, None]


def _first(value: Any) -> float | None:
    """Of a tag that may have several values (one for each window)."""
    if value is None or value == "":
        return None
    return float(value if isinstance(value, int | float | str) else value[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Values that break the standard in small ways are warned of by the parser; that is not what a check looks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """From the least value to the greatest as 0 to 255; a flat picture is black."""
    low, high = float(values.min()), float(values.max())
    return ((values - low) * (255 / (high - low) if high > low else 0)).round().astype(np.uint8)


def _plain(value: Any) -> Any:
    """Numbers and strings stay; everything else (several values, sequences) as its words."""
    if isinstance(value, int):
        return int(value)
    return value if type(value) in (float, str) else str(value)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts) and _is_dicom(p)]


def _is_dicom(file: Path) -> bool:
    if file.suffix.lower() in (".dcm", ".dicom"):
        return True
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def _unreadable(name: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return DataError(
        f"{name} · cannot be read as DICOM ({reason})",
        next="Replace it, decompress its pixels (dcmdjpeg, gdcmconv --raw), or take it out.",
        code="unreadable",
    )


def _pydicom() -> Any:
    try:
        import pydicom  # pyright: ignore[reportMissingImports]
        import pydicom.datadict  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependency(f"pydicom = missing · reads DICOM ({error})", next="pip install pydicom") from None
    return pydicom
