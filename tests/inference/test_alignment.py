"""Contexts that are brought to a target, through the predictor and the workflow, with a network that only averages."""

import json
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation

from scripts.data.preprocessing import Preprocessing
from scripts.inference import aligned_contexts as alignment
from scripts.inference.confidence import SHARES, ConfidentInferer
from scripts.inference.self_test import dice_by_label
from scripts.inference.target import HARDLY_TO_BE_TRUSTED, NOT_TO_BE_TRUSTED
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from tests.workflows import run_workflow

SIZE = 32
CENTRE = np.full(3, (SIZE - 1) / 2)
PLACES = {1: (4, 3, 2)}
"""Centres of the labels from the middle of the head."""


class LabelAverage(torch.nn.Module):
    """Answers the mean of the labels that it is shown, times a factor."""

    def __init__(self, size=SIZE, factor=1.0):
        super().__init__()
        self.register_buffer("grid", torch.tensor((size,) * 3))
        self.factor = factor

    def forward(self, target, images, labels, mini_context_size):
        return self.factor * labels.mean(1)


def head(places, size=SIZE):
    """An ellipsoid with smooth texture, brighter where its labels are: image and label map."""
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1) - (size - 1) / 2
    texture = gaussian_filter(np.random.default_rng(0).standard_normal((size,) * 3), 2.0)
    inside = ((grid / (13, 14, 12)) ** 2).sum(-1) < 1
    image = inside * (1 + 0.15 * texture / texture.std())
    label = np.zeros((size,) * 3, np.int16)
    for value, place in places.items():
        label[(((grid - place) / (4, 5, 4)) ** 2).sum(-1) < 1] = value
    return gaussian_filter(image + 0.5 * (label > 0), 0.7), label


def subject(seed, degrees=4.0, shift=1.5, places=PLACES):
    """The same head, turned about each axis and shifted by up to so much, with noise of its own."""
    rng = np.random.default_rng(seed)
    image, label = head(places)
    turn = Rotation.from_euler("xyz", rng.uniform(-degrees, degrees, 3), degrees=True).as_matrix()
    offset = CENTRE - turn @ (CENTRE + rng.uniform(-shift, shift, 3))
    image = affine_transform(image, turn, offset, order=1) + 0.02 * rng.standard_normal(image.shape)
    return image.astype(np.float32), affine_transform(label, turn, offset, order=0)


def noise(seed=0):
    return np.random.default_rng(seed).standard_normal((SIZE,) * 3).astype(np.float32)


def predictor(pairs, align="deformable", network=None, **options):
    inferer = ICLInferer(network or LabelAverage(), device="cpu", align=align, **options)
    inferer.set_context(*zip(*pairs, strict=True))
    return inferer


def predicted(inferer, image):
    return inferer.complete(inferer.target(image))


def dice(prediction, label, count=1):
    return dice_by_label(prediction.as_tensor().long(), torch.from_numpy(label)[None].long(), count)


@pytest.fixture(scope="module")
def near():
    """A predictor whose contexts lie nearly as its targets do."""
    return predictor([subject(seed) for seed in range(3)])


def test_contexts_in_another_pose_are_brought_to_the_target():
    pairs = [subject(seed, degrees=20, shift=4) for seed in range(3)]
    image, label = subject(10, degrees=20, shift=4)
    found = {mode: predicted(predictor(pairs, mode), image) for mode in ("off", "affine", "deformable")}
    (plain,), (affine,), (deformable,) = (dice(found[mode].prediction, label) for mode in found)
    assert plain < 0.5 and affine > 0.8 and deformable > 0.85
    assert found["off"].alignment is None and not found["off"].doubt and not found["off"].aligned
    for mode in ("affine", "deformable"):
        said = found[mode].alignment
        assert said["mode"] == mode and list(said["contexts"]) == ["context 1", "context 2", "context 3"]
        assert found[mode].warnings == [] and said["left_out"] == []
        (region,) = said["regions"]
        assert region["labels"] == [1] and region["folded"] == 0
        for words in said["contexts"].values():
            assert 0.4 < words["similarity"] <= 1 and words["transform"].startswith("turned by ")
            assert ("bent by" in words["transform"]) == (mode == "deformable")


