"""DICOM objects made by pydicom here: only listed tags, the patient as unit, windows as the standard says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid  # noqa: E402

from sfumato.data.dicom import PERSONAL, Dicom  # noqa: E402
from sfumato.data.entries import Columns  # noqa: E402
from sfumato.data.prepare import check, load  # noqa: E402
from sfumato.data.settings import DataSettings  # noqa: E402
from sfumato.data.sources import settings_for  # noqa: E402
from sfumato.errors import DataError, UsageError  # noqa: E402

TAGS = ("Modality", "BodyPartExamined")


def save(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    whole = Dataset()
    whole.file_meta = meta
    whole.SOPClassUID, whole.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = pixels.ndim == 3
    whole.Rows, whole.Columns = pixels.shape[:2]
    whole.SamplesPerPixel = 3 if colour else 1
    whole.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        whole.PlanarConfiguration = 0
    whole.BitsAllocated = whole.BitsStored = 8 * pixels.itemsize
    whole.HighBit = whole.BitsStored - 1
    whole.PixelRepresentation = int(pixels.dtype.kind == "i")
    whole.PixelData = pixels.tobytes()
    whole.PatientID, whole.PatientName, whole.PatientBirthDate = "p1", "Doe^Jane", "19700101"
    whole.Modality, whole.BodyPartExamined, whole.StudyDescription = "CT", "CHEST", "a chest for Jane Doe"
    for name, value in tags.items():
        if value is None:
            del whole[name]
        else:
            setattr(whole, name, value)
    whole.save_as(path, enforce_file_format=True)
    return path


def ramp(dtype: Any = np.int16) -> np.ndarray:
    return np.arange(64, dtype=dtype).reshape(8, 8)


def only(path: Path, **columns: Any) -> Any:
    (record,) = Dicom(path, tags=TAGS, columns=Columns(**columns))
    return record


def test_only_listed_tags_enter_and_the_patient_becomes_the_unit(tmp_path):
    save(tmp_path / "a.dcm", ramp())
    record = only(tmp_path)
    assert record.metadata == {"Modality": "CT", "BodyPartExamined": "CHEST"}
    assert (record.unit, record.id, record.text) == ("p1", "a.dcm", None)
    assert "Jane" not in json.dumps([record.id, record.unit, dict(record.metadata)])


@pytest.mark.parametrize("tag", ["PatientName", "PatientID", "PatientBirthDate"])
def test_tags_that_name_a_person_cannot_be_listed(tmp_path, tag):
    save(tmp_path / "a.dcm", ramp())
    assert tag in PERSONAL
    with pytest.raises(UsageError, match=f"tag = {tag} · names a person"):
        Dicom(tmp_path, tags=(tag,))
    with pytest.raises(UsageError, match="names a person"):
        Dicom(tmp_path, tags=(), columns=Columns(text=tag))
    with pytest.raises(UsageError, match="no keyword"):
        Dicom(tmp_path, tags=("modality",))


def test_every_personal_keyword_is_in_the_dictionary():
    unknown = [name for name in PERSONAL if pydicom.datadict.tag_for_keyword(name) is None]
    assert unknown == []


def test_without_a_window_the_darkest_is_black_and_the_brightest_white(tmp_path):
    save(tmp_path / "a.dcm", ramp())
    np.testing.assert_array_equal(only(tmp_path).image[:, :, 0], np.round(ramp() * 255 / 63).astype(np.uint8))


def test_rescale_and_window_follow_the_standard(tmp_path):
    """PS3.3 C.11.2.1.2: y = ((x - (c - .5)) / (w - 1) + .5) * 255, cut to 0 .. 255."""
    save(
        tmp_path / "a.dcm",
        ramp(),
        RescaleSlope=2.0,
        RescaleIntercept=-10.0,
        WindowCenter=[40.0, 900.0],
        WindowWidth=[21.0, 5.0],
    )
    x = ramp() * 2.0 - 10.0
    expected = (((x - 39.5) / 20 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(only(tmp_path).image[:, :, 0], expected)


def test_the_inverted_kind_is_turned_and_colour_stays(tmp_path):
    save(tmp_path / "a.dcm", ramp(np.uint8), PhotometricInterpretation="MONOCHROME1")
    assert only(tmp_path).image[0, 0, 0] == 255
    colour = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    save(tmp_path / "a.dcm", colour)
    np.testing.assert_array_equal(only(tmp_path).image, colour)
    save(tmp_path / "a.dcm", np.full((4, 4), 7, np.int16))
    assert only(tmp_path).image.max() == 0


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"PatientID": None}, "unit"),
        ({"PatientID": " "}, "unit"),
        ({"Rows": 60_000, "Columns": 60_000}, "huge"),
        ({"NumberOfFrames": 3}, "frames"),
        ({"PixelData": b"\0\0"}, "unreadable"),
        ({"Rows": None, "Columns": None}, "missing_column"),
    ],
)
def test_a_bad_object_is_named_and_the_next_is_read(tmp_path, tags, code):
    save(tmp_path / "bad.dcm", ramp(), **tags)
    save(tmp_path / "good.dcm", ramp())
    bad, good = Dicom(tmp_path, tags=TAGS).entries()
    with pytest.raises(DataError) as refused:
        bad.read()
    assert refused.value.code == code
    assert "bad.dcm" in refused.value.message
    assert good.read().image is not None


def test_torn_files_and_links_are_problems_of_their_own(tmp_path, tmp_path_factory):
    inner = tmp_path / "set"
    inner.mkdir()
    whole = save(tmp_path / "whole.dcm", ramp()).read_bytes()
    (inner / "torn.dcm").write_bytes(whole[:200])
    (inner / "other.dcm").write_text("not one")
    (inner / "link.dcm").symlink_to(tmp_path / "whole.dcm")
    (inner / "notes.txt").write_text("not looked at")
    (inner / "plain").write_bytes(whole)
    result = check(inner)
    assert result["records"] == 4
    codes = {problem["record"]: problem["code"] for problem in result["problems"] if problem["level"] == "error"}
    assert codes["link.dcm"] == "outside"
    assert codes["other.dcm"] in ("unreadable", "unit")
    assert "plain" not in codes
    assert "torn.dcm" in codes


def test_objects_are_loaded_by_patient(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.dcm", np.roll(ramp(), i), PatientID=f"p{i % 3}", StudyDescription=f"study {i}")
    assert settings_for(tmp_path).source == "dicom"
    data = DataSettings(source="dicom", path=str(tmp_path), public_units=1, image_size=8)
    prepared = load(data, unit="person")
    assert len({r.unit for r in prepared.private}) == 2
    assert all(r.text is None for r in prepared.private)
    told = DataSettings(
        source="dicom",
        path=str(tmp_path),
        public_units=1,
        image_size=8,
        text_column="StudyDescription",
        modalities=("text", "image"),
    )
    assert {r.text for r in load(told, unit="person").private} <= {f"study {i}" for i in range(6)}


def test_every_object_that_pydicom_brings_is_read_or_is_a_data_error():
    """Real ones: several scanners, compressed pixels, broken values, no pixels, several frames."""
    files = Path(pydicom.__file__).parent / "data" / "test_files"
    if not files.is_dir():
        pytest.skip("this pydicom brings no files")
    read = 0
    for entry in Dicom(files, tags=TAGS).entries():
        try:
            record = entry.read()
        except DataError as error:
            assert error.code in ("unit", "unreadable", "frames", "missing_column", "huge")
            assert error.next
        else:
            read += 1
            assert record.image.dtype == np.uint8
            assert record.image.shape[2] in (1, 3)
            assert set(record.metadata) <= set(TAGS)
    assert read > 50
