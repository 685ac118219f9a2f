"""DomainNet: 345 classes in up to six domains, such as photographs, paintings and drawings."""

from __future__ import annotations

from typing import Any

from cl_bench.contracts.photographs import PhotographFiles
from cl_bench.data.published import domainnet
from cl_bench.data.published.domainnet import Variant
from cl_bench.data.sources import FileSource, Sources, require_files


class DomainNet(PhotographFiles):
    """The images in the official lists in ``root``, all domains pooled.

    Labels are in the official numbering, and the images are those of the cleaned version. Every image has its
    domain, so a result counts each domain separately. Published with T=5, 69 classes an experience; published
    rows do not state which of the two variants they used.

    Args:
        variant: official345, all six domains; no_quickdraw, the other five, as in a list that many copied.
        kwargs: As in every dataset of photographs.
    """

    name = "domainnet"

    def __init__(self, *, variant: Variant = "official345", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.variant = variant

    @property
    def variants(self) -> dict[str, str]:
        """Variant and transforms."""
        return {"variant": self.variant} | super().variants

    def sources(self) -> Sources:
        """Read the official lists and check that every file exists; no image is opened."""
        root = self._existing_root()
        domains = domainnet.domains(self.variant)
        train, test = (domainnet.listed(root, split, domains) for split in ("train", "test"))
        require_files(root, [*train.files, *test.files], self._remedy)
        return Sources(
            train=FileSource(root, train.files, train.targets),
            test=FileSource(root, test.files, test.targets),
            class_names=domainnet.names(),
            domains=domains,
            train_domains=train.domains,
            test_domains=test.domains,
        )