@pytest.mark.parametrize("code", ["LPS", "SAR", "AIL"])
def test_a_reoriented_scan_has_the_same_prediction(near, code):
    scan = nib.Nifti1Image(subject(10)[0], np.eye(4))
    turn = nib.orientations.ornt_transform(nib.io_orientation(scan.affine), nib.orientations.axcodes2ornt(code))
    other = scan.as_reoriented(turn)
    expected = near.predict((scan.get_fdata(dtype=np.float32), scan.affine)).numpy()[0]
    found = near.predict((other.get_fdata(dtype=np.float32), other.affine))
    back = nib.Nifti1Image(found.numpy()[0], found.affine.numpy()).as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(other.affine), nib.io_orientation(scan.affine))
    )
    assert np.allclose(found.affine, other.affine) and (expected > 0).sum() > 100
    assert (np.asarray(back.dataobj) != expected).sum() <= 0.001 * (expected > 0).sum()


def test_a_target_unlike_every_context_is_not_to_be_trusted(near):
    confident = ConfidentInferer(near, progress=False)
    target = confident.complete(near.target(noise()))
    assert target.doubt == NOT_TO_BE_TRUSTED and target.warnings == [NOT_TO_BE_TRUSTED]
    assert NOT_TO_BE_TRUSTED in target.confidence["flags"]
    assert target.alignment["contexts"] == {} and target.alignment["left_out"] == near.context.names
    plain = predictor([subject(seed) for seed in range(3)], "off")
    assert torch.equal(target.prediction, plain.predict(noise()))  # shown as it is
    assert target.used == {1: near.context.names}


def test_a_context_that_does_not_align_is_left_out_and_named():
    bad = (noise(1), subject(5)[1])
    target = predicted(predictor([subject(0), bad, subject(1)]), subject(10)[0])
    assert target.alignment["left_out"] == ["context 2"] and list(target.alignment["contexts"]) == [
        "context 1",
        "context 3",
    ]
    assert target.used == {1: ["context 1", "context 3"]} and not target.doubt
    assert target.warnings == ["not aligned and left out: context 2"]
    assert dice(target.prediction, subject(10)[1])[0] > 0.8


@pytest.mark.parametrize(("second", "regions"), [((7, 7, 6), 2), ((-2, 1, 2), 1)])
def test_labels_far_apart_get_regions_of_their_own(second, regions):
    places = {1: (-7, -7, -6), 2: second} if regions == 2 else {1: (5, 1, 2), 2: second}
    pairs = [subject(seed, places=places) for seed in range(2)]
    image, label = subject(10, places=places)
    inferer = predictor(pairs, network=LabelAverage(size=16))
    target = predicted(inferer, image)
    assert [region["labels"] for region in target.alignment["regions"]] == ([[1], [2]] if regions == 2 else [[1, 2]])
    assert min(dice(target.prediction, label, 2)) > 0.75
    assert len(target.views) == regions and set(target.used) == {1, 2}


@pytest.mark.parametrize(
    ("aligned", "doubt"), [(3, None), (2, None), (1, HARDLY_TO_BE_TRUSTED), (0, NOT_TO_BE_TRUSTED)]
)
def test_a_target_that_most_contexts_do_not_align_with_is_doubted(near, aligned, doubt):
    target = near.target(subject(10)[0])
    target.aligned = dict.fromkeys(range(aligned), 0.5)
    target.alignment = {"left_out": [f"context {n}" for n in range(4 - aligned)]}
    assert target.doubt == doubt


def test_without_evidence_contexts_of_another_contrast_vote_and_the_network_is_not_asked():
    pairs = [subject(seed) for seed in range(4)]
    image, label = subject(10)
    for scan, alike in ((image, True), (image.max() - image, False)):
        inferer = predictor(pairs, network=LabelAverage(factor=0.0), evidence=False)
        target = predicted(inferer, scan)
        (region,) = target.alignment["regions"]
        network, votes = inferer.parts(target, inferer.network, {1: sorted(target.aligned)})[0]
        assert (region["intensities_alike"] > 0.8) == alike
        assert (network == votes).all() == (not alike) and votes.max() > 0.9
    assert region["compared"] == "edges" and dice(target.prediction, label)[0] > 0.7


