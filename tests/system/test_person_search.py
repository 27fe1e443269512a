"""Person search as a whole: what a step looks at, its memory on one rank and on two, scores, pictures, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from losses.ddps import correlation_distillation, logit_distillation
from losses.oim import UNLABELLED
from orchestrator import checkpoint, figures, find
from orchestrator.families.person_search import data, search
from orchestrator.families.person_search.recipe import Search, StepTrain, learning_rate
from orchestrator.families.person_search.training import in_places, memory
from orchestrator.fit import fit, to_device
from orchestrator.method import Experiment, Progress, Where
from orchestrator.needs import Place, Prepared
from orchestrator.pictures import Lines, Panel, Sheet
from orchestrator.recipe import changed, flat, recipe_from

CPU = torch.device("cpu")
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ddps.npz")
ALONE = {"ld": 0.0, "cd": 0.0, "dfd": 0.0}


@pytest.fixture
def experiment(tiny_recipe, tiny_place, prepared):
    def make(**changes):
        recipe = tiny_recipe("ddps", **changes)
        find.method("ddps").check(recipe)
        return find.method("ddps").experiment(recipe, prepared("ddps", recipe), Where(tiny_place, 0, 1, CPU))

    return make


def first(made, epoch=1):
    return next(iter(made.batches(epoch)))


# --- a step -----------------------------------------------------------------------------------------------------------


def test_the_rate_of_every_step_is_that_recorded():
    train, steps = StepTrain(rate=0.003), 10
    found = [learning_rate(train, Progress(s // steps + 1, s, 0.0), steps) for s in range(200)]
    assert found == pytest.approx(GOLDEN["lr_schedule/lr"].tolist(), rel=1e-6)
    assert learning_rate(StepTrain(warmup_epochs=0, fall_epoch=0), Progress(20, 0, 0.0), steps) == 0.003


def test_the_teacher_looks_at_the_student_s_boxes(experiment):
    task = experiment().task.train()
    looked = task.look(first(experiment()))
    seen, pairs, sizes = looked.seen, looked.pairs, looked.images.sizes
    with torch.no_grad():
        taught = task.teacher.pyramid(looked.images.pixels_BCHW)
        logits, _ = task.teacher.classify(taught, seen.regions.boxes, sizes)
        embedding = task.teacher.embed(taught, seen.people.boxes, sizes)
    assert torch.equal(pairs.theirs_R2, logits) and pairs.own_R2 is seen.logit_R2
    people = int(pairs.is_person_P.sum())
    assert 0 < people < len(pairs.is_person_P)
    alike = torch.cdist(pairs.theirs_PD[:people], embedding)
    assert alike.amin(1).max() < 1e-3 and not pairs.own_PD[people:].any()  # each is a row of the sampled boxes
    losses = task.losses(looked)
    is_person = (seen.regions.label_N > 0).long()
    torch.testing.assert_close(losses.terms["ld"], logit_distillation(seen.logit_R2, logits, is_person))
    rows = pairs.own_PD[:people], pairs.theirs_PD[:people]
    torch.testing.assert_close(losses.terms["cd"], correlation_distillation(*rows))
    assert losses.observed["people"] == people
    losses.total.backward()
    assert all(p.grad is None for p in task.teacher.parameters()) and not task.teacher.training
    labels = torch.cat(looked.seen.people.labels())
    assert set(labels[labels > 0].tolist()) <= {*range(1, 17), UNLABELLED}


def test_the_teacher_may_propose_instead(experiment):
    """A student that is its own teacher says the same of the teacher's boxes."""
    made = experiment(regions="teacher", **{"teacher.network.levels": 12})
    task = made.task.eval()
    looked = task.look(first(made))
    assert len(looked.pairs.own_R2) == len(looked.pairs.label_R) and looked.pairs.own_R2 is not looked.seen.logit_R2
    task.teacher = task.student
    own = task.look(first(made)).pairs
    assert torch.equal(own.own_R2, own.theirs_R2) and torch.equal(own.own_PD, own.theirs_PD)
    losses = task._on_boxes(own)
    assert losses.terms["ld"].abs() < 1e-6 and losses.terms["cd"].abs() < 1e-6


