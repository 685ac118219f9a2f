"""One step of a stream, as a strategy sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experience:
    """One experience of a class-incremental stream: its place and its classes, nothing of the others.

    Labels are positions in the class order, so the classes of an experience are a contiguous range and
    every class before ``classes.start`` was met earlier.

    Attributes:
        index: Place in the stream, from 0.
        num_experiences: Length of the stream, ``T``.
        classes: Positions of the classes that this experience brings.

    Raises:
        ValueError: If the index lies outside the stream or the experience brings no class.

    >>> second = Experience(index=1, num_experiences=5, classes=range(2, 4))
    >>> second.num_classes, second.num_classes_seen, second.is_first, second.is_last
    (2, 4, False, False)
    """

    index: int
    num_experiences: int
    classes: range

    def __post_init__(self) -> None:
        """Refuse what cannot be a step of a stream."""
        if not 0 <= self.index < self.num_experiences:
            raise ValueError(
                f"Experience {self.index} does not exist in a stream of {self.num_experiences}: "
                f"give an index from 0 to {self.num_experiences - 1}."
            )
        if not self.classes or self.classes.step != 1:
            raise ValueError(
                f"An experience brings a contiguous, non-empty range of classes, not {self.classes}."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes this experience brings."""
        return len(self.classes)

    @property
    def num_classes_seen(self) -> int:
        """Number of classes met up to and including this experience."""
        return self.classes.stop

    @property
    def is_first(self) -> bool:
        """Whether nothing came before."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after."""
        return self.index == self.num_experiences - 1
