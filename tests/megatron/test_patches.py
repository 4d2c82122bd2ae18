"""Patches: live status, identical originals after disable(), and errors that name what does not fit."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wrapt

import megatron_fp32_router
from megatron_fp32_router import cli
from megatron_fp32_router.patching.records import PATCHES

HOME = "megatron.core.transformer.moe.router"


def everything_imported() -> None:
    for patch in PATCHES:
        if is_here(patch.module):
            importlib.import_module(patch.module)


def is_here(module: str) -> bool:
    """Whether the release has `module`, asked of its files."""
    root = Path(importlib.import_module("megatron.core").__file__).parent.parent.parent
    path = root / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def originals() -> dict[str, Any]:
    found = {}
    for patch in PATCHES:
        module = sys.modules.get(patch.module)
        if module is not None:
            try:
                owner, name, value = wrapt.resolve_path(module, patch.path)
            except AttributeError:
                continue  # this release has no such function
            if isinstance(owner, type):
                owner = next(cls for cls in owner.__mro__ if name in vars(cls))
            if owner is not object:  # of a function that has a class's name, every look-up gives another object
                found[patch.id] = (owner, value)
    return found


def test_disable_gives_the_identical_objects_back() -> None:
    everything_imported()
    before = originals()
    megatron_fp32_router.enable()
    assert all(now is not before[name] for name, now in originals().items() if name == "gating")
    megatron_fp32_router.enable()
    megatron_fp32_router.disable()
    after = originals()
    assert after.keys() == before.keys()
    assert all(after[name][0] is before[name][0] and after[name][1] is before[name][1] for name in before)


def test_where_the_weight_is_not_on_its_device_yet_the_line_does_not_name_products(
    router: Any, plugin: Any, caplog: Any
) -> None:
    built = router().to("meta")
    with caplog.at_level(logging.INFO):
        sys.modules["megatron.core.transformer.module"].Float16Module(built.config, built)  # type: ignore[attr-defined]
    assert "gating in products chosen at the first forward (the weight is still on meta)" in caplog.text


def test_status_is_asked_live(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_imported()
    states = {record.id: record.state for record in megatron_fp32_router.status()}
    waiting = {patch.id for patch in PATCHES if not is_here(patch.module)}
    assert "legacy-wrap-check" in waiting
    assert {states.pop(name) for name in waiting} == {"armed"}
    assert set(states.values()) <= {"applied", "native"}
    assert states["gating"] == states["router-casts"] == states["bias-update"] == "applied"
    with monkeypatch.context() as patching:
        patching.setattr(f"{HOME}.Router.gating", lambda self, input: None)
        assert {r.id: r.state for r in megatron_fp32_router.status()}["gating"] == "displaced"
    assert {r.id: r.state for r in megatron_fp32_router.status()}["gating"] == "applied"
    megatron_fp32_router.disable()
    assert {r.state for r in megatron_fp32_router.status()} == {"off"}


def test_disable_refuses_while_another_patch_sits_on_ours(plugin: Any) -> None:
    everything_imported()
    router = sys.modules[HOME]
    ours = router.Router.gating

    @functools.wraps(ours)
    def theirs(self: Any, input: Any) -> Any:
        return ours(self, input)

    router.Router.gating = theirs
    with pytest.raises(megatron_fp32_router.DisplacedPatchError, match="gating"):
        megatron_fp32_router.disable()
    # Theirs carries copies of our attributes; asked to arm again, we must not take it for our own or wrap it.
    megatron_fp32_router.enable()
    assert router.Router.gating is theirs
    assert {r.id: r.state for r in megatron_fp32_router.status()}["gating"] == "displaced"
    with pytest.raises(megatron_fp32_router.DisplacedPatchError, match="gating"):
        megatron_fp32_router.disable()
    assert router.TopKRouter.forward.__wrapped__
    router.Router.gating = ours


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("megatron.core.transformer.moe.router:Router", "gating"),
        ("megatron.core.transformer.moe.router:TopKRouter", "forward"),
        ("megatron.core.transformer.module:Float16Module", "__init__"),
        ("megatron.core.transformer.moe.moe_utils:", "get_updated_expert_bias"),
        ("megatron.core.distributed.finalize_model_grads:", "_update_router_expert_bias"),
    ],
)
def test_a_renamed_target_is_an_error_that_names_it_the_release_and_the_variable(
    owner: str, name: str, release: Any, caplog: pytest.LogCaptureFixture
) -> None:
    everything_imported()
    module, _, cls = owner.partition(":")
    place: Any = getattr(sys.modules[module], cls) if cls else sys.modules[module]
    kept = vars(place)[name]
    delattr(place, name)
    setattr(place, f"{name}_renamed", kept)
    try:
        with pytest.raises(megatron_fp32_router.TargetMissingError) as caught:
            megatron_fp32_router.enable()
        for part in (name, str(release), "MEGATRON_FP32_ROUTER_ON_MISMATCH=warn"):
            assert part in str(caught.value)
        with caplog.at_level(logging.WARNING):
            megatron_fp32_router.enable(on_mismatch="warn")
        assert any(name in record.getMessage() for record in caplog.records)
        assert "drifted" in {record.state for record in megatron_fp32_router.status()}
    finally:
        megatron_fp32_router.disable()
        delattr(place, f"{name}_renamed")
        setattr(place, name, kept)


def test_a_target_that_takes_other_parameters_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    everything_imported()

    def forward(self: Any, tokens: Any) -> Any: ...

    monkeypatch.setattr(sys.modules[HOME].TopKRouter, "forward", forward)
    with pytest.raises(megatron_fp32_router.TargetMissingError) as caught:
        megatron_fp32_router.enable()
    megatron_fp32_router.disable()
    assert "takes (self, tokens) where (self, input, …) was expected" in str(caught.value)


def test_what_a_patch_puts_in_place_is_made_once(build: Any, plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew in every call, a replacement would lose what it keeps, and a step would pay for it."""
    factory = next(patch.factory for patch in PATCHES if patch.id == "wrap-check")
    home, made = importlib.import_module(factory.__module__), []
    real = getattr(home, factory.__name__)
    monkeypatch.setattr(home, factory.__name__, lambda original: made.append(original) or real(original))
    megatron_fp32_router.disable()
    megatron_fp32_router.enable()
    build()
    build()
    assert len(made) == 1


