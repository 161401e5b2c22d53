"""How much memory a traced program holds at its fullest moment, on one device.

An estimate before any compiler. A value is stored from where it is computed to its last use.
Elementwise results that only elementwise operations and reductions read are fused and never stored,
and so is what widens the operand of a product. Updates, loop carries and donated arguments are
written in place. Arrays are laid out so that narrow rows are not padded; kernels keep their scratch
on chip; arrays in the host's memory do not count.

Inside a loop over layers, a compiler may compute ahead whatever does not wait for the layer before:
expanded and gathered weights, and activations recomputed from stored inputs. Those of all layers of
a round are counted together.

Outside of `shard_map` a trace has whole arrays. A value is split there as its largest operand is.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

_ELEMENTWISE = """
    abs add and broadcast_in_dim bitcast_convert_type ceil clamp concatenate convert_element_type
    copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow iota is_finite le log log1p logistic
    lt max min mul ne neg not or pad pow reduce_precision rem rev round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin slice sqrt square sub tan tanh transpose xor
"""
_READERS = """
    argmax argmin cumsum dynamic_update_slice reduce_and reduce_max reduce_min reduce_or reduce_sum
    scatter scatter-add
"""
_SAME = """
    expand_dims name optimization_barrier reshape sharding_constraint squeeze stop_gradient
