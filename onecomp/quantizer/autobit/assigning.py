"""From errors to an assignment: what a target means, what layers take, and where DBF steps in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onecomp.quantizer.autobit.algorithm import ROUNDING, TiedSet, allocate, reach, tie
from onecomp.quantizer.autobit.assignment import Assignment, LayerChoice
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.dbf import DBF
from onecomp.quantizer.dbf.rank import bits_with_scales

Shapes = Mapping[str, tuple[int, int]]
"""``(out_features, in_features)`` of every target layer by full name."""


LEAST_DBF_BITS, MOST_DBF_BITS = 1e-4, 2.0
"""A rank of one in any layer; where a square layer is full, others are before."""
NOMINAL_SHAPE = (4096, 4096)
"""Shape of a layer, for what has to be known before the model is."""
SLACK = 0.5
"""Bits by which a target may differ between that shape and the model's."""
NOTABLE_BITS = 0.05
"""Bits a weight that are said to be left unspent."""
BISECTIONS = 20
"""Halvings of the bits between which those of DBF are looked for."""


@dataclass(frozen=True)
class Assigner:
    """Decides which candidate quantizes which layer.

    Args:
        candidates: What there is to choose from; each is for the layers that it accepts.
        fused_groups: Last parts of the names of layers that are tied.
        target_bit: Average bits a weight.
        is_effective: ``target_bit`` counts scales, too.
        auto_dbf: Take DBF where bits are few.
        dbf_threshold: Bits up to which they are.
        dbf_iters: Iterations of DBF; None for its default.
    """

    candidates: Sequence[Quantizer]
    fused_groups: Sequence[Sequence[str]]
    target_bit: int | float
    is_effective: bool
    auto_dbf: bool
    dbf_threshold: int | float
    dbf_iters: int | None

    @property
    def children(self) -> list[Quantizer]:
        """The candidates, and behind them DBF of the target's bits where that is low enough."""
        if not self.auto_dbf or self.target_bit > self.dbf_threshold:
            return list(self.candidates)
        dbf = self._dbf(min(float(self.target_bit), MOST_DBF_BITS))
        is_there = any(
            isinstance(candidate, DBF) and candidate.settings() == dbf.settings()
            for candidate in self.candidates
        )
        return [*self.candidates, *([] if is_there else [dbf])]

    def target(self, shapes: Shapes) -> float:
        """Largest average of stored bits a weight.

        A target of raw bits becomes what it takes with scales: the candidates' mean, over layers;
        without DBF, whose shapes may have no room for them, unless there is nothing else.
        """
        if self.is_effective:
            return float(self.target_bit)
        coded = [candidate for candidate in self.candidates if not isinstance(candidate, DBF)]
        total = 0.0
        for name, (rows, columns) in shapes.items():
            each = [
                candidate.bits_per_weight(name, columns, rows, wbits=self.target_bit)
                for candidate in coded or self.candidates
            ]
            known = [bits for bits in each if bits is not None]
            total += rows * columns * sum(known) / len(known)
        return total / _num_weights(shapes)

    def may_take_only_dbf(self) -> bool:
        """Whether the target may be below all candidates: what is known before the layers are."""
        each = [c.bits_per_weight("", *NOMINAL_SHAPE) for c in self.candidates]
        known = [bits for bits in each if bits is not None]
        target = self.target({"": NOMINAL_SHAPE})
        return self.auto_dbf and bool(known) and target - SLACK < min(known)

    def takes_only_dbf(self, shapes: Shapes) -> bool:
        """Whether the target is below all that the candidates can do."""
        if not self.auto_dbf:
            return False
        sets = self._sets(shapes, self.candidates)
        return all(part.allowed for part in sets) and self._is_below(shapes, sets)

    def _is_below(self, shapes: Shapes, sets: Sequence[TiedSet]) -> bool:
        """Whether the target is too low for every choice; what rounding does to it counts not."""
        return self.target(shapes) < reach(sets)[0] / _num_weights(shapes) * (1 - ROUNDING)

    def problems(self, shapes: Shapes) -> list[str]:
        """What keeps these layers from any assignment, one sentence each."""
        if self.takes_only_dbf(shapes):
            least, target = _average_with_dbf(shapes, LEAST_DBF_BITS), self.target(shapes)
            if least <= target:
                return []
            return [
                f"target_bit={self.target_bit:g} is {target:.3f} bits a weight with scales: too "
                f"low for the candidates, and for DBF, which takes {least:.3f}. Raise it."
            ]
        unknown = [
            f"{candidate.name} does not say what it stores (bits_per_weight), so that it can be a "
            "candidate with assignment_strategy='manual' only."
            for candidate in self.candidates
            if self._is_unknown(candidate, shapes)
        ]
        if unknown:
            return unknown
        sets = self._sets(shapes, self.children)
        problems = [
            f"{', '.join(part.layer_names)} are fused, but no candidate is for all of them. "
            "Change the candidates' rules, or take enable_fused_groups=False."
            for part in sets
            if not part.allowed
        ]
        if problems:
            return problems
        if not self._is_below(shapes, sets):
            return []
        least, most = (bits / _num_weights(shapes) for bits in reach(sets))
        return [
            f"target_bit={self.target_bit:g} is {self.target(shapes):.3f} bits a weight with "
            f"scales, but these candidates take {least:.3f} to {most:.3f}. Raise it, give a "
            "smaller candidate, or take auto_dbf=True."
        ]

    def remarks(self, shapes: Shapes) -> list[str]:
        """That DBF is all there will be, or joins the candidates, and what is to be known of it."""
        target = f"target_bit={self.target_bit:g}"
        if self.takes_only_dbf(shapes):
            dbf = self._dbf(self._dbf_bits(shapes))
            reason = f"{target} is too low for the candidates: all layers get {dbf.name}."
            return [reason, *dbf.remarks(shapes)]
        most = reach(self._sets(shapes, self.children))[1] / _num_weights(shapes)
        if self.target(shapes) > most + NOTABLE_BITS:
            return [
                f"{target} is {self.target(shapes):.3f} bits a weight with scales, but the "
                f"candidates take {most:.3f} at most: the rest stays unused."
            ]
        return [
            f"{target} is at most dbf_threshold={self.dbf_threshold:g}: {dbf.name} is a candidate."
            for dbf in self.children[len(self.candidates) :]
        ]

    def _is_unknown(self, candidate: Quantizer, shapes: Shapes) -> bool:
        own = {name: shape for name, shape in shapes.items() if candidate.accepts(name)}
        return any(
            candidate.bits_per_weight(name, columns, rows) is None
            for name, (rows, columns) in own.items()
        )

    def only_dbf(self, shapes: Shapes) -> Assignment:
        """DBF for every layer, with as many bits as the target has room for."""
        bits, children = self._dbf_bits(shapes), self.children
        children.append(self._dbf(bits))
        layers = {name: layer_choice(children, name, shapes, len(children) - 1) for name in shapes}
        return Assignment(layers, self.target(shapes), (bits,))

    def _dbf_bits(self, shapes: Shapes) -> float:
        """Most bits of DBF with which all layers keep to the target.

        They may be above it, as layers without room for so many fall short.
        """
        target, least, most = self.target(shapes), LEAST_DBF_BITS, MOST_DBF_BITS
        if _average_with_dbf(shapes, most) <= target:
            return most
        for _ in range(BISECTIONS):
            middle = (least + most) / 2
            fits = _average_with_dbf(shapes, middle) <= target
            least, most = (middle, most) if fits else (least, middle)
        return max(LEAST_DBF_BITS, math.floor(least * 1e4) / 1e4)

    def assign(self, shapes: Shapes, errors: Mapping[str, Sequence[float]]) -> Assignment:
        """The assignment with the least sum of errors that keeps to the target.

        Args:
            shapes: All layers.
            errors: By layer, of each candidate.

        Raises:
            ConfigError: None keeps to the target; with what there is.
        """
        target, children = self.target(shapes), self.children
        sets = self._sets(shapes, children, errors)
        chosen = {
            name: index
            for part, index in zip(sets, allocate(sets, target), strict=True)
            for name in part.layer_names
        }
        layers = {
            name: layer_choice(children, name, shapes, chosen[name], errors[name])
            for name in shapes
        }
        return Assignment(layers, target)

    def _sets(
        self,
        shapes: Shapes,
        children: Sequence[Quantizer],
        errors: Mapping[str, Sequence[float]] | None = None,
    ) -> list[TiedSet]:
        sets = []
        for names in tie(shapes, self.fused_groups):
            bits = [_stored_bits(children, name, shapes) for name in names]
            each = [errors[name] if errors else [0.0] * len(children) for name in names]
            sets.append(
                TiedSet(
                    names,
                    _num_weights({name: shapes[name] for name in names}),
                    tuple(None if None in part else sum(part) for part in zip(*bits, strict=True)),
                    tuple(sum(part) for part in zip(*each, strict=True)),
                )
            )
        return sets

    def _dbf(self, bits: float) -> DBF:
        return dbf_of(bits, self.dbf_iters)