def test_a_batch_without_anybody_who_has_an_identity(experiment):
    """Such a batch is NaN in the public code; here its people without identity still enter the queue."""
    made = experiment()
    batch = first(made)
    batch["identity"] = [torch.full_like(i, UNLABELLED) for i in batch["identity"]]
    losses = made.task.train()(batch)
    assert losses.terms["oim"].item() == 0 and all(t.isfinite() for t in losses.terms.values())
    losses.total.backward()
    made.task.after_step(losses.kept)
    memory = made.task.student.memory
    assert not memory.table_KD.any() and memory.queue_QD.any() and 0 <= memory.position < 12
    batch["boxes"] = [b[:0] for b in batch["boxes"]]
    batch["identity"] = [i[:0] for i in batch["identity"]]
    losses = made.task(batch)
    assert all(t.isfinite() for t in losses.terms.values()) and losses.terms["cd"].item() == 0


def test_the_first_loss_of_an_empty_memory(experiment):
    made = experiment(**ALONE)
    losses = made.task.train()(first(made))
    assert set(losses.terms) == {"rpn_class", "rpn_box", "person", "box", "oim"} and losses.weights["box"] == 10
    assert losses.terms["oim"].item() == pytest.approx(np.log(16 + 12), rel=1e-6)


def test_compared_feature_losses_stand_in_the_place_of_dfd(experiment):
    made = experiment(dfd=0.0, pkd=6.0, reviewkd=1.2, **{"student.levels": 12})
    losses = made.task.train()(first(made))
    assert {"pkd", "reviewkd", "ld", "cd"} < set(losses.terms) and not any("dfd" in name for name in losses.terms)
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in trained for p in made.task.fusion.parameters())
    as_released = experiment(dfd=0.0, reviewkd=1.2, reviewkd_trained=False)
    assert not any(p.requires_grad for p in as_released.task.fusion.parameters())
    before = [p.clone() for p in as_released.task.fusion.parameters()]
    fit(replace(as_released, epochs=1), CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, as_released.task.fusion.parameters(), strict=True))
    losses = experiment(ld=0.0, cd=0.0).task.train()(first(experiment()))
    assert {"dfd_person", "dfd_background", "dfd_attention", "dfd_context"} < set(
        losses.terms
    ) and "ld" not in losses.terms


def test_boxes_on_maps_are_divided_as_asked(experiment):
    """The two readings differ where a frame is padded, here at the right: 64 × 48 becomes 64 × 64."""
    values = {}
    for boxes in ("padded", "unpadded"):
        made = experiment(boxes=boxes)
        batch = next(b for b in made.batches(1) if any(tuple(s) == (64, 48) for s in b["sizes"]))
        values[boxes] = made.task.train()(batch).terms
    assert values["padded"]["dfd_person"] != values["unpadded"]["dfd_person"]
    assert values["padded"]["dfd_attention"] == values["unpadded"]["dfd_attention"]


def test_the_teacher_s_memory_ranks_the_boxes(experiment, teachers):
    stored = checkpoint.load_extras(teachers("ddps"))
    made = experiment()
    assert torch.equal(made.task.teacher_memory.table_KD, stored["memory.table_KD"])
    assert experiment(cd_score="constant").task.teacher_memory is None
    assert not any(name.startswith("teacher") for name in made.task.stored())
    assert {"student.memory.table_KD", "student.memory.queue_QD", "student.memory.position"} <= set(made.task.stored())


def test_places_for_rows():
    rows = torch.ones(2, 3)
    assert in_places(rows, 4).sum() == 6 and in_places(rows, 4).shape == (4, 3)
    with pytest.raises(ValueError, match="2 rows for 1 places"):
        in_places(rows, 1)


# --- two processes ----------------------------------------------------------------------------------------------------


