"""The published archives: where each is fetched from, and how it is verified."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 20

Advance = Callable[[int], None]
"""Called with the number of bytes processed since the last call."""


@dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        url: Its address; empty if fetching it requires an account.
        size: Its published length in bytes, or None.
        md5: Its published md5.
        sha256: Its published sha256, or None.
        unpacks: Folder that it unpacks to; empty if it is used as it is.
        file_name: Its name on disk; the last part of the address if empty.
    """

    url: str
    size: int | None
    md5: str
    sha256: str | None = None
    unpacks: str = ""
    file_name: str = ""

    @property
    def name(self) -> str:
        """Name of the file below the root."""
        return self.file_name or posixpath.basename(self.url)


def require_whole(path: Path, archive: Archive, advance: Advance = lambda _: None) -> None:
    """Check the size and the checksums of ``path``.

    Raises:
        ValueError: If it is not the published file.
    """
    size = path.stat().st_size
    if archive.size is not None and size != archive.size:
        raise ValueError(
            f"{path} has {size:,} bytes, not the published {archive.size:,}: remove it and run again."
        )
    hashes = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    if archive.sha256 is None:
        del hashes["sha256"]
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            for running in hashes.values():
                running.update(block)
            advance(len(block))
    for kind, running in hashes.items():
        found, expected = running.hexdigest(), getattr(archive, kind)
        if found != expected:
            raise ValueError(
                f"{path} has the {kind} {found}, not the published {expected}: remove it and run again."
            )


def human(size: int) -> str:
    """Return a number of bytes in words.

    >>> human(2_191_079_936), human(512)
    ('2.2 GB', '512 bytes')
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


IMAGENET_R = (
    Archive(
        "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
        2_191_079_936,
        "a61312130a589d0ca1a8fca1f2bd3337",
        "18c6bf493b39a0d975d48e587437f562caab9c52ae6327dcfa9dd8eb54aa1b52",
        unpacks="imagenet-r",
    ),
)

CIFAR100 = (
    Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        169_001_437,
        "eb9058c3a382ffc7106e4002c42a8d85",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        unpacks="cifar-100-python",
    ),
)

_DOMAINNET = "http://csr.bu.edu/ftp/visda/2019/multi-source/"


def _domain(path: str, size: int, md5: str, sha256: str) -> Archive:
    folder = posixpath.basename(path).removesuffix(".zip")
    return Archive(_DOMAINNET + path, size, md5, sha256, unpacks=folder)


def _list(name: str, size: int, md5: str) -> Archive:
    return Archive(f"{_DOMAINNET}domainnet/txt/{name}.txt", size, md5)


DOMAINNET = (
    _list("clipart_train", 1_443_819, "b4349693a7f9c05c53955725c47ed6cb"),
    _list("clipart_test", 628_917, "f5ddbcfd657a3acf9d0f7da10db22565"),
    _list("infograph_train", 1_683_098, "379b50054f4ac2018dca4f89421b92d9"),
    _list("infograph_test", 728_028, "779626b50869edffe8ea6941c3755c71"),
    _list("painting_train", 2_241_901, "7db0e7ca73ad9982f6e1f7f3ef372c0a"),
    _list("painting_test", 971_888, "232b35dc53f26d414686ae579e38d9b5"),
    _list("quickdraw_train", 5_164_600, "b732ced3939ac8efdd8c0a889dca56cc"),
    _list("quickdraw_test", 2_213_400, "c1a828fdfe216fb109f1c0083a252c6f"),
    _list("real_train", 4_440_944, "8ebf02c2075fadd564705f0dc7cd6291"),
    _list("real_test", 1_911_327, "6098816791c3ebed543c71ffa11b9054"),
    _list("sketch_train", 1_960_222, "1233bd18aa9a8a200bf4cecf1c34ef3e"),
    _list("sketch_test", 850_581, "d8a222e4672cfd585298aa14d02ea441"),
    # The cleaned version: clipart and painting come from groundtruth.
    _domain(
        "groundtruth/clipart.zip",
        1_270_909_081,
        "cd0d8f2d77a4e181449b78ed62bccf1e",
        "f8f248a3e8bbc9868c523ae24e6601b4c2ad102afc60c0efeb4f3255df22354d",
    ),
    _domain(
        "infograph.zip",
        4_338_659_804,
        "720380b86f9e6ab4805bb38b6bd135f8",
        "891e14f476317e97b6f06d6498c11d0a5b8d0c8b57210765ed9beb072da611fa",
    ),
    _domain(
        "groundtruth/painting.zip",
        3_679_366_174,
        "1ae32cdb4f98fe7ab5eb0a351768abfd",
        "fa47e6d405503ea0286cabd767f176bd30e988b63ddd7b9db16cf030c9770015",
    ),
    _domain(
        "quickdraw.zip",
        459_920_701,
        "bdc1b6f09f277da1a263389efe0c7a66",
        "9f37df2a8c3733703dbb35ad9964202a65f675ca30137756457537536b485d84",
    ),
    _domain(
        "real.zip",
        6_062_039_589,
        "dcc47055e8935767784b7162e7c7cca6",
        "d7fe010b430c5b510f85d657d38c4a1924822695fabea4fef57bd00dba251d63",
    ),
    _domain(
        "sketch.zip",
        2_633_992_926,
        "658d8009644040ff7ce30bb2e820850f",
        "23a7dbae7016b343e934399beaa8a68728fb5e570ebe2c71df9b75cf91c499fc",
    ),
)

IMAGENET_TRAIN = Archive(
    "", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e", file_name="ILSVRC2012_img_train.tar"
)
IMAGENET_VAL = Archive(
    "", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622", file_name="ILSVRC2012_img_val.tar"
)
IMAGENET_DEVKIT = Archive(
    "", None, "fa75699e90414af021442c21a62c3abf", file_name="ILSVRC2012_devkit_t12.tar.gz"
)