"""
_FUSED = frozenset(_ELEMENTWISE.split())
_READS_FUSED = _FUSED | frozenset(_READERS.split())
_ALIASES = frozenset(_SAME.split())  # results are other names of the operands
_IN_PLACE = frozenset(("dynamic_update_slice", "scatter", "scatter-add"))
_LANES = 128  # lanes of a TPU's registers; the last axis of an array is padded to whole registers
# Calls whose body runs where it is called: parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "shard_map": "jaxpr",
    "custom_lin": "jaxpr",
}


@dataclasses.dataclass
class _Step:
    """One operation of the flattened program, on numbered values; an operand None is a literal."""

    name: str
    parameters: dict
    operands: list[int | None]
    outputs: list[int]
    shapes: tuple[tuple[int, ...], ...]  # of the first operand and the first output
    parts: list[float]  # the part of each operand that one device has

    @property
    def inputs(self) -> list[int]:
        """The operands that are values."""
        return [operand for operand in self.operands if operand is not None]


class _Program:
    """A jaxpr with its calls written out.

    Values are numbered; `sizes` are their bytes on one device.
    """

    def __init__(self, jaxpr, sizes: Sequence[float] | None = None):
        """Args: sizes: bytes of the arguments on one device; by default those of the trace."""
        self.steps: list[_Step] = []
        self.sizes: list[float] = []
        given = map(_bytes, jaxpr.invars) if sizes is None else sizes
        self.arguments = [self._new(size) for size in given]
        constants = [self._new(_bytes(var)) for var in jaxpr.constvars]
        self.outside = {*self.arguments, *constants}
        names = (*jaxpr.invars, *jaxpr.constvars)
        scope = dict(zip(names, (*self.arguments, *constants), strict=True))
        self._write_out(jaxpr, scope)
        self.results = [scope[var] for var in jaxpr.outvars if not _is_literal(var)]

    def _new(self, size: float) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _write_out(self, jaxpr, scope) -> None:
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            inner = _open(equation.params[_CALLS[name]]) if name in _CALLS else None
            if inner is not None and len(inner.invars) == len(equation.invars):
                self._write_call(equation, inner, scope)
                continue
            operands = [None if _is_literal(var) else scope[var] for var in equation.invars]
            whole = [_bytes(var) for var in equation.invars]
            mine = [w if x is None else self.sizes[x] for x, w in zip(operands, whole, strict=True)]
            parts = [min(m / w, 1.0) if w else 1.0 for m, w in zip(mine, whole, strict=True)]
            part = parts[whole.index(max(whole))] if whole else 1.0
            for var in equation.outvars:
                scope[var] = self._new(_bytes(var) * part)
            outputs = [scope[var] for var in equation.outvars]
            ends = [variables[0] for variables in (equation.invars, equation.outvars) if variables]
            shapes = tuple(getattr(var.aval, "shape", ()) for var in ends)
            self.steps.append(_Step(name, equation.params, operands, outputs, shapes, parts))

    def _write_call(self, equation, inner, scope) -> None:
        inside = {var: self._new(_bytes(var)) for var in inner.constvars}
        for var, given in zip(inner.invars, equation.invars, strict=True):
            inside[var] = self._new(_bytes(given)) if _is_literal(given) else scope[given]
            if equation.primitive.name == "shard_map":
                self.sizes[inside[var]] = _bytes(var)  # what one device has of it
        self._write_out(inner, inside)
        for var, result in zip(equation.outvars, inner.outvars, strict=True):
            scope[var] = self._new(_bytes(result)) if _is_literal(result) else inside[result]

    def compute_ahead(self, carries: Sequence[int]) -> None:
        """Puts first whatever does not wait for the carries of a loop."""
        waits, ahead, behind = set(carries), [], []
        for step in self.steps:
            if waits.isdisjoint(step.inputs):
                ahead.append(step)
            else:
                waits.update(step.outputs)
                behind.append(step)
        self.steps = ahead + behind


def peak_bytes(
    jaxpr: Any, sizes: Sequence[float] | None = None, donated: Sequence[bool] = ()
) -> int:
    """Returns the bytes a program holds at its fullest moment beside its arguments, on one device.

    Args:
      jaxpr: of a trace, closed or open.
      sizes: bytes of each argument on one device; by default arguments are whole.
      donated: whether results may be written over an argument.
    """
    program = _Program(_open(jaxpr), sizes)
    flags = zip(program.arguments, donated, strict=False)
    return round(_peak(program, {argument for argument, flag in flags if flag}))


def _peak(program: _Program, donated: set[int]) -> float:
    buffers = _find_buffers(program, donated)
    last_use: dict[int, int] = {}
    for number, step in enumerate(program.steps):
        for value in step.inputs:
            last_use.update(dict.fromkeys(buffers[value], number))
    for value in program.results:
        last_use.update(dict.fromkeys(buffers[value], len(program.steps)))
    dying: dict[int, list[int]] = {}
    for buffer, number in last_use.items():
        if buffer not in program.outside:
            dying.setdefault(number, []).append(buffer)
    live = peak = 0.0
    for number, step in enumerate(program.steps):
        stored = [v for v in step.outputs if buffers[v] == {v} and v not in program.outside]
        new = sum(program.sizes[value] for value in stored)
        peak = max(peak, live + _inside(step, new))
        live += new
        live -= sum(program.sizes[value] for value in dying.get(number, ()))
        live -= sum(program.sizes[value] for value in stored if value not in last_use)
    return peak


def _find_buffers(program: _Program, donated: set[int]) -> list[set[int]]:
    """Returns for each value the stored values it is in: itself, or those it is fused from."""
    stored = _find_stored(program)
    results, free = set(program.results), set(donated)
    buffers = [{value} for value in range(len(program.sizes))]
    for step in program.steps:
        first = step.outputs[0] if step.outputs else None
        if step.name in _FUSED and first not in stored:
            buffers[first] = set().union(*(buffers[value] for value in step.inputs))
        elif step.name == "transpose" and _is_relabeled(step):
            buffers[first] = buffers[step.operands[0]]
        elif step.name in _FUSED and first in results:
            sources = set().union(*(buffers[value] for value in step.inputs))
            over = [v for v in sources & free if program.sizes[v] == program.sizes[first]]
            if over:
                buffers[first] = {over[0]}
                free.discard(over[0])
        else:
            for result, operand in _in_place(step, program):
                buffers[result] = buffers[operand]
    return buffers


def _find_stored(program: _Program) -> set[int]:
    """Returns the values that something reads from memory."""
    widened = {
        step.outputs[0]
        for step in program.steps
        if step.name == "convert_element_type"
        and step.operands[0] is not None
        and program.sizes[step.outputs[0]] > program.sizes[step.operands[0]]
    }
    stored = set(program.results)
    for step in program.steps:
        if step.name == "dot_general":
            stored.update(set(step.inputs) - widened)
        elif step.name not in _READS_FUSED | _ALIASES:
            stored.update(step.inputs)
    for step in reversed(program.steps):
        if step.name in _ALIASES and not stored.isdisjoint(step.outputs):
            stored.update(step.inputs)
    return stored


def _in_place(step: _Step, program: _Program) -> list[tuple[int, int]]:
    """Returns (result, operand) of results that are in the memory of an operand."""
    pairs = []
    if step.name in _ALIASES:
        pairs = list(zip(step.outputs, step.operands, strict=True))
    elif step.name in _IN_PLACE and step.operands[0] is not None:
        result, operand = step.outputs[0], step.operands[0]
        pairs = [(result, operand)] * (program.sizes[result] == program.sizes[operand])
    elif step.name in ("scan", "while"):
        pairs = _carried(step)
    elif step.name == "pallas_call":
        aliases = step.parameters.get("input_output_aliases", ())
        pairs = [(step.outputs[result], step.operands[operand]) for operand, result in aliases]
    return [(result, operand) for result, operand in pairs if operand is not None]


def _is_relabeled(step: _Step) -> bool:
    """Returns whether a transposition moves nothing.

    XLA on TPU puts an axis last that fills whole registers, where the array's own last axis does
    not. The cache's entries are laid out this way, and kernels take them transposed.
    """
    whole = [shape[-1] % _LANES == 0 for shape in step.shapes]
    return whole[0] != whole[1]


def _carried(step: _Step) -> list[tuple[int, int | None]]:
    """Returns (result, operand) of a loop's carries."""
    p = step.parameters
    if step.name == "scan":
        first, count = _scan_sizes(p)
    else:
        first, count = p["cond_nconsts"] + p["body_nconsts"], len(step.outputs)
    return list(zip(step.outputs[:count], step.operands[first : first + count], strict=True))


