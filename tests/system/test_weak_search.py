"""Person search from boxes alone: what is trained on, what is not, how it starts an epoch, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from conftest import write_scenes
from PIL import Image
from tiny import met

from losses.oim import UNLABELLED
from models.detectors import FasterRCNN
from models.siamese_search import SiameseSearch, SiameseSearchConfig
from orchestrator import figures, find
from orchestrator.datasets import inria_person
from orchestrator.datasets.unions import union
from orchestrator.evaluation.clusters import agreement
from orchestrator.families.person_search import data
from orchestrator.families.weak_search.clustering import embed_people
from orchestrator.families.weak_search.crops import cut, is_usable
from orchestrator.families.weak_search.job import training_people
from orchestrator.fit import fit
from orchestrator.method import Where
from orchestrator.needs import Place
from orchestrator.recipe import changed

CPU = torch.device("cpu")


@pytest.fixture
def experiment(tiny_recipe, tiny_place, prepared):
    def make(**changes):
        recipe = tiny_recipe("rsiamnet", **changes)
        find.method("rsiamnet").check(recipe)
        return find.method("rsiamnet").experiment(recipe, prepared("rsiamnet", recipe), Where(tiny_place, 0, 1, CPU))

    return make


def renamed(root, side="train"):
    """Other identities in a side's list of boxes: everybody is somebody else, some are nobody."""
    file = root / side / "boxes.csv"
    head, *rows = file.read_text().splitlines()
    fields = [row.split(",") for row in rows]
    for number, row in enumerate(fields):
        row[5] = "" if number % 5 == 0 else f"p{(7 * number) % 11}"
    file.write_text("\n".join([head, *map(",".join, fields)]) + "\n")


# --- What is trained on -----------------------------------------------------------------------------------------------


def weights_of(root, storage, tiny_recipe, **changes):
    place, recipe = Place(str(storage), str(root)), tiny_recipe("rsiamnet", **changes)
    ready = met("rsiamnet", recipe, place)
    made = find.method("rsiamnet").experiment(recipe, ready, Where(place, 0, 1, CPU))
    history, _ = fit(made, CPU)
    return made.task.state_dict(), history


def test_other_identities_change_no_weight(tmp_path, tiny_recipe, quick_disk):
    write_scenes(tmp_path / "a" / "scenes")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    renamed(tmp_path / "b" / "scenes")
    one, first = weights_of(tmp_path / "a", tmp_path / "sa", tiny_recipe)
    two, second = weights_of(tmp_path / "b", tmp_path / "sb", tiny_recipe)
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == ["clusters_E5"]  # what is told
    told = [{k: v for k, v in h[-1].items() if k.startswith("clusters/pair")} for h in (first, second)]
    assert told[0] != told[1]  # which are told of, and nothing else


def without_identities(root):
    file = root / "train" / "boxes.csv"
    head, *rows = file.read_text().splitlines()
    fields = [row.split(",") for row in rows]
    file.write_text("\n".join([head, *(",".join([*f[:5], "", *f[6:]]) for f in fields)]) + "\n")


def test_no_identity_is_needed_but_where_one_is_learned(tmp_path, tiny_recipe, quick_disk):
    write_scenes(tmp_path / "a" / "scenes")
    without_identities(tmp_path / "a" / "scenes")
    state, _ = weights_of(tmp_path / "a", tmp_path / "s", tiny_recipe, **{"train.epochs": 1})
    assert len(state["bank_ND"]) > 20
    place = Place(str(tmp_path / "s"), str(tmp_path / "a"))
    supervised = tiny_recipe("rsiamnet", oim=1.0, clu=0.0, path="scene")
    with pytest.raises(ValueError, match="0 identities, which the supervised reference learns; expected 1 to 5,554"):
        find.method("rsiamnet").needs(supervised, place)
    with pytest.raises(ValueError, match="0 identities, which the memory of identities learns; expected 1 to 5,554"):
        find.method("ddps").needs(tiny_recipe("ddps", ld=0, cd=0, dfd=0), place)


