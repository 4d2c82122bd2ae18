"""What the demo found, as table rows and plain sentences; demo_page.py draws it.

Everything here is a function of the data that `demo` collects and saves:

    {"megatron", "torch", "python", "plugin": str, "steps": int, "recipe": {field: value},
     "choices": [[what, why], …], "off": RUN, "on": RUN}

    RUN = {"dtypes": {tensor: [dtype after wrapping, dtype after training]},
           "updates": {"expected", "moved", "stuck", "reversed", "unasked", "wrong_size", "wrong": int},
           "count_error": float, "max_vio": float, "disagree": float (share), "tokens_compared": int,
           "reference_weight": str, "loss": float, "seconds": float,
           "series": {"layers": [name, …], "bias" and "exact": [layer][expert][step 0…], "max_vio" and
                      "count_error": [step], "wrong": [layer][expert], "wrong_at": [step]}}
"""

from __future__ import annotations

from typing import Any, Final

RUNS: Final = ("off", "on")


def below_fp32(dtype: str) -> bool:
    """Whether a dtype's name stands for a floating-point type with fewer bits than fp32."""
    return dtype in ("bfloat16", "float16") or dtype.startswith("float8")


def low_tensors(run: dict[str, Any]) -> list[str]:
    """Router tensors that were below fp32 after wrapping or at the end of training."""
    return [name for name, dtypes in run["dtypes"].items() if any(map(below_fp32, dtypes))]


def protected(data: dict[str, Any]) -> bool:
    """Whether the run with the plugin kept every tensor at fp32 or above and made every update right."""
    return not low_tensors(data["on"]) and data["on"]["updates"]["wrong"] == 0


def _dtype(dtypes: list[str]) -> str:
    # Upstream lifts expert_bias back to fp32 in its first forward: both states are the truth.
    return dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]}, then {dtypes[1]}"


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def rows(data: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table: (what, plugin off, plugin on). HTML, terminal and README show the same one."""
    off, on = data["off"], data["on"]
    names = list(dict.fromkeys([*off["dtypes"], *on["dtypes"]]))
    absent = ["absent", "absent"]
    table = [
        (f"dtype of {name}", _dtype(off["dtypes"].get(name, absent)), _dtype(on["dtypes"].get(name, absent)))
        for name in names
    ]

    def add(label: str, show: Any) -> None:
        table.append((label, show(off), show(on)))

    add("bias updates that were due", lambda run: f"{run['updates']['expected']:,}")
    add("… and moved the bias", lambda run: f"{run['updates']['moved']:,}")
    for label, key in (
        ("… swallowed: the bias stayed", "stuck"),
        ("… moved the wrong way", "reversed"),
        ("… moved by another amount than the rate", "wrong_size"),
    ):
        add(label, lambda run, key=key: _of(run["updates"][key], run["updates"]["expected"]))
    add("bias moved where it was balanced", lambda run: f"{run['updates']['unasked']:,}")
    add("largest error of the token counter", lambda run: f"{run['count_error']:,.0f} tokens")
    add("final load violation, MaxVio", lambda run: f"{run['max_vio']:.3f}")
    add("tokens routed unlike fp64", lambda run: f"{run['disagree']:.2%}")
    add("final loss (nats per byte)", lambda run: f"{run['loss']:.4f}")
    return table


def findings(data: dict[str, Any]) -> list[str]:
    """What the figures say, in plain sentences, good or bad."""
    off, on = data["off"], data["on"]
    updates = off["updates"]
    low = low_tensors(off)
    lasting = [name for name in low if below_fp32(off["dtypes"][name][1])]
    passing = [name for name in low if name not in lasting]
    said = []
    if low:
        said.append(
            f"Without the plugin, Megatron-Core {data['megatron']} holds {_listed(lasting) or 'nothing'} below fp32"
            + (f", and {_listed(passing)} between wrapping and its first forward." if passing else ".")
        )
    else:
        said.append(f"Megatron-Core {data['megatron']} keeps every router tensor in fp32 by itself.")
    if stopped(data):
        said.append(
            f"The balancer has stopped: {updates['stuck']:,} of {updates['expected']:,} updates left the "
            "bias where it was. Around 0.75 neighbouring bf16 numbers are 0.0039 apart, so an update of "
            f"{data['recipe']['bias_rate']:g} is rounded away whole. Nothing in a training log shows it."
        )
    elif updates["wrong"]:
        said.append(
            f"{updates['wrong']:,} updates went wrong ({updates['reversed']:,} moved the bias away from "
            f"balance, {updates['stuck']:,} did not move it, {updates['unasked']:,} moved an expert that was "
            f"balanced). The token counter is off by up to {off['count_error']:,.0f} tokens: enough to "
            "cancel an update, or to turn its sign around, when an expert is near its fair share."
        )
    else:
        said.append("Every update went the right way without the plugin in this run.")
    said.append(
        f"The router sends {off['disagree']:.2%} of {off['tokens_compared']:,} tokens to another set of "
        f"experts than an fp64 computation from {off['reference_weight']} does; "
        f"with the plugin {on['disagree']:.2%}."
    )
    if protected(data):
        said.append(
            f"With the plugin, all {on['updates']['expected']:,} updates agree with exact integer "
            f"arithmetic, the counter is off by {on['count_error']:,.0f} tokens, "
            f"and no router tensor is below fp32."
        )
    else:
        said.append(
            f"THE PLUGIN DID NOT KEEP ITS PROMISE: {on['updates']['wrong']:,} wrong updates; below fp32: "
            f"{_listed(low_tensors(on)) or 'nothing'}."
        )
    said.append(
        f"Load violation at the end: {off['max_vio']:.3f} off, {on['max_vio']:.3f} on; loss {off['loss']:.4f} off, "
        f"{on['loss']:.4f} on. "
        + (
            "The run is short: the loss is no evidence for or against anything."
            if stopped(data)
            else "The run is short and few updates differ: neither is evidence for or against anything."
        )
    )
    return said


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}" if names else ""


def worst(data: dict[str, Any]) -> tuple[int, int]:
    """(layer, expert) with the most wrong updates in the run without the plugin: the one worth drawing."""
    wrong = data["off"]["series"]["wrong"]
    return max(
        ((layer, expert) for layer, row in enumerate(wrong) for expert in range(len(row))),
        key=lambda place: wrong[place[0]][place[1]],
    )


def stopped(data: dict[str, Any]) -> bool:
    """Whether most updates of the run without the plugin were swallowed."""
    return bool(data["off"]["updates"]["stuck"] > data["off"]["updates"]["expected"] // 2)
