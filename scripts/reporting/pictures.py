"""Figures: a scan with its mask for the person who checks a result, an episode for TensorBoard, a training group.

Volumes are ``(H, W, D)`` in RAS voxel order: the axes run to the patient's right, front and top. Slices are
drawn in the radiological convention: the patient's right is on the picture's left in axial and coronal
slices, the front is on the left in sagittal ones; front (axial) or head (coronal, sagittal) is up. Letters
at the edges say so.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from scripts.runtime.output_folder import write_output

PANEL_PX = 256
GAP_PX = 8
FILL_OPACITY = 0.3
CONTOUR_PX = 2
SHOWN_CONTEXTS = 3
LEGEND_ENTRIES = 60
SHEET_PX = 2400

_BACKGROUND, _INK, _FAINT = (16, 16, 18), (235, 235, 235), (150, 150, 155)
# Okabe and Ito's colours, made for colour-blind readers; those that stand out on grey come first.
_PALETTE = ("E69F00", "56B4E9", "009E73", "F0E442", "CC79A7", "D55E00", "0072B2")
_PLANES = (("axial", 2, "RL"), ("coronal", 1, "RL"), ("sagittal", 0, "AP"))


def label_colour(label: int) -> tuple[int, int, int]:
    """RGB of a label value >= 1; the same in every figure."""
    if label <= len(_PALETTE):
        return tuple(bytes.fromhex(_PALETTE[label - 1]))
    hue, saturation = label * 0.618034 % 1, (0.5, 0.7, 0.9)[label % 3]  # the golden ratio spreads the hues
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, 0.95))


def overlay_figure(
    image: Any,
    mask: Any,
    spacing_mm: Sequence[float],
    contexts: Iterable[tuple[Any, Any]] = (),
    title: str = "",
    context_names: Sequence[str] = (),
) -> Image.Image:
    """Three planes through the foreground, plain above and with the mask below; contexts at the right.

    Radiological convention: the patient's right is on the picture's left.

    Args:
        image: ``(H, W, D)``, RAS voxel order, any intensity; shown between its 0.5 and 99.5 percentiles.
        mask: ``(H, W, D)`` integer labels; 0 is background.
        spacing_mm: voxel size along the three axes.
        contexts: (image, mask) pairs of any shape, RAS voxel order; the first three are shown, voxels as cubes.
        title: a line above the figure.
        context_names: of the contexts; without, they are numbered.

    Raises:
        ValueError: an array is not 3D, or a mask does not fit its image.
    """
    image, mask = _checked(image, mask)
    spacing = np.asarray(spacing_mm, float)
    if spacing.shape != (3,) or not (spacing > 0).all():
        raise ValueError(f"spacing_mm must be three positive numbers, got {spacing_mm}")
    extent = spacing * image.shape
    window, centre, found = _window(image), _centre(mask > 0), set(_labels(mask))
    columns = []
    for name, axis, sides in _PLANES:
        plain, overlaid = _slice(image, mask, axis, centre[axis], extent * PANEL_PX / extent.max(), window)
        caption = f"{name}, slice {centre[axis] + 1} of {image.shape[axis]}"
        columns.append(_join([_panel(plain, PANEL_PX, caption, sides), _panel(overlaid, PANEL_PX, sides=sides)]))
    thumbs, size = [], (2 * PANEL_PX - (SHOWN_CONTEXTS - 1) * GAP_PX - 32) // SHOWN_CONTEXTS
    for number, pair in enumerate(islice(contexts, SHOWN_CONTEXTS), start=1):
        picture, labels = _checked(*pair)
        shape = np.array(picture.shape) * (size / max(picture.shape[:2]))
        overlaid = _slice(picture, labels, 2, _centre(labels > 0)[2], shape, _window(picture))[1]
        thumbs.append(_panel(overlaid, size, context_names[number - 1] if context_names else f"context {number}"))
        found.update(_labels(labels))
    if thumbs:
        columns.append(_join(thumbs))
    rows = [_join(columns, across=True)]
    rows.append(_legend(sorted(found), rows[0].width))
    if title:
        rows.insert(0, _line(title, 16, rows[0].width))
    return ImageOps.expand(_join(rows), GAP_PX, _BACKGROUND)


def episode_figure(
    target: Any, truth: Any, pred: Any, context_images: Any, context_labels: Any, max_contexts: int = 3
) -> Image.Image:
    """What the network was asked, should have said and said, then its contexts: slices through the foreground.

    Args:
        target: ``(H, W, D)`` array or tensor in [0, 1], like truth and pred; shown axial and coronal.
        truth: the label, or the wanted output.
        pred: the network's prediction; values beyond [0, 1] are clipped.
        context_images: ``(L, H, W, D)``, shown axial.
        context_labels: ``(L, H, W, D)``.
        max_contexts: how many of the L pairs are shown.
    """
    target, truth, pred = _array(target), _array(truth), _array(pred)
    middle, columns = _centre(truth > 0.5), []
    for name, volume in (("target", target), ("truth", truth), ("prediction", pred)):
        columns.append([(f"{name}, {plane}", volume, axis, middle) for plane, axis, _ in _PLANES[:2]])
    pairs = zip(context_images, context_labels, strict=True)
    for number, pair in enumerate(islice(pairs, max_contexts), start=1):
        picture, label = (_array(x) for x in pair)
        middle = _centre(label > 0.5)
        columns.append([(f"context {number}", picture, 2, middle), (f"label {number}", label, 2, middle)])
    size, drawn = PANEL_PX * 3 // 4, []
    for column in columns:
        panels = []
        for caption, volume, axis, at in column:
            shape = np.array(volume.shape) * (size / max(volume.shape))
            panels.append(_panel(_slice(volume, None, axis, at[axis], shape, (0.0, 1.0))[0], size, caption))
        drawn.append(_join(panels))
    return ImageOps.expand(_join(drawn, across=True), GAP_PX, _BACKGROUND)


class GroupView(NamedTuple):
    """One state of a group, such as before or after augmentation.

    Attributes:
        name: what state this is.
        images: ``(N, H, W, D)`` arrays or tensors, one for each member.
        labels: the wanted outputs, of the same shape.
        window: intensities of the images that are black and white; None takes each image's 0.5 and 99.5 percentiles.
    """

    name: str
    images: Any
    labels: Any
    window: tuple[float, float] | None = (0.0, 1.0)


def group_figure(views: Iterable[GroupView], cases: Sequence[str], generation: bool, title: str = "") -> Image.Image:
    """A group of members in columns, its states one below the other: axial slices, radiological convention.

    Args:
        views: the states. A mask is drawn over its image, in a slice through the smaller of foreground and background
            (an inverted mask has them swapped); an output image stands below its image, both in the middle slice.
        cases: name of each member, above its column.
        generation: the labels are images.
        title: a line above the figure.

    Raises:
        ValueError: images, labels and cases differ in number, or image and label in shape.
    """
    size, blocks = PANEL_PX * 3 // 4, []
    for view in views:
        columns = []
        for case, *pair in zip(cases, view.images, view.labels, strict=True):
            image, label = (_array(x) for x in pair)
            _checked(image, label)
            window = _window(image) if view.window is None else view.window
            shape = np.array(image.shape) * (size / max(image.shape))
            if generation:
                middle = image.shape[2] // 2
                shown = (image, window), (label, (0.0, 1.0))
                panels = [_slice(x, None, 2, middle, shape, between)[0] for x, between in shown]
            else:
                mask = np.rint(label).astype(np.int32)
                middle = _centre(mask > 0 if mask.mean() < 0.5 else mask == 0)[2]
                panels = [_slice(image, mask, 2, middle, shape, window)[1]]
            columns.append(_join([_panel(panels[0], size, case), *(_panel(x, size) for x in panels[1:])], gap=2))
        row = _join(columns, across=True)
        name = f"{view.name}: inputs, wanted outputs below" if generation else view.name
        blocks.append(_join([_line(name, 14, row.width), row], gap=0))
    if title:
        blocks.insert(0, _line(title, 16, blocks[0].width))
    return ImageOps.expand(_join(blocks), GAP_PX, _BACKGROUND)


def contact_sheet(figures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Figures side by side and row by row on one sheet, made smaller where a side would exceed 2400 pixels.

    Args:
        figures: at least one.
        columns: how many stand side by side.
    """
    starts = range(0, len(figures), columns)
    sheet = _join([_join(figures[start : start + columns], across=True) for start in starts])
    sheet.thumbnail((SHEET_PX, SHEET_PX), Image.Resampling.LANCZOS)
    return sheet


