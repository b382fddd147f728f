"""Lets torchvision be imported where its compiled part does not fit the machine's torch, as PyPI's on a build for CPUs.

MONAI Label imports it for tasks that these tests do not run. Declared operators that nothing implements are enough.
Python runs this file at its start if the folder is on ``PYTHONPATH``.
"""

import sys

try:
    import torchvision  # noqa: F401
except ImportError:
    pass  # then MONAI Label is not installed either
except RuntimeError:  # "operator torchvision::nms does not exist"
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    LIBRARY = torch.library.Library("torchvision", "DEF")  # kept, for the operators live as long as it does
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
