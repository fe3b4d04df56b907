from __future__ import annotations

import pytest

from data_shards.cli import main
from data_shards.readers.formats import formats


def test_every_option_of_every_reader_is_explained() -> None:
    found = formats()
    assert {".nii.gz", ".mha", ".npz", ".png", ".tif", ".dcm", "a folder", ".svs", ".json"} <= {
        suffix for item in found for suffix in item.suffixes
    }
    for item in found:
        assert item.summary, item.suffixes
        for name, values, meaning in item.options:
            assert values and len(meaning) > 10, (item.suffixes, name)


def test_the_command_shows_one_format_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", ".png"]) == 0
    shown = capsys.readouterr().out
    assert "orientation: refuse | " in shown and "burned_in" not in shown
    assert main(["formats", "dicom"]) == 0
    shown = capsys.readouterr().out
    assert "burned_in: refuse | allow" in shown and "fraction: 0.5" in shown
    assert main(["formats"]) == 0
    assert "level: 0" in capsys.readouterr().out
    assert main(["formats", "pngg"]) == 2
    assert "no format 'pngg'; did you mean '.png'?" in capsys.readouterr().err