def test_one_line_says_what_the_tensors_are(build: Any, plugin: Any, caplog: Any, capsys: Any, release: Any) -> None:
    with caplog.at_level(logging.INFO):
        build()
    lines = [
        r.getMessage() for r in caplog.records if r.name == "megatron_fp32_router" and "routers:" in r.getMessage()
    ]
    assert len(lines) == 1
    assert "routers:" not in capsys.readouterr().err  # logging is configured here; it has the line already
    for part in (str(release), "2 routers", "weight float32 x2", "expert_bias float32 x2", "protect=all"):
        assert part in lines[0]


def test_the_line_is_seen_in_a_program_that_never_configured_logging(
    build: Any, plugin: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    build()
    assert capsys.readouterr().err.count("2 routers:") == 1


def test_nothing_is_said_about_fp32_training(build: Any, plugin: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        build(precision="fp32")
    assert not [r for r in caplog.records if r.name == "megatron_fp32_router" and "routers:" in r.getMessage()]


def test_nothing_is_said_about_a_model_without_routers(router: Any, plugin: Any, caplog: Any) -> None:
    config = router().config
    with caplog.at_level(logging.DEBUG):
        sys.modules["megatron.core.transformer.module"].Float16Module(config, torch.nn.Linear(8, 8))  # type: ignore[attr-defined]
    assert not [r for r in caplog.records if r.name == "megatron_fp32_router"]


def test_a_reloaded_router_module_is_patched_again_before_a_model_is_wrapped(plugin: Any) -> None:
    everything_imported()
    module = sys.modules[HOME]
    saved = dict(vars(module))
    try:
        importlib.reload(module)
        assert not hasattr(module.Router.gating, "__wrapped__")
        # Any later import settles it; so does wrapping a model.
        sys.modules.pop("this", None)
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("this")
        assert {r.id: r.state for r in megatron_fp32_router.status()}["gating"] == "applied"
    finally:
        vars(module).update(saved)


def test_wrapping_a_model_settles_a_reload_without_a_further_import(plugin: Any, router: Any) -> None:
    config = router().config
    module = sys.modules[HOME]
    wrap = sys.modules["megatron.core.transformer.module"].Float16Module
    wrap(config, torch.nn.Linear(1, 1))  # whatever it imports on first use has been imported now
    saved = dict(vars(module))
    try:
        importlib.reload(module)
        wrap(config, torch.nn.Linear(1, 1))
        assert {r.id: r.state for r in megatron_fp32_router.status()}["gating"] == "applied"
    finally:
        vars(module).update(saved)


def test_the_doctor_foretells_the_states_that_the_patches_have(plugin: Any, request: Any, capsys: Any) -> None:
    everything_imported()
    tree = request.config.getoption("--megatron")
    assert cli.main(["doctor", "--json", "--megatron", tree]) == 0
    foretold = {patch["id"]: patch["state"] for patch in json.loads(capsys.readouterr().out)["patches"]}
    # Of a function that this Megatron does not have; status() has no state of its own for that.
    foretold = {name: "native" if state == "n/a" else state for name, state in foretold.items()}
    found = {record.id: record.state for record in megatron_fp32_router.status()}
    assert foretold.keys() == found.keys()
    # A module that the release lacks is waited for in a program; the doctor knows that it will not come.
    waiting = {name for name, state in found.items() if state == "armed"}
    assert {foretold[name] for name in waiting} <= {"armed", "native"}
    assert {name: foretold[name] for name in found.keys() - waiting} == {
        name: found[name] for name in found.keys() - waiting
    }
