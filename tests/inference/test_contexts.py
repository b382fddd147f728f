"""The context set: its pairs on the grid and in their own space, what it knows of them, whom it chooses."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data import volumes
from scripts.data.example_pairs import context_cases
from scripts.data.volumes import load_volume, volume_digest
from scripts.inference import context_pairs
from scripts.inference.context_source import load_contexts
from scripts.inference.last_used import LastUsed

GRID = (16, 16, 16)
NAMES = [f"p{i}" for i in range(6)]


@pytest.fixture
def root(make_dataset, tmp_path):
    return make_dataset(tmp_path / "data", cases=NAMES, channels=(0, 1))


def test_pairs_are_on_the_grid(root):
    cases = context_cases(root)
    found = load_contexts(cases, cases[1:4], GRID)
    assert len(found) == 3 and found.names == NAMES[1:4]
    images, labels = found.pairs()
    assert images.shape == labels.shape == (3, 1, *GRID)
    assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
    assert not labels.dtype.is_floating_point and set(labels.unique().tolist()) == {0, 1, 2}
    assert found.preprocessing.spatial_size == GRID and found.output_range == (0.0, 1.0)
    for number, case in enumerate(cases[1:4]):  # the grid is the image's own, so nothing is resampled
        assert np.array_equal(labels[number, 0], nib.load(case["label"]).get_fdata())


def test_spacing_does_not_hang_on_the_choice(make_dataset, root):
    make_dataset(root.parent, root.name, cases=["large"], size=(16, 16, 24), channels=(0, 1))
    cases = context_cases(root)
    chosen = [[case] for case in cases]
    spacings = {load_contexts(cases, one, GRID).preprocessing.spacing_mm for one in chosen}
    assert spacings == {1.5}
    assert load_contexts(cases, cases, GRID, spacing=2.5).preprocessing.spacing_mm == 2.5


def test_labels_and_who_has_them(root, rewrite):
    rewrite(root / "labelsTr" / "p1.nii.gz", lambda v: np.where(v == 2, 0, v))
    rewrite(root / "labelsTr" / "p3.nii.gz", lambda v: np.zeros_like(v))
    cases = context_cases(root)
    found = load_contexts(cases, cases, GRID)
    assert found.label_values == [1, 2]
    assert found.holding(1) == [0, 1, 2, 4, 5] and found.holding(2) == [0, 2, 4, 5] and found.holding(3) == []
    assert load_contexts(cases, [cases[1]], GRID).label_values == [1]
    assert load_contexts(cases, [cases[3]], GRID).label_values == []


def test_pairs_that_another_set_has_read_are_taken_over(root, monkeypatch):
    cases = context_cases(root)
    earlier = load_contexts(cases, cases[:4], GRID)
    earlier.pairs([1, 2, 3])
    read = counted(monkeypatch)
    later = load_contexts(cases, [cases[5], cases[3], cases[0], cases[1]], GRID)
    assert later.take_over(earlier) == {0: 2, 1: 3, 3: 1}
    images, labels = later.pairs()
    assert read == [cases[5]["image"], cases[5]["label"], cases[0]["image"], cases[0]["label"]]  # 0 was not read yet
    anew = load_contexts(cases, [cases[5], cases[3], cases[0], cases[1]], GRID)
    assert torch.equal(images, anew.pairs()[0]) and torch.equal(labels, anew.pairs()[1])
    assert load_contexts(cases, cases, GRID, spacing=2.0).take_over(earlier) == {}  # on another grid


def test_no_more_pairs_are_kept_than_are_to_be():
    asked = []
    kept = LastUsed(lambda number: asked.append(number) or -number, 2)
    assert [kept(n) for n in (1, 2, 1, 3, 1, 2)] == [-1, -2, -1, -3, -1, -2]
    assert asked == [1, 2, 3, 2]  # 2 was used longest ago when 3 came
    assert kept.get(3) is None and kept.get(1) == -1


# --- a target among the contexts


def reoriented(image, codes):
    wanted = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))


def nudged(image):
    affine = image.affine + np.random.default_rng(0).uniform(-1e-6, 1e-6, (4, 4)) * [[1], [1], [1], [0]]
    return nib.Nifti1Image(np.asanyarray(image.dataobj), affine)


def typed(image, dtype):
    return nib.Nifti1Image(np.asanyarray(image.dataobj).astype(dtype), image.affine)


DISGUISES = {
    "copied": ("x.nii.gz", lambda image: image),
    "not compressed": ("x.nii", lambda image: image),
    "float": ("x.nii.gz", lambda image: typed(image, np.float32)),
    "double": ("x.nii.gz", lambda image: typed(image, np.float64)),
    "int32": ("x.nii.gz", lambda image: typed(image, np.int32)),
    "header noise": ("x.nii.gz", nudged),
    "LPS": ("x.nii.gz", lambda image: reoriented(image, "LPS")),
    "ASL": ("x.nii.gz", lambda image: reoriented(image, "ASL")),
    "MGH": ("x.mgz", lambda image: nib.MGHImage(np.asanyarray(image.dataobj).astype(np.float32), image.affine)),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_target_is_recognised_among_the_contexts(root, tmp_path, disguise):
    found = load_contexts(*[context_cases(root)] * 2, GRID)
    name, change = DISGUISES[disguise]
    image = nib.load(root / "imagesTr" / "p2_0000.nii.gz")
    spaced = nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([0.9375, 0.9375, 1.5, 1]))
    nib.save(change(spaced), tmp_path / name)
    assert found.same_image(volume_digest(load_volume(tmp_path / name))) == [2]


def test_another_image_is_not_recognised(root, tmp_path, rewrite):
    found = load_contexts(*[context_cases(root)] * 2, GRID)
    path = root / "imagesTr" / "p2_0000.nii.gz"
    for change in (lambda v: v[::-1], lambda v: v + 1, lambda v: v.reshape(16, 8, 32), lambda v: v.transpose(1, 0, 2)):
        (tmp_path / "other.nii.gz").write_bytes(path.read_bytes())
        rewrite(tmp_path / "other.nii.gz", change)
        assert found.same_image(volume_digest(load_volume(tmp_path / "other.nii.gz"))) == []


def test_minus_zero_is_zero():
    voxels = torch.arange(27.0).reshape(1, 3, 3, 3) - 5
    other = torch.where(voxels == 0, -0.0, voxels)
    assert volume_digest(MetaTensor(voxels)) == volume_digest(MetaTensor(other))


# --- generation


def test_generation_pairs_are_two_channels(root):
    cases = context_cases(root, channel=0, label_channel=1)
    assert all(case["output"].endswith("_0001.nii.gz") and "label" not in case for case in cases)
    images, outputs = load_contexts(cases, cases[:4], GRID).pairs()
    assert images.shape == outputs.shape == (4, 1, *GRID) and outputs.dtype == torch.float32
    assert 0 <= outputs.min() and outputs.max() <= 1
    torch.testing.assert_close(outputs, 1 - images, atol=0.02, rtol=0)


def test_generation_output_range_is_that_of_the_outputs(root, rewrite):
    # a small object in much air
    for path in (root / "imagesTr").iterdir():
        scale = 1 if path.name.endswith("_0000.nii.gz") else 5

        def small(voxels, scale=scale):
            inner = np.zeros(voxels.shape, np.float32)
            inner[4:12, 4:12, 4:12] = scale * np.arange(100, 612).reshape(8, 8, 8)
            return inner

        rewrite(path, small)
    for number, name in enumerate(NAMES):  # the same image twice is refused
        rewrite(root / "imagesTr" / f"{name}_0000.nii.gz", lambda v, n=number: v + n)
    cases = context_cases(root, label_channel=1)
    low, high = load_contexts(cases, cases, (8, 8, 8)).output_range
    assert (low, high) == pytest.approx((500, 3055), abs=20)


def test_second_channel_as_input(root):
    candidates = (context_cases(root, channel) for channel in (0, 1))
    first, second = (load_contexts(cases, cases, GRID).pairs() for cases in candidates)
    torch.testing.assert_close(second[0], 1 - first[0], atol=0.02, rtol=0)
    assert torch.equal(first[1], second[1])


# --- own space


def test_pairs_in_their_own_space(root, write_nifti):
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -3], [0, 0, 1, 7], [0, 0, 0, 1]])
    for path in (root / "imagesTr" / "p1_0000.nii.gz", root / "labelsTr" / "p1.nii.gz"):
        write_nifti(path, np.asanyarray(nib.load(path).dataobj)[:, 2:], affine)
    cases = context_cases(root)
    image, label = load_contexts(cases, cases[:3], GRID).native(1)
    assert image.shape == label.shape == (1, 16, 14, 16) and np.allclose(label.affine, affine)
    assert torch.equal(image.as_tensor(), load_volume(cases[1]["image"]).as_tensor())
    assert set(label.unique().tolist()) == {0, 1, 2}


def test_values_of_no_class_are_background(make_dataset, tmp_path):
    labels = {"background": 0, "first": 1, "ignore": 2}
    root = make_dataset(tmp_path, cases=3, labels=labels)
    cases = context_cases(root)
    found = load_contexts(cases, cases, GRID)
    assert found.label_values == [1] and found.holding(2) == []
    assert set(found.pairs()[1].unique().tolist()) == set(found.native(0)[1].unique().tolist()) == {0, 1}


# --- what is kept


def counted(monkeypatch):
    read, load_volume, load_labels = [], volumes.load_volume, volumes.load_labels
    monkeypatch.setattr(volumes, "load_volume", lambda path: read.append(path) or load_volume(path))
    monkeypatch.setattr(volumes, "load_labels", lambda path: read.append(path) or load_labels(path))
    return read


def test_contexts_of_all_targets_are_read_once(root, monkeypatch):
    monkeypatch.setattr(context_pairs, "_CACHE_BYTES", 0)
    read = counted(monkeypatch)
    found = load_contexts(*[context_cases(root)] * 2, GRID)
    assert not read  # nothing is read that is not asked for
    found.describe()
    images, labels = found.pairs([4, 1])
    assert all(torch.equal(some, of_all[[4, 1]]) for some, of_all in zip((images, labels), found.pairs(), strict=True))
    assert len(read) == 12 and len(set(read)) == 12


def test_of_many_candidates_only_some_are_kept(root, monkeypatch):
    read = counted(monkeypatch)
    monkeypatch.setattr(context_pairs, "_CACHE_BYTES", 3 * 5 * 16**3)  # three pairs
    cases = context_cases(root)
    found = load_contexts(cases, cases, GRID, similar=2)
    found.describe()
    assert len(read) == 12
    first, _ = found.pairs([0, 1, 2])
    before = len(read)
    again, _ = found.pairs([2, 0, 1])
    assert len(read) == before and torch.equal(again, first[[2, 0, 1]])
    found.pairs([3, 4, 5])
    found.pairs([0])
    assert len(read) == before + 8
    assert found.label_values == [1, 2] and found.holding(1) == list(range(6)) and len(read) == before + 8


def test_what_pairs_hold_is_remembered_for_the_next_run(root, tmp_path, monkeypatch, rewrite):
    def load():
        cases = context_cases(root)
        return load_contexts(cases, cases, GRID, similar=2, record=tmp_path / "seen.json")

    read = counted(monkeypatch)
    first = load()
    first.describe()
    target = first.pairs([3])[0][0]
    assert len(read) == 12
    again = load()
    assert torch.equal(again.similarity(target), first.similarity(target)) and again.label_values == [1, 2]
    assert again.fingerprint == first.fingerprint and len(read) == 12
    rewrite(root / "labelsTr" / "p2.nii.gz", lambda v: np.where(v == 1, 0, v))
    changed = load()
    assert changed.holding(1) == [0, 1, 3, 4, 5] and changed.fingerprint != first.fingerprint and len(read) == 14
    for damage in ("{", '{"a": {"values": [1]}}', "[]"):
        (tmp_path / "seen.json").write_text(damage)
        assert load().holding(1) == [0, 1, 3, 4, 5]


def test_the_fingerprint_is_of_content_and_choice(root, tmp_path):
    cases = context_cases(root)
    plain = load_contexts(cases, cases, GRID).fingerprint
    renamed = [case | {"case": f"other {i}"} for i, case in enumerate(cases)]
    assert load_contexts(renamed, renamed, GRID).fingerprint == plain
    others = [
        load_contexts(cases, cases[:5], GRID),
        load_contexts(cases, cases, GRID, spacing=2),
        load_contexts(cases, cases, (8, 8, 8)),
        load_contexts(cases, cases, GRID, similar=2),
        load_contexts(cases, cases, GRID, similar=3),
        load_contexts(cases, [case | {"classes": {"first": [1]}} for case in cases], GRID),
    ]
    assert len({plain, *(other.fingerprint for other in others)}) == 7


# --- choice for a target


def smooth(seed, size=GRID):
    """An image of its own with coarse structure."""
    rng = np.random.default_rng(seed)
    coarse = torch.tensor(rng.random((1, 1, 4, 4, 4)), dtype=torch.float32)
    return torch.nn.functional.interpolate(coarse, size, mode="trilinear")[0]


@pytest.fixture
def varied(root, write_nifti):
    """Six candidates that look different; label 2 is in the last two."""
    for number, name in enumerate(NAMES):
        write_nifti(root / "imagesTr" / f"{name}_0000.nii.gz", 1 + 1000 * smooth(number)[0].numpy())
        label = np.zeros(GRID, np.uint8)
        label[4:8] = 1
        label[10:12] = 2 * (number > 3)
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", label)
    cases = context_cases(root)
    return load_contexts(cases, cases, GRID, similar=2)


def test_the_most_similar_are_chosen(varied):
    noise = 0.1 * torch.randn(1, *GRID)
    for number in range(6):
        similarity = varied.similarity(varied.pairs([number])[0][0] + noise)
        assert similarity.shape == (6,) and similarity.argmax() == number and 0.8 < similarity[number] <= 1
        chosen = varied.choose(range(6), similarity)
        assert chosen == similarity.argsort(descending=True)[:2].tolist()
        pool = [i for i in range(6) if i != number]
        assert number not in varied.choose(pool, similarity) and len(varied.choose(pool, similarity)) == 2
        assert varied.choose(varied.holding(2), similarity) == [4, 5]  # no more there are


def test_similarity_is_of_scans_on_the_grid(varied):
    image = varied.pairs([2])[0][0]
    torch.testing.assert_close(varied.similarity(image), varied.similarity(image[None]))
    torch.testing.assert_close(varied.similarity(image), varied.similarity(0.2 + 0.5 * image), atol=0.02, rtol=0)
    padded = torch.nn.functional.pad(image, (3, 3, 2, 2, 4, 4))  # of a larger scan the middle counts
    torch.testing.assert_close(varied.similarity(padded), varied.similarity(image))
    assert varied.similarity(1 - image)[2] == pytest.approx(-1, abs=0.01)
    assert varied.similarity(torch.ones(1, 9, 5, 7)).isfinite().all()


def test_equals_are_taken_in_their_order(varied):
    similarity = varied.similarity(torch.full((1, *GRID), 0.5))  # like nothing
    assert not similarity.any()
    assert varied.choose([5, 3, 4, 0], similarity) == [0, 3]


def test_without_a_choice_all_serve(root):
    found = load_contexts(*[context_cases(root)] * 2, GRID)
    assert not found.chooses and found.choose([0, 3, 5]) == [0, 3, 5]
    cases = context_cases(root)
    assert not load_contexts(cases, cases, GRID, similar=6).chooses
    assert load_contexts(cases, cases, GRID, similar=5).chooses


# --- what is to be said


def test_warnings_tell_who_lacks_a_label(root, rewrite):
    rewrite(root / "labelsTr" / "p1.nii.gz", lambda v: np.where(v == 2, 0, v))
    rewrite(root / "labelsTr" / "p3.nii.gz", lambda v: np.zeros_like(v))
    cases = context_cases(root)
    found = load_contexts(cases, cases, GRID, notes=["made by hand"])
    assert found.warnings([2]) == [
        "made by hand",
        "no label is left on the grid of p3: not used",
        "label 2 is in 4 of 6 contexts; not in p1, p3",
    ]
    whole = [case for case in cases if case["case"] not in ("p1", "p3")]
    assert load_contexts(whole, whole, GRID).warnings([1, 2]) == []


def test_a_label_that_is_lost_on_the_grid_is_not_held(root, rewrite):
    def speck(voxels):
        small = np.where(voxels == 2, 0, voxels)
        small[1, 1, 1] = 2  # between the voxels of the coarse grid
        return small

    rewrite(root / "labelsTr" / "p0.nii.gz", speck)
    cases = context_cases(root)
    assert cases[0]["values"][2] == 1
    assert load_contexts(cases, cases, (8, 8, 8), spacing=2).holding(2, on_grid=True) == [1, 2, 3, 4, 5]
