"""From errors to an assignment: what a target means, what layers take, and where DBF steps in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onecomp.quantizer.autobit.algorithm import TiedSet, allocate, reach, tie
from onecomp.quantizer.autobit.assignment import Assignment, LayerChoice
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.dbf import DBF
from onecomp.quantizer.dbf.rank import stored_bits

Shapes = Mapping[str, tuple[int, int]]
"""``(out_features, in_features)`` of every target layer by full name."""


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
        auto_dbf: Take DBF where bits are too few for codes.
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

    def target(self, shapes: Shapes) -> float:
        """Largest average of stored bits a weight.

        A target of raw bits becomes what it takes with scales: the candidates' mean, over layers.
        """
        if self.is_effective:
            return float(self.target_bit)
        total = 0.0
        for name, (rows, columns) in shapes.items():
            each = [
                candidate.bits_per_weight(name, columns, rows, wbits=self.target_bit)
                for candidate in self.candidates
            ]
            known = [bits for bits in each if bits is not None]
            total += rows * columns * sum(known) / len(known)
        return total / _num_weights(shapes)

    def takes_only_dbf(self, shapes: Shapes, slack: float = 0.0) -> bool:
        """Whether the target is below what the candidates can do well, or at all.

        Args:
            shapes: The layers.
            slack: Bits by which it would have to be lower for the answer to be False.
        """
        if not self.auto_dbf:
            return False
        if self.target_bit <= self.dbf_threshold + slack:
            return True
        sets = self._sets(shapes)
        if not all(part.allowed for part in sets):
            return False
        return self.target(shapes) + slack < reach(sets)[0] / _num_weights(shapes)

    def problems(self, shapes: Shapes) -> list[str]:
        """What keeps these layers from any assignment, one sentence each."""
        if self.takes_only_dbf(shapes):
            return [
                f"target_bit={self.target_bit:g} is too low for the candidates, and for DBF in "
                f"their place: {problem} Or raise target_bit."
                for problem in self._dbf(float(self.target_bit)).model_problems(shapes)
            ]
        unknown = [
            f"{candidate.name} does not say what it stores (bits_per_weight), so that it can be a "
            "candidate with assignment_strategy='manual' only."
            for candidate in self.candidates
            if self._is_unknown(candidate, shapes)
        ]
        if unknown:
            return unknown
        sets = self._sets(shapes)
        problems = [
            f"{', '.join(part.layer_names)} are fused, but no candidate is for all of them. "
            "Change the candidates' rules, or take enable_fused_groups=False."
            for part in sets
            if not part.allowed
        ]
        if problems:
            return problems
        least, most = (bits / _num_weights(shapes) for bits in reach(sets))
        target = self.target(shapes)
        if target >= least * (1 - 1e-9):
            return []
        return [
            f"target_bit={self.target_bit:g} is {target:.3f} bits a weight with scales, but these "
            f"candidates take {least:.3f} to {most:.3f}. Raise it, give a smaller candidate, or "
            "take auto_dbf=True."
        ]

    def remarks(self, shapes: Shapes) -> list[str]:
        """That there will be DBF only, and what is to be known of it."""
        if not self.takes_only_dbf(shapes):
            return []
        dbf = self._dbf(float(self.target_bit))
        reason = f"target_bit={self.target_bit:g} is too low for codes: all layers get {dbf.name}."
        return [reason, *dbf.remarks(shapes)]

    def _is_unknown(self, candidate: Quantizer, shapes: Shapes) -> bool:
        own = {name: shape for name, shape in shapes.items() if candidate.accepts(name)}
        return any(
            candidate.bits_per_weight(name, columns, rows) is None
            for name, (rows, columns) in own.items()
        )

    def only_dbf(self, shapes: Shapes) -> Assignment:
        """DBF for every layer, with the target's bits or what keeps to it with scales."""
        bits = self._dbf_bits(shapes)
        layers = {name: self._dbf_choice(name, shapes, 0, bits) for name in shapes}
        return Assignment(layers, self.target(shapes), (bits,))

    def _dbf_bits(self, shapes: Shapes) -> float:
        target, most = self.target(shapes), float(self.target_bit)
        if _average_with_dbf(shapes, most) <= target:
            return most
        least = 0.0
        for _ in range(BISECTIONS):
            middle = (least + most) / 2
            fits = _average_with_dbf(shapes, middle) <= target
            least, most = (middle, most) if fits else (least, middle)
        return round(least, 4) - 1e-4

    def assign(self, shapes: Shapes, errors: Mapping[str, Sequence[float]]) -> Assignment:
        """The assignment with the least sum of errors that keeps to the target.

        Args:
            shapes: All layers.
            errors: By layer, of each candidate.

        Raises:
            ConfigError: None keeps to the target; with what there is.
        """
        target, sets = self.target(shapes), self._sets(shapes, errors)
        chosen = {
            name: index
            for part, index in zip(sets, allocate(sets, target), strict=True)
            for name in part.layer_names
        }
        layers = {
            name: layer_choice(self.candidates, name, shapes, chosen[name], errors[name])
            for name in shapes
        }
        found = Assignment(layers, target)
        if self.auto_dbf and (found.average_bits or math.inf) <= self.dbf_threshold:
            return self._with_dbf(found, shapes)
        return found

    def _sets(
        self, shapes: Shapes, errors: Mapping[str, Sequence[float]] | None = None
    ) -> list[TiedSet]:
        sets = []
        for names in tie(shapes, self.fused_groups):
            bits = [_stored_bits(self.candidates, name, shapes) for name in names]
            each = [errors[name] if errors else [0.0] * len(self.candidates) for name in names]
            sets.append(
                TiedSet(
                    names,
                    _num_weights({name: shapes[name] for name in names}),
                    tuple(None if None in part else sum(part) for part in zip(*bits, strict=True)),
                    tuple(sum(part) for part in zip(*each, strict=True)),
                )
            )
        return sets

    def _with_dbf(self, found: Assignment, shapes: Shapes) -> Assignment:
        """Layers of few bits get DBF with their codes' bits where that stores no more."""
        codes = {
            name: _code_bits(self.candidates[choice.child], name)
            for name, choice in found.layers.items()
            if choice.bits <= self.dbf_threshold
        }
        few = {
            name: float(bits)
            for name, bits in codes.items()
            if bits is not None
            and stored_bits(*shapes[name], float(bits)) <= found.layers[name].bits
        }
        bits = sorted(set(few.values()))
        changed = {
            name: replace(
                self._dbf_choice(name, shapes, bits.index(few[name]), few[name]),
                errors=found.layers[name].errors,
            )
            for name in few
        }
        return replace(found, layers={**found.layers, **changed}, dbf_bits=tuple(bits))

    def _dbf_choice(self, name: str, shapes: Shapes, number: int, bits: float) -> LayerChoice:
        children = [*self.candidates, *[self._dbf(bits)] * (number + 1)]
        return layer_choice(children, name, shapes, len(children) - 1)

    def _dbf(self, bits: float) -> DBF:
        return dbf_of(bits, self.dbf_iters)


def _average_with_dbf(shapes: Shapes, bits: float) -> float:
    """Stored bits a weight with DBF of so many bits in every layer."""
    total = sum(math.prod(shape) * stored_bits(*shape, bits) for shape in shapes.values())
    return total / _num_weights(shapes)


def _code_bits(candidate: Quantizer, layer_name: str) -> int | float | None:
    """Bits of integer codes; None for methods that store something else."""
    try:
        stored = candidate.layer_format(layer_name)
    except NotImplementedError:
        return None
    return stored.bits if stored.method == "gptq" else None


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


def _stored_bits(candidates: Sequence[Quantizer], name: str, shapes: Shapes) -> list[int | None]:
    """Bits that a layer takes with each candidate; None where one is not for the layer."""
    rows, columns = shapes[name]
    each = [
        candidate.bits_per_weight(name, columns, rows) if candidate.accepts(name) else None
        for candidate in candidates
    ]
    return [None if bits is None else round(bits * rows * columns) for bits in each]
