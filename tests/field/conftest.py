"""Libraries of other layouts, as far as their tests need them."""

from __future__ import annotations

import sys


def _declare_operators() -> None:
    """torchvision of the package index is built for CUDA. Beside a torch for processors alone it is imported,
    for its transforms, if two operators that it has no code for are at least declared.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return  # tests of pages and of the site do without
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        _kept.append(library)


_kept: list[object] = []  # operators are there as long as their library is
_declare_operators()
