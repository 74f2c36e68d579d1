"""What a conversion did, and what it did not do."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Entry", "Report"]


@dataclass(frozen=True)
class Entry:
    """One layer: its name, what it was, what it is (the same where it was left alone), and a note."""

    name: str
    old: str
    new: str
    note: str = ""

    @property
    def converted(self) -> bool:
        """Whether anything changed."""
        return self.old != self.new


@dataclass
class Report:
    """All layers that a conversion considered; prints as a table.

    Example:
        >>> print(Report([Entry("act", "ReLU", "CenteredSoftplus")]))
        name  was   is                note
        ----  ----  ----------------  ----
        act   ReLU  CenteredSoftplus
    """

    entries: list[Entry] = field(default_factory=list)

    @property
    def converted(self) -> list[Entry]:
        """The layers that changed."""
        return [e for e in self.entries if e.converted]

    @property
    def left(self) -> list[Entry]:
        """The layers that did not, with the reasons."""
        return [e for e in self.entries if not e.converted]

    def __str__(self) -> str:
        """Lay the entries out in columns."""
        rows = [("name", "was", "is", "note")]
        rows += [(e.name or "(model)", e.old, e.new, e.note) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        rows.insert(1, tuple("-" * w for w in widths))  # type: ignore[arg-type]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
        return "\n".join(line.rstrip() for line in lines)
