"""A plan as data and as text: what a device holds, computes and sends; whether it fits."""

import dataclasses
from typing import Any

from v4jax import log
from v4jax.costs import flops
from v4jax.model import take_inventory
from v4jax.planning import memory, remedies, roofline
from v4jax.planning.memory import DeviceBytes
from v4jax.planning.remedies import Remedy
from v4jax.planning.roofline import Times
from v4jax.planning.workload import Workload

_NEAR = 0.9  # part of the limit; compiled steps took up to a tenth more than their estimates


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer to a `Workload`.

    parameters: of the model with its MTP block or draft module. active_parameters: those that every
    token passes, without these and the embedding. largest_batch: about how many sequences would fit
    on the same mesh, None where the plan does not fit. remedies: what would make it fit, empty
    where it does.
    """

    name: str
    work: Workload
    parameters: int
    active_parameters: int
    held: DeviceBytes
    times: Times
    largest_batch: int | None
    remedies: list[Remedy]

    @property
    def fits(self) -> bool:
        """Whether a device can hold what it must."""
        return self.held.total <= self.work.topology.chip.device_limit_bytes

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences per second at best: consumed in prefill, made in decode."""
        return self.work.step_tokens / self.times.seconds

    @property
    def prefill_seconds(self) -> float:
        """Time of the whole prefill at best."""
        return self.times.seconds * self.work.context / self.work.chunk


def make_plan(name: str, work: Workload) -> Plan:
    """Returns the plan of a workload; traces its step, which takes some seconds."""
    held = memory.count_bytes(work)
    fits = held.total <= work.topology.chip.device_limit_bytes
    weights = take_inventory(work.config, work.storage).weights
    chosen = work.config.num_experts_per_tok / work.config.n_routed_experts
    active = sum(
        weight.parameters * (chosen if weight.is_routed else 1.0)
        for weight in weights
        if weight.trained and not weight.drafts and weight.component != "embedding"
    )
    return Plan(
        name=name,
        work=work,
        parameters=sum(weight.parameters for weight in weights),
        active_parameters=round(active),
        held=held,
        times=roofline.estimate(work),
        largest_batch=remedies.largest_batch(work, held) if fits else None,
        remedies=[] if fits else remedies.find_remedies(work, held),
    )


def as_data(plan: Plan) -> dict[str, Any]:
    """Returns the plan as values for JSON; sizes in bytes, times in seconds."""
    work, times, chip = plan.work, plan.times, plan.work.topology.chip
    return {
        "model": plan.name,
        "regime": work.regime,
        "topology": work.topology.name,
        "chips": work.topology.chips,
        "devices": work.topology.devices,
        "mesh": work.sizes,
        "context": work.context,
        "batch": work.batch,
        "chunk": work.chunk,
        "numerics": work.numerics.name,
        "training": work.training if work.regime == "train" else None,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "device_bytes": dataclasses.asdict(plan.held) | {"total": plan.held.total},
        "device_limit_bytes": chip.device_limit_bytes,
        "fits": plan.fits,
        "largest_batch": plan.largest_batch,
        "remedies": [dataclasses.asdict(remedy) for remedy in plan.remedies],
        "device_flops": times.flops,
        "sequence_flops": flops.by_component(roofline.count_sequence(work)),
        "device_memory_traffic_bytes": times.memory_bytes,
        "traffic": [dataclasses.asdict(item) for item in times.traffic],
        "seconds": {
            "compute": times.compute_seconds,
            "memory": times.memory_seconds,
            "links": times.link_seconds,
            "step": times.seconds,
        },
        "draft_seconds": times.draft_seconds,
        "draft_tokens": work.config.draft_tokens,
        "draft_memory_traffic_bytes": times.draft_bytes,
        "tokens_per_second": plan.tokens_per_second,
        "sources": {chip.name: chip.source},
    }


def as_text(plan: Plan) -> str:
    """Returns the plan as text."""
    parts = (_head(plan), _bytes(plan), _operations(plan), _links(plan), _time(plan))
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(plan: Plan) -> list[str]:
    work, topology = plan.work, plan.work.topology
    reads = {
        "decode": "one token of each sequence a step",
        "prefill": f"{work.chunk:,} tokens of each sequence a step",
        "train": f"{work.training}, layers recomputed in the backward pass",
    }[work.regime]
    devices = f"{topology.devices} devices" if topology.chip.devices > 1 else "a device each"
    return [
        f"{plan.name}: {work.regime} on {topology.name}"
        f" ({topology.chips} chips, {devices}), mesh {work.mesh_name}",
        f"{work.batch} sequences of {work.context:,} tokens, {reads}; numerics "
        f"{work.numerics.name}",
        f"{plan.parameters / 1e9:,.1f} B parameters, {plan.active_parameters / 1e9:,.1f} B of them "
        "in every token",
    ]


