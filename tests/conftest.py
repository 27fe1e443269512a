"""Fixtures of all tests: a tiny data set on disk, recipes that fit it, one local cluster for the session."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import cases, family_of, own, preparation, with_paths

for name, value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "ORCHESTRATOR_PATIENCE_S": "60",
    "RAY_worker_niceness": "0",  # 15, and a test beside those on Ray takes their processor
}.items():
    os.environ.setdefault(name, value)

TRAIN_IDENTITIES = 16  # of the tiny data set
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the arguments ``case_method`` and ``case`` runs for every case."""
    if "case_method" in metafunc.fixturenames:
        metafunc.parametrize(("case_method", "case"), cases())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test on Ray first: it takes longest, and another file is tested beside it."""
    items.sort(key=lambda item: "ray" not in item.keywords)


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    """Recipe settings of d3still on the tiny data set, benchmark "folder"."""
    return dict(family_of("d3still").TINY)


@pytest.fixture(scope="session")
def tiny_sureid_settings() -> dict[str, Any]:
    """The same of sureid."""
    return dict(family_of("sureid").TINY)


@pytest.fixture(scope="session")
def tiny_arguments(tiny_settings):
    """Makes the ``--set`` arguments of the tiny recipe of d3still."""

    def arguments(**changes: Any) -> list[str]:
        from orchestrator import find

        settings = tiny_settings | with_paths(find.recipe("d3still", "folder"), changes)
        return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]

    return arguments


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A folder data set: 16 training and 6 test identities, two cameras."""
    from orchestrator.datasets.demo import render

    root = tmp_path_factory.mktemp("tiny")
    for part, identities, shots in (
        ("train", range(TRAIN_IDENTITIES), 3),
        ("query", range(20, 26), 1),
        ("gallery", range(20, 26), 2),
    ):
        for identity in identities:
            folder = root / part / f"{identity:04d}"
            folder.mkdir(parents=True)
            for camera in range(2):
                for shot in range(shots):
                    image = render(identity, camera, shot + (5 if part == "gallery" else 0))
                    image.save(folder / f"{identity:04d}_c{camera + 1}_{shot}.png")
    # Verified faces, for whoever takes these things for some: the same people as in the gallery.
    shutil.copytree(root / "gallery", root / "test")
    write_scenes(root / "scenes")
    return root


def write_scenes(root: Path) -> None:
    """Own scenes of the same number of identities: 24 training and 10 gallery frames of two shapes."""
    from orchestrator.datasets import composed, demo_scenes

    for side, part, frames, identities in (("train", 105, 24, TRAIN_IDENTITIES), ("gallery", 106, 10, 6)):
        plan = composed.Plan(part, frames, range(1, identities + 1), range(20_000, 20_100), ((48, 64), (64, 48)))
        rows = ["image,x1,y1,x2,y2,identity,camera"]
        (root / side / "images").mkdir(parents=True)
        for frame in range(frames):
            image, boxes, people = composed.compose(plan, frame, demo_scenes.cut)
            image.save(root / side / "images" / f"{frame:02d}.png")
            rows += [
                f"{frame:02d}.png,{','.join(map(str, box))},{who if who <= identities else ''},{frame % 2}"
                for box, who in zip(boxes.tolist(), people.tolist(), strict=True)
            ]
        (root / side / "boxes.csv").write_text("\n".join(rows) + "\n")
        assert len({row.split(",")[5] for row in rows[1:]} - {""}) == identities
    of_identity = [row.split(",")[5] for row in rows[1:]]  # of the gallery
    queries = [rows[1 + of_identity.index(i)] for i in sorted(set(of_identity) - {""}) if of_identity.count(i) > 1]
    (root / "query.csv").write_text("\n".join([rows[0], *queries]) + "\n")


@pytest.fixture(scope="session")
def quick_disk():
    """Caches are not forced to the disk: nobody pulls the plug of a test."""
    from orchestrator import cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_sync", lambda path: None)
        yield


@pytest.fixture(scope="session")
def tiny_place(tiny_root, tmp_path_factory, quick_disk):
    """One storage for the whole session, so that every tiny recipe is prepared once; do not damage it."""
    from orchestrator.needs import Place

    return Place(storage=str(tmp_path_factory.mktemp("storage")), data_root=str(tiny_root))


@pytest.fixture
def no_files(monkeypatch):
    """A function after which no image can be read, no file's time be asked, nothing be listed or made."""
    from orchestrator import cache, find
    from orchestrator.datasets.images import Folder

    def raises(*arguments, **named):
        raise AssertionError("looked at a file, or made something")

    def forbid() -> None:
        for name in ("read", "stamp"):
            monkeypatch.setattr(Folder, name, raises)
        for owner, name in ((cache, "ensure"), (find, "dataset"), (find, "listed")):
            monkeypatch.setattr(owner, name, raises)

    return forbid


@pytest.fixture
def own_place(tiny_root, tmp_path, quick_disk):
    """An empty storage of one test's own."""
    from orchestrator.needs import Place

    return Place(storage=str(tmp_path / "runs"), data_root=str(tiny_root))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Method -> weights of an untrained teacher of its tiny recipe, one for each family."""
    from orchestrator import find
    from orchestrator.recipe import changed

    stored: dict[str, Path] = {}

    def weights(method: str) -> Path:
        family = find.method(method).family
        if family not in stored:
            base = find.recipe(method, "folder")
            recipe = changed(base, own(base, family_of(method).TINY))
            folder = tmp_path_factory.mktemp(f"teacher-{family}")
            stored[family] = family_of(method).save_teacher(folder, recipe, TRAIN_IDENTITIES)
        return stored[family]

    return weights


@pytest.fixture(scope="session")
def tiny_teacher(teachers) -> Path:
    """Weights of the teacher of the tiny recipes of asymmetric retrieval."""
    return teachers("d3still")


@pytest.fixture(scope="session")
def tiny_recipe(teachers):
    """Makes the tiny recipe of any method; changes by any name that people may write."""
    from orchestrator import find
    from orchestrator.recipe import changed

    def recipe(method: str = "d3still", **changes: Any) -> Any:
        base = find.recipe(method, "folder")
        settings = own(base, family_of(method).TINY)
        if hasattr(base, "teacher"):
            settings["teacher.weights"] = str(teachers(method))
        return changed(base, settings | with_paths(base, changes))

    return recipe


@pytest.fixture(scope="session")
def tiny_sureid(tiny_recipe):
    """Makes tiny recipes of sureid."""
    return partial(tiny_recipe, "sureid")


@pytest.fixture(scope="session")
def prepared(tiny_place):
    """Makes everything ready that a recipe needs, in the session's storage or in another place."""
    from orchestrator import find
    from orchestrator.needs import Prepared

    preparations = {tiny_place: preparation(tiny_place)}

    def prepare(method: str, recipe: Any, purpose: str = "train", place: Any = tiny_place) -> Prepared:
        meet = preparations.setdefault(place, preparation(place)).meet
        needs = find.method(method).needs(recipe, place, purpose)
        return Prepared(place, {role: meet(method, need) for role, need in needs.items()})

    return prepare


@pytest.fixture(scope="session")
def local_ray():
    """One local cluster for the session."""
    from orchestrator import on_ray

    with on_ray.connected(dashboard=False) as runner:
        yield runner


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder with reference numbers and images is not beside this checkout")
    return SHARED
