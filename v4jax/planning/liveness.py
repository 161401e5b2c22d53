"""How much memory a traced program holds at its fullest moment.

An estimate from the trace, before any compiler: values are born where they are computed and die
after their last use. Elementwise results that only elementwise operations and reductions read are
taken as fused, never stored; updates and loop carries as written in place; arrays as laid out so
that narrow rows are not padded; kernels keep their scratch on chip.
"""

import dataclasses
import math

_ELEMENTWISE = """
    abs add and broadcast_in_dim bitcast_convert_type ceil clamp concatenate convert_element_type
    copy cos div eq erf exp exp2 expand_dims expm1 floor ge gt integer_pow iota is_finite le log
    log1p logistic lt max min mul ne neg not or pad pow reduce_precision rem reshape rev round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sign sin slice sqrt square
    squeeze stop_gradient sub tan tanh transpose xor
"""
_READERS = """
    argmax argmin cumsum dynamic_update_slice reduce_and reduce_max reduce_min reduce_or reduce_sum
    scatter scatter-add
"""
_FUSED = frozenset(_ELEMENTWISE.split())
_READS_FUSED = _FUSED | frozenset(_READERS.split())
_IN_PLACE = frozenset(("dynamic_update_slice", "scatter", "scatter-add", "optimization_barrier"))
_LANES = 128  # of a TPU's registers: the last axis of an array is padded to whole ones
# Calls whose body runs where they stand: parameter that holds it.
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

    @property
    def inputs(self) -> list[int]:
        """The operands that are values."""
        return [operand for operand in self.operands if operand is not None]


class _Program:
    """A jaxpr with its calls written out; values are numbered, `sizes` are their bytes."""

    def __init__(self, jaxpr):
        self.steps: list[_Step] = []
        self.sizes: list[int] = []
        self.arguments = {var: self._new(var) for var in (*jaxpr.constvars, *jaxpr.invars)}
        scope = dict(self.arguments)
        self._write_out(jaxpr, scope)
        self.results = [scope[var] for var in jaxpr.outvars if not _is_literal(var)]

    def _new(self, var) -> int:
        self.sizes.append(_bytes(var.aval))
        return len(self.sizes) - 1

    def _write_out(self, jaxpr, scope) -> None:
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            inner = _open(equation.params[_CALLS[name]]) if name in _CALLS else None
            if inner is not None and len(inner.invars) == len(equation.invars):
                inside = {var: self._new(var) for var in inner.constvars}
                for var, given in zip(inner.invars, equation.invars, strict=True):
                    inside[var] = self._new(given) if _is_literal(given) else scope[given]
                    self.sizes[inside[var]] = _bytes(var.aval)  # a device's share of an argument
                self._write_out(inner, inside)
                for var, result in zip(equation.outvars, inner.outvars, strict=True):
                    scope[var] = self._new(result) if _is_literal(result) else inside[result]
                continue
            operands = [None if _is_literal(var) else scope[var] for var in equation.invars]
            for var in equation.outvars:
                scope[var] = self._new(var)
            outputs = [scope[var] for var in equation.outvars]
            ends = [variables[0] for variables in (equation.invars, equation.outvars) if variables]
            shapes = tuple(getattr(var.aval, "shape", ()) for var in ends)
            self.steps.append(_Step(name, equation.params, operands, outputs, shapes))


def peak_bytes(jaxpr) -> int:
    """Returns the bytes a program holds at its fullest moment beside its arguments.

    Args:
      jaxpr: of `jax.make_jaxpr`, closed or open.
    """
    program = _Program(_open(jaxpr))
    buffers = _find_buffers(program)
    last_use = {}
    for number, step in enumerate(program.steps):
        for value in step.inputs:
            for buffer in buffers[value]:
                last_use[buffer] = number
    for value in program.results:
        for buffer in buffers[value]:
            last_use[buffer] = len(program.steps)
    dying: dict[int, list[int]] = {}
    for buffer, number in last_use.items():
        dying.setdefault(number, []).append(buffer)
    outside = set(program.arguments.values())
    live = peak = 0
    for number, step in enumerate(program.steps):
        born = [v for v in step.outputs if buffers[v] == {v} and v not in outside]
        new = sum(program.sizes[value] for value in born)
        peak = max(peak, live + _inside(step, new))
        live += new
        peak = max(peak, live)
        live -= sum(program.sizes[v] for v in dying.get(number, ()) if v not in outside)
        live -= sum(program.sizes[v] for v in born if v not in last_use)  # never read
    return peak


def _find_buffers(program: _Program) -> list[set[int]]:
    """Returns for each value the stored values it lives in: itself, or those it is fused from."""
    must_store = set(program.results)
    for step in program.steps:
        if step.name not in _READS_FUSED:
            must_store.update(step.inputs)
    buffers = [{value} for value in range(len(program.sizes))]
    for step in program.steps:
        if step.name in _FUSED and step.outputs[0] not in must_store:
            buffers[step.outputs[0]] = set().union(*(buffers[v] for v in step.inputs))
        elif step.name == "transpose" and _lies_so(step):
            buffers[step.outputs[0]] = buffers[step.operands[0]]
        elif step.name in _IN_PLACE:
            for result, operand in zip(step.outputs, step.operands, strict=False):
                if operand is not None and program.sizes[result] == program.sizes[operand]:
                    buffers[result] = buffers[operand]
        elif step.name in ("scan", "while"):
            for result, operand in _carried(step):
                if operand is not None:
                    buffers[result] = buffers[operand]
        elif step.name == "pallas_call":
            for operand, result in step.parameters.get("input_output_aliases", ()):
                if step.operands[operand] is not None:
                    buffers[step.outputs[result]] = buffers[step.operands[operand]]
    return buffers


def _lies_so(step: _Step) -> bool:
    """Returns whether a transposition is but another name for what lies in memory.

    XLA on TPU puts an axis last that fills whole lanes, where the array's own last one does not: so
    lie the cache's entries, and kernels are given them turned.
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


def _inside(step: _Step, new: int) -> int:
    """Returns the bytes that a step needs while it runs, its results included."""
    p = step.parameters
    if step.name == "scan":
        body = _open(p["jaxpr"])
        slices = body.invars[sum(_scan_sizes(p)) :]
        sliced = sum(_bytes(var.aval) for var in slices)
        return new + sliced + peak_bytes(body)
    if step.name == "while":
        return new + peak_bytes(p["body_jaxpr"])
    if step.name == "cond":
        return max(new, *(peak_bytes(branch) for branch in p["branches"]))
    return new


def _bytes(aval) -> int:
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def _open(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


def _is_literal(var) -> bool:
    return hasattr(var, "val")
