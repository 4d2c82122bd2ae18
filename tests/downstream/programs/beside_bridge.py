"""What Megatron-Bridge's recipes import and no optimizer needs. Import this before them, as a plain import."""

from __future__ import annotations

import os
import sys
import typing

from transformer_engine_stub import Finder

sys.path += os.environ["EMERGING_OPTIMIZERS"].split(os.pathsep)
# That package asks for Python 3.12, and only for this.
if not hasattr(typing, "override"):
    typing.override = lambda function: function  # type: ignore[attr-defined]

#: Data of videos, and diffusion models, which have no experts.
_BESIDE = ("data.energon", "models.qwen_vl.data.energon", "diffusion", "recipes.flux", "recipes.wan")
sys.meta_path.insert(0, Finder(*(f"megatron.bridge.{name}" for name in _BESIDE)))
sys.meta_path.append(Finder("modelopt", "nvidia_resiliency_ext"))
