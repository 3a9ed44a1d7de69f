"""Decisions and plans as text for people and as data for programs."""

from __future__ import annotations

from typing import Any

from .dispatch import Candidate, Decision, Plan, Refusal
from .resident import checkpoint_bytes


def refusal_text(decision: Decision) -> str:
    """Why no kernel takes a problem: one sentence, then one line per kernel with all reasons."""
    request = decision.request
    head = f"no kernel takes {decision.spec} at M={decision.m}"
    if request.forced is not None:
        own = [r for r in decision.refused if r.name.split(".")[0] == request.forced]
        others = [r for r in decision.refused if r.name.split(".")[0] != request.forced]
        if own:
            head = (
                f"{request.source} asks for backend {request.forced}, which refuses {decision.spec} at M={decision.m}"
                f"{_other_device(own)}; leave the request out to let awq-core choose"
            )
        else:
            names = sorted({r.name.split(".")[0] for r in others})
            head = (
                f"{request.source} asks for backend {request.forced}, which is not installed; "
                f"installed are {', '.join(names) or 'none'} (`awq backends` shows what failed to load)"
            )
        return "\n".join([head + ".", *(refusal_line(r) for r in own)])
    return "\n".join([head + ".", *(refusal_line(r) for r in decision.refused)])


def _other_device(refused: list[Refusal]) -> str:
    """`` (it needs an NVIDIA or AMD GPU)`` where the device is a reason against each kernel."""
    wanted = [next((r.wanted for r in refusal.reasons if r.rule == "device"), "") for refusal in refused]
    return f" (it needs {' or '.join(dict.fromkeys(wanted))})" if all(wanted) else ""


def refusal_line(refusal: Refusal) -> str:
    """``  name: reason; reason``."""
    return f"  {refusal.name}: " + "; ".join(str(reason) for reason in refusal.reasons)


def plan_line(plan: Plan) -> str:
    """The plan in one line: ``M 1-12 cpu.int4pack | M 13+ cpu.unpack``."""
    return " | ".join(f"M {band.rows} {band.candidate.name}" for band in plan.bands)


def memory_text(plan: Plan) -> str:
    """What the resident weight takes, and why, where it is more than in the checkpoint."""
    stored, resident = checkpoint_bytes(plan.spec), resident_bytes(plan)
    if resident is None:
        return f"resident {plan.resident.name}, of unknown size"
    text = f"resident {plan.resident.name}, {resident / stored:.2f}x of the checkpoint's bytes"
    return f"{text}: {plan.resident.note}" if plan.resident.note and resident > 1.5 * stored else text


def resident_bytes(plan: Plan) -> int | None:
    """Bytes of the resident weight; None where the layout's ``nbytes``, which may be a plugin's, does not say."""
    try:
        return int(plan.resident.nbytes(plan.spec))
    except Exception:  # a number for people is no reason to fail
        return None


def plan_text(plan: Plan) -> str:
    """The plan with every refusal, for people; a reason that holds at several M is said once."""
    lines = [str(plan.spec), "  " + plan_line(plan), "  " + memory_text(plan)]
    for band in plan.bands:
        others = [f"{_short(c)}" for c in band.decision.accepted[1:]]
        lines.append(f"  M {band.rows}: {_short(band.candidate)}" + (f", before {', '.join(others)}" if others else ""))
    said: list[Refusal] = []
    for place, decision in [("1", plan.decision), *((str(band.rows), band.decision) for band in plan.bands)]:
        new = [refusal for refusal in decision.refused if not any(_covers(old, refusal) for old in said)]
        lines += [f"  refused at M {place}:", *("  " + refusal_line(refusal) for refusal in new)] if new else []
        said += new
    return "\n".join(lines)


def plan_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data (for ``--json``)."""
    spec = plan.spec
    return {
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "group_size": spec.group_size,
        "layout": spec.layout,
        "zero_point": spec.zero_point,
        "bias": spec.bias,
        "dtype": spec.dtype,
        "device": str(spec.device),
        "experts": spec.experts,
        "resident": plan.resident.name,
        "resident_bytes": resident_bytes(plan),
        "checkpoint_bytes": checkpoint_bytes(spec),
        "note": plan.resident.note,
        "bands": [
            {
                "first": band.rows.first,
                "last": band.rows.last,
                "kernel": band.candidate.name,
                "accepted": [c.name for c in band.decision.accepted],
                "refused": [_refusal_data(r) for r in band.decision.refused],
            }
            for band in plan.bands
        ],
        "refused": [_refusal_data(r) for r in plan.decision.refused],
    }


def _covers(old: Refusal, new: Refusal) -> bool:
    """Whether what was said of a kernel is enough to refuse it here too."""
    return old.name == new.name and set(old.reasons) <= set(new.reasons)


def _refusal_data(refusal: Refusal) -> dict[str, Any]:
    reasons = [{"rule": r.rule, "wanted": r.wanted, "got": r.got} for r in refusal.reasons]
    return {"kernel": refusal.name, "reasons": reasons}


def _short(candidate: Candidate) -> str:
    return f"{candidate.name} (priority {candidate.capability.priority})"
