"""Whatever happens to the bytes of a sealed file, it is found out; and every reader of torch's files still reads it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.migration import migrate_checkpoint

from lightning_hetero.strategy.checkpoint_files import BrokenSealError, is_sealed, save_sealed


def sealed(value: Any) -> bytes:
    buffer = io.BytesIO()
    save_sealed(value, buffer)
    return buffer.getvalue()


def is_refused(data: bytes) -> bool:
    try:
        is_sealed(io.BytesIO(data))
    except BrokenSealError:
        return True
    return False


def test_every_single_bit_counts() -> None:
    data = sealed({"step": 1})
    assert is_sealed(io.BytesIO(data))
    undetected = [
        (place, bit)
        for place, byte in enumerate(data)
        for bit in range(8)
        if not is_refused(data[:place] + bytes([byte ^ (1 << bit)]) + data[place + 1 :])
    ]
    assert len(data) > 1000
    assert undetected == []


def test_a_file_that_lost_its_end_is_refused_wherever_it_was_cut() -> None:
    data = sealed({"step": 1})
    # Less than the four bytes that all zip archives begin with is no archive at all; torch cannot read it, either.
    assert [size for size in range(len(data)) if not is_refused(data[:size])] == [1, 2, 3]


@pytest.mark.parametrize("value", [0, 0xFF])
def test_a_block_that_was_overwritten_is_refused(value: int, state: dict[str, Any]) -> None:
    data = sealed(state)
    starts = range(0, len(data) - 512, 512)
    assert len(starts) > 10
    assert all(is_refused(data[:at] + bytes([value]) * 512 + data[at + 512 :]) for at in [*starts, len(data) - 512])


def test_a_file_that_got_longer_is_refused(state: dict[str, Any]) -> None:
    assert is_refused(sealed(state) + b"\0")


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it_without_a_word(mmap: bool, state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "sealed.ckpt"
    path.write_bytes(sealed(state))
    read = torch.load(path, weights_only=True, mmap=mmap)
    assert torch.equal(read["state_dict"]["weight"], state["state_dict"]["weight"])
    assert read["state_dict"]["weight"].data_ptr() == read["state_dict"]["tied"].data_ptr()
    assert {**read, "state_dict": None} == {**state, "state_dict": None}


def test_it_is_what_torch_save_writes_with_a_comment(state: dict[str, Any]) -> None:
    plain = io.BytesIO()
    torch.save(state, plain)
    data = sealed(state)
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.testzip() is None
    assert archive.comment.startswith(b"lightning_hetero sha256 ")
    assert [entry.filename for entry in archive.infolist()] == [e.filename for e in zipfile.ZipFile(plain).infolist()]
    assert len(data) == len(plain.getvalue()) + len(archive.comment)


def test_torchs_own_reader_in_cpp_passes_over_the_seal(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "sealed.ckpt"
    path.write_bytes(sealed(state))
    assert "data.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()


@pytest.mark.parametrize("in_zip", [True, False])
def test_what_plain_torch_wrote_has_no_seal_and_is_not_refused(in_zip: bool, state: dict[str, Any]) -> None:
    plain = io.BytesIO()
    torch.save(state, plain, _use_new_zipfile_serialization=in_zip)
    assert is_sealed(plain) is False


def test_the_seal_of_a_file_that_is_saved_anew_by_plain_torch_is_gone(state: dict[str, Any]) -> None:
    again = io.BytesIO()
    torch.save(torch.load(io.BytesIO(sealed(state)), weights_only=True), again)
    assert is_sealed(again) is False


def test_lightning_migrates_it_as_any_other(state: dict[str, Any]) -> None:
    read = torch.load(io.BytesIO(sealed({**state, "pytorch-lightning_version": "2.4.0"})), weights_only=True)
    migrated, _ = migrate_checkpoint(read)
    assert migrated["epoch"] == 3


@pytest.mark.parametrize("size", [0, 1, 21, 22, 23, 1000])
def test_tensors_of_any_size_are_sealed(size: int) -> None:
    data = sealed({"numbers": torch.arange(size, dtype=torch.uint8)})
    assert is_sealed(io.BytesIO(data))
    assert torch.load(io.BytesIO(data), weights_only=True)["numbers"].tolist() == [n % 256 for n in range(size)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("after", range(12))
def test_what_goes_wrong_on_the_way_is_raised_as_it_is(error: type[BaseException], after: int) -> None:
    class Fails(io.BytesIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes > after:
                raise error("now")
            return super().write(data)

    file = Fails()
    with pytest.raises(error, match="now"):
        save_sealed({"numbers": torch.ones(1000)}, file)
    assert file.writes == after + 1