def test_the_vote_of_a_context_alone_is_half_the_networks():
    inferer = predictor([subject(seed) for seed in range(2)], network=LabelAverage(factor=0.0))
    target = predicted(inferer, subject(10)[0])
    (both,), (alone,) = (inferer.parts(target, inferer.network, {1: chosen}) for chosen in ([0, 1], [0]))
    assert both[0].max() == alone[0].max() == 0  # a network that says nothing
    assert both[1].max() > 0.9 and 0.45 < alone[1].max() <= 0.5


def on_view(mask, view):
    return Preprocessing.label_on(MetaTensor(torch.from_numpy(mask)[None]), view.image)


class Brightness(LabelAverage):
    """Answers the target's image as it is shown, and keeps the contexts' ones."""

    def forward(self, target, images, labels, mini_context_size):
        self.images, self.labels = images, labels
        return target


@pytest.mark.parametrize("inverted", [False, True])
def test_the_network_is_shown_evidence_whatever_the_target_s_contrast(inverted):
    pairs = [subject(seed) for seed in range(4)]
    image, label = subject(10)
    network = Brightness()
    inferer = predictor(pairs, network=network)
    target = predicted(inferer, image.max() - image if inverted else image)
    members = {1: sorted(target.aligned)}
    evidence, _ = inferer.parts(target, network, members)[0]
    where = on_view(label == 1, target.views[0])
    inside, outside = evidence[where].mean(), evidence[~where].mean()
    assert 0 <= evidence.min() and evidence.max() <= 1 and inside > 0.7 and outside < inside - 0.4
    marked = network.labels > 0.5
    assert network.images[marked].mean() > 0.7 and network.images[~marked].mean() < 0.4


def test_each_label_has_evidence_of_its_own():
    places = {1: (4, 3, 2), 2: (-5, 3, 2)}

    def pair(seed):
        image, label = subject(seed, places=places)
        return np.where(label == 2, 0.5 * image, image), label  # 2 is dark, 1 bright

    network = Brightness()
    inferer = predictor([pair(seed) for seed in range(3)], network=network)
    image, label = pair(10)
    target = predicted(inferer, image)
    (shown, _), view = inferer.parts(target, network, {v: sorted(target.aligned) for v in (1, 2)})[0], target.views[0]
    for channel, value in enumerate((1, 2)):
        own, other = (on_view(label == v, view)[0] for v in (value, 3 - value))
        assert shown[channel][own].mean() > shown[channel][other].mean() + 0.4


def test_labels_outside_of_the_scan_are_background():
    places = {1: (0, 0, -7), 2: (0, 0, 10)}
    pairs = [subject(seed, degrees=2, shift=1, places=places) for seed in range(3)]
    image, label = (part[..., :11] for part in subject(10, degrees=2, shift=1, places=places))
    both = predicted(predictor(pairs), image)
    assert dice(both.prediction, label)[0] > 0.75 and both.prediction.max() == 1
    alone = predicted(predictor(pairs, labels=[2]), image)
    assert not alone.prediction.any() and not alone.doubt and len(alone.aligned) == 3
    assert alone.warnings == ["outside of the scan and left empty: label 2"]


def test_a_target_has_the_same_prediction_every_time_and_in_threads(near):
    image = subject(10)[0]
    first = near.predict(image)
    near.predict(subject(11)[0])
    assert torch.equal(near.predict(image), first)
    fresh = predictor([subject(seed) for seed in range(3)])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(fresh.predict, [image, image]))
    assert all(torch.equal(one, first) for one in found)