def save_png(figure: Image.Image, path: str | os.PathLike) -> None:
    """Write the figure as PNG: the complete file takes the old one's place, or the old one stays.

    Raises:
        FileExistsError: there is a file that this program did not write.
    """
    write_output(path, lambda temporary: figure.save(temporary, format="PNG"))


def _array(x: Any) -> np.ndarray:
    if not isinstance(x, Tensor):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x).numpy()  # NumPy has no bfloat16


def _checked(image: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    image, mask = _array(image), _array(mask)
    if image.ndim != 3 or image.shape != mask.shape or not image.size:
        raise ValueError(f"image and mask must be (H, W, D) of one shape, got {image.shape} and {mask.shape}")
    if not np.issubdtype(mask.dtype, np.integer):
        mask = np.rint(np.nan_to_num(mask)).astype(np.int64)
    return image, mask


def _labels(mask: np.ndarray) -> list[int]:
    return np.unique(mask[mask > 0]).tolist()


def _window(image: np.ndarray) -> tuple[float, float]:
    step = max(1, round((image.size / 1e6) ** (1 / 3)))  # a million voxels tell the percentiles
    values = image[::step, ::step, ::step].astype(np.float64)
    values = values[np.isfinite(values)]
    return tuple(np.percentile(values, (0.5, 99.5)).tolist()) if values.size else (0.0, 0.0)


def _centre(foreground: np.ndarray) -> list[int]:
    """Slice index per axis: through the centroid, or the fullest slice where that one would show little."""
    centre = []
    for axis in range(3):
        area = foreground.sum(tuple({0, 1, 2} - {axis}))
        middle = int(np.average(np.arange(len(area)), weights=area).round()) if area.any() else len(area) // 2
        centre.append(middle if area[middle] >= area.max() / 2 else int(area.argmax()))
    return centre


def _slice(
    image: np.ndarray,
    mask: np.ndarray | None,
    axis: int,
    index: int,
    extent_px: np.ndarray,
    window: tuple[float, float],
) -> tuple[Image.Image, Image.Image | None]:
    """One slice as the viewer expects it, plain and with the mask (None without one)."""
    width, height = np.maximum(np.delete(extent_px, axis).round().astype(int), 1)
    low, high = window
    plane = np.nan_to_num(np.moveaxis(image, axis, 0)[index].astype(np.float32), nan=low, posinf=high, neginf=low)
    plane = ((plane - low) / (high - low or 1)).clip(0, 1).T[::-1, ::-1]
    smooth = Image.fromarray(np.ascontiguousarray(plane)).resize((width, height), Image.Resampling.BICUBIC)
    grey = np.repeat((np.asarray(smooth).clip(0, 1) * 255)[..., None], 3, axis=2)
    plain = Image.fromarray(grey.round().astype(np.uint8))
    if mask is None:
        return plain, None
    labels = np.moveaxis(mask, axis, 0)[index].T[::-1, ::-1]
    rows, columns = ((np.arange(n) + 0.5) * m / n for n, m in zip((height, width), labels.shape, strict=True))
    labels = labels[rows.astype(int)[:, None], columns.astype(int)]  # nearest: the mask's own voxels
    around = np.pad(labels, CONTOUR_PX)
    windows = np.lib.stride_tricks.sliding_window_view(around, (2 * CONTOUR_PX + 1,) * 2)
    contour = (windows != labels[..., None, None]).any((2, 3))
    for label in _labels(labels):
        here = labels == label
        opacity = np.where(contour[here], 1.0, FILL_OPACITY)[:, None]
        grey[here] = grey[here] * (1 - opacity) + np.array(label_colour(label)) * opacity
    return plain, Image.fromarray(grey.round().astype(np.uint8))


def _line(text: str, size: int, width: int, colour: tuple[int, int, int] = _INK) -> Image.Image:
    """One line of text, shortened to the width."""
    line = Image.new("RGB", (width, size + 6), _BACKGROUND)
    pen, font, text = ImageDraw.Draw(line), ImageFont.load_default(size), " ".join(text.split())
    while text.rstrip("…") and pen.textlength(text, font) > width:
        text = text.rstrip("…")[:-1] + "…"
    pen.text((0, 1), text, colour, font)
    return line


def _panel(picture: Image.Image, size: int, caption: str = "", sides: str = "") -> Image.Image:
    """A picture centred in a square, a letter at its left and right, a caption above."""
    panel = Image.new("RGB", (size, size), (0, 0, 0))
    panel.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    for letter, anchor, x in zip(sides, ("lm", "rm"), (5, size - 6), strict=False):
        ImageDraw.Draw(panel).text(
            (x, size // 2), letter, _INK, ImageFont.load_default(14), anchor, stroke_width=2, stroke_fill=(0, 0, 0)
        )
    return _join([_line(caption, 12, size, _FAINT), panel], gap=0) if caption else panel


def _legend(labels: list[int], width: int) -> Image.Image:
    """Label values with their colours, in as many rows as they need."""
    cell, height = 64, 22
    names = [str(label) for label in labels[:LEGEND_ENTRIES]] or ["no foreground"]
    names += [f"and {len(labels) - LEGEND_ENTRIES} more"] if len(labels) > LEGEND_ENTRIES else []
    per_row = max(1, width // cell)
    legend = Image.new("RGB", (width, height * -(-len(names) // per_row)), _BACKGROUND)
    pen = ImageDraw.Draw(legend)
    for index, name in enumerate(names):
        x, y = index % per_row * cell, index // per_row * height
        if index < min(len(labels), LEGEND_ENTRIES):
            pen.rectangle((x, y + 4, x + 12, y + 16), fill=label_colour(labels[index]))
            x += 19
        pen.text((x, y + 10), name, _INK, ImageFont.load_default(14), "lm")
    return legend


def _join(pictures: Sequence[Image.Image], across: bool = False, gap: int = GAP_PX) -> Image.Image:
    """Pictures one below the other, or side by side."""
    along, wide = (0, 1) if across else (1, 0)
    size = [0, 0]
    size[along] = sum(p.size[along] for p in pictures) + gap * (len(pictures) - 1)
    size[wide] = max(p.size[wide] for p in pictures)
    joined, at = Image.new("RGB", tuple(size), _BACKGROUND), [0, 0]
    for picture in pictures:
        joined.paste(picture, tuple(at))
        at[along] += picture.size[along] + gap
    return joined
