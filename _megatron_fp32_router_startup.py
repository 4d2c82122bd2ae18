"""What the .pth and .start lines call at every interpreter start, so that MEGATRON_FP32_ROUTER=1 needs no code.

This module is outside the package because importing the package arms it, and it imports nothing at module level
because it runs before the program that it serves. The package is not imported at that point either: site is still
reading .pth files, wrapt may be importable only after a later one, and an error here would print a traceback and let
the program train unprotected. So `init()` only leaves a gate in the import system. At the first import of Megatron
the gate imports the package, and there an error stops the program.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


def init() -> None:
    """Leave a gate before Megatron if MEGATRON_FP32_ROUTER, or a variable of a similar name, is on. Never raises.

    May be called any number of times: site runs a .pth line twice in a virtual environment, and from Python
    3.15 on there may be both a .pth and a .start file that call it.
    """
    import sys

    if _asked_for() is None and not _near_misses():
        return
    if any(type(finder).__name__ == Gate.__name__ for finder in sys.meta_path):
        return
    gate = Gate()
    sys.meta_path.insert(0, gate)

    # Something that ran even earlier has imported Megatron. Its other parts still pass the gate; do not wait for them.
    if "megatron" in sys.modules:
        try:
            gate.tell() if _asked_for() is None else gate.open()
        except RuntimeError as error:
            print(error, file=sys.stderr)


def command() -> int:
    """The console script. Where the package cannot start, print why in one line, without a traceback, and return 2."""
    import sys

    try:
        from megatron_fp32_router.cli import main
    except Exception as error:
        print(f"megatron-fp32-router: {type(error).__name__}: {error}. To go on: {_remedy(error)}", file=sys.stderr)
        return 2
    return main()


class Gate:
    """A finder, first on sys.meta_path, that finds nothing: it arms the plugin before Megatron is looked for.

    While arming fails, every attempt to import Megatron fails. Once it has succeeded, the gate does nothing more.
    Where only a variable of a similar name is set, it warns once and lets Megatron through. It stays on
    sys.meta_path: taking it out would make every search that is under way, in this thread or another, skip the
    finder behind it.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._opening: set[int] = set()
        self._told = False

        # Python leaves the frames of the import system out of a traceback where the last of them is this function.
        # So a user sees the message below first.
        import _frozen_importlib

        leave_out = getattr(_frozen_importlib, "_call_with_frames_removed", None)
        if leave_out is not None:
            self.find_spec = type(self.tell)(leave_out, self.find_spec)  # type: ignore[method-assign, misc]

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Arm the plugin if *name* is Megatron or a part of it. Raises RuntimeError if that fails."""
        if self.is_open or (name != "megatron" and not name.startswith("megatron.")):
            return None

        import _thread

        # While it is imported below, the package may ask where Megatron is; that must not import it again. The
        # program may have changed the variable since: its present value counts.
        thread = _thread.get_ident()
        if thread in self._opening:
            return None
        if _asked_for() is None:
            self.tell()
            return None

        self._opening.add(thread)
        try:
            with _ImportLockReleased():
                self.open()
        finally:
            self._opening.discard(thread)

        # Arming has put wrapt's finder before this one, where the search that is under way does not look any
        # more. Search again, so that no hook is missed.
        from importlib.util import find_spec

        return find_spec(name)

    def tell(self) -> None:
        """Warn once of variables that may have been meant to turn the plugin on.

        Not at the start of the interpreter, since most programs do not import Megatron. Not in workers that
        multiprocessing starts, since the program that started them has warned. Of the ranks only the first one does.
        """
        import os
        import sys

        told, self._told = self._told, True
        if told or "megatron_fp32_router" in sys.modules or os.environ.get("RANK", "0") != "0":
            return
        # A forked worker has a parent; a spawned one, or the server that forks, imports the program before it does.
        process = sys.modules.get("multiprocessing.process")
        spawned = any(argument.startswith("from multiprocessing.") for argument in sys.orig_argv)
        if spawned or (process is not None and process.parent_process() is not None):
            return
        for name in _near_misses():
            print(
                f"megatron_fp32_router: {name}={os.environ[name]} turns nothing on: the variable is "
                "MEGATRON_FP32_ROUTER, and it is not set. Routers train unprotected, unless this program imports "
                "megatron_fp32_router. Set MEGATRON_FP32_ROUTER=1 if that was meant, or unset this one.",
                file=sys.stderr,
            )

    def open(self) -> None:
        """Import the package, which arms it. Raises RuntimeError, which says how to go on, if that fails."""
        from importlib import import_module

        # RuntimeError and not ImportError: programs catch the latter to find out whether Megatron is there,
        # and would go on without it, or without the plugin.
        try:
            import_module("megatron_fp32_router")
        except Exception as error:
            # An error of ours says what to do; its traceback would only hide that.
            ours = type(error).__module__ == "megatron_fp32_router.errors"
            raise RuntimeError(_explain(error)) from (None if ours else error)
        self.is_open = True


class _ImportLockReleased:
    """Lets other threads import while a finder does.

    The import system holds its global lock while it asks a finder. A thread that is importing something which
    the package needs too could not finish without that lock, and both would wait for ever.
    """

    def __enter__(self) -> None:
        import _imp

        self._depth = 0
        try:
            while True:
                _imp.release_lock()
                self._depth += 1
        except RuntimeError:
            pass  # It is released as often as this thread had acquired it.

    def __exit__(self, *_: object) -> None:
        import _imp

        for _level in range(self._depth):
            _imp.acquire_lock()


def _asked_for() -> "str | None":
    """The value of MEGATRON_FP32_ROUTER, or None where it is off. The package checks any other value."""
    import os

    value = os.environ.get("MEGATRON_FP32_ROUTER", "").strip()
    return None if value in ("", "0") else value


def _near_misses() -> "list[str]":
    """Variables that may have been meant to be MEGATRON_FP32_ROUTER; none where that one is 0."""
    import os

    if os.environ.get("MEGATRON_FP32_ROUTER", "").strip() == "0":
        return []
    return [
        name
        for name, value in os.environ.items()
        if all(word in name.upper() for word in ("MEGA", "FP32", "ROUT"))
        and not (name + "_").startswith("MEGATRON_FP32_ROUTER_")
        and value.strip() not in ("", "0")
    ]


def _remedy(error: Exception) -> str:
    import sys

    if not isinstance(error, ImportError):
        return "correct what the error names"
    if getattr(error, "name", None) == "megatron_fp32_router":
        return f"install it again: {sys.executable} -m pip install --force-reinstall megatron-fp32-router"
    return f"give this Python what is missing: {sys.executable} -m pip install 'wrapt>=1.17,<3' packaging"


def _explain(error: Exception) -> str:
    return (
        f"MEGATRON_FP32_ROUTER={_asked_for()} asks for megatron_fp32_router, which could not start:\n"
        f"    {type(error).__name__}: {error}\n"
        "Megatron is not imported, because it would train unprotected. Either\n"
        f"  - {_remedy(error)}; or\n"
        "  - unset MEGATRON_FP32_ROUTER to train without the plugin."
    )
