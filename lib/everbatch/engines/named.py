"""What a mixin keeps in its state by name: slices of parameters, and whole tensors."""

from __future__ import annotations

from torch import Tensor

from everbatch.engines.shards import Scratch, Shard, Sums, Vector

__all__ = ["ByName", "Whole"]


class ByName(dict[str, Tensor]):
    """State of a mixin that is per element: parameter name to this rank's slice. Saved whole, by name."""

    _vector: Vector | None = None
    _norm: tuple[Vector, int, Tensor] | None = None

    @classmethod
    def of(cls, vector: Vector) -> ByName:
        """The tensors of a vector, which stays in one piece; its tensors may be edited in place, and not be replaced."""
        result = cls({s.name: t for s, t in vector})
        result._vector = vector
        return result

    def covers(self, shards: list[Shard]) -> bool:
        """Whether something is kept for each of these shards."""
        return (self._vector is not None and self._vector.shards == shards) or all(s.name in self for s in shards)

    def over(self, host: Sums, shards: list[Shard]) -> Vector:
        """A vector of what is kept for these shards: the one it was made of; after loading a new one, in one piece as that was
        (sums over pieces round otherwise), to whose memory what is kept moves."""
        if self._vector is None or self._vector.host is not host or self._vector.shards != shards:
            self._vector = Vector(host, shards, [self[s.name] for s in shards]).clone()
            self.update({s.name: t for s, t in self._vector})
        return self._vector

    def norm(self, vector: Vector) -> Tensor:
        """`vector.norm()` of what `over` gave, worked out again only where it was written into. Not where sums cross ranks, which
        must all take part."""
        version = -1 if vector.flat is None else vector.flat._version
        if self._norm is None or self._norm[:2] != (vector, version) or version < 0:
            self._norm = vector, version, vector.norm()
        return self._norm[2]

    def give_to(self, scratch: Scratch) -> None:
        """End it, and return its memory if that was lent."""
        if self._vector is not None:
            scratch.give(self._vector)
        self.clear()

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor]]]:
        """Copies and pickles hold the tensors alone."""
        return type(self), (dict(self),)


class Whole(dict[str, Tensor]):
    """State of a mixin that every rank holds whole: tensors by a key of the mixin's own, saved once."""
