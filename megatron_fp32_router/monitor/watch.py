"""When the monitor looks, and what it does then.

A step is one call of finalize_model_grads. Between looks that costs a comparison of two integers: no hook is
installed, no tensor is touched, nothing waits for the device. For a look, forward hooks go onto the routers after the
step before it; the numbers stay on the device until the balance update is done and are then read in one go.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_fp32_router.errors import Fp32RouterError, MonitorError, UnprotectedRouterError
from megatron_fp32_router.monitor import look, sinks
from megatron_fp32_router.monitor.collect import Exchange, place
from megatron_fp32_router.monitor.sinks import Entry, Layer
from megatron_fp32_router.protect import balance
from megatron_fp32_router.registry import mismatch, registry, replaces
from megatron_fp32_router.say import rank, say
from megatron_fp32_router.settings import PREFIX


class Monitor:
    """The monitor of this process."""

    def __init__(self) -> None:
        self.step = 0
        self.entries: dict[Layer, Entry] = {}
        self._failed = False
        self._calls = 0
        self._offset: int | None = None
        self._listeners: dict[Layer, look.Listener] = {}
        self._memory: dict[Layer, look.Memory] = {}
        #: A look that waits for the balance update.
        self._open: dict[Layer, look.Seen] | None = None
        self._exchange = Exchange()

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
        """What the step is called in the file: a program that counts from 1 again after a restart goes on there."""
        if self._offset is None:
            self._offset = sinks.last_step(sinks.path()) if rank() == 0 else 0
        return self._offset + step

    # Steps -------------------------------------------------------------------------------------------------------

    def at_gradients(self, model: Any, config: Any) -> None:
        """Called once in every finalize_model_grads, when gradients are reduced and no bias has moved yet."""
        with self._own_failures():
            self._at_gradients(model, config)

    @contextlib.contextmanager
    def _own_failures(self) -> Iterator[None]:
        """A defect of the monitor is not to be taken for one of the training."""
        try:
            yield
        except Fp32RouterError:
            raise
        except Exception as error:
            self._failed = True
            try:
                mismatch(
                    MonitorError,
                    f"the monitor itself failed ({type(error).__name__}: {error}); the training is not to blame. "
                    f"Unset {PREFIX}_MONITOR to train without it, or set {PREFIX}_ON_MISMATCH=warn to go on without "
                    "it from here.",
                )
            except MonitorError as ours:
                raise ours from error

    def _at_gradients(self, model: Any, config: Any) -> None:
        if self._failed:
            return
        if look.capturing():
            say(logging.WARNING, f"{PREFIX}_MONITOR: steps inside a CUDA graph are not looked at", once=True)
            return
        interval = registry.settings.monitor
        if self._open is not None:
            # Somebody replaced the balance update, so nothing told us that it was done.
            for seen in self._open.values():
                frozen = getattr(seen.router, "frozen_expert_bias", False)
                seen.updated = seen.router.training and not frozen
            self._close()
        step = self._now()
        if step == self.step:
            return  # the same step computed again
        self.step = step
        looks = step % interval == 0
        if not looks and (step + 1) % interval:
            return
        layers = look.layers_of(model)
        if looks:
            self._look(layers, config)
        if (step + 1) % interval == 0:
            self._listeners = look.listen(layers, samples=place()[2])

    def _look(self, layers: dict[Layer, tuple[str, Any]], config: Any) -> None:
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.remove()
        samples = place()[2]
        self._open = {}
        with torch.no_grad():
            for layer, (name, router) in layers.items():
                memory = self._memory.setdefault(layer, look.Memory())
                self._open[layer] = look.see(name, router, listeners.get(layer), samples, memory)
        updates = getattr(config, "moe_router_enable_expert_bias", False)
        if not updates or all(seen.before_E is None for seen in self._open.values()):
            self._close()
        elif any(look.broken(seen) for seen in self._open.values()):
            # At once, without the numbers of the update: it may refuse to work on what it finds.
            self._close(reduce=False)
        else:
            balance.watchers.append(self._after_update)

    def _after_update(self, updated: list[tuple[list[Any], torch.Tensor]]) -> None:
        with self._own_failures():
            self._close_with(updated)

    def _close_with(self, updated: list[tuple[list[Any], torch.Tensor]]) -> None:
        rows = {
            id(router): row_E
            for routers, counts_LE in updated
            for router, row_E in zip(routers, counts_LE.unbind(), strict=True)
        }
        for seen in (self._open or {}).values():
            seen.reduced_E = rows.get(id(seen.router))
            seen.updated = id(seen.router) in rows
        self._close()

    def _close(self, reduce: bool = True) -> None:
        """The end of a look: read the numbers, hand them on, judge.

        `reduce`: sum up counts that nobody else has; only where every rank does so.
        """
        seen, self._open = self._open or {}, None
        if self._after_update in balance.watchers:
            balance.watchers.remove(self._after_update)
        with torch.no_grad():
            if reduce:
                look.reduce_the_rest(seen.values())
            look.read(seen.values())
        self._hand_on({layer: look.entry(each, self._memory[layer], self.step) for layer, each in seen.items()})

    def _hand_on(self, own: dict[Layer, Entry]) -> None:
        """Bring the layers together, write them, and say what is wrong with them."""
        first = rank() == 0
        together = dict(own)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            stage, stages, speaks = place()
            if speaks:
                self._exchange.post(self.step, stage, own)
            else:
                for layer, entry in own.items():
                    for text in entry["violations"]:
                        self._exchange.complain(layer, text)
            if first or any(writer is not None for writer in sinks.megatron_writers()):
                together = dict(self._exchange.collect(self.step, stages))
            if first:
                for layer, text in self._exchange.complaints():
                    together.setdefault(layer, {"metrics": {}, "violations": []})["violations"].append(text)
        self.entries = together = {layer: together[layer] for layer in sorted(together, key=sinks.order)}
        if first and not together:
            say(logging.WARNING, f"{PREFIX}_MONITOR is on, and there is no router to look at", once=True)
        step = self._label(self.step)
        if first:
            before = f", which goes on after step {self._offset}" if self._offset else ""
            where = f"the monitor looks every {registry.settings.monitor} steps and writes {sinks.path()}{before}"
            say(logging.INFO, where, threshold=registry.settings.log, once=True)
            sinks.append(step, together)
        sinks.publish(step, together)
        self._judge(together)

    def _judge(self, entries: dict[Layer, Entry]) -> None:
        found = [f"layer {layer}, {text}" for layer, entry in entries.items() for text in entry["violations"]]
        if found:
            listed = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
            mismatch(
                UnprotectedRouterError,
                f"the monitor found routers that are no longer in fp32: {listed}. Something has changed them since "
                f"the model was wrapped. {PREFIX}_ON_MISMATCH=warn trains on as it is.",
            )


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

    return _allreduce_conditional_embedding_grads