def test_boxes_that_leave_their_frame_are_clipped_for_both_paths(tmp_path, tiny_recipe, quick_disk):
    write_scenes(tmp_path / "a" / "scenes")
    file = tmp_path / "a" / "scenes" / "train" / "boxes.csv"
    head, first, *rows = file.read_text().splitlines()
    fields = first.split(",")
    file.write_text("\n".join([head, ",".join([fields[0], "-9", "-4", "20", "300", *fields[5:]]), *rows]) + "\n")
    place, recipe = Place(str(tmp_path / "s"), str(tmp_path / "a")), tiny_recipe("rsiamnet")
    ready = met("rsiamnet", recipe, place)
    people = training_people(recipe, ready)
    height = people.frames.table.all("size")[0, 0]
    assert people.scenes.boxes(0)[0].tolist() == [0, 0, 20, height]


def test_a_batch_of_nobody_has_a_gradient_of_zero(experiment):
    made = experiment(path="crop", det=0.0, **{"student.search_by": "crop"})
    batch = next(iter(made.batches(1)))
    batch |= {"people": [b[:0] for b in batch["people"]], "row": batch["row"][:0], "crops": batch["crops"][:0]}
    batch |= {"row_identity": batch["row_identity"][:0], "counts": [0]}
    losses = made.task.train()(batch)
    losses.total.backward()
    assert losses.total == 0 and not made.task.student.embedding.weight.grad.any()


def test_the_supervised_reference_does_look_at_identities(tmp_path, tiny_recipe, quick_disk):
    write_scenes(tmp_path / "a" / "scenes")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    renamed(tmp_path / "b" / "scenes")
    changes = {"path": "scene", "clu": 0.0, "ins": 0.0, "inter": 0.0, "oim": 1.0, "train.epochs": 1}
    one, _ = weights_of(tmp_path / "a", tmp_path / "sa", tiny_recipe, **changes)
    two, _ = weights_of(tmp_path / "b", tmp_path / "sb", tiny_recipe, **changes)
    assert not torch.equal(one["student.embedding.weight"], two["student.embedding.weight"])


def test_crops_are_cut_from_the_original_frame_and_mirrored_with_it(experiment, tiny_recipe, prepared):
    made = experiment(**{"batch.flip": 1.0})
    batch = next(iter(made.batches(1)))
    ready = prepared("rsiamnet", tiny_recipe("rsiamnet"))
    people = training_people(tiny_recipe("rsiamnet"), ready)
    assert batch["counts"] == [len(batch["row"])] == [sum(map(len, batch["people"]))]
    for row, crop, identity in zip(batch["row"].tolist(), batch["crops"], batch["row_identity"].tolist(), strict=True):
        frame, scenes = people.image_N[row], people.scenes
        key = scenes.frames.keys[frame]
        assert key in batch["names"] and identity == scenes.identity_N[row]
        image = np.asarray(Image.open(f"{scenes.frames.reader.root}/{key}").convert("RGB"))
        x1, y1, x2, y2 = scenes.box_N4[row].tolist()
        part = Image.fromarray(image[max(y1, 0) : y2, max(x1, 0) : x2]).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(part, float)[:, ::-1] - crop.permute(1, 2, 0).numpy()).max() <= 1


def test_a_box_with_too_little_in_its_frame_is_detected_and_never_recognised():
    box = np.array([[0, 0, 5, 5], [-9, 3, 1, 9], [3, 3, 40, 50], [18, 2, 40, 9]])
    size = np.array([[20, 20]] * 4)
    assert is_usable(box, size).tolist() == [True, False, True, True]
    frame = torch.arange(1200).remainder(251).to(torch.uint8).reshape(3, 20, 20)
    assert not cut(frame, box[1], (4, 4)).any() and cut(frame, box[3], (7, 2)).shape == (3, 7, 2)
    assert torch.equal(cut(frame, box[3], (7, 2)), frame[:, 2:9, 18:20])


def test_tiny_boxes_keep_their_row(tmp_path, tiny_recipe, quick_disk):
    write_scenes(tmp_path / "a" / "scenes")
    file = tmp_path / "a" / "scenes" / "train" / "boxes.csv"
    head, first, *rows = file.read_text().splitlines()
    image = first.split(",")[0]
    file.write_text("\n".join([head, f"{image},3,3,4,9,,0", first, *rows]) + "\n")
    state, history = weights_of(tmp_path / "a", tmp_path / "sa", tiny_recipe, **{"train.epochs": 1})
    assert len(state["bank_ND"]) == len(rows) + 2 and state["bank_ND"].isfinite().all()
    assert np.isfinite(history[-1]["loss/clu"])