def _scan_sizes(parameters: dict) -> tuple[int, int]:
    """Returns the numbers of constants and carries of a scan."""
    if "num_consts" in parameters:  # jax 0.10
        return parameters["num_consts"], parameters["num_carry"]
    constants, carries, _ = parameters["ft_in"].unpack()  # jax 0.12
    return len(constants), len(carries)


def _inside(step: _Step, new: float) -> float:
    """Returns the bytes that a step needs while it runs, its results included."""
    p = step.parameters
    if step.name == "scan":
        body = _open(p["jaxpr"])
        constants, carries = _scan_sizes(p)
        program = _Program(body, _split(body, step.parts))
        program.compute_ahead(program.arguments[constants : constants + carries])
        slices = program.arguments[constants + carries :]
        return new + sum(program.sizes[value] for value in slices) + _peak(program, set())
    if step.name == "while":
        return new + _peak(_Program(_open(p["body_jaxpr"])), set())
    if step.name == "cond":
        branches = map(_open, p["branches"])
        programs = [_Program(branch, _split(branch, step.parts[1:])) for branch in branches]
        return max(new, *(_peak(program, set()) for program in programs))
    return new


def _split(jaxpr, parts: Sequence[float]) -> list[float]:
    """Returns the bytes of a body's arguments, of which a device has these parts."""
    return [_bytes(var) * part for var, part in zip(jaxpr.invars, parts, strict=True)]


def _bytes(var) -> int:
    """Returns the bytes of a value in a device's memory."""
    aval = var.aval
    if getattr(aval, "memory_space", None) == jax.memory.Space.Host:
        return 0
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def _open(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


def _is_literal(var) -> bool:
    return hasattr(var, "val")
