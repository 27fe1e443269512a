"""Packed faces to files: the same bytes, gone on with after an end, nothing overwritten, one line for an error."""

import io
import pickle
import re
import runpy
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from orchestrator.datasets import convert, verification_pack
from orchestrator.datasets.recordio import packed, write_records


def stored(seed, form="JPEG"):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(stream, form)
    return stream.getvalue()


LABELS = [0, 0, 1, 1, 1, *range(2, 11)]


@pytest.fixture
def source(tmp_path):
    """Fourteen faces of eleven identities, every third a PNG."""
    count = len(LABELS)
    payloads = [packed([count + 1.0, count + 1.0])]
    payloads += [packed(float(label), stored(i, "JPEG" if i % 3 else "PNG"), id=i) for i, label in enumerate(LABELS)]
    write_records(tmp_path / "train.rec", payloads)
    return tmp_path / "train.rec"


def members():
    return {f"{label:02d}/{i + 1:02d}.{'jpg' if i % 3 else 'png'}": stored(i, "JPEG" if i % 3 else "PNG")
            for i, label in enumerate(LABELS)}  # fmt: skip


def held(place):
    if place.suffix == ".zip":
        with zipfile.ZipFile(place) as archive:
            assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
            return {name: archive.read(name) for name in archive.namelist()}
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["faces", "faces.zip", "deep/er/faces", "deep/er/faces.zip"])
def test_records_become_files_of_the_same_bytes(name, source, tmp_path):
    place = tmp_path / name
    said = convert.convert(source, place)
    assert said == f"14 images of 11 identities: 14 written to {place}, 0 were already there"
    assert held(place) == members()
    before = {path: path.stat().st_mtime_ns for path in (place, *place.rglob("*"))}
    assert convert.convert(source, place) == f"14 images of 11 identities: 0 written to {place}, 14 were already there"
    assert {path: path.stat().st_mtime_ns for path in (place, *place.rglob("*"))} == before


@pytest.mark.parametrize("name", ["faces", "faces.zip"])
def test_it_goes_on_where_it_was_ended(name, source, tmp_path):
    place = tmp_path / name

    def ended(what, done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, place, ended)
    if name == "faces":
        assert len(held(place)) == 6 and held(place).items() <= members().items()
    else:
        assert not place.exists() and (tmp_path / "faces.zip.part").exists()
    assert convert.convert(source, place).endswith(f": 8 written to {place}, 6 were already there")
    assert held(place) == members() and not (tmp_path / "faces.zip.part").exists()


def test_an_archive_that_was_ended_from_outside_starts_anew(source, tmp_path):
    place = tmp_path / "faces.zip"
    (tmp_path / "faces.zip.part").write_bytes(b"PK\3\4 and no table at the end")
    assert convert.convert(source, place).endswith("14 written to " + str(place) + ", 0 were already there")
    assert held(place) == members()


def test_a_file_that_was_ended_from_outside_is_written_over(source, tmp_path):
    place = tmp_path / "faces"
    place.mkdir()
    (place / ".part").write_bytes(b"half of an image")
    convert.convert(source, place)
    assert held(place) == members()


