from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from scripts.reporting import pictures
from scripts.reporting.pictures import (
    GAP_PX,
    PANEL_PX,
    SHEET_PX,
    GroupView,
    contact_sheet,
    episode_figure,
    group_figure,
    label_colour,
    overlay_figure,
    save_png,
)
from scripts.runtime.output_folder import STATE

CAPTION_PX = 18
PLANES = ("axial", "coronal", "sagittal")


def panel(figure, plane, overlaid=True):
    """The square of one plane as an array of floats."""
    x = GAP_PX + PLANES.index(plane) * (PANEL_PX + GAP_PX)
    y = GAP_PX + CAPTION_PX + overlaid * (PANEL_PX + GAP_PX)
    return np.asarray(figure.crop((x, y, x + PANEL_PX, y + PANEL_PX)), float)


def where(pixels, colour):
    """Rows and columns of the pixels of exactly this colour (the contour is opaque)."""
    return np.nonzero((pixels == colour).all(-1))


def box_of(pixels, colour):
    rows, columns = where(pixels, colour)
    return rows.min(), rows.max(), columns.min(), columns.max()


def scan(shape=(40, 40, 40)):
    return np.random.default_rng(0).normal(100, 20, shape)


def cube(shape=(40, 40, 40), low=(10, 10, 10), high=(30, 30, 30), label=1):
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = label
    return mask


def test_mask_is_drawn_below_and_only_there():
    figure = overlay_figure(scan(), cube(), (1, 1, 1))
    for plane in PLANES:
        plain, overlaid = panel(figure, plane, False), panel(figure, plane)
        assert where(plain, label_colour(1))[0].size == 0
        scale = PANEL_PX / 40
        expected = 10 * scale, 30 * scale - 1, 10 * scale, 30 * scale - 1
        assert np.abs(np.subtract(box_of(overlaid, label_colour(1)), expected)).max() <= 2
        changed = np.abs(plain - overlaid).max(-1) > 0
        inside = np.zeros((PANEL_PX, PANEL_PX), bool)
        inside[64:192, 64:192] = True
        assert changed[inside].mean() > 0.95 and not changed[~inside].any()
        # the fill is orange and lets the image shine through
        middle = overlaid[100:150, 100:150].reshape(-1, 3)
        assert len(np.unique(middle, axis=0)) > 20
        assert (middle[:, 0] > middle[:, 2]).mean() > 0.95