def _bytes(plan: Plan) -> list[str]:
    chip, held = plan.work.topology.chip, plan.held
    limit = chip.device_limit_bytes
    lines = [f"bytes of one device, of {log.format_bytes(limit)} ({chip.limit_source})"]
    for field in dataclasses.fields(held):
        kinds = getattr(held, field.name)
        if not kinds:
            continue
        shown = sorted(kinds.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {log.format_bytes(size)}" for name, size in shown)
        estimate = "estimate: " if field.name == "temporaries" else ""
        lines.append(_row(field.name, log.format_bytes(sum(kinds.values())), estimate + parts))
    verdict = f"fits: {held.total / limit:.0%} used"
    if plan.largest_batch is not None:
        verdict += f"; room for about {plan.largest_batch:,} sequences"
    if held.total > _NEAR * limit:
        verdict += "; near the limit, ask the compiler (--compile)"
    if not plan.fits:
        verdict = f"DOES NOT FIT: {log.format_bytes(held.total - limit)} too much"
    lines.append(_row("total", log.format_bytes(held.total), verdict))
    if not plan.fits and not plan.remedies:
        lines.append("no single change of mesh, chunk, batch, context or chips was found to fit")
    for number, remedy in enumerate(plan.remedies):
        lead = "smallest change" if number == 0 else "or"
        size = log.format_bytes(remedy.device_bytes)
        lines.append(f"  {lead + ':':<17}{remedy.change}  (about {size} a device)")
    return lines


def _row(name: str, size: str, text: str) -> str:
    return f"  {name:<12}{size:>9}  {text}"


def _operations(plan: Plan) -> list[str]:
    work = plan.work
    per_sequence = flops.by_component(roofline.count_sequence(work))
    tokens = 1 if work.regime == "decode" else min(work.chunk, work.context)
    which = {
        "decode": f"the token at position {work.context - 1:,}",
        "prefill": "a token, mean over the whole prefill",
        "train": "a token, forward, backward and recomputation",
    }[work.regime]
    lines = [f"operations of {which}; of one device in a step"]
    for component, count in sorted(per_sequence.items(), key=lambda item: -item[1]):
        share = count / sum(per_sequence.values())
        device = plan.times.flops[component]
        lines.append(
            f"  {component:<23}{count / tokens / 1e9:>10.3f} GFLOP {share:>6.1%}"
            f"{device / 1e12:>12.4f} TFLOP"
        )
    total = sum(per_sequence.values()) / tokens / 1e9
    device = sum(plan.times.flops.values()) / 1e12
    lines.append(f"  {'total':<23}{total:>10.3f} GFLOP {'':>6}{device:>12.4f} TFLOP")
    return lines


def _links(plan: Plan) -> list[str]:
    if not plan.times.traffic:
        return []
    lines = ["sent by one device in a step (from the traced step)"]
    for item in plan.times.traffic:
        network = f", {log.format_bytes(item.network_bytes)} between slices"
        lines.append(
            f"  {item.kind:<15}{' '.join(item.axes):<16}{item.count:>5} times"
            f"{log.format_bytes(item.sent_bytes):>11}{item.seconds * 1e3:>11.3f} ms"
            + (network if item.network_bytes else "")
        )
    return lines


def _time(plan: Plan) -> list[str]:
    work, times = plan.work, plan.times
    moved = ", ".join(
        f"{name} {log.format_bytes(size)}"
        for name, size in sorted(times.memory_bytes.items(), key=lambda item: -item[1])
    )
    lines = [
        "time of a step at best (published peaks, everything overlapped; a bound, not a forecast)",
        f"  compute  {times.compute_seconds * 1e3:>12.3f} ms",
        f"  memory   {times.memory_seconds * 1e3:>12.3f} ms  {moved}",
        f"  links    {times.link_seconds * 1e3:>12.3f} ms",
    ]
    rate = f"{plan.tokens_per_second:,.0f} tokens/s"
    if work.regime == "prefill":
        rate += f"; the whole prefill {log.format_seconds(plan.prefill_seconds)}"
    lines.append(f"  step     {times.seconds * 1e3:>12.3f} ms  set by {times.bound}: {rate}")
    if times.draft_bytes:
        tokens = work.config.draft_tokens
        lines.append(
            f"  drafts   {times.draft_seconds * 1e3:>12.3f} ms  more where {tokens} "
            f"{'token is' if tokens == 1 else 'tokens are'} drafted (--speculate), which reads "
            f"{log.format_bytes(times.draft_bytes)}"
        )
    return lines