def test_nothing_else_is_overwritten(source, tmp_path):
    folder, archive = tmp_path / "faces", tmp_path / "faces.zip"
    (folder / "00").mkdir(parents=True)
    (folder / "00" / "02.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"00/02\.jpg holds another image; remove it, or name another folder"):
        convert.convert(source, folder)
    assert (folder / "00" / "02.jpg").read_bytes() == b"mine"
    for other, message in (
        ({"00/01.png": b"mine"}, r"faces\.zip is there and holds something else than 00/01\.png; remove it"),
        (members() | {"mine.png": b"mine"}, r"faces\.zip is there and holds 1 other files; remove it"),
    ):
        for place, said in ((archive, message), (tmp_path / "faces.zip.part", r"faces\.zip\.part holds ")):
            archive.unlink(missing_ok=True)
            with zipfile.ZipFile(place, "w") as file:
                for name, data in other.items():
                    file.writestr(name, data)
            before = place.read_bytes()
            with pytest.raises(ValueError, match=said):
                convert.convert(source, archive)
            if place == archive:
                assert place.read_bytes() == before
            else:
                assert not archive.exists()
            place.unlink()


def test_what_is_neither_jpeg_nor_png_is_counted(tmp_path):
    write_records(tmp_path / "a.rec", [packed(0.0, stored(0)), packed(1.0, b"BM bitmap"), packed(1.0, b"GIF")])
    offset = (tmp_path / "a.idx").read_text().split()[3]
    said = convert.convert(tmp_path / "a.rec", tmp_path / "faces")
    assert said == (f"3 images of 2 identities: 1 written to {tmp_path / 'faces'}, 0 were already there; 2 are neither "
                    f"JPEG nor PNG and were left out, first key 1 at byte {offset}")  # fmt: skip
    assert list(held(tmp_path / "faces")) == ["0/0.jpg"]


def test_recorded_files_are_converted(shared, tmp_path):
    with np.load(shared / "golden" / "face" / "recordio.npz") as golden:
        (tmp_path / "a.rec").write_bytes(golden["rec"].tobytes())
        (tmp_path / "a.idx").write_bytes(golden["idx"].tobytes())
        images = golden["images"]
    convert.convert(tmp_path / "a.rec", tmp_path / "faces")
    found = held(tmp_path / "faces")
    assert sorted(found) == ["0/1.png", "0/2.png", "1/3.png", "1/4.png", "2/5.png"]
    for name, pixels in zip(sorted(found), images, strict=True):
        assert (np.array(Image.open(io.BytesIO(found[name]))) == pixels).all()


# --- Packs ------------------------------------------------------------------------------------------------------------


def test_a_pack_becomes_the_safe_form(tmp_path):
    images, same = [stored(i) for i in range(6)], [True, False, True]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([np.frombuffer(i, np.uint8) for i in images], same)))
    place = tmp_path / "safe" / "lfw.npz"
    assert convert.convert(tmp_path / "lfw.bin", place) == f"6 images, 3 pairs: written to {place}"
    found = verification_pack.opened(place)
    assert list(found.encoded) == images and found.same_P.tolist() == same
    before = place.stat().st_mtime_ns
    assert convert.convert(tmp_path / "lfw.bin", place) == f"6 images, 3 pairs: already in {place}"
    assert place.stat().st_mtime_ns == before
    for other_images, other_same in ((images[::-1], same), (images, [False, False, True])):
        verification_pack.save(place, other_images, other_same)
        with pytest.raises(ValueError, match=r"lfw\.npz holds another pack; remove it, or name another file"):
            convert.convert(tmp_path / "lfw.bin", place)
        assert list(verification_pack.opened(place).encoded) == other_images


def test_a_damaged_source_leaves_nothing(source, tmp_path):
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([stored(0)[:-40], stored(1)], [True])))
    with pytest.raises(ValueError, match=r"lfw\.bin: image 0 cannot be decoded"):
        convert.convert(tmp_path / "lfw.bin", tmp_path / "lfw.npz")
    with open(source, "r+b") as file:
        file.truncate(source.stat().st_size - 4)
    with pytest.raises(ValueError, match=r"train\.rec: byte \d+: a record of \d+ bytes ends beyond"):
        convert.convert(source, tmp_path / "faces")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lfw.bin", "train.idx", "train.rec"]


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source_name", "place"), [("a.txt", "b"), ("a.bin", "b"), ("a.rec", "b.npz"), ("a.npz", "b")])
def test_other_kinds_of_files_are_refused(source_name, place):
    with pytest.raises(
        ValueError, match=rf"{source_name} to {place}: expected <pack>\.bin and <pack>\.npz, or <faces>"
    ):
        convert.convert(source_name, place)


def test_the_command_says_what_it_did_and_errors_in_one_line(source, tmp_path, capsys):
    convert.main([str(source), str(tmp_path / "faces")])
    printed = capsys.readouterr()
    assert printed.out == f"14 images of 11 identities: 14 written to {tmp_path / 'faces'}, 0 were already there\n"
    assert printed.err == "\rconverting 14 of 14 (100 %), 0.0 minutes left\n"
    for arguments, message in (
        (["absent.rec", "faces"], "error: absent.rec: no such file"),
        (["absent.bin", "a.npz"], "error: absent.bin: no such verification pack"),
        ([str(source), str(source / "faces")], "error: "),
    ):
        with pytest.raises(SystemExit) as ended:
            convert.main(arguments)
        assert str(ended.value).startswith(message) and "\n" not in str(ended.value)
    with pytest.raises(SystemExit) as ended:
        convert.main([])
    assert ended.value.code == 2 and "required: source, destination" in capsys.readouterr().err


def test_progress_tells_how_long_it_will_take(capsys):
    clock = iter([0.0, 0.1, 30.0, 30.1, 60.0])
    report = convert._shown(lambda: next(clock))
    for done in (1, 100, 101, 200):
        report("converting", done, 200)
    assert capsys.readouterr().err == (
        "\rconverting 100 of 200 (50 %), 0.5 minutes left\rconverting 200 of 200 (100 %), 0.0 minutes left\n"
    )


def test_it_runs_as_a_program(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", str(source), str(tmp_path / "faces.zip")])
    runpy.run_path(convert.__file__, run_name="__main__")
    assert re.match(r"14 images of 11 identities: 14 written to .*faces\.zip, ", capsys.readouterr().out)
    assert held(tmp_path / "faces.zip") == members()