@pytest.mark.parametrize(
    ("axis", "plane", "line"),
    [(0, "axial", 1), (0, "coronal", 1), (1, "axial", 0), (1, "sagittal", 1), (2, "coronal", 0), (2, "sagittal", 0)],
)
def test_radiological_convention(axis, plane, line):
    # the far end of an axis (right, anterior, superior) is drawn at the left or at the top
    high, low = [30] * 3, [10] * 3
    low[axis], high[axis] = 32, 38
    end = cube(low=low, high=high)
    positions = where(panel(overlay_figure(scan(), end, (1, 1, 1)), plane), label_colour(1))[line]
    assert (positions < PANEL_PX // 2).all()
    image = panel(overlay_figure(end, cube(), (1, 1, 1)), plane, False).max(-1)
    image[110:146, :20] = image[110:146, -20:] = 0  # the letters
    near, far = np.split(image, 2, axis=line)
    assert (near > 128).any() and not (far > 128).any()


def test_letters_stand_at_both_sides(monkeypatch):
    sides = []
    original = pictures._panel
    monkeypatch.setattr(pictures, "_panel", lambda *a, **k: sides.append(k.get("sides") or a[3]) or original(*a, **k))
    figure = overlay_figure(np.zeros((8, 8, 8)), cube((8, 8, 8), (4,) * 3, (5,) * 3), (1, 1, 1))
    assert sides == ["RL", "RL", "RL", "RL", "AP", "AP"]
    pixels = panel(figure, "axial", False)  # a black image: what shines are the letters
    lit = np.nonzero((pixels > 200).all(-1).any(0))[0]
    assert lit.min() < 20 and lit.max() > PANEL_PX - 20
    assert not ((lit > 25) & (lit < PANEL_PX - 25)).any()


def test_aspect_follows_the_spacing():
    figure = overlay_figure(scan((40, 40, 10)), cube((40, 40, 10), (10, 10, 3), (30, 30, 7)), (1, 1, 2))
    top, bottom, left, right = box_of(panel(figure, "coronal"), label_colour(1))
    assert abs((right - left + 1) - 20 / 40 * PANEL_PX) <= 2
    assert abs((bottom - top + 1) - 4 * 2 / 40 * PANEL_PX) <= 2
    assert np.asarray(panel(figure, "coronal", False))[:60, 30:200].max() == 0  # 20 mm high, 40 mm wide


def test_small_and_large_volumes_fill_their_panels():
    for shape in ((5, 5, 5), (300, 200, 100)):
        pixels = panel(overlay_figure(scan(shape), np.zeros(shape, int), (1, 1, 1)), "axial", False)
        assert (pixels.max(-1) > 0).any(0).sum() >= PANEL_PX - 3


def test_slices_go_through_the_foreground():
    mask = cube(low=(2, 20, 33), high=(6, 24, 36)) + cube(low=(34, 20, 33), high=(38, 24, 36), label=2)
    figure = overlay_figure(scan(), mask, (1, 1, 1))  # two sides, nothing at the centroid
    for plane in PLANES:
        pixels = panel(figure, plane)
        assert where(pixels, label_colour(1))[0].size or where(pixels, label_colour(2))[0].size


def test_empty_mask_shows_the_middle():
    image = np.zeros((20, 20, 20))
    image[10, 10, 10] = 1.0
    image[:, :, 0] = 1e-3  # so that the window is not empty
    figure = overlay_figure(image, np.zeros((20, 20, 20), int), (1, 1, 1))
    for plane in PLANES:
        plain, overlaid = panel(figure, plane, False), panel(figure, plane)
        assert np.array_equal(plain, overlaid)
        assert plain[90:166, 90:166].max() == 255


@pytest.mark.parametrize("shape", [(20, 20, 1), (1, 20, 20), (20, 1, 20), (1, 1, 1)])
def test_one_slice_volume(shape):
    figure = overlay_figure(scan(shape), np.ones(shape, int), (1, 1, 3))
    assert where(np.asarray(figure), label_colour(1))[0].size > 0


@pytest.mark.parametrize("value", [0, 7, -1000.0, np.nan, np.inf])
def test_constant_image(value):
    with np.errstate(all="raise"):
        figure = overlay_figure(np.full((12, 12, 12), value), cube((12, 12, 12), (3,) * 3, (9,) * 3), (1, 1, 1))
    assert where(panel(figure, "axial"), label_colour(1))[0].size > 0


def test_outliers_and_nan_do_not_spoil_the_window():
    image = np.random.default_rng(0).random((40, 40, 40))
    image[0, 0, 0], image[1, 1, 1], image[2, 2, 2] = 1e9, np.nan, -np.inf
    mask = cube()
    grey = panel(overlay_figure(image, mask, (1, 1, 1)), "axial", False)
    assert 80 < grey[20:-20, 30:-30].mean() < 180


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.float32, np.float64])
def test_any_dtype(dtype):
    mask = cube().astype(dtype)
    image = (scan() > 100).astype(dtype)
    reference = overlay_figure(image.astype(float), cube(), (1, 1, 1))
    assert ImageChops.difference(overlay_figure(image, mask, (1, 1, 1)), reference).getbbox() is None


def test_tensors_and_inputs_are_left_alone():
    image, mask = scan(), cube()
    copies = image.copy(), mask.copy()
    figure = overlay_figure(torch.from_numpy(image), torch.from_numpy(mask), torch.ones(3))
    assert ImageChops.difference(figure, overlay_figure(image.astype("f4"), mask, (1, 1, 1))).getbbox() is None
    assert np.array_equal(image, copies[0]) and np.array_equal(mask, copies[1])


