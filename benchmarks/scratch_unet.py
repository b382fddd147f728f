"""What a plain 3D U-Net makes of the same few labelled scans: accuracy, and seconds until the first mask.

    python -m benchmarks.scratch_unet --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        [--part development --context_size 8 --minutes 10 --cases 12]

MONAI's U-Net is trained on the K contexts alone, on the grid and the voxels of the in-context network, with MONAI's
Dice and cross-entropy loss and random affine, contrast and noise transforms; the in-context network gets the same K
contexts as examples. One choice of contexts for all targets, as a user has it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Compose, RandAdjustContrastd, RandAffined, RandGaussianNoised
from monai.utils import set_determinism
from torch import Tensor
from tqdm import tqdm

from benchmarks.unseen_dataset import UnseenCases, interval, mean_dice
from scripts.checkpoint import load_network
from scripts.data.preprocessing import PlacedScores, Preprocessing
from scripts.inferer import ICLInferer
from scripts.runtime.commandline import main

_CHANNELS = (16, 32, 64, 128)
_BATCH = 2


def scratch_unet(
    dataset_dir: str,
    checkpoint: str,
    part: str = "development",
    context_size: int = 8,
    minutes: float = 10,
    cases: int | None = None,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Print mean Dice of both, with 95 % intervals over the cases, and the seconds until the first mask.

    Args:
        dataset_dir: nnU-Net dataset folder of the split file.
        checkpoint: weights of the in-context network.
        part: development or reporting.
        context_size: contexts K.
        minutes: of the U-Net's training.
        cases: at most so many targets.
        learning_rate: of Adam.
        seed: of contexts, weights and transforms.
        device: where to compute.
    """
    set_determinism(seed)
    unseen = UnseenCases(dataset_dir, part, cases, seed)
    episodes = list(unseen.episodes("aligned"))
    contexts = episodes[0][1][:context_size]
    started = time.monotonic()
    network = load_network(checkpoint)
    inferer = ICLInferer(network, device, spacing=unseen.spacing(network.grid.tolist()))
    inferer.set_context([image for image, _ in contexts], [label for _, label in contexts])
    seconds = {}
    predictions = {"in-context": []}
    for target, _ in tqdm(episodes, "in-context"):
        predictions["in-context"].append(inferer.predict(target[0]))
        seconds.setdefault("in-context", time.monotonic() - started)
    values = inferer.label_values
    started = time.monotonic()
    unet = train_unet(*on_grid(inferer), len(values), 60 * minutes, learning_rate, device)
    predictions["U-Net"] = []
    for target, _ in tqdm(episodes, "U-Net"):
        predictions["U-Net"].append(predict(unet, target[0], inferer.context.preprocessing, values, device))
        seconds.setdefault("U-Net", time.monotonic() - started)
    for name, found in predictions.items():
        dice = [
            mean_dice(prediction, target[1], values) for prediction, (target, _) in zip(found, episodes, strict=True)
        ]
        mean, low, high = interval(dice)
        print(
            f"{name:10s} K={context_size} Dice {mean:.3f} [{low:.3f}, {high:.3f}]  {len(dice)} cases  "
            f"first mask after {seconds[name]:.1f} s on {device}"
        )


def on_grid(inferer: ICLInferer) -> tuple[Tensor, Tensor]:
    """Contexts as :func:`train_unet` takes them: images, and classes numbered in the order of the labels."""
    images, labels = inferer.context.pairs()
    return images, sum(number * (labels == value) for number, value in enumerate(inferer.label_values, start=1))


def predict(
    unet: torch.nn.Module, scan: MetaTensor, preprocessing: Preprocessing, values: Sequence[int], device: str
) -> MetaTensor:
    """Label numbers (1, H, W, D) on a scan's own voxels, from a network of :func:`train_unet`."""
    target = preprocessing.target(scan)
    with torch.inference_mode():
        scores = unet(target[None].as_tensor().to(device)).softmax(1)[0, 1:].cpu()
    placed = {value: PlacedScores(score, target) for value, score in zip(values, scores, strict=True)}
    return preprocessing.to_native_labels(placed)


def train_unet(
    images: Tensor, classes: Tensor, labels: int, seconds: float, learning_rate: float, device: str
) -> torch.nn.Module:
    """MONAI's U-Net trained on some pairs for some time.

    Args:
        images: (K, 1, H, W, D) in [0, 1].
        classes: the same shape; 0 is background, and 1 and on the labels.
        labels: how many labels.
        seconds: of training.
        learning_rate: of Adam.
        device: where to compute.

    Returns:
        The network, in evaluation mode: (B, 1, H, W, D) -> (B, 1 + labels, H, W, D) logits.
    """
    unet = UNet(3, 1, 1 + labels, _CHANNELS, (2,) * (len(_CHANNELS) - 1), num_res_units=2).to(device)
    optimizer = torch.optim.Adam(unet.parameters(), learning_rate)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    started = time.monotonic()
    with tqdm(total=round(seconds), unit="s", desc="train U-Net") as bar:
        for image, label in _batches(images, classes):
            passed = time.monotonic() - started
            bar.update(min(round(passed), bar.total) - bar.n)
            if passed >= seconds:
                return unet.eval()
            optimizer.zero_grad()
            loss(unet(image.to(device)), label.to(device)).backward()
            optimizer.step()
    raise AssertionError("there is always another batch")


def _batches(images: Tensor, classes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Random pairs without end, changed at random."""
    change = Compose(
        [
            RandAffined(
                ("image", "label"),
                prob=0.8,
                rotate_range=(0.35,) * 3,
                scale_range=(0.15,) * 3,
                translate_range=[n / 10 for n in images.shape[2:]],
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.4)),
            RandGaussianNoised("image", prob=0.3, std=0.05),
        ]
    )
    while True:
        chosen = torch.randint(len(images), (_BATCH,)).tolist()
        made = [change({"image": images[i], "label": classes[i].float()}) for i in chosen]
        yield tuple(torch.stack([pair[key].as_tensor() for pair in made]) for key in ("image", "label"))


if __name__ == "__main__":
    main(scratch_unet)
