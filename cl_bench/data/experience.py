"""One step of a stream, as a strategy sees it, and a batch of its images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, H, W) in [0, 1] and labels (B,), which are positions in the class order."""


@dataclass(frozen=True)
class Experience:
    """One experience of a class-incremental stream: its place and its own classes, nothing of the others.

    Labels are positions in the class order, so the classes of an experience are a contiguous range, and
    every class before ``classes.start`` belongs to an earlier experience.

    Attributes:
        index: Place in the stream, from 0.
        num_experiences: Length of the stream, ``T``.
        classes: Positions of the classes that this experience brings.
        class_names: Names of these classes, in order of position; empty if they have none.

    Raises:
        ValueError: If the index lies outside the stream, the experience brings no class, or the number of
            names differs from the number of classes.

    >>> second = Experience(index=1, num_experiences=5, classes=range(2, 4), class_names=("ant", "bee"))
    >>> second.num_classes, second.num_classes_seen, second.is_first
    (2, 4, False)
    """

    index: int
    num_experiences: int
    classes: range
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that describe no experience."""
        if not 0 <= self.index < self.num_experiences:
            raise ValueError(
                f"Experience {self.index} does not exist in a stream of {self.num_experiences}: "
                f"give an index from 0 to {self.num_experiences - 1}."
            )
        if not self.classes or self.classes.step != 1:
            raise ValueError(
                f"An experience brings a contiguous, non-empty range of classes, not {self.classes}."
            )
        if self.class_names and len(self.class_names) != len(self.classes):
            raise ValueError(
                f"Experience {self.index} brings {len(self.classes)} classes, not {len(self.class_names)}: "
                "give class_names one name for each class, or none at all."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes that this experience brings."""
        return len(self.classes)

    @property
    def num_classes_seen(self) -> int:
        """Number of classes up to and including this experience."""
        return self.classes.stop

    @property
    def is_first(self) -> bool:
        """Whether this is the first experience of the stream."""
        return self.index == 0