def memories(recipe, roles, place: Place, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The memory after three steps in float64, batch norms as they are."""
    method = find.method("ddps")
    made: Experiment = method.experiment(
        recipe_from(method.recipes["folder"], recipe), Prepared.of(place, roles), Where(place, rank, world, CPU)
    )
    task = made.task.double().train()
    for module in task.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    model = nn.parallel.DistributedDataParallel(task, broadcast_buffers=False) if world > 1 else task
    for _, batch in zip(range(3), made.batches(1), strict=False):
        losses = model(to_device(batch, CPU))
        made.optimizer.zero_grad()
        losses.total.backward()
        made.optimizer.step()
        with torch.no_grad():
            task.after_step(losses.kept)
    return {name: value.clone() for name, value in task.student.memory.named_buffers()}


def one_of_two(rank: int, file: str, recipe, roles, place: Place, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    made = memories(recipe, roles, place, rank, 2)
    method = find.method("ddps")
    prepared, own = Prepared.of(place, roles), recipe_from(method.recipes["folder"], recipe)
    torch.manual_seed(0)
    student = method.experiment(own, prepared, Where(place, rank, 2, CPU)).task.student
    found = search.embedded(student, data.open_gallery(prepared, own.student.size), CPU)
    torch.save({**made, "query": torch.from_numpy(found.query_QD), "counts": [len(d) for d in found.detections]},
               f"{out}.{rank}")  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_one_memory_and_find_the_same(tiny_recipe, prepared, tiny_place, tmp_path):
    recipe = tiny_recipe("ddps")
    roles = prepared("ddps", recipe).plain()
    arguments = (str(tmp_path / "meet"), flat(recipe), roles, tiny_place, str(tmp_path / "out"))
    torch.multiprocessing.spawn(one_of_two, arguments, nprocs=2)
    one, two = (torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2))
    alone = memories(flat(recipe), roles, tiny_place, 0, 1)
    assert alone["table_KD"].any() and alone["queue_QD"].any() and alone["position"] > 0
    for name, value in alone.items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], value, rtol=1e-9, atol=1e-12)
    method = find.method("ddps")
    student = method.experiment(recipe, Prepared.of(tiny_place, roles), Where(tiny_place, 0, 1, CPU)).task.student
    found = search.embedded(student, data.open_gallery(Prepared.of(tiny_place, roles), recipe.student.size), CPU)
    assert torch.equal(one["query"], two["query"]) and one["counts"] == [len(d) for d in found.detections]
    torch.testing.assert_close(one["query"], torch.from_numpy(found.query_QD))


# --- scores and pictures ----------------------------------------------------------------------------------------------


@pytest.fixture
def searched(tiny_recipe, prepared):
    recipe = tiny_recipe("ddps", **ALONE)
    return data.open_gallery(prepared("ddps", recipe), recipe.student.size)


def perfect(searched) -> search.Found:
    """Everybody is found where they are, and known by their number."""
    scenes = searched.scenes

    def code(identity):
        known = np.eye(40, dtype=np.float32)[np.where(identity == UNLABELLED, 39, identity)]
        return known.reshape(-1, 40)

    of_frame = [scenes.identity_N[scenes.rows(f)] for f in range(len(scenes))]
    boxes = [np.concatenate([scenes.boxes(f), np.full((len(i), 1), 0.9)], 1) for f, i in enumerate(of_frame)]
    asked = []
    for frame, box in zip(searched.queries.frame_Q, searched.queries.box_Q4, strict=True):
        row = (scenes.boxes(frame) == box).all(1).argmax()
        asked.append(of_frame[frame][row])
    return search.Found(boxes, list(map(code, of_frame)), list(map(code, of_frame)), code(np.array(asked)))


def test_who_finds_everybody_scores_full(searched):
    metrics = search.scored(perfect(searched), searched, Search(context=True)).metrics
    assert {metrics[f"{g}/{m}"] for g in ("val", "bound") for m in ("map", "top1")} == {1.0}
    assert 0 < metrics["context/map"] <= 1  # who is matched to the query takes the best similarity of its frame
    assert "context/map" not in search.scored(perfect(searched), searched, Search()).metrics
    assert metrics["detection/ap"] == metrics["detection/recall"] == metrics["detection/labelled_recall"] == 1.0
    assert metrics["detection/labelled_ap"] < 1  # boxes of people without identity count as wrong
    found = perfect(searched)
    lost = replace(found, detections=[d[:0] for d in found.detections], embeddings=[e[:0] for e in found.embeddings])
    metrics = search.scored(lost, searched, Search()).metrics
    assert metrics["val/map"] == metrics["detection/ap"] == 0 and metrics["bound/map"] == 1.0
    assert 0 < search.by_chance(searched, Search())["val/map"] < 0.9
    unsure = replace(found, detections=[d * [1, 1, 1, 1, 0.4] for d in found.detections])
    assert search.scored(unsure, searched, Search()).metrics["val/map"] == 0  # below least_score nobody is searched
    assert search.scored(unsure, searched, Search(least_score=0.3)).metrics["val/map"] == 1


def test_a_search_is_scored_by_what_the_network_sees(experiment, searched, tiny_recipe, prepared, tiny_place):
    made = experiment(**ALONE)
    student = made.task.student.eval()
    found = search.embedded(student, searched, CPU)
    frames = searched.frames
    for frame in (0, 1):
        from models.person_search import padded
        from orchestrator.datasets.augmentation import normalised

        images = padded(normalised(frames(frame)[None], student.pixels))
        with torch.no_grad():
            expected = student.found(student.pyramid(images.pixels_BCHW), images)[0]
        assert np.allclose(found.detections[frame][:, 4], expected.score_N) and len(expected.score_N)
        assert np.allclose(found.detections[frame][:, :4] * frames.scale(frame), expected.boxes_N4, atol=1e-3)
    assert [len(t) for t in found.true_embeddings] == searched.scenes.count_F.tolist()
    assert np.allclose(np.linalg.norm(found.query_QD, axis=1), 1, atol=1e-5)
    row = (searched.scenes.boxes(int(searched.queries.frame_Q[0])) == searched.queries.box_Q4[0]).all(1).argmax()
    own = found.true_embeddings[int(searched.queries.frame_Q[0])][row]
    assert np.allclose(own, found.query_QD[0], atol=1e-5)


def test_pictures_show_what_was_found(experiment, searched, tmp_path):
    from orchestrator.families.person_search import pictures

    student = experiment(**ALONE).task.student.eval()
    found = perfect(searched)
    several = replace(searched, galleries={**searched.galleries, "3": searched.galleries["all"]})
    evaluation = search.scored(found, several, Search())
    made = pictures.pictures(student, several, evaluation, Search(), CPU)
    assert isinstance(made["matches"], Panel) and made["matches"].correct[:, 0].all()
    assert isinstance(made["looks"], Sheet) and isinstance(made["gallery_size"], Lines)
    for name, picture in made.items():
        figures.draw(picture).savefig(tmp_path / f"{name}.png")
    assert "gallery_size" not in pictures.pictures(student, searched, evaluation, Search(), CPU)
    # Every box twice: the second one around a person is scored as wrong, and marked so.
    double = replace(found, detections=[np.repeat(d, 2, 0) for d in found.detections],
                     embeddings=[np.repeat(e, 2, 0) for e in found.embeddings])  # fmt: skip
    assert not pictures.matches(searched, double, Search()).correct[:, 1].any()
    nobody = replace(found, detections=[d[:0] for d in found.detections], embeddings=[e[:0] for e in found.embeddings])
    assert not pictures.matches(searched, nobody, Search()).correct.any()


def test_a_trial_reads_no_frame_that_is_stored(tiny_recipe, prepared, tiny_place, no_files):
    recipe = tiny_recipe("ddps", **{"train.epochs": 1})
    ready, where, method = prepared("ddps", recipe), Where(tiny_place, 0, 1, CPU), find.method("ddps")

    no_files()
    made = method.experiment(recipe, ready, where)
    history, evaluation = fit(made, CPU)
    scored = method.score(made.task.student, recipe, ready, where)
    assert scored.metrics == evaluation.metrics and "loss/cd" in history[0]
    assert set(method.pictures(made.task.student, recipe, ready, scored, where)) == {"matches", "looks"}


def test_frames_that_are_not_stored_are_decoded_by_other_processes(experiment):
    off = {"run.pixel_cache": "off", **ALONE}
    here, there = (first(experiment(**off, **{"run.loader_workers": n})) for n in (0, 2))
    assert torch.equal(here["frames"], there["frames"]) and here["names"] == there["names"]
    stored = first(experiment(**ALONE))
    assert 0 < (here["frames"].float() - stored["frames"].float()).abs().mean() < 3  # JPEG


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher.network.size": "48x96"}, r"teacher.size \(48, 96\) is not student.size \(48, 64\)"),
        ({"student.size": "64x48", "teacher.network.size": "64x48"}, "student: size 64x48: the shorter side comes"),
        ({"data.skip_unreadable": "true"}, "skip_unreadable: a frame that is left out may hold somebody"),
        ({"student.name": "vit_tiny_patch16_224", "student.width": 1}, "expected .*; take a convolutional network"),
        ({"teacher.network.name": "resnet1o"}, "did you mean resnet"),
        ({"student.pretrained": "true"}, "no pretrained weights for width 0.125"),
        ({"pkd": 6.0}, "PKD compares maps of one width: student.levels 8, teacher.levels 12"),
        ({"sampled_boxes": 3}, "sampled_boxes is 3, and a quarter of them may be people: none; take 4 or more"),
        ({"batch.scenes": 30}, r"batch.scenes \(30\) is more than the 24 training frames; lower it"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(tiny_recipe, prepared, tiny_place, changes, words):
    recipe = tiny_recipe("ddps", **changes)
    with pytest.raises(ValueError, match=words) as error:
        find.method("ddps").check(recipe)
        find.method("ddps").needs(recipe, tiny_place)
    assert "\n" not in str(error.value)


def test_a_teacher_of_another_width_or_memory_is_refused(tiny_recipe, prepared, tiny_place, teachers, tmp_path):
    method = find.method("ddps")
    with pytest.raises(ValueError, match=r"holds another architecture: width 0.125 instead of 0.25"):
        method.needs(tiny_recipe("ddps", **{"teacher.network.width": 0.25}), tiny_place)
    network, facts = checkpoint.load_model(teachers("ddps"))
    checkpoint.save_model(tmp_path, network, facts, "bare")
    bare = tiny_recipe("ddps", **{"teacher.weights": str(tmp_path / "bare.safetensors")})
    with pytest.raises(ValueError, match=r"has no memory of identities beside it .* set cd_score=constant"):
        prepared("ddps", bare)
    prepared("ddps", changed(bare, {"cd_score": "constant"}))
    network.memory = memory(bare.memory, 8, 5)
    checkpoint.save_model(tmp_path, network, facts, "other")
    other = tiny_recipe("ddps", **{"teacher.weights": str(tmp_path / "other.safetensors")})
    with pytest.raises(ValueError, match="is of 5 identities, the training set has 16; is it the teacher"):
        prepared("ddps", other)
    network.memory = memory(changed(bare, {"memory.queue": 13}).memory, 8, 16)
    checkpoint.save_model(tmp_path, network, facts, "longer")
    longer = tiny_recipe("ddps", **{"teacher.weights": str(tmp_path / "longer.safetensors")})
    with pytest.raises(ValueError, match=r"has a queue of 13, the recipe one of 12; set memory\.queue"):
        prepared("ddps", longer)


def test_recipes_equal_and_as_released():
    recipes = find.method("ddps").recipes
    equal, released = recipes["cuhk_sysu"], recipes["cuhk_sysu_released"]
    assert (equal.ld, equal.cd, equal.tau, equal.cd_overlap) == (1.0, 0.01, 4.0, 0.7)
    assert (equal.dfd_person, equal.dfd_background, equal.dfd_attention, equal.dfd_context) == (
        5e-5,
        2.5e-5,
        5e-5,
        5e-7,
    )
    assert (equal.train.rate, equal.batch.scenes, equal.teacher.train.rate, equal.teacher.scenes) == (
        0.003,
        5,
        0.0024,
        4,
    )
    assert (equal.memory.queue, recipes["prw"].memory.queue, recipes["prw"].train.rate) == (5000, 500, 0.01)
    assert (released.cd_score, released.boxes, released.batch.by_aspect) == ("constant", "unpadded", False)
    alone = recipes["cuhk_sysu_released_alone"]
    assert alone.student.freeze_norms and not released.student.freeze_norms and not find.method("ddps").distils(alone)
    mobile, mobile_alone = (recipes[f"cuhk_sysu_released_mobilenet{end}"] for end in ("", "_alone"))
    assert (
        (mobile.batch.scenes, mobile.train.rate) == (2, 0.0012) == (mobile_alone.batch.scenes, mobile_alone.train.rate)
    )
    assert (mobile.detector.sampling.before_nms, mobile.detector.sampling.proposals) == (2000, 1000)
    assert (mobile.detector.proposal_score, mobile.student.pretrained, mobile_alone.student.pretrained) == (
        0.05,
        True,
        False,
    )
    assert not mobile_alone.student.freeze_norms and not find.method("ddps").distils(mobile_alone)
    assert all(r.train.precision == "float32" for r in recipes.values())
