"""CIFAR-100: 100 classes, 50,000 training and 10,000 test images of 32 pixels, enlarged."""

from __future__ import annotations

from cl_bench.contracts.photographs import Photographs
from cl_bench.data.published import cifar100
from cl_bench.data.sources import PixelSource, Sources


class Cifar100(Photographs):
    """The images of ``root/cifar-100-python``, in the order of the published files, all in memory.

    Labels are the published fine labels. torchvision reads the same files in the same order, but its
    unpickler runs code that a pickle names. Here the checksum of a file is verified first, and a restricted
    unpickler reads it. Published with T=10.
    """

    name = "cifar100"
    decoding = "published pixels, uint8 RGB"
    whole_test_images = True

    def sources(self) -> Sources:
        """Read the three files."""
        root = self._existing_root()
        return Sources(
            train=PixelSource(*cifar100.images(root, "train")),
            test=PixelSource(*cifar100.images(root, "test")),
            class_names=cifar100.names(root),
        )