def test_a_trial_reads_no_image_that_is_stored(tiny_recipe, prepared, tiny_place, no_files):
    recipe, method = tiny_recipe("rsiamnet", **{"train.epochs": 1}), find.method("rsiamnet")
    ready, where = prepared("rsiamnet", recipe), Where(tiny_place, 0, 1, CPU)

    no_files()
    made = method.experiment(recipe, ready, where)
    _, evaluation = fit(made, CPU)
    scored = method.score(made.task.student, recipe, ready, where)
    assert scored.metrics == evaluation.metrics
    assert {"matches", "clusters"} <= set(method.pictures(made.task.student, recipe, ready, scored, where))


@pytest.mark.slow
def test_pictures_show_clusters_over_epochs(experiment, tiny_recipe, prepared, tiny_place, tmp_path):
    recipe = tiny_recipe("rsiamnet")
    made, ready = experiment(), prepared("rsiamnet", recipe)
    history, evaluation = fit(made, CPU)
    where = Where(tiny_place, 0, 1, CPU)
    pictures = find.method("rsiamnet").pictures(made.task.student, recipe, ready, evaluation, where)
    assert set(pictures) == {"matches", "clusters", "cluster_sizes", "cluster_pairs"}
    assert dict(pictures["cluster_sizes"].lines["clusters"]) == {
        epoch: h["clusters/count"] for epoch, h in enumerate(history, 1)
    }
    for name, picture in pictures.items():
        figures.draw(picture).savefig(tmp_path / f"{name}.png")


# --- The start of an epoch --------------------------------------------------------------------------------------------


def test_the_memory_is_refilled_with_unit_embeddings_of_everybody(experiment):
    made = experiment()
    with torch.no_grad():
        told = made.start_epoch(made.task.eval(), 1)
    task = made.task
    torch.testing.assert_close(task.bank_ND.norm(dim=1), torch.ones(len(task.bank_ND)))
    assert set(told) == {f"clusters/{n}" for n in ("count", "largest", "alone", "pair_precision", "pair_recall")}
    assert told["clusters/count"] == int(task.label_N.max()) + 1 < len(task.label_N)


@pytest.mark.parametrize("path", ["both", "scene", "crop"])
def test_people_are_embedded_as_a_step_embeds_them(path, experiment, tiny_recipe, prepared):
    made = experiment(path=path, **{"batch.flip": 0.0, "student.search_by": "scene"})
    task = made.task.eval()
    people = training_people(task.recipe, prepared("rsiamnet", tiny_recipe("rsiamnet")))
    embedded = embed_people(task.student, people, path, True, CPU)
    looked = task.look(next(iter(made.batches(1))))
    feature = task._feature(looked.scene_PD, looked.crop_PD)
    feature = torch.nn.functional.normalize(feature, dim=1)
    torch.testing.assert_close(feature, embedded[looked.row_P], atol=2e-5, rtol=0)


def test_blended_refill_keeps_a_part_of_the_old_rows(experiment):
    made = experiment(refill="blend", bank_momentum=0.9)
    with torch.no_grad():
        made.start_epoch(made.task.eval(), 1)
        fresh = made.task.bank_ND.clone()
        made.task.bank_ND.copy_(-fresh)
        made.task.steps += 1
        made.start_epoch(made.task, 2)
    torch.testing.assert_close(made.task.bank_ND, -fresh)


def test_agreement_counts_pairs_of_known_people():
    label, identity = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 2, 2, UNLABELLED, 3])
    found = agreement(label, identity, identity != UNLABELLED)
    pairs = [(i, j) for i in range(6) for j in range(i) if UNLABELLED not in (identity[i], identity[j])]
    together = [(i, j) for i, j in pairs if label[i] == label[j]]
    same = [(i, j) for i, j in pairs if identity[i] == identity[j]]
    both = len(set(together) & set(same))
    assert (found.pair_precision, found.pair_recall) == (both / len(together), both / len(same))
    assert (found.count, found.largest, found.alone) == (3, 3, 1 / 6)
    nobody = agreement(np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool))
    assert (nobody.count, nobody.pair_precision, nobody.pair_recall) == (0, 1.0, 1.0)


# --- Networks ---------------------------------------------------------------------------------------------------------


