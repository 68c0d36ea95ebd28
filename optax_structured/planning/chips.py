"""What a chip holds, and how fast its links are."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of the vendor's documentation, for one chip."""

    name: str
    memory: float  # bytes
    link: float  # bytes a second, all links of a chip to its neighbours together
    dimensions: int  # of a slice


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16e9, 200e9, 2),
        Chip("v5p", 95e9, 600e9, 3),
        Chip("v6e", 32e9, 448e9, 2),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of this name.

    Raises:
      ValueError: there is none.
    """
    if name not in CHIPS:
        raise ValueError(f"--chip {name}: no such chip; there are {', '.join(CHIPS)}")
    return CHIPS[name]


def topology(chip: Chip, count: int) -> str:
    """The smallest slice of at least so many chips, as libtpu names it.

    >>> topology(CHIPS["v5e"], 256), topology(CHIPS["v5p"], 256), topology(CHIPS["v5e"], 1)
    ('v5e:16x16', 'v5p:4x8x8', 'v5e:2x2')
    """
    doublings = max((count - 1).bit_length(), 2)
    short, longer = divmod(doublings, chip.dimensions)
    sides = [short] * (chip.dimensions - longer) + [short + 1] * longer
    if short == 0:  # two doublings in three dimensions: libtpu has 2x2x1
        sides = sorted(sides, reverse=True)
    return f"{chip.name}:{'x'.join(str(2**side) for side in sides)}"
