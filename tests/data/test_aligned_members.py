"""Members of a group that are brought to its first one, and the cache of how."""

import pytest
import torch

from scripts.data import aligned_members
from scripts.data.aligned_members import AlignedMembers
from tests.inference.test_alignment import subject


@pytest.fixture(scope="module")
def members():
    pairs = [subject(seed, degrees=12, shift=3) for seed in range(3)]
    images, labels = (torch.stack([torch.from_numpy(x)[None] for x in part]) for part in zip(*pairs, strict=True))
    images = (images - images.amin()) / (images.amax() - images.amin())
    return images, labels.to(torch.uint8)


def overlap(a, b):
    return float(2 * (a * b).sum() / (a.sum() + b.sum()))


def test_members_come_to_lie_on_the_first_one_and_transforms_are_found_once(members, tmp_path, monkeypatch):
    images, labels = members
    aligned = AlignedMembers(tmp_path)
    image, label = aligned(list(images), images, labels, generation=False)
    assert torch.equal(image[0], images[0]) and torch.equal(label[0], labels[0])
    assert image.dtype == images.dtype and label.dtype == torch.uint8 and set(label.unique().tolist()) == {0, 1}
    for number in (1, 2):
        before, after = (overlap(group[0], group[number]) for group in (labels, label))
        assert after > 0.8 > before
    monkeypatch.setattr(aligned_members, "align", lambda *_: pytest.fail("registered again"))
    again, _ = aligned(list(images), images, labels, generation=False)
    assert torch.equal(again, image) and len(list((tmp_path / "aligned").iterdir())) == 2


def test_what_does_not_align_stays_and_what_is_damaged_is_found_anew(members, tmp_path):
    images, labels = members
    flat = torch.cat((images[:2], torch.full_like(images[:1], 0.5)))
    aligned = AlignedMembers(tmp_path)
    image, label = aligned(list(flat), flat, labels, generation=False)
    assert torch.equal(image[2], flat[2]) and torch.equal(label[2], labels[2])
    (kept,) = (tmp_path / "aligned").iterdir()
    kept.write_bytes(b"damaged")
    assert torch.equal(aligned(list(flat), flat, labels, generation=False)[0], image)


def test_members_that_are_never_drawn_again_leave_nothing_behind(members, tmp_path):
    images, labels = members
    image, label = AlignedMembers(tmp_path)(list(images), images, labels, generation=False, keep=False)
    assert overlap(label[0], label[1]) > 0.8 and not torch.equal(image[1], images[1])
    assert not list(tmp_path.iterdir())