def network(**changes):
    torch.manual_seed(0)
    config = {"backbone": "resnet10t", "width": 0.125, "size": (64, 96), "levels": 64, "dim": 8, "crop": (64, 32)}
    return SiameseSearch(SiameseSearchConfig(**config | changes)).eval()


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
@pytest.mark.parametrize("crop_cells", ["align", "average", "whole", "align_tall"])
@torch.no_grad()
def test_every_detector_embeds_in_every_way(detector, crop_cells):
    net = network(detector=detector, crop_cells=crop_cells)
    boxes, scores, embeddings = net(torch.randn(1, 3, 64, 90))
    assert len(boxes) == len(scores) == len(embeddings) and net.embed_crops(torch.randn(3, 3, 64, 32)).shape == (3, 8)
    assert (scores[1:] <= scores[:-1]).all()
    maps = net.pyramid(torch.randn(1, 3, 64, 96))
    unit = net.embed(maps, [torch.tensor([[1.0, 2, 30, 60], [5, 5, 20, 20]])], [(64, 96)])
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
    assert net.embed(maps, [torch.zeros(0, 4)], [(64, 96)]).shape == (0, 8)


@torch.no_grad()
def test_people_can_be_searched_by_their_crops():
    by_crop = network(search_by="crop")
    image, box = torch.randn(1, 3, 64, 96), torch.tensor([[16.0, 0, 48, 64]])  # as large as a crop
    found = by_crop.embed(by_crop.pyramid(image), [box], [(64, 96)])
    expected = torch.nn.functional.normalize(by_crop.embed_crops(image[:, :, :, 16:48]), dim=1)
    # Two samples a cell at quarters of a pixel: the picture a little smoothed.
    assert torch.nn.functional.cosine_similarity(found, expected).item() > 0.9


def test_parameters_are_those_of_torchvision_and_of_the_card():
    with torch.device("meta"):
        net = SiameseSearch(SiameseSearchConfig())
    count = sum(p.numel() for p in (*net.trunk.parameters(), *net.detector.parameters()))
    assert count == 32_115_270 and sum(p.numel() for p in net.embedding.parameters()) == 2048 * (256 * 49 + 1)


def test_levels_of_boxes_are_those_recorded():
    golden = np.load("tests/golden/rsiamnet.npz")
    scale = torch.from_numpy(golden["roi_level/scale"]).float()
    net = network()
    box = torch.stack([torch.zeros_like(scale), torch.zeros_like(scale), scale, scale], 1)
    assert (net.pool.map_levels([box]) + 3).tolist() == golden["roi_level/level"].tolist()
    assert net.pool.scales == [1 / 8, 1 / 16, 1 / 32, 1 / 64]


def test_frozen_stages_and_norms_stay():
    net = network()
    net.freeze(1, True)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert {"trunk.body.conv1.weight", "trunk.body.layer1.0.conv1.weight", "trunk.body.layer4.0.bn1.weight"} <= frozen
    assert "trunk.body.layer2.0.conv1.weight" not in frozen
    assert not any(m.training for m in net.train().trunk.norms())
    net = network()
    net.freeze(0, False)
    assert all(p.requires_grad for p in net.parameters()) and all(m.training for m in net.train().trunk.norms())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"detector": "yolo"}, "detector is one of fcos, retinanet, faster_rcnn, got 'yolo'"),
     ({"levels": 32}, "FCOS norms 32 groups of channels; levels must be a larger multiple, got 32"),
     ({"crop_cells": "whole", "crop": (60, 32)}, "sides are multiples of 32, got 60×32"),
     ({"detector": "retinanet", "group_norm": True, "levels": 48}, "levels must be a multiple of 32, got 48")],
)  # fmt: skip
def test_a_network_that_cannot_be_built(settings, words):
    with pytest.raises(ValueError, match=words):
        network(**settings)


def test_a_two_stage_detector_has_finer_levels():
    net = network(detector="faster_rcnn")
    assert isinstance(net.detector, FasterRCNN) and net.pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


# --- Data -------------------------------------------------------------------------------------------------------------