def test_contexts_are_known_before_a_target_whichever_it_is(near):
    """The first target may be a context itself, which is left out of its own contexts."""
    pairs = [subject(seed) for seed in range(3)]
    fresh = predictor(pairs)
    fresh.predict(pairs[0][0])
    assert torch.equal(fresh.predict(subject(10)[0]), near.predict(subject(10)[0]))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of two contexts."""
    path = tmp_path_factory.mktemp("record") / ".alignment.json"
    predictor([subject(seed) for seed in range(2)], alignment_record=path).aligned.describe([1])
    return path.read_text()


@pytest.mark.parametrize("damage", [None, "{", "[]", {"1": [[0.0] * 4] * 4}, {"1": [["nan"] * 4] * 4}])
def test_transforms_between_contexts_are_remembered(record, tmp_path, monkeypatch, damage):
    path, kept, found = tmp_path / ".alignment.json", json.loads(record), []
    assert set(kept["transforms"]) == {"0", "1"}
    path.write_text(json.dumps({**kept, "transforms": damage}) if isinstance(damage, dict) else damage or record)
    plain = alignment.align
    monkeypatch.setattr(alignment, "align", lambda *args: (found.append(args), plain(*args))[1])
    predictor([subject(seed) for seed in range(2)], alignment_record=path).aligned.describe([1])
    assert len(found) == (damage is not None)
    assert json.loads(path.read_text()) == kept


def test_a_record_of_other_contexts_is_not_used(record, tmp_path):
    (tmp_path / ".alignment.json").write_text(record)
    inferer = predictor([subject(0), subject(7)], alignment_record=tmp_path / ".alignment.json")
    inferer.aligned.describe([1])
    kept = json.loads((tmp_path / ".alignment.json").read_text())
    assert kept["contexts"] != json.loads(record)["contexts"]
    assert kept["transforms"]["1"] != json.loads(record)["transforms"]["1"]


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_the_self_test_chooses_the_networks_share(factor):
    inferer = predictor([subject(seed) for seed in range(3)], network=LabelAverage(factor=factor))
    found = ConfidentInferer(inferer, self_test=True, progress=False).prepare()
    dice_of = {float(share): mean for share, mean in found["mean_dice_by_share"].items()}
    assert tuple(dice_of) == SHARES and found["network_share"] == inferer.share
    assert dice_of[inferer.share] == max(dice_of.values()) > 0.75
    if factor == 0:  # a network that says nothing
        assert inferer.share < 0.5 and dice_of[1.0] == 0


def test_the_workflow_reports_how_contexts_were_aligned(tmp_path, write_nifti, monkeypatch):
    for seed in range(3):
        image, label = subject(seed)
        write_nifti(tmp_path / "contexts" / "imagesTr" / f"c{seed}_0000.nii.gz", image)
        write_nifti(tmp_path / "contexts" / "labelsTr" / f"c{seed}.nii.gz", label)
    described = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "blob": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "contexts" / "dataset.json").write_text(json.dumps({**described, "numTraining": 3}))
    write_nifti(tmp_path / "scans" / "scan.nii.gz", subject(10)[0])
    torch.manual_seed(0)
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=SIZE).state_dict(), tmp_path / "model.pt")
    related = []
    plain = alignment.AlignedContexts._relate
    monkeypatch.setattr(
        alignment.AlignedContexts, "_relate", lambda self, numbers: (related.append(numbers), plain(self, numbers))
    )
    options = {
        "dataset_dir": str(tmp_path / "scans"),
        "context_dir": str(tmp_path / "contexts"),
        "output_dir": str(tmp_path / "out"),
        "checkpoint": str(tmp_path / "model.pt"),
        "device": "cpu",
        "align": "deformable",
    }
    run_workflow("inference", **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    case = report["cases"]["scan"]
    assert len(case["alignment"]["contexts"]) == 3 and case["alignment"]["regions"][0]["labels"] == [1]
    for said in case["alignment"]["contexts"].values():
        assert 0.4 < said["similarity"] <= 1 and "turned by" in said["transform"] and "bent by" in said["transform"]
    assert case["seconds_by_step"]["alignment"] > 0 and not any("picture" in words for words in case["warnings"])
    assert related and (tmp_path / "out" / ".alignment.json").is_file()
    related.clear()
    run_workflow("inference", **options, overwrite=True)
    again = json.loads((tmp_path / "out" / "report.json").read_text())["cases"]["scan"]
    assert not related and again["alignment"] == case["alignment"]