def test_contexts_of_any_shape_stand_at_the_right():
    base = overlay_figure(scan(), cube(), (1, 1, 1))
    contexts = [(scan((9, 30, 5)), cube((9, 30, 5), (2, 5, 1), (7, 25, 4), 3)), (scan((64,) * 3), cube((64,) * 3))]
    one, two = (overlay_figure(scan(), cube(), (1, 1, 1), contexts[:n]) for n in (1, 2))
    assert one.width == two.width > base.width
    assert where(np.asarray(one)[:, base.width :], label_colour(3))[0].size > 0
    five = overlay_figure(scan(), cube(), (1, 1, 1), contexts + 3 * contexts[:1])
    three = overlay_figure(scan(), cube(), (1, 1, 1), iter(contexts + contexts[:1]))
    assert ImageChops.difference(five, three).getbbox() is None


def test_legend_names_every_label_with_its_colour():
    mask = np.zeros((40, 40, 40), np.int32)
    labels = [1, 2, 8, 41, 1035, *range(100, 140)]
    for index, label in enumerate(labels):
        mask.flat[index::200] = label
    figure = overlay_figure(scan(), mask, (1, 1, 1))
    legend = np.asarray(figure)[GAP_PX + CAPTION_PX + 2 * PANEL_PX + 2 * GAP_PX :]
    for label in labels:
        assert where(legend, label_colour(label))[0].size >= 100, label
    mask.flat = np.arange(mask.size) % 500
    assert overlay_figure(scan(), mask, (1, 1, 1)).height < 1000


def test_colours_are_stable_and_distinct():
    colours = [label_colour(label) for label in range(1, 60)]
    assert colours == [label_colour(label) for label in range(1, 60)]
    assert len(set(colours)) == len(colours)
    assert all(max(colour) > 100 for colour in colours)
    assert label_colour(2035) == label_colour(2035)


def test_title_is_drawn_and_shortened():
    plain, titled, long = (overlay_figure(scan(), cube(), (1, 1, 1), title=t) for t in ("", "case 1", "word\n" * 200))
    assert titled.height > plain.height
    assert long.size == titled.size
    assert np.asarray(titled)[: GAP_PX + 20].max() > 200


@pytest.mark.parametrize(
    ("image", "mask", "spacing", "words"),
    [
        ((4, 4), (4, 4), (1, 1, 1), r"got \(4, 4\)"),
        ((4, 4, 4), (4, 4, 5), (1, 1, 1), r"got \(4, 4, 4\) and \(4, 4, 5\)"),
        ((4, 4, 0), (4, 4, 0), (1, 1, 1), r"got \(4, 4, 0\)"),
        ((1, 4, 4, 4), (1, 4, 4, 4), (1, 1, 1), r"got \(1, 4, 4, 4\)"),
        ((4, 4, 4), (4, 4, 4), (1, 0, 1), "three positive numbers"),
        ((4, 4, 4), (4, 4, 4), (1, np.nan, 1), "three positive numbers"),
        ((4, 4, 4), (4, 4, 4), (1, 1), "three positive numbers"),
        ((4, 4, 4), (4, 4, 4), (1, 1, 1, 1), "three positive numbers"),
    ],
)
def test_bad_input_is_refused(image, mask, spacing, words):
    with pytest.raises(ValueError, match=words):
        overlay_figure(np.zeros(image), np.zeros(mask), spacing)


# --- the episode ------------------------------------------------------------------------------------------


def episode(length=4, size=(16, 16, 16)):
    volumes = torch.rand(size), torch.from_numpy(cube(size, (4, 4, 4), (12, 12, 12))).float(), torch.rand(size)
    return *volumes, torch.rand(length, *size), (torch.rand(length, *size) > 0.5).float()


