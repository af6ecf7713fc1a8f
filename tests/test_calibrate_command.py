"""What a calibration refuses, and the command that asks for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibrations import make_calibrated, pretend_costs, pretend_speed, write_records
from checkpoints import save_checkpoint
from depthmix.adapters.exit_files import find_exits
from depthmix.models import calibrating
from depthmix.models.calibrating import calibrate
from depthmix_cli.app import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose exits are often right."""
    return make_calibrated(tmp_path_factory.mktemp("calibrated") / "model")


class TestRefusals:
    def test_a_model_without_exits(self, tmp_path):
        folder = save_checkpoint(tmp_path / "model")
        data = write_records(tmp_path / "records.jsonl")
        with pytest.raises(FileNotFoundError, match=r"`model` must have exits .* add-exits"):
            calibrate(folder, data)
        with pytest.raises(FileNotFoundError, match="`exits` must have exits"):
            calibrate(folder, data, exits=tmp_path)

    def test_few_records(self, folder, tmp_path):
        data = write_records(tmp_path / "records.jsonl", 7)
        with pytest.raises(ValueError, match=r"at least 8 records, .* got 7 in"):
            calibrate(folder, data)

    def test_records_that_ask_nothing(self, folder, tmp_path):
        path = tmp_path / "records.jsonl"
        path.write_text('{"text": "no question"}\n' * 8)
        with pytest.raises(ValueError, match=r"record 1 of .* has `text`"):
            calibrate(folder, path)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"num_texts": 7}, "`num_texts` must be at least 8, got 7"),
            ({"num_measured": 0}, "`num_measured` must be at least 1, got 0"),
            ({"max_new_tokens": 1}, "`max_new_tokens` must be at least 2, got 1"),
            ({"texts_unchanged": 1.5}, "`texts_unchanged` must be a share above 0 and below 1"),
            ({"texts_unchanged": 0.98}, "needs at least 149 texts .* got 12"),
        ],
    )
    def test_options_out_of_bounds(self, folder, tmp_path, options, match):
        data = write_records(tmp_path / "records.jsonl")
        with pytest.raises(ValueError, match=match):
            calibrate(folder, data, **{"max_new_tokens": 4} | options)

    def test_a_plan_that_cannot_be_written_is_none(self, folder, tmp_path, monkeypatch):
        pretend_costs(monkeypatch)
        pretend_speed(monkeypatch, 1.4)
        place = find_exits(folder)
        assert place is not None
        before = {path.name: path.read_bytes() for path in place.iterdir()}

        def fail(path, content):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(calibrating, "write_whole", fail)
        data = write_records(tmp_path / "records.jsonl")
        with pytest.raises(OSError, match=r"`exits` must be a place with room, .* calibrate again"):
            calibrate(folder, data, max_new_tokens=4)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == before


class TestCommand:
    def test_it_prints_what_was_found(self, folder, tmp_path, monkeypatch, capsys):
        pretend_costs(monkeypatch)
        calls = pretend_speed(monkeypatch, 1.4)
        data = write_records(tmp_path / "records.jsonl")
        options = ["--data", str(data), "--max-new-tokens", "4", "--num-texts", "8"]
        assert run(["calibrate", str(folder), *options]) == 0
        said = capsys.readouterr().out
        assert "Measured: 1.40 times as fast" in said
        assert "on 4 texts that chose nothing" in said
        options += ["--lossy", "--texts-unchanged", "0.2"]
        assert run(["calibrate", str(folder), *options]) == 0
        assert "Texts unchanged: 20% asked for" in capsys.readouterr().out
        assert [verify for verify, _, _ in calls] == [True, False]

    def test_lossy_alone_asks_for_98_of_100(self, folder, tmp_path, capsys):
        data = write_records(tmp_path / "records.jsonl")
        assert run(["calibrate", str(folder), "--data", str(data), "--lossy"]) == 1
        assert "`texts_unchanged` of 0.98 needs at least 149 texts" in capsys.readouterr().err

    def test_a_share_without_lossy_is_refused(self, folder, capsys):
        options = ["--data", "none.jsonl", "--texts-unchanged", "0.9"]
        assert run(["calibrate", str(folder), *options]) == 1
        said = capsys.readouterr().err
        assert "`texts_unchanged` needs `--lossy`, got 0.9 without it" in said
