"""When the monitor looks, and what it does then.

A step is one call of finalize_model_grads. A step without a look compares two integers: no hook is installed, no tensor
is touched, nothing waits for the device. Forward hooks go onto the routers one step before a look. Numbers stay on the
device until the balance update is done; then they are copied to the host together.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from megatron_fp32_router.balance import update
from megatron_fp32_router.gating.schedule import capturing
from megatron_fp32_router.log import rank, say
from megatron_fp32_router.monitor import look, outside, sinks
from megatron_fp32_router.monitor.sinks import Entry, Layer
from megatron_fp32_router.patching.owner import AT_UNDO
from megatron_fp32_router.patching.registry import registry, replaces
from megatron_fp32_router.ranks.places import is_alone
from megatron_fp32_router.settings import PREFIX

if TYPE_CHECKING:
    from megatron_fp32_router.monitor.collect import Exchange


class Monitor:
    """The monitor of this process."""

    def __init__(self) -> None:
        self.step = 0
        self.entries: dict[Layer, Entry] = {}
        self._ended = False
        self._calls = 0
        self._offset: int | None = None
        self._listeners: dict[Layer, look.Listener] = {}
        self._memory: dict[Layer, look.Memory] = {}
        #: A look that waits for the balance update.
        self._open: dict[Layer, look.Seen] | None = None
        #: Whether broken promises in `entries` have not been reported yet.
        self._unjudged = False
        #: (layer, name) of what was not finite at the last look.
        self._not_finite: set[tuple[Layer, str]] = set()
        #: See _others().
        self._exchange: Exchange | None = None

    # The clock ---------------------------------------------------------------------------------------------------

    def _now(self) -> int:
        """The step that ends here: megatron.training's own iteration, else the calls of finalize_model_grads."""
        arguments = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
        iteration = getattr(arguments, "curr_iteration", None)
        if iteration is not None:
            self._offset = 0
            return int(iteration) + 1
        self._calls += 1
        return self._calls

    def _label(self, step: int) -> int:
        """The step's number in the file. A restarted program that counts from 1 goes on after the file's last step."""
        if self._offset is None:
            self._offset = 0
            if rank() == 0 and os.path.exists(sinks.path()):  # also False when the folder cannot be read
                from megatron_fp32_router.monitor import restart

                self._offset = restart.last_step(sinks.path())
        return self._offset + step

    # Steps -------------------------------------------------------------------------------------------------------

    def at_gradients(self, model: Any, config: Any) -> None:
        """Called once in every finalize_model_grads, when gradients are reduced and no bias has moved yet."""
        if not self._ended:
            self._try(self._at_gradients, model, config)

    def _after_update(self, updated: list[tuple[list[Any], torch.Tensor]]) -> None:
        self._try(self._close_with, updated)

    def _try(self, part: Callable[..., None], *arguments: Any) -> None:
        """Do a part of the work. An error in it ends the monitor, not the training; violations are still reported."""
        try:
            part(*arguments)
        except Exception as error:  # any error: the training must go on
            from megatron_fp32_router.monitor import findings

            self._end(*findings.failure(error, lambda why: (others := self._others()) is not None and others.end(why)))
        unjudged, self._unjudged = self._unjudged, False
        if unjudged and any(entry["violations"] for entry in self.entries.values()):
            from megatron_fp32_router.monitor import findings

            findings.refuse(self.entries)

    def _end(self, why: str, speaker: int = 0) -> None:
        """Stop looking, and say why."""
        from megatron_fp32_router.monitor import findings

        self.stop()
        findings.say_the_end(why, speaker)

    def stop(self) -> None:
        """Look no more, and take off all hooks."""
        self._ended = True
        self._take_listeners()
        self._take_open()
        self._memory.clear()

    def _others(self) -> Exchange | None:
        """The exchange with the other ranks; None when there are none."""
        if self._exchange is None and not is_alone():
            from megatron_fp32_router.monitor.collect import Exchange

            self._exchange = Exchange()
        return self._exchange

    def _take_listeners(self) -> dict[Layer, look.Listener]:
        """Take the hooks off the routers, and return the listeners."""
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.remove()
        return listeners

    def _take_open(self) -> dict[Layer, look.Seen]:
        """Stop waiting for the balance update, and return what the open look has seen."""
        seen, self._open = self._open or {}, None
        if self._after_update in update.watchers:
            update.watchers.remove(self._after_update)
        return seen

    def _at_gradients(self, model: Any, config: Any) -> None:
        if capturing():
            say(logging.WARNING, f"{PREFIX}_MONITOR: steps inside a CUDA graph are not looked at", once=True)
            return
        interval = registry.settings.monitor
        if self._open is not None:
            # Somebody else's balance update ran, which does not call _after_update.
            for seen in self._open.values():
                frozen = getattr(seen.router, "frozen_expert_bias", False)
                seen.updated = seen.router.training and not frozen
            self._close()
        step = self._now()
        if step == self.step or self._ended:
            return  # the same step is computed again, or closing the last look ended the monitor
        self.step = step
        looks = step % interval == 0
        if not looks and (step + 1) % interval:
            return
        layers = look.layers_of(model)
        if looks:
            self._look(layers, config)
        if (step + 1) % interval == 0 and not self._ended:
            self._listeners = look.listen(layers, samples=self._place()[2])

    def _look(self, layers: dict[Layer, tuple[str, Any]], config: Any) -> None:
        listeners = self._take_listeners()
        others = self._others()
        if others is not None and others.has_ended():
            self._end(str(others.ended))
            return
        samples = self._place()[2]
        self._open = {}
        with torch.no_grad():
            for layer, (name, router) in layers.items():
                memory = self._memory.setdefault(layer, look.Memory())
                listener = listeners.get(layer)
                self._open[layer] = seen = look.see(name, router, listener, samples, memory)
                if registry.settings.monitor_record and samples and listener is not None and listener.sample:
                    from megatron_fp32_router.monitor import recording

                    seen.recorded = recording.copied(router, seen.before_E, listener.sample)
        if registry.settings.on_mismatch == "raise" and any(look.below(seen) for seen in self._open.values()):
            # Now, because the balance update will refuse these tensors. Other ranks may be in it already, waiting for
            # this one, so this rank must not wait for them.
            self._close(meet=False)
        elif getattr(config, "moe_router_enable_expert_bias", False):
            update.watchers.append(self._after_update)  # also on a rank without routers: all ranks close a look there
        else:
            self._close()

    def _close_with(self, updated: list[tuple[list[Any], torch.Tensor]]) -> None:
        rows = {
            id(router): row_E
            for routers, counts_LE in updated
            for router, row_E in zip(routers, counts_LE.unbind(), strict=True)
        }
        for seen in (self._open or {}).values():
            if id(seen.router) in rows:
                seen.counts_E, seen.reduced, seen.updated = rows[id(seen.router)], True, True
        self._close()

    def _close(self, meet: bool = True) -> None:
        """End a look: read the numbers, bring those of all ranks together, write them.

        Args:
            meet: wait for other ranks. Only where none of them waits for this one.
        """
        seen = self._take_open()
        with torch.no_grad():
            look.read(seen.values())
        self.entries = {layer: look.entry(each, self._memory[layer], self.step) for layer, each in seen.items()}
        self._unjudged = True
        if self._exchange is None:
            look.count_own(self.entries, seen)
        else:
            writes = rank() == 0 or sinks.writers() != (None, None)
            self.entries = self._exchange.bring_together(self.step, self.entries, seen, meet, writes)
        self.entries = {layer: self.entries[layer] for layer in sorted(self.entries, key=sinks.order)}
        self._hand_on()
        recorded = {layer: each.recorded for layer, each in seen.items() if each.recorded}
        if recorded:
            from megatron_fp32_router.monitor import recording

            recording.write(self._label(self.step), self._place()[0], recorded)
        if self._exchange is not None and self._exchange.ended is not None:
            self._end(self._exchange.ended)

    def _place(self) -> tuple[int, int, bool]:
        """See collect.place()."""
        if self._others() is None:
            return 0, 1, rank() == 0
        from megatron_fp32_router.monitor import collect

        return collect.place()

    def _hand_on(self) -> None:
        """Write the look, and warn of what is not finite."""
        step = self._label(self.step)
        if rank() == 0:
            if not self.entries:
                say(logging.WARNING, f"{PREFIX}_MONITOR is on, and there is no router to look at", once=True)
            before = f", which goes on after step {self._offset}" if self._offset else ""
            where = f"the monitor looks every {registry.settings.monitor} steps and writes {sinks.path()}{before}"
            written = sinks.append(step, self.entries)
            if written:
                say(logging.INFO, where, threshold=registry.settings.log, once=True)
            outside.hand_on(step, self.entries, file=written)
            not_finite = {
                (layer, name)
                for layer, entry in self.entries.items()
                for name, value in entry["metrics"].items()
                if value and name.startswith(sinks.NOT_FINITE)
            }
            if not_finite - self._not_finite:
                from megatron_fp32_router.monitor import findings

                findings.say_what_is_not_finite(step, self.entries, not_finite - self._not_finite)
            self._not_finite = not_finite
        if (theirs := sinks.writers()) != (None, None):
            from megatron_fp32_router.monitor import writers

            writers.publish(step, self.entries, *theirs)


#: The monitor that runs now; a new one each time the plugin is turned on.
current: Monitor = Monitor()


def look_at_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """_allreduce_conditional_embedding_grads: every finalize_model_grads calls it once, before biases move."""
    global current
    monitor = current = Monitor()

    @replaces(original)
    def _allreduce_conditional_embedding_grads(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, config, *args, **kwargs)
        if registry.settings.monitor:
            monitor.at_gradients(model, config)
        return result

    setattr(_allreduce_conditional_embedding_grads, AT_UNDO, monitor.stop)
    return _allreduce_conditional_embedding_grads