def _average_with_dbf(shapes: Shapes, bits: float) -> float:
    """Stored bits a weight with DBF of so many bits in every layer."""
    total = sum(math.prod(shape) * bits_with_scales(*shape, bits) for shape in shapes.values())
    return total / _num_weights(shapes)


def dbf_of(bits: float, iters: int | None) -> DBF:
    """DBF of so many bits; ``iters`` is None for its default."""
    return DBF(target_bits=bits) if iters is None else DBF(target_bits=bits, iters=iters)


def layer_choice(
    children: Sequence[Quantizer],
    name: str,
    shapes: Shapes,
    child: int,
    errors: Sequence[float] = (),
) -> LayerChoice:
    """One child for a layer, with what it takes."""
    rows, columns = shapes[name]
    bits = children[child].bits_per_weight(name, columns, rows)
    known = tuple(error if math.isfinite(error) else None for error in errors)
    return LayerChoice(child, bits, rows * columns, known)


def _num_weights(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes.values())


def _stored_bits(children: Sequence[Quantizer], name: str, shapes: Shapes) -> list[int | None]:
    """Bits that a layer takes with each child; None where one is not for the layer."""
    rows, columns = shapes[name]
    each = [
        child.bits_per_weight(name, columns, rows) if child.accepts(name) else None
        for child in children
    ]
    return [None if bits is None else round(bits * rows * columns) for bits in each]