def test_episode_width_follows_the_contexts():
    none, two, four = (episode_figure(*episode(n)) for n in (0, 2, 4))
    column = PANEL_PX * 3 // 4 + GAP_PX
    assert (two.width - none.width, four.width - none.width) == (2 * column, 3 * column)
    assert none.height == two.height == four.height
    assert episode_figure(*episode(4), max_contexts=1).width == none.width + column
    assert np.asarray(four).ndim == 3  # what TensorBoard's add_image takes as HWC


def episode_panel(figure, column, row=0):
    size = PANEL_PX * 3 // 4
    x, y = GAP_PX + column * (size + GAP_PX), GAP_PX + CAPTION_PX + row * (size + CAPTION_PX + GAP_PX)
    return np.asarray(figure.crop((x, y, x + size, y + size)), float)


def test_episode_shows_what_was_given():
    target, truth, pred, images, labels = episode()
    figure = episode_figure(target * 0, truth, 1 - truth, images * 0 + 0.5, labels * 0 + 1)
    assert episode_panel(figure, 0).max() == 0
    assert episode_panel(figure, 1)[96, 96].tolist() == [255] * 3 and episode_panel(figure, 1)[5, 5].max() == 0
    assert episode_panel(figure, 2)[96, 96].max() == 0 and episode_panel(figure, 2)[5, 5].tolist() == [255] * 3
    assert set(np.unique(episode_panel(figure, 3))) <= {127, 128}
    assert episode_panel(figure, 4, row=1).min() == 255


def test_prediction_is_clipped_and_nan_is_survived():
    target, truth, pred, images, labels = episode()
    wild = pred * 0 + 1e6
    wild[:8] = -1e6
    wild[0, 0] = torch.nan
    shown = episode_panel(episode_figure(target, truth, wild, images, labels), 2)
    tame = episode_panel(episode_figure(target, truth, (wild > 0).float(), images, labels), 2)
    assert {0.0, 255.0} <= set(np.unique(shown))
    assert np.abs(shown - tame).mean() < 1


@pytest.mark.parametrize("convert", [np.asarray, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double])
def test_episode_takes_arrays_and_tensors(convert):
    inputs = episode()
    inputs = [torch.round(x * 8) / 8 for x in inputs]  # exact in every type
    reference = episode_figure(*inputs)
    assert ImageChops.difference(episode_figure(*map(convert, inputs)), reference).getbbox() is None


def test_episode_with_gradients_and_empty_truth_and_odd_grid():
    target, truth, pred, images, labels = episode(2, (16, 8, 24))
    episode_figure(target, truth * 0, pred.requires_grad_(), images, labels * 0)


# --- the group --------------------------------------------------------------------------------------------


def group_panel(figure, member, view=0, output=False, generation=False):
    """A member's square as an array of floats, in a figure without a title."""
    size, heading = PANEL_PX * 3 // 4, 20
    height = heading + CAPTION_PX + size + (2 + size) * generation
    x = GAP_PX + member * (size + GAP_PX)
    y = GAP_PX + view * (height + GAP_PX) + heading + CAPTION_PX + output * (size + 2)
    return np.asarray(figure.crop((x, y, x + size, y + size)), float)


def members(low, high, number=3, size=(16, 16, 16)):
    images = torch.rand(number, *size) * 0.5 + 0.25
    return images, torch.stack([torch.from_numpy(cube(size, low, high)).float()] * number)


def test_a_group_s_masks_lie_on_their_images():
    images, masks = members((4, 4, 4), (12, 12, 12))
    masks[1] = 0
    figure = group_figure([GroupView("before", images, masks), GroupView("after", images * 0, masks)], "abc", False)
    expected = 4 * 12, 12 * 12 - 1, 4 * 12, 12 * 12 - 1
    for view in (0, 1):
        for member in (0, 2):
            box = box_of(group_panel(figure, member, view), label_colour(1))
            assert np.abs(np.subtract(box, expected)).max() <= 2
        assert where(group_panel(figure, 1, view), label_colour(1))[0].size == 0
    assert group_panel(figure, 1, 0).mean() > 100 and group_panel(figure, 1, 1).max() == 0


