"""`fp.rules.measured(fun)(*args)`: the rules that win for this function on this machine, by measuring each.

Every operator that has a rule is compiled and run by itself, at the types that it has in the function: by
autodiff, by its rule, and by each of the rule's other ways. What wins by more than its noise is kept. Then
the whole function is measured; what makes it slower is left out, and if autodiff or `default` is still
better, that is what is returned.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from funcprop import _jax
from funcprop.graph.objective import Argnums
from funcprop.graph.references import require_no_references
from funcprop.program.call import without_aux
from funcprop.program.layer_calls import layer_call
from funcprop.program.structural_key import structural_key
from funcprop.rules.machine import CompileTarget
from funcprop.rules.matching import matches
from funcprop.rules.measuring import measurements_file
from funcprop.rules.measuring.choices import RuleChoices, geometry
from funcprop.rules.measuring.ruled_programs import RuledProgram, alone, whole
from funcprop.rules.rewrite import Match, Rewriter
from funcprop.rules.rule import Rule
from funcprop.rules.rule_set import OperatorKey, RuleSet
from funcprop.rules.sets import autodiff, default, handwritten

OWN = "its rule"
# Where a program takes long, so many seconds for all of its turns are enough.
_PATIENCE = 2.0


@dataclass(frozen=True)
class Score:
    """Ratios to autodiff: of time with the spread of its logarithm (None if nothing ran), and of bytes."""

    time: float | None
    spread: float
    bytes: float

    def gain(self, weight: float) -> float:
        """The weighted logarithm of both ratios; below zero is better."""
        of_time = 0.0 if not weight or self.time is None else weight * math.log(self.time)
        return of_time + (0.0 if weight == 1 else (1 - weight) * math.log(max(self.bytes, 1e-6)))

    def wins(self, weight: float) -> bool:
        """Whether it is better than autodiff by more than its noise."""
        return self.gain(weight) + weight * self.spread < -1e-3

    def __str__(self) -> str:
        of_time = (
            "" if self.time is None else f"{self.time:.2f} ± {self.time * self.spread:.2f} of the time, "
        )
        return f"{of_time}{self.bytes:.2f} of the bytes"


@dataclass(frozen=True)
class MeasuredSite:
    """An operator at certain sizes, as often as it is found, and the ways to differentiate it by rules."""

    operator: OperatorKey
    geometry: str
    label: str
    match: Match
    ways: dict[str, Rule]


def measured(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    objective: str | float = "time",
    repeats: int = 9,
    file: str | Path | None = None,
) -> Callable[..., RuleSet]:
    """Measure which rules win for a function on this machine, and return them as a rule set.

    `measured(fun, argnums, has_aux)(*args, **kwargs) -> RuleSet`. Each operator that has a rule is compiled
    and run by itself, by autodiff, by the rule and by its other ways (with patches or without, products in
    the loop or before it, sizes of blocks). The median of paired ratios counts, and a way is kept if it
    wins by more than its spread. Then `value_and_grad` of the whole function is measured: rules that make
    it worse are left out, and if `default` or autodiff is better, it is returned. The result is an ordinary
    rule set for this machine; `print` shows what it keeps and why. It is kept in a file, so that the second
    call for the same function takes no longer than to trace it.

    Args:
        fun, argnums, has_aux: as in `fp.value_and_grad`; `argnums=None` for all that have a derivative.
        objective: `"time"`, `"bytes"` (temporary bytes of the compiled programs), or the weight `w` of time
            between 0 and 1: `w log time + (1 − w) log bytes` is made small.
        repeats: how often each program is run.
        file: where results are kept; `measured.json` in the user's cache directory if None. Damaged, it is
            ignored with a warning.

    Raises:
        ValueError: the objective or `repeats` is out of range.
        TypeError: an argument is a shape and time counts; `fun` does not return a scalar.

    Example:
        >>> import jax.numpy as jnp, funcprop as fp, tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     found = fp.rules.measured(jnp.sum, objective="bytes", file=f"{place}/file.json")(jnp.ones(3))
        >>> print(found.name)
        measured
    """
    weight = _weight(objective)
    if repeats < 1:
        raise ValueError(f"measured: repeats={repeats}; every program has to run at least once.")
    scalar = without_aux(fun) if has_aux else fun
    path = measurements_file.default_path() if file is None else Path(file)

    def rules_of(*args: Any, **kwargs: Any) -> RuleSet:
        require_no_references("measured", fun, args, kwargs)
        label = getattr(fun, "__name__", type(fun).__name__)
        program, call = whole(scalar, label, argnums, args, kwargs)
        if weight and not program.runs:
            raise TypeError(
                "measured: an argument is a shape (jax.ShapeDtypeStruct), but time can only be measured with "
                "arrays; pass arrays, or objective='bytes'."
            )
        target = CompileTarget.of(None, call.values)
        session = _Session(program, target, weight, repeats, _device(call.values))
        found = _sites(matches(scalar, handwritten.on(target.machine))(*args, **kwargs), target)
        key = _key(program, session, found)
        stored = measurements_file.read(path).get(key)
        kept = None if stored is None else _from_stored(stored, found)
        if kept is None:
            kept = session.choose(found)
            measurements_file.add(path, {key: _stored(kept)})
        return _rule_set(kept, found, target)

    return rules_of


@dataclass(frozen=True)
class Kept:
    """What was decided: the ways by operator and geometry with their scores, or a set that was better.

    `whole` is the whole function's score.
    """

    ways: dict[tuple[str, str], tuple[str, str]]
    instead: str | None
    whole: str


def _weight(objective: Any) -> float:
    weight = (
        {"time": 1.0, "bytes": 0.0}.get(objective, objective) if isinstance(objective, str) else objective
    )
    if not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise ValueError(
            f"measured: objective={objective!r}; pass 'time', 'bytes', or the weight of time from 0 to 1."
        )
    return float(weight)


def _device(values: Sequence[Any]) -> Any:
    return next((d for v in values if (d := _jax.device_of(v)) is not None), None)


# --- operators --------------------------------------------------------------------------------


def _sites(found: Sequence[Match], target: CompileTarget) -> list[MeasuredSite]:
    """The operators with rules, each geometry once."""
    sites: dict[tuple[Any, str], MeasuredSite] = {}
    for match in found:
        call = layer_call(match.equation)
        if match.mapped or (call is None and match.bound is None and match.reason is None):
            continue
        operator: OperatorKey = match.equation.primitive.name if call is None else call.layer
        base = handwritten.find(operator, target.platform)
        if base is None:
            continue
        atoms = [v.aval for v in match.equation.invars]
        types = atoms if call is None else call.unbatched(atoms)
        static = match.equation.params if call is None else dict(call.static)
        at = geometry(match.operator, types, static)
        ways = {OWN: base, **(base.ways() if base.ways is not None else {})}
        shapes = " ".join(f"{a.dtype}{list(a.shape)}" for a in types[:3])
        sites.setdefault(
            (operator, at), MeasuredSite(operator, at, f"{match.operator} {shapes}", match, ways)
        )
    return list(sites.values())


def _chosen_set(
    kept: dict[tuple[str, str], str], sites: Sequence[MeasuredSite], target: CompileTarget
) -> RuleSet:
    """A rule set of the ways by operator and geometry."""
    changes: dict[OperatorKey, Rule] = {}
    for operator in dict.fromkeys(site.operator for site in sites):
        own = [s for s in sites if s.operator == operator and (s.match.operator, s.geometry) in kept]
        if not own:
            continue
        name = own[0].match.operator
        chosen = tuple(sorted((s.geometry, kept[name, s.geometry]) for s in own))
        rules = {kept[name, s.geometry]: s.ways[kept[name, s.geometry]] for s in own}
        changes[operator] = RuleChoices(name, chosen, tuple(sorted(rules.items()))).rule()
    return RuleSet("measured", changes, target=target.machine)


# --- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Session:
    """Measurements of one function for one objective."""

    program: RuledProgram
    target: CompileTarget
    weight: float
    repeats: int
    device: Any

    def choose(self, sites: Sequence[MeasuredSite]) -> Kept:
        """Measure all operators, then the whole."""
        ways: dict[tuple[str, str], tuple[str, Score]] = {}
        for site in sites:
            if (best := self.best_way(site)) is not None:
                ways[site.match.operator, site.geometry] = best
        return self.checked(ways, sites)

    def best_way(self, site: MeasuredSite) -> tuple[str, Score] | None:
        """The way of an operator that wins by more than its noise; None if autodiff is as good."""
        program = alone(site.match.equation, self.program.runs, self.device)
        sets = {name: autodiff.replace({site.operator: way}) for name, way in site.ways.items()}
        sets = {name: rules.on(self.target.machine) for name, rules in sets.items()}
        fire = {n: r for n, r in sets.items() if Rewriter(r).find(site.match.equation) is not None}
        scores = self.scores(program, fire)
        winners = {name: score for name, score in scores.items() if score.wins(self.weight)}
        if not winners:
            return None
        best = min(winners, key=lambda name: winners[name].gain(self.weight))
        return best, winners[best]

    def scores(self, program: RuledProgram, sets: dict[str, RuleSet]) -> dict[str, Score]:
        """The ratios of programs by rule sets to the one by autodiff, run in turn."""
        if not sets:
            return {}
        compiled = [program.compiled(rules) for rules in (autodiff, *sets.values())]
        held = [_jax.temporary_bytes(executable) for executable in compiled]
        ratios = [h / held[0] if held[0] else (1.0 if not h else math.inf) for h in held[1:]]
        if not (program.runs and self.weight):
            return {name: Score(None, 0.0, r) for name, r in zip(sets, ratios, strict=True)}
        seconds = _in_turn(compiled, program.operands, self.repeats)
        found = {}
        for i, name in enumerate(sets):
            logs = np.log(seconds[:, i + 1] / seconds[:, 0])
            low, median, high = np.percentile(logs, [25, 50, 75])
            found[name] = Score(float(np.exp(median)), float(high - low) / 2, ratios[i])
        return found

    def checked(self, ways: dict[tuple[str, str], tuple[str, Score]], sites: Sequence[MeasuredSite]) -> Kept:
        """Leave out what makes the whole function worse; or all, if `default` or autodiff is better."""
        own = default.on(self.target.machine)
        names = {key: way for key, (way, _) in ways.items()}
        while names:
            sets = {"default": own, "measured": _chosen_set(names, sites, self.target)}
            for operator in dict.fromkeys(operator for operator, _ in names):
                rest = {key: way for key, way in names.items() if key[0] != operator}
                if len({operator for operator, _ in names}) > 1:
                    sets[f"without {operator}"] = _chosen_set(rest, sites, self.target)
            scores = self.scores(self.program, sets)
            gains = {name: score.gain(self.weight) for name, score in scores.items()}
            better = [n for n in gains if n.startswith("without ")]
            least = min(better, key=lambda n: gains[n], default=None)
            noise = self.weight * scores["measured"].spread
            if least is not None and gains[least] < gains["measured"] - max(noise, 1e-3):
                names = {key: way for key, way in names.items() if f"without {key[0]}" != least}
                continue
            # Below its noise, the difference to `default` says nothing; then what was tuned less is safer.
            if gains["default"] < min(gains["measured"] + noise / 2, 0.0):
                return Kept({}, "default", str(scores["default"]))
            if gains["measured"] >= 0:
                break
            kept = {key: (way, str(ways[key][1])) for key, way in names.items()}
            return Kept(kept, None, str(scores["measured"]))
        scores = self.scores(self.program, {"default": own})
        if scores["default"].wins(self.weight):
            return Kept({}, "default", str(scores["default"]))
        return Kept({}, "autodiff", "no rule wins by more than its noise")


def _in_turn(programs: Sequence[Any], operands: Sequence[Any], repeats: int) -> np.ndarray:
    """Seconds of the second of two runs of each program in each turn."""
    rows: list[list[float]] = []
    start = time.perf_counter()
    for turn in range(repeats + 1):
        row = []
        for program in programs:
            jax.block_until_ready(program(*operands))
            before = time.perf_counter()
            jax.block_until_ready(program(*operands))
            row.append(time.perf_counter() - before)
        if turn:  # The first touches memory for the first time.
            rows.append(row)
        if len(rows) >= 3 and time.perf_counter() - start > _PATIENCE * len(programs):
            break
    return np.array(rows)


# --- what is kept -----------------------------------------------------------------------------


def _key(program: RuledProgram, session: _Session, sites: Sequence[MeasuredSite]) -> str:
    """The function, the objective, the machine and the versions."""
    key = structural_key(jax.make_jaxpr(program.by(autodiff))(*program.operands))
    machine = session.target.machine
    device = session.device or jax.devices(None)[0]
    what = f"{machine.name}, {machine.cores} cores, {device.device_kind}"
    ways = sorted(f"{s.match.operator}:{s.geometry}:{len(s.ways)}" for s in sites)
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    digest = hashlib.sha256("\n".join(ways).encode()).hexdigest()[:16]
    return f"{what} | {versions} | time {session.weight:g} | {key.digest.hex()} | {digest}"


def _stored(kept: Kept) -> dict[str, Any]:
    ways = [{"operator": o, "geometry": g, "way": w, "score": s} for (o, g), (w, s) in kept.ways.items()]
    return {"instead": kept.instead, "whole": kept.whole, "ways": ways}


def _from_stored(stored: Any, sites: Sequence[MeasuredSite]) -> Kept | None:
    """What a file says; None if it is not what this version writes."""
    known = {(s.match.operator, s.geometry): s.ways for s in sites}
    try:
        ways = {(w["operator"], w["geometry"]): (w["way"], str(w["score"])) for w in stored["ways"]}
        instead, of_whole = stored["instead"], str(stored["whole"])
    except (KeyError, TypeError):
        return None
    if instead not in (None, "default", "autodiff"):
        return None
    if any(key not in known or way not in known[key] for key, (way, _) in ways.items()):
        return None
    return Kept(ways, instead, of_whole)


def _rule_set(kept: Kept, sites: Sequence[MeasuredSite], target: CompileTarget) -> RuleSet:
    labels = {(s.match.operator, s.geometry): s.label for s in sites}
    if kept.instead is not None:
        rules = {"default": default, "autodiff": autodiff}[kept.instead].on(target.machine)
        return rules.noted("measured", (f"{kept.instead} as it is: {kept.whole}",))
    chosen = _chosen_set({key: way for key, (way, _) in kept.ways.items()}, sites, target)
    notes = [f"the whole function: {kept.whole}"]
    notes += [f"{labels[key]}: {way}, {score}" for key, (way, score) in kept.ways.items()]
    return chosen.noted("measured", tuple(notes))
