"""Pictures, folders and lists as people have them: lying photographs, wide greys, links, hidden files, Windows."""

import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator import find, indexing
from orchestrator.datasets import (
    emoji,
    folder,
    images,
    layout,
    market1501,
    occluded_duke,
    occluded_reid,
    occlusion,
    omniglot,
)
from orchestrator.datasets.images import (
    IMAGE_SUFFIXES,
    Frames,
    ImageSet,
    RetrievalData,
    check_findable,
    decode,
    lost_queries,
)
from orchestrator.datasets.listing import files_below


def stored(image: Image.Image, form: str, **options) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def tree(root, names):
    """Small pictures of different content at the paths, in the format that the extension says."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, Image.registered_extensions()[path.suffix.lower()])


SIDES = [f"{side}/{who}/{n}.png" for side in ("train", "query", "gallery") for who in "ab" for n in (0, 1)]


# --- Pictures ---------------------------------------------------------------------------------------------------------

# What a viewer does with the stored pixels, by EXIF orientation.
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "JPEG": {"quality": 98, "subsampling": 0}}


def oriented(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("tag", TURNED)
def test_photographs_are_read_upright(tag, form):
    lying = np.zeros((24, 40, 3), np.uint8)
    lying[:8, :20], lying[16:, :20], lying[:8, 20:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    found = np.asarray(decode(stored(Image.fromarray(lying), form, exif=oriented(tag), **LOSSLESS[form])))
    np.testing.assert_allclose(found.astype(int), TURNED[tag](lying), atol=12 if form == "JPEG" else 0)


@pytest.mark.parametrize("tag", [0, 9, 77])
def test_an_orientation_that_is_none_changes_nothing(tag):
    lying = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(stored(Image.fromarray(lying), "PNG", exif=oriented(tag)))), lying)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_leave_the_picture_as_it_lies():
    lying = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    for exif in (b"Exif\0\0damaged", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"x"):
        assert np.array_equal(np.asarray(decode(stored(Image.fromarray(lying), "PNG", exif=exif))), lying)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_lying_and_transparent(mode):
    lying = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    lying.putpixel((0, 0), (0, 0, 0, 0))  # clear at the top left, which tag 6 turns to the top right
    found = np.asarray(decode(stored(lying.convert(mode), "PNG", exif=oriented(6))))
    assert found.shape == (4, 2, 3)
    assert found[0, 1].tolist() == [255, 255, 255] and found.sum() == 3 * 255


RAMP = np.linspace(0, 1, 48 * 32).reshape(48, 32)
WIDE = {
    "16 bit": ((RAMP * 65_535).astype(np.uint16), 65_535),
    "16 bit, little used": ((RAMP * 4_095).astype(np.uint16), 65_535),
    "8 of 16 bit": ((RAMP * 255).round().astype(np.uint16), 255),
    "16 of 32 bit": ((RAMP * 65_535).astype(np.int32), 65_535),
    "fractions": (RAMP.astype(np.float32), 1),
    "8 bit as fractions": ((RAMP * 255).astype(np.float32), 255),
}


@pytest.mark.parametrize("case", WIDE)
def test_wide_greys_are_scaled_and_not_cut_off(case):
    values, white = WIDE[case]
    found = np.asarray(decode(stored(Image.fromarray(values), "TIFF")))
    assert found.shape == (48, 32, 3) and np.ptp(found, axis=2).max() == 0
    np.testing.assert_allclose(found[..., 0], values / white * 255, atol=0.51)


@pytest.mark.parametrize(("least", "greatest"), [(-7.5, 3.0), (0, 1e6), (2_000.25, 2_000.75)])
def test_greys_of_no_known_range_are_scaled_by_their_own(least, greatest):
    values = (least + RAMP * (greatest - least)).astype(np.float32)
    found = np.asarray(decode(stored(Image.fromarray(values), "TIFF")))[..., 0]
    assert (found.min(), found.max()) == (0, 255) and np.all(np.diff(found.ravel().astype(int)) >= 0)
    whole = np.array([[-(2**30), 0, 2**30]], np.int32)
    assert np.asarray(decode(stored(Image.fromarray(whole), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_wide_greys_that_are_not_finite_or_all_alike():
    values = np.array([[np.nan, -np.inf, 0.0, 1.0, np.inf]], np.float32)
    assert np.asarray(decode(stored(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 0, 0, 255, 255]
    assert np.asarray(decode(stored(Image.fromarray(np.full((2, 2), 7e6, np.float32)), "TIFF"))).max() == 0
    assert np.asarray(decode(stored(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))).max() == 0


def test_wide_greys_lying_transparent_and_in_other_formats():
    values = (RAMP * 65_535).astype(np.uint16)
    for form in ("PNG", "PPM"):
        assert np.asarray(decode(stored(Image.fromarray(values), form))).max() == 255
    lying = np.asarray(decode(stored(Image.fromarray(values), "PNG", exif=oriented(8))))
    assert lying.shape == (32, 48, 3) and lying[0, 0, 0] == round(values[0, -1] / 257)
    clear = np.asarray(decode(stored(Image.fromarray(values), "PNG", transparency=0)))
    assert clear[0, 0].tolist() == [255] * 3 and clear[0, 9].max() < 5


def test_palette_cmyk_and_one_bit():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 4, (9, 9, 3), dtype=np.uint8) * 80)
    few = colours.quantize(64)
    assert np.array_equal(np.asarray(decode(stored(few, "PNG"))), np.asarray(few.convert("RGB")))
    cyan = decode(stored(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")).getpixel((4, 4))
    assert cyan[0] < 20 and min(cyan[1:]) > 200
    assert decode(stored(Image.new("1", (8, 8), 1), "PNG")).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(form):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if form == "WEBP" else {}
    data = stored(first, form, save_all=True, append_images=[second], **options)
    assert decode(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_extension_that_is_taken_can_be_read(suffix):
    form = Image.registered_extensions()[suffix]
    image = Image.new("F", (16, 16), 0.5) if suffix == ".pfm" else Image.new("RGB", (16, 16), "grey")
    assert abs(decode(stored(image, form)).getpixel((8, 8))[0] - 128) < 10


def test_the_readme_names_every_reader_and_extension():
    text = (Path(images.__file__).parent / "README.md").read_text()
    assert [name for name in find.datasets() if f"\n| `{name}` |" not in text] == []
    assert [suffix for suffix in IMAGE_SUFFIXES if suffix not in text] == []


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_what_systems_put_beside_images_is_no_data(tmp_path):
    root = tmp_path / ".data" / "__MACOSX"  # where the data lie does not matter, only what is below
    tree(root, SIDES)
    tree(root, [f"{side}/{hidden}" for side in ("train", "gallery") for hidden in (
        "a/.thumb.jpg", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/a/0.png", ".hidden/0.png", "@eaDir/0.jpg",
    )])  # fmt: skip
    for side in ("train", "query", "gallery"):
        for junk in ("a/._0.png", "a/Thumbs.db", "._a", ".DS_Store", "b/desktop.ini", "thumbs.db"):
            (root / side / junk).write_bytes(b"\0\5\x16\7")
    data = folder.load(str(root))
    assert [key for side in data.sets().values() for key in side.keys] == SIDES and data.notice == ""
    assert data.train.num_identities == data.gallery.num_identities == 2
    indexing.indexed(data.gallery, tmp_path / "cache")


def test_more_extensions_are_read_and_the_rest_is_counted(tmp_path):
    tree(tmp_path, [*SIDES, "gallery/a/1.jfif", "gallery/a/2.GIF", "gallery/a/3.jpe", "gallery/b/4.Jpg"])
    assert len(folder.load(str(tmp_path)).gallery) == 8 and folder.load(str(tmp_path)).notice == ""
    tree(tmp_path, ["gallery/b/cam1/5.png", "gallery/c/cam1/6.png", "train/7.png"])
    (tmp_path / "query" / "a" / "8.heic").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("beside the folders, where anything may lie")
    data = folder.load(str(tmp_path))
    assert data.gallery.num_identities == 2  # a folder without an image in it is no identity
    assert data.notice == (
        "4 files were left out: gallery/b/cam1/5.png, gallery/c/cam1/6.png, train/7.png, …; "
        "what is read are images at {train,query,gallery}/<identity>/<image>"
    )


def test_names_that_are_no_utf8_can_be_printed(tmp_path):
    tree(tmp_path, SIDES)
    try:
        (tmp_path / "gallery" / os.fsdecode(b"a/Stra\xdfe.txt")).write_text("")
    except OSError:
        pytest.skip("this file system takes no such name")
    assert r"gallery/a/Stra\udcdfe.txt" in folder.load(str(tmp_path)).notice.encode().decode()


def test_links_to_files_and_folders_are_followed(tmp_path):
    stock, root = tmp_path / "stock", tmp_path / "data"
    tree(stock, ["people/x/0.png", "people/x/1.png", "2.png"])
    tree(root, ["train/a/0.png", "query/x/0.png"])
    (root / "gallery").symlink_to(stock / "people")
    (root / "train" / "b").symlink_to(stock / "people" / "x")
    (root / "train" / "a" / "1.png").symlink_to(stock / "2.png")
    data = folder.load(str(root))
    assert data.train.keys == ("train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png")
    assert data.gallery.keys == ("gallery/x/0.png", "gallery/x/1.png")
    assert Frames(data.gallery, (4, 4))([0, 1]).shape == (2, 3, 4, 4)


def test_links_that_lead_nowhere_or_in_circles_are_named(tmp_path):
    tree(tmp_path, SIDES)
    link = tmp_path / "gallery" / "a" / "9.png"
    link.symlink_to("/old/disk/9.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere: 1 below .*gallery, first .*a/9.png to /old/disk/9.png; rep"):
        folder.load(str(tmp_path))
    link.unlink()
    (tmp_path / "gallery" / "b" / "all").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"gallery/b/all/gallery is a link to a folder that holds it; remove it"):
        folder.load(str(tmp_path))
    (tmp_path / "gallery" / "b" / "all").unlink()
    (tmp_path / "gallery" / "b" / "itself").symlink_to("itself")
    with pytest.raises(FileNotFoundError, match=r"first .*gallery/b/itself to itself"):
        folder.load(str(tmp_path))


@pytest.mark.parametrize("name", ["Query", "query"])
def test_a_query_folder_is_not_overlooked(tmp_path, name):
    tree(tmp_path, [path for path in SIDES if not path.startswith("query")])
    (tmp_path / name).symlink_to(tmp_path / "gallery" if name == "Query" else "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"{name} would not be read; it must be a folder named query"):
        folder.load(str(tmp_path))


def test_a_folder_with_images_at_another_depth_alone(tmp_path):
    tree(tmp_path, [*SIDES[:8], "gallery/a/cam1/0.png", "gallery/1.png"])
    with pytest.raises(FileNotFoundError, match=r"no images in .*gallery; 2 files were left out: gallery/1.png, gall"):
        folder.load(str(tmp_path))


def test_files_below_are_in_order_and_only_as_deep_as_asked(tmp_path):
    tree(tmp_path, ["a/1.png", "a-b/1.png", "a/b/1.png", "0.png"])
    assert files_below("x", tmp_path) == ["0.png", "a/1.png", "a/b/1.png", "a-b/1.png"]  # as paths are compared
    assert files_below("x", tmp_path, depth=1) == ["0.png"]
    assert files_below("x", tmp_path, depth=2) == ["0.png", "a/1.png", "a-b/1.png"]
    assert files_below("x", tmp_path / "none") == []


def test_published_sets_skip_hidden_files_and_follow_links(tmp_path, monkeypatch):
    monkeypatch.setattr(market1501, "_COUNTS", {"train": (2, 2), "query": (1, 1), "gallery": (1, 1)})
    tree(tmp_path, ["elsewhere/0002_c1s1_000451_03.jpg", "elsewhere/0007_c2s1_000451_03.jpg",
                    "query/0001_c1s1_000001_00.jpg", "bounding_box_test/0001_c2s1_000001_00.jpg",
                    "query/.ipynb_checkpoints/0001_c1s1_000001_00-checkpoint.jpg"])  # fmt: skip
    (tmp_path / "bounding_box_train").symlink_to("elsewhere")
    (tmp_path / "query" / "._0001_c1s1_000001_00.jpg").write_bytes(b"\0\5\x16\7")
    assert len(market1501.load(str(tmp_path)).query) == 1

    monkeypatch.setattr(occluded_duke, "_COUNTS", {"train": (1, 1), "query": (1, 1), "gallery": (1, 1)})
    names = {"train": "0001_c2_f0046182.jpg", "query": "0005_c2_f0046985.jpg", "gallery": "0005_c5_f0051781.jpg"}
    tree(tmp_path, [f"duke/DukeMTMC-reID/{layout.PEOPLE[part]}/{file}" for part, file in names.items()])
    for part, file in names.items():
        (tmp_path / "duke" / f"{part}.list").write_bytes(b"\xef\xbb\xbf" + file.encode() + b"\r\n")
        (tmp_path / "duke" / "DukeMTMC-reID" / layout.PEOPLE[part] / f"._{file}").write_bytes(b"\0")
    assert occluded_duke.load(str(tmp_path / "duke")).query.keys == ("query/0005_c2_f0046985.jpg",)

    monkeypatch.setattr(occluded_reid, "_COUNT", (1, 1))
    tree(tmp_path, ["stock/001_01.tif", "Occluded_REID/query/001/001_01.tif", "Occluded_REID/gallery/__MACOSX/x.tif"])
    (tmp_path / "Occluded_REID" / "gallery" / "001").symlink_to(tmp_path / "stock")
    (tmp_path / "Occluded_REID" / "query" / "001" / "._001_01.tif").write_bytes(b"\0")
    data = occluded_reid.load(str(tmp_path))
    assert data.query.keys == ("query/001/001_01.tif",) and data.gallery.keys == ("gallery/001/001_01.tif",)


def test_an_archive_packed_on_a_mac(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "_COUNTS", {"background": (2, 1), "evaluation": (2, 1)})
    for part in ("background", "evaluation"):
        with zipfile.ZipFile(tmp_path / f"images_{part}.zip", "w") as archive:
            for folder_of in ("", "__MACOSX/"):
                for name in ("0001_01.png", "0001_02.png") if not folder_of else ("._0001_01.png",):
                    archive.writestr(f"{folder_of}images_{part}/Alphabet/character01/{name}", b"")
            archive.writestr(f"images_{part}/Alphabet/character01/._0001_01.png", b"")
    assert len(omniglot.load(str(tmp_path)).train) == 2


def test_occluders_hidden_linked_and_wide(tmp_path):
    tree(tmp_path, ["stock/b.JPE", "poles/a.png", "poles/.a.png", "poles/__MACOSX/a.png"])
    (tmp_path / "poles" / "linked").symlink_to(tmp_path / "stock")
    Image.fromarray((RAMP * 65_535).astype(np.uint16)).save(tmp_path / "poles" / "z.tif")
    assert [p.name for p in occlusion.pictures_in(tmp_path / "poles")] == ["a.png", "b.JPE", "z.tif"]
    grey = occlusion.from_folder(tmp_path / "poles").patches[-1]
    assert len(grey[0].unique()) == 256
    (tmp_path / "poles" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"occluders: links that lead nowhere: 1 .*gone.png to nowhere.png"):
        occlusion.pictures_in(tmp_path / "poles")


# --- Lists ------------------------------------------------------------------------------------------------------------

ROWS = [["a/Straße 1.jpg".replace(" ", "_"), "0"], ["b/2.jpg", "1"]]
LISTS = {"as it is": ("\n", "utf-8"), "CRLF": ("\r\n", "utf-8"), "mark": ("\n", "utf-8-sig"),
         "both": ("\r\n", "utf-8-sig")}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_a_list_saved_on_windows_reads_as_the_original(tmp_path, case):
    end, encoding = LISTS[case]
    (tmp_path / "list.txt").write_bytes(end.join([*map(" ".join, ROWS), ""]).encode(encoding))
    assert layout.table("x", tmp_path / "list.txt", 2) == ROWS


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a/1.jpg 0\r\n".encode("utf-16"), 1),
        ("a/1.jpg 0\r\n".encode("utf-16-le"), 1),
        (b"a/1.jpg 0\nStra\xdfe.jpg 1\n", 2),
        (b"\xef\xbb\xbf\n\n\xdf 1\n", 3),
    ],
)
def test_a_list_that_is_no_utf8_is_refused_by_file_and_line(tmp_path, content, line):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^x: .*list.txt line {line} is not UTF-8 text .*; save it as UTF-8$"):
        layout.table("x", tmp_path / "list.txt", 2)


@pytest.mark.parametrize(("end", "encoding"), LISTS.values(), ids=LISTS)
def test_the_manifest_of_emoji_saved_on_windows(tmp_path, monkeypatch, end, encoding):
    monkeypatch.setattr(emoji, "_COUNTS", {"train": (1, 1), "test": (1, 1)})
    lines = ["file,pid,camid,stem,split", "1.png,1,1,x,train", "2.png,2,1,y,test", ""]
    (tmp_path / "manifest.csv").write_bytes(end.join(lines).encode(encoding))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("1.png", b"")
        archive.writestr("2.png", b"")
    assert emoji.load(str(tmp_path)).train.keys == ("1.png",)


# --- Data in which nothing can be found -------------------------------------------------------------------------------

TRAIN = [path for path in SIDES if path.startswith("train")]
NOTHING = {
    "other names": (["query/0042/0.png", "gallery/42/0.png"],
                    r"folder/query: none of 1 queries can find anything: 1 have no image of their identity in the "
                    r"gallery, first query/0042/0.png \(both sides must name identities alike\)"),
    "one camera": ([f"{side}/{i}/{i}_c1_{side}.png" for side in ("query", "gallery") for i in "xy"],
                   r"2 have only images of their own camera to find, which the camera rule removes, first query/x/"),
    "one image each": (["gallery/x/0.png", "gallery/y/0.png"],
                       r"folder/gallery: none of 2 .*: 2 are the only image of their identity, first gallery/x/0.png"),
    "one camera, each against all others": ([f"gallery/x/{n}_c1_.png" for n in (0, 1)], "2 have only images of their"),
    "one image each, with cameras": ([f"gallery/{i}/{i}_c{n}_.png" for n, i in enumerate("xy")], "2 are the only ima"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_data_in_which_nothing_can_be_found_are_refused(tmp_path, case):
    names, reason = NOTHING[case]
    tree(tmp_path, [*TRAIN, *names])
    with pytest.raises(ValueError, match=reason):
        folder.load(str(tmp_path))


def test_some_queries_that_find_nothing_are_counted(tmp_path):
    pairs = ["query/x/x_c1_0.png", "gallery/x/x_c2_0.png", "query/y/y_c1_0.png", "gallery/y/y_c1_1.png",
             "query/z/z_c1_0.png", "query/w/w_c1_0.png"]  # fmt: skip
    tree(tmp_path, [*TRAIN, *pairs])
    assert folder.load(str(tmp_path)).notice == (
        "3 of 4 queries can find nothing and do not count: 2 have no image of their identity in the gallery, first "
        "query/w/w_c1_0.png (both sides must name identities alike) and 1 have only images of their own camera to "
        "find, which the camera rule removes, first query/y/y_c1_0.png (a second camera must have seen their identity)"
    )


def test_one_camera_in_a_published_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(market1501, "_COUNTS", {"train": (1, 1), "query": (1, 1), "gallery": (1, 1)})
    tree(tmp_path, ["bounding_box_train/0002_c1s1_000451_03.jpg", "query/0001_c1s1_000001_00.jpg",
                    "bounding_box_test/0001_c1s1_000009_00.jpg"])  # fmt: skip
    with pytest.raises(ValueError, match="market1501/query: none of 1 queries can find anything: 1 have only images"):
        market1501.load(str(tmp_path))


def test_lost_queries_are_those_without_a_relevant_image():
    rng = np.random.default_rng(0)
    for case in range(200):
        sides = []
        for name in ("query", "gallery"):
            n = int(rng.integers(1, 6))
            keys = tuple(f"{name}/{i}" for i in range(n))
            sides.append(ImageSet(name, keys, rng.integers(-1, 3, n), None, rng.integers(0, 2, n)))
        query, gallery = sides if case % 2 else (sides[1], sides[1])
        data = RetrievalData(query, query, gallery, leave_one_out=not case % 2, camera_filter=case % 3 == 0)
        relevant = query.identity[:, None] == gallery.identity
        if data.camera_filter:
            relevant &= query.camera[:, None] != gallery.camera
        if data.leave_one_out:
            relevant &= ~np.eye(len(query), dtype=bool)
        lost = int((~relevant.any(axis=1)).sum())
        assert lost_queries(data)[0] == lost
        if lost == len(query):
            with pytest.raises(ValueError, match=f"none of {lost} queries"):
                check_findable(data)
        else:
            check_findable(replace(data, notice="x"))
