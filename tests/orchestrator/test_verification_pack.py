"""Verification packs: every form that is found, what a pickle may not do, damage, and the safe form."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from orchestrator import find
from orchestrator.datasets import verification_pack
from orchestrator.datasets.verification_pack import load, opened, save


def stored(seed, size=(8, 8), form="PNG", mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form)
    return stream.getvalue()


def pixels_of(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


IMAGES = [stored(i) for i in range(6)]
SAME = [True, False, True]


def written(tmp_path, content, name="lfw.bin"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path


def python2_text(data):
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def python2(images, flags):
    """As Python 2 wrote two lists with protocol 2, which numbers what it has seen from 1."""
    return b"\x80\x02]q\x01(" + b"".join(images) + b"e]q\x02(" + b"".join(flags) + b"e\x86q\x03."


def python2_array(data):
    """As numpy wrote an array in Python 2: every name and code is plain text."""
    count, text = b"M" + struct.pack("<H", len(data)) + b"\x85", b"T" + struct.pack("<i", len(data)) + data
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01" + count + dtype + b"\x89"
            + text + b"tb")  # fmt: skip


def python2_flag(value):
    dtype = b"cnumpy\ndtype\n(U\x02b1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return b"cnumpy.core.multiarray\nscalar\n(" + dtype + b"U\x01" + bytes([value]) + b"tR"


# --- Forms that are found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["bytes", "array", "column"])
@pytest.mark.parametrize("flag", [bool, np.bool_])
@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_packs_of_python_3(protocol, form, flag, core, tmp_path):
    entry = {
        "bytes": bytes,
        "array": lambda data: np.frombuffer(bytearray(data), np.uint8),
        "column": lambda data: np.frombuffer(data, np.uint8).reshape(-1, 1),
    }[form]
    content = pickle.dumps(([entry(image) for image in IMAGES], [flag(same) for same in SAME]), protocol)
    if core == "numpy.core":  # as releases before 2 name it
        content = content.replace(b"cnumpy._core.", b"cnumpy.core.")
        content = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        content = content.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
        if content[2:3] == b"\x95":  # a block says its length
            content = content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]
    assert (b"numpy" in content) == (form != "bytes" or flag is np.bool_)
    assert b"numpy._core" not in content or core == "numpy._core"
    pack = load(written(tmp_path, content), size=None)
    assert len(pack.images) == 6 and pack.same_P.tolist() == SAME and pack.same_P.dtype == bool
    for image, data in zip(pack.images, IMAGES, strict=True):
        assert image.dtype == np.uint8 and (image == pixels_of(data)).all()


@pytest.mark.parametrize("flags", [[b"\x88", b"\x89", b"\x88"], [python2_flag(1), python2_flag(0), python2_flag(1)]])
@pytest.mark.parametrize("entry", [python2_text, python2_array])
def test_packs_of_python_2(entry, flags, tmp_path):
    pack = load(written(tmp_path, python2([entry(image) for image in IMAGES], flags)), size=None)
    assert pack.same_P.tolist() == SAME
    assert all((image == pixels_of(data)).all() for image, data in zip(pack.images, IMAGES, strict=True))


def test_images_are_decoded_when_they_are_asked_for(tmp_path, monkeypatch):
    pack = load(written(tmp_path, (IMAGES, SAME)))
    asked = []
    decode = verification_pack.decode
    monkeypatch.setattr(verification_pack, "decode", lambda data: asked.append(data) or decode(data))
    assert pack.images[3].shape == (112, 112, 3) and asked == [IMAGES[3]]
    assert (pack.images[-1] == pack.images[np.int64(5)]).all()
    with pytest.raises(IndexError):
        pack.images[6]


@pytest.mark.parametrize(("size", "stored_size", "expected"), [
    (None, (8, 6), (6, 8)), (112, (8, 8), (112, 112)), (112, (96, 112), (131, 112)), (4, (8, 8), (4, 4)),
    (112, (112, 120), (120, 112)), (112, (250, 250), (112, 112)),
])  # fmt: skip
def test_the_shorter_side_is_resized(size, stored_size, expected, tmp_path):
    images = [stored(i, stored_size) for i in range(4)]
    pack = load(written(tmp_path, (images, [True, False])), size=size)
    assert {image.shape for image in pack.images} == {(*expected, 3)}
    if size is None or size == min(stored_size):
        assert all((image == pixels_of(data)).all() for image, data in zip(pack.images, images, strict=True))


def test_grey_images_are_given_as_colour(tmp_path):
    pack = load(written(tmp_path, ([stored(0, mode="L")] * 4, [True, False])), size=None)
    assert pack.images[0].shape == (8, 8, 3) and (pack.images[0][..., 0] == pack.images[0][..., 2]).all()


# --- What a pickle may not do -----------------------------------------------------------------------------------------

FORBIDDEN = {
    "os.system": b"cos\nsystem\n(V%s\ntR.",
    "posix.system": b"\x80\x04\x8c\x05posix\x8c\x06system\x93(V%s\ntR.",
    "builtins.exec": b"cbuiltins\nexec\n(Vimport os; os.system('%s')\ntR.",
    "__builtin__.eval": b"c__builtin__\neval\n(V__import__('os').system('%s')\ntR.",
    "os.popen": b"(ios\npopen\n(V%s\ntR.",
    "subprocess.Popen": b"(csubprocess\nPopen\n(V%s\nlo.",
    "numpy.load": b"cnumpy\nload\n(V%s\ntR.",
    "numpy.core.multiarray.fromfile": b"cnumpy.core.multiarray\nfromfile\n(V%s\ntR.",
    "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93(V%s\ntR.",
    "_codecs.decode": b"c_codecs\ndecode\n(V%s\nVrot13\ntR.",
    "numpy.object_": b"cnumpy\nobject_\n.",
    "copy_reg._reconstructor": b"ccopy_reg\n_reconstructor\n(V%s\ntR.",
    "orchestrator.datasets.verification_pack._Array": b"corchestrator.datasets.verification_pack\n_Array\n.",
}


@pytest.mark.parametrize("name", FORBIDDEN)
@pytest.mark.parametrize("beside", [False, True])
def test_forbidden_names_are_refused_before_anything_is_called(name, beside, tmp_path):
    trap = tmp_path / "trap"
    content = FORBIDDEN[name].replace(b"%s", b"touch " + str(trap).encode())
    if beside:  # a whole pack follows
        content = content[:-1] + b"0" + pickle.dumps((IMAGES, SAME), 0)
    path = written(tmp_path, content)
    with pytest.raises(
        ValueError,
        match=rf"lfw\.bin: no verification pack: {name} is forbidden; nothing was executed; a pack holds",
    ):
        load(path)
    assert not trap.exists()


TRICKS = {
    "an attribute of an allowed name": (b"c_codecs\nencode\nN}V__call__\nI1\ns\x86b.", "cannot be changed"),
    "the dictionary of an allowed name": (b"cnumpy\nndarray\n}V__setstate__\nI1\nsb.", "cannot be changed"),
    "an object of an allowed name": (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
    "an object that is stored elsewhere": (b"P1\n.", "persistent"),
    "a number of copyreg": (b"\x80\x02\x82\x05.", "extension code"),
    "a memo of 60 GB": (b"Nr\xff\xff\xff\xff.", "memo index 4294967295 after 1 operations"),
    "text in another encoding": (b"c_codecs\nencode\n(Vabc\nVutf-7\ntR.", "text encoded as 'utf-7', expected latin1"),
    "no text": (b"c_codecs\nencode\n(I5\nVlatin1\ntR.", "text encoded"),
    "a number that is no truth value": (
        pickle.dumps((IMAGES, [np.float64(1), np.float64(0), np.float64(1)])), "a number that is no truth value"),
    "a huge array": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99999999999999\ntVb\ntR.", "expected"),
    "an array of objects": (pickle.dumps((list(np.array([[None], [None]], object)), [True])), "is no array of bytes"),
    "one text a thousand times": (
        b"((lp0\nV" + b"a" * 1000 + b"\np1\n0" + b"c_codecs\nencode\n(g1\nVlatin1\ntRa" * 100 + b"(lt.",
        "more bytes than the file has"),
    "one buffer a thousand times": (
        b"\x80\x05]\x96" + struct.pack("<Q", 1000) + b"a" * 1000 + b"\x940" + b"cnumpy.core.numeric\n_frombuffer\n"
        b"(h\x00cnumpy\ndtype\n(Vu1\ntRK\x01\x85VC\ntRa" * 100 + b"]\x86.", "more bytes than the file has"),
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_with_what_is_allowed_are_refused(trick, tmp_path):
    content, message = TRICKS[trick]
    with pytest.raises(ValueError, match=r"lfw\.bin: no verification pack: ") as found:
        load(written(tmp_path, content))
    assert message in str(found.value) and "\n" not in str(found.value)
    assert load(written(tmp_path, (IMAGES, SAME), "whole.bin"), None).same_P.tolist() == SAME  # nothing is left behind


# --- Damage -----------------------------------------------------------------------------------------------------------


def array(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


WRONG = {
    "an odd number of images": ((IMAGES[:5], SAME), "5 images and 3 flags, expected two images a flag"),
    "too few flags": ((IMAGES, SAME[:2]), "6 images and 2 flags, expected two images a flag"),
    "nothing": (([], []), "0 images and 0 flags, expected two images a flag"),
    "text": (([*IMAGES[:5], "text"], SAME), "image 5 is text, expected encoded bytes or a uint8 array"),
    "None": (([None, *IMAGES[1:]], SAME), "image 0 is NoneType, expected encoded bytes"),
    "a list": (([*IMAGES[:2], [1, 2], *IMAGES[3:]], SAME), "image 2 is list, expected"),
    "wide numbers": (([array(9, dtype=np.int16), *IMAGES[1:]], SAME), "image 0 is an array of i2"),
    "fractions": (([array(9, dtype=np.float32), *IMAGES[1:]], SAME), "image 0 is an array of f4 (9,)"),
    "truth values": (([array(9, dtype=bool), *IMAGES[1:]], SAME), "image 0 is an array of b1 (9,) with 9 bytes"),
    "decoded pixels": (([array(8, 8, 3), *IMAGES[1:]], SAME), "(8, 8, 3) with 192 bytes, expected uint8 (n,)"),
    "a row": (([array(1, 9), *IMAGES[1:]], SAME), "(1, 9) with 9 bytes"),
    "flags that are numbers": ((IMAGES, [1, 0, 1]), "flag 0 is int, expected a truth value"),
    "flags that are text": ((IMAGES, [True, "no", True]), "flag 1 is str, expected a truth value"),
    "three parts": ((IMAGES, SAME, SAME), "expected (images, flags), two lists, found tuple"),
    "no parts": ({"images": IMAGES}, "two lists, found dict"),
    "no lists": ((5, SAME), "two lists"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("protocol", [2, 5])
def test_wrong_types_and_numbers_are_refused(case, protocol, tmp_path):
    content, message = WRONG[case]
    with pytest.raises(ValueError, match=r"lfw\.bin: no verification pack: ") as found:
        load(written(tmp_path, pickle.dumps(content, protocol)))
    assert message in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    "damage", [stored(0, form="JPEG", size=(32, 32))[:-60], stored(0)[:60], b"", b"GIF89a", b"no image"]
)
@pytest.mark.parametrize("name", ["lfw.bin", "lfw.npz"])
def test_an_image_that_cannot_be_decoded_is_named(damage, name, tmp_path):
    images = [*IMAGES[:4], damage, IMAGES[5]]
    path = tmp_path / name
    if name == "lfw.npz":
        save(path, images, SAME)
    else:
        written(tmp_path, (images, SAME))
    with pytest.raises(ValueError, match=rf"{name}: image 4 cannot be decoded: .") as found:
        load(path)
    assert "\n" not in str(found.value) and len(opened(path).encoded) == 6


@pytest.mark.parametrize("kept", [0, 1, 3, 20, 200, -1])
def test_a_truncated_pack_is_refused(kept, tmp_path):
    for protocol in (2, 4):
        content = pickle.dumps((IMAGES, SAME), protocol)
        with pytest.raises(ValueError, match=r"lfw\.bin: no verification pack: "):
            load(written(tmp_path, content[:kept]))


def test_other_damage_never_gives_anything_but_a_refusal(tmp_path):
    rng = np.random.default_rng(0)
    content = pickle.dumps(([np.frombuffer(image, np.uint8) for image in IMAGES], list(map(np.bool_, SAME))), 2)
    refused = 0
    for _ in range(300):
        data = bytearray(content)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        try:
            load(written(tmp_path, bytes(data)))
        except ValueError as error:
            refused += "\n" not in str(error)
    assert refused > 200


def test_what_is_too_large_is_refused(tmp_path, monkeypatch):
    large = tmp_path / "large.bin"
    large.touch()
    with open(large, "r+b") as file:
        file.truncate((2 << 30) + 1)  # a hole: nothing is written, and nothing read
    with pytest.raises(
        ValueError, match=r"large\.bin: 2,147,483,649 bytes, packs of more than 2,147,483,648 are refused"
    ):
        load(large)
    wide = io.BytesIO()
    Image.new("L", (4097, 4097)).save(wide, "PNG")
    with pytest.raises(ValueError, match=r"image 0 cannot be decoded: 4097 × 4097 pixels, more than 16,777,216 are"):
        load(written(tmp_path, ([wide.getvalue(), IMAGES[0]], [True])))
    path = tmp_path / "tight.npz"
    np.savez_compressed(path, encoded=np.zeros(20_000, np.uint8), offset=np.array([0, 1, 2]), same=np.array([True]))
    monkeypatch.setattr(verification_pack, "_BYTES", 10_000)
    with pytest.raises(
        ValueError, match=r"tight\.npz: no verification pack: 20,\d+ bytes when unpacked, more than 10,000"
    ):
        load(path)
    one = b"a" * 500  # a picture that is listed many times
    with pytest.raises(ValueError, match="images of more than 10,000 bytes"):
        load(written(tmp_path, ([one] * 30, [True] * 15)))


def test_there_must_be_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lfw\.bin: no such verification pack"):
        load(tmp_path / "lfw.bin")


# --- The safe form ----------------------------------------------------------------------------------------------------


def test_the_safe_form_holds_the_same(tmp_path):
    save(tmp_path / "lfw.npz", IMAGES, SAME)
    assert [path.name for path in tmp_path.iterdir()] == ["lfw.npz"]
    found = opened(tmp_path / "lfw.npz")
    assert list(found.encoded) == IMAGES and found.same_P.tolist() == SAME
    with np.load(tmp_path / "lfw.npz", allow_pickle=False) as stored_arrays:
        assert {name: str(stored_arrays[name].dtype) for name in stored_arrays.files} == {
            "encoded": "uint8", "offset": "int64", "same": "bool"}  # fmt: skip
    pack = load(str(tmp_path / "lfw.npz"), size=None)
    assert all((image == pixels_of(data)).all() for image, data in zip(pack.images, IMAGES, strict=True))
    with pytest.raises(ValueError, match=r"5 images and 3 flags, expected two images a flag"):
        save(tmp_path / "odd.npz", IMAGES[:5], SAME)


UNSAFE = {
    "objects": ({"encoded": np.array([b"a", None], object)}, "allow_pickle=False"),
    "objects as flags": ({"same": np.array([True, None, False], object)}, "allow_pickle=False"),
    "flags that are numbers": ({"same": np.array([1, 0, 1])}, "expected uint8, int64 and bool of one dimension"),
    "wide bytes": ({"encoded": np.zeros(9, np.int16)}, "int16 (9,)"),
    "a table": ({"offset": np.zeros((2, 4), np.int64)}, "int64 (2, 4)"),
    "no offset": ({"offset": np.zeros(0, np.int64)}, "offsets must rise from 0"),
    "offsets that fall": ({"offset": np.array([0, 9, 8, 7, 6, 5, 4])}, "offsets must rise from 0"),
    "offsets that end early": ({"offset": np.arange(7)}, "offsets must rise from 0 to the"),
    "offsets that begin late": ({"offset": np.array([1, 2, 3, 4, 5, 6, len(b"".join(IMAGES))])}, "offsets must rise"),
    "too few flags": ({"same": np.array([True, False])}, "6 images and 2 flags"),
    "a part that is not there": ({"same": None}, "same"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_damage_of_the_safe_form_is_refused(case, tmp_path):
    changed, message = UNSAFE[case]
    save(tmp_path / "lfw.npz", IMAGES, SAME)
    with np.load(tmp_path / "lfw.npz") as arrays:
        content = {name: value for name, value in (dict(arrays) | changed).items() if value is not None}
    np.savez(tmp_path / "lfw.npz", **content)
    with pytest.raises(ValueError, match=r"lfw\.npz: no verification pack: ") as found:
        load(tmp_path / "lfw.npz")
    assert message in str(found.value)


def test_a_truncated_safe_form_is_refused(tmp_path):
    save(tmp_path / "lfw.npz", IMAGES, SAME)
    data = (tmp_path / "lfw.npz").read_bytes()
    for kept in (0, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"lfw\.npz: no verification pack: "):
            load(written(tmp_path, data[:kept], "lfw.npz"))
    with zipfile.ZipFile(tmp_path / "lfw.npz", "w") as archive:
        archive.writestr("encoded.npy", b"no array")
    with pytest.raises(ValueError, match="no verification pack"):
        load(tmp_path / "lfw.npz")


def test_a_pack_alone_is_no_data_set():
    assert "verification_pack" not in find.datasets() and "face_records" in find.datasets()
    with pytest.raises(ValueError, match="there is no data set reader 'verification_pack'; there are: "):
        find.dataset("verification_pack")