def test_an_inverted_mask_is_cut_through_the_same_structure():
    images, masks = members((2, 2, 12), (8, 8, 15), number=1)
    inverted = 1 - masks
    figure = group_figure([GroupView("before", images, masks), GroupView("after", images, inverted)], ["a"], False)
    before, after = (group_panel(figure, 0, view) for view in (0, 1))
    hole = slice(110, 160), slice(110, 160)  # right and front are drawn at the left and at the top
    colourful = [np.ptp(pixels, axis=-1).astype(bool) for pixels in (before, after)]
    assert colourful[0][hole].all() and not colourful[1][hole].any()
    assert not colourful[0][:60, :60].any() and colourful[1][:60, :60].all()


def test_a_group_s_outputs_stand_below_their_inputs():
    images, _ = members((4, 4, 4), (12, 12, 12))
    outputs = torch.full_like(images, 0.5)
    views = [GroupView("before", images * 0, outputs), GroupView("after", images * 0 + 1, outputs, window=None)]
    figure = group_figure(views, "abc", True)
    for view in (0, 1):
        assert set(np.unique(group_panel(figure, 2, view, output=True, generation=True))) <= {127, 128}
    assert group_panel(figure, 0, 0, generation=True).max() == 0


def test_the_window_of_a_view():
    images, masks = members((4, 4, 4), (5, 5, 5), number=1)
    wide = [GroupView("a", images * 100, masks * 0), GroupView("b", images * 100, masks * 0, window=None)]
    figure = group_figure(wide, ["a"], False)
    assert group_panel(figure, 0, 0).min() == 255
    assert 80 < group_panel(figure, 0, 1).mean() < 180


def test_a_group_s_size_follows_members_and_views():
    images, masks = members((4, 4, 4), (12, 12, 12), number=4, size=(16, 8, 24))
    view, column = GroupView("view", images, masks), PANEL_PX * 3 // 4 + GAP_PX
    one, two, titled = (
        group_figure(views, "abcd", False, title)
        for views, title in (([view], ""), ([view] * 2, ""), ([view], "title"))
    )
    assert one.width == 4 * column + GAP_PX and one.width == two.width == titled.width
    assert two.height - GAP_PX > 2 * (one.height - 2 * GAP_PX) and titled.height > one.height


@pytest.mark.parametrize(
    ("images", "labels", "cases"), [((2, 4, 4, 4), (2, 4, 4, 4), "a"), ((1, 4, 4, 4), (1, 4, 4, 5), "a")]
)
def test_a_group_that_does_not_fit_is_refused(images, labels, cases):
    with pytest.raises(ValueError):
        group_figure([GroupView("view", torch.zeros(images), torch.zeros(labels))], cases, False)


def test_contact_sheet():
    figures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    sheet = contact_sheet(figures)
    assert sheet.size == (2 * 40 + GAP_PX, 2 * 30 + GAP_PX)
    assert [sheet.getpixel(at) for at in ((0, 0), (79, 0), (0, 60))] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    large = contact_sheet([Image.new("RGB", (SHEET_PX, 100), "red")] * 3)
    assert large.width == SHEET_PX and large.height < 150


# --- writing ----------------------------------------------------------------------------------------------


def test_save_png(tmp_path):
    path = tmp_path / "overlays" / "case.1.png"
    for colour in ("red", "blue"):
        figure = Image.new("RGB", (8, 8), colour)
        save_png(figure, path)
    assert {p.name for p in path.parent.iterdir()} == {"case.1.png", STATE}
    with Image.open(path) as loaded:
        assert loaded.format == "PNG"
        assert ImageChops.difference(loaded.convert("RGB"), figure).getbbox() is None


def test_save_png_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "case.png"
    save_png(Image.new("RGB", (4, 4)), path)
    old = path.read_bytes()

    def fails(self, file, **options):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (8, 8)), path)
    assert path.read_bytes() == old
    assert {p.name for p in tmp_path.iterdir()} == {"case.png", STATE}