def write_inria(root, boxes={"Train": (2, 1), "Test": (1,)}):  # noqa: B006
    """The layout of INRIA person: an annotation for each image, corners from 1."""
    for part, counts in boxes.items():
        for folder in ("pos", "annotations"):
            (root / part / folder).mkdir(parents=True)
        for number, count in enumerate(counts):
            name = f"person_{number:03d}"
            Image.new("RGB", (60, 50), (number, 9, 9)).save(root / part / "pos" / f"{name}.png")
            lines = [
                "# PASCAL Annotation Version 1.00",
                "",
                f'Image filename : "{part}/pos/{name}.png"',
                "Image size (X x Y x C) : 60 x 50 x 3",
                f'Objects with ground truth : {count} {{ "PASperson" }}',
            ]
            lines += [
                f'Bounding box for object {i} "PASperson" (Xmin, Ymin) - (Xmax, Ymax) : ({i}, 5) - ({i + 20}, 45)'
                for i in range(1, count + 1)
            ]
            lines.append("# Größe")
            (root / part / "annotations" / f"{name}.txt").write_text("\n".join(lines), "latin-1")


def test_inria_person_is_read(tmp_path):
    write_inria(tmp_path)
    found = inria_person.read(tmp_path)
    assert found.train.frames.keys == (
        "Train/pos/person_000.png",
        "Train/pos/person_001.png",
        "Test/pos/person_000.png",
    )
    assert found.train.boxes(0).tolist() == [[0, 4, 21, 45], [1, 4, 22, 45]] and found.train.num_identities == 0
    with pytest.raises(ValueError, match=r"inria_person/Train: images, boxes are \(2, 3\), expected \(614, 1237\)"):
        inria_person.load(str(tmp_path))
    with pytest.raises(ValueError, match="inria_person has nobody to search; name it behind a benchmark"):
        union({"inria_person": found})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("Objects with ground truth : 2", "Objects with ground truth : 3", "has 2 boxes and says 3"),
     ("Image filename", "Picture", "names no image or no number of objects"),
     ("(1, 5) - (21, 45)", "(1, 5) - (0, 45)", "has a box without area")],
)  # fmt: skip
def test_what_is_wrong_with_an_inria_annotation_is_said(tmp_path, old, new, words):
    write_inria(tmp_path)
    file = tmp_path / "Train" / "annotations" / "person_000.txt"
    file.write_text(file.read_text("latin-1").replace(old, new), "latin-1")
    with pytest.raises(ValueError, match=words):
        inria_person.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no annotations in"):
        inria_person.load(str(tmp_path / "nowhere"))


def test_a_union_has_the_training_frames_of_all_and_the_gallery_of_the_first(tiny_root, tmp_path):
    write_inria(tmp_path)
    first, other = find.dataset("folder_scenes")(str(tiny_root), "test"), inria_person.read(tmp_path)
    second = find.dataset("folder_scenes")(str(tiny_root), "test")
    joined = union({"one": first, "other": other, "again": second})  # parts share file names
    train = joined.train
    assert len(train) == 2 * len(first.train) + 3 and len(set(train.frames.keys)) == len(train)
    assert joined.gallery is first.gallery and train.num_identities == 2 * first.train.num_identities
    assert train.frames.reader.read("other/Train/pos/person_000.png") == other.train.frames.reader.read(
        "Train/pos/person_000.png"
    )
    key = first.train.frames.keys[0]
    assert train.frames.reader.read(f"one/{key}") == train.frames.reader.read(f"again/{key}")
    last = train.rows(len(train) - 1)
    assert np.array_equal(train.box_N4[last], second.train.boxes(len(second.train) - 1))
    assert train.frames.reader.stamp(train.frames.keys) == train.frames.reader.stamp(list(train.frames.keys))
    with pytest.raises(FileNotFoundError, match="no data set of the union has the key 'nobody/x'"):
        train.frames.reader.read("nobody/x")


def test_a_union_is_named_with_plus(tiny_root):
    with pytest.raises(ValueError, match=r"prw\+prw names a data set twice"):
        data.parts_of("prw+prw")
    recipe = changed(find.recipe("rsiamnet", "folder"), {"data.name": "folder_scenes+market"})
    with pytest.raises(ValueError, match=r"there is no data set reader 'market'; did you mean market1501\?"):
        find.method("rsiamnet").check(recipe)
    recipe = changed(find.recipe("rsiamnet", "folder"), {"data.name": "folder_scenes+demo_people"})
    with pytest.raises(ValueError, match="demo_people holds no scenes with boxes of people"):
        data.listed(recipe.data, Place("", str(tiny_root)))


def test_other_training_frames_leave_the_gallery_s_needs_alone(tiny_recipe, tiny_place):
    needs = [
        find.method("rsiamnet").needs(tiny_recipe("rsiamnet", **changes), tiny_place)
        for changes in ({}, {"data.fraction": 0.5}, {"data.name": "folder_scenes+demo_scenes"})
    ]
    for role in needs[0]:
        keys = {need[role].key for need in needs}
        assert len(keys) == (1 if role.startswith(("gallery", "references")) else 3), role


def test_the_counts_that_are_told_are_those_of_what_is_trained_on(tiny_recipe, prepared):
    told = prepared("rsiamnet", tiny_recipe("rsiamnet", **{"data.fraction": 0.5})).told()
    assert told["protocol"].startswith("frames/boxes/identities: train 12/")


@pytest.mark.slow
def test_a_union_is_trained_on(tiny_recipe, tiny_root, tmp_path, quick_disk):
    union_name = {"data.name": "folder_scenes+demo_scenes", "train.epochs": 1, "batch.by_aspect": False, "oim": 1.0}
    state, history = weights_of(tiny_root, tmp_path, tiny_recipe, **union_name)
    scenes = find.dataset("demo_scenes")("", "test").train
    own = find.dataset("folder_scenes")(str(tiny_root), "test").train
    assert len(state["bank_ND"]) == len(scenes.box_N4) + len(own.box_N4) and np.isfinite(history[-1]["val/map"])


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.fraction": 0.1}, r"batch.scenes \(4\) is more than the 2 training frames; data.fraction is 0.1, so an"),
        ({"clu": 0.0, "ins": 0.0, "inter": 0.0}, "nothing trains the embedding: set one of clu, ins, inter"),
        ({"path": "scene", "student.search_by": "crop"}, "search_by=crop, but path=scene trains no crop"),
        ({"inter_normalization": "linear", "inter_temperature": 0.5}, "linear has no temperature, got 0.5"),
        ({"data.skip_unreadable": True}, "a frame that is left out may hold somebody who is searched"),
        ({"student.size": "64x48"}, "student: size 64x48: the shorter side comes first"),
        ({"student.levels": 40}, "student: FCOS norms 32 groups"),
        ({"student.frozen_stages": 1}, "frozen_stages=1 and freeze_norms=False of a network from scratch keep"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(tiny_recipe, tiny_place, changes, words):
    recipe = tiny_recipe("rsiamnet", **changes)
    with pytest.raises(ValueError, match=words) as error:
        find.method("rsiamnet").check(recipe)
        find.method("rsiamnet").needs(recipe, tiny_place)
    assert "\n" not in str(error.value)


def test_scenes_with_one_box_are_trained_on_and_one_box_in_all_is_refused(tmp_path, tiny_recipe, quick_disk):
    write_scenes(tmp_path / "a" / "scenes")
    file = tmp_path / "a" / "scenes" / "train" / "boxes.csv"
    head, *rows = file.read_text().splitlines()
    of_image = {row.split(",")[0]: row for row in rows}
    file.write_text("\n".join([head, *of_image.values()]) + "\n")
    state, history = weights_of(tmp_path / "a", tmp_path / "sa", tiny_recipe, **{"train.epochs": 1})
    assert len(state["bank_ND"]) == len(of_image) and np.isfinite(history[-1]["loss/clu"])
    one = next(row for row in rows if row.split(",")[5])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "scenes" / "train" / "boxes.csv").write_text(f"{head}\n{one}\n")
    with pytest.raises(ValueError, match="folder_scenes has 1 boxes in its training frames; people are told apart"):
        find.method("rsiamnet").needs(tiny_recipe("rsiamnet"), Place(str(tmp_path / "sb"), str(tmp_path / "b")))


def test_everybody_in_one_cluster_has_no_loss_and_trains_on(experiment):
    made = experiment()
    with torch.no_grad():
        made.start_epoch(made.task.eval(), 1)
    made.task.label_N.zero_()
    losses = made.task.train()(next(iter(made.batches(1))))
    losses.total.backward()
    assert losses.terms["clu"] == 0 and losses.total > 0
    assert all(p.grad.isfinite().all() for p in made.task.parameters() if p.grad is not None)
