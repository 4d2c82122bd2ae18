"""The serving contracts: whole, quoted, and `scripts/contracts verify` sees a line that changed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fp32_router.serving.contracts import Engine, Entry, Model, Source, engines

ROOT = Path(__file__).resolve().parent.parent
ALL = [(engine, model) for engine in engines().values() for model in engine.models]


@pytest.mark.parametrize(("engine", "model"), ALL, ids=[f"{e.engine}-{m.architectures[0]}" for e, m in ALL])
def test_every_contract_is_whole(engine: Engine, model: Model) -> None:
    assert engine.versions
    assert engine.established
    assert engine.ties in ("lower", "torch.topk")
    assert model.function in ("sigmoid", "softmax", "logits")
    assert "weight" in model.tensors
    for kind, entries in model.tensors.items():
        assert any(not entry.where for entry in entries), kind
        for entry in entries:
            assert entry.dtype in ("float32", "bfloat16", "model", "logits")
            assert entry.source.quote
            assert entry.source.line or entry.source.function
    assert set(model.rests_on) <= set(engine.sources)


#: Architectures that every engine should have a contract for, and those that nobody has looked at yet.
WANTED = {
    "DeepseekV3ForCausalLM",
    "GlmMoeDsaForCausalLM",
    "Glm4MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "MiniMaxM2ForCausalLM",
    "KimiLinearForCausalLM",
    "BailingMoeV2ForCausalLM",
    "GptOssForCausalLM",
    "NemotronHForCausalLM",
}
MISSING = {
    # Only the file of DeepSeek-V3 has been read.
    "tensorrt-llm": WANTED - {"DeepseekV3ForCausalLM"},
    # It has no class of that name.
    "transformers": {"BailingMoeV2ForCausalLM"},
}


@pytest.mark.parametrize("engine", engines().values(), ids=engines())
def test_an_architecture_without_a_contract_is_a_known_gap(engine: Engine) -> None:
    found = {name for model in engine.models for name in model.architectures}
    assert found == WANTED - MISSING.get(engine.engine, set())


def test_every_source_is_one_that_some_contract_rests_on() -> None:
    for engine in engines().values():
        used = {name for model in engine.models for name in model.rests_on}
        cited = [e.source for m in engine.models for entries in m.tensors.values() for e in entries] + [engine.loading]
        unused = [name for name, source in engine.sources.items() if source not in cited and name not in used]
        assert set(unused) <= {"default"}, engine.engine


def verify(engine: str, folder: Path) -> tuple[int, str]:
    asked = f"{engine}=={engines()[engine].versions[0]}"
    command = [sys.executable, "scripts/contracts", "verify", asked, "--in", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["vllm", "sglang", "transformers"])
def test_a_changed_line_is_seen_and_its_contract_named(name: str, tmp_path: Path) -> None:
    # Files as the quotes have them: every quote at its line, and nothing else.
    files: dict[str, list[str]] = {}
    for source in engines()[name].sources.values():
        lines = files.setdefault(source.file, [])
        assert source.line is not None
        lines += [""] * (source.line - 1 + len(source.quote) - len(lines))
        lines[source.line - 1 : source.line - 1 + len(source.quote)] = source.quote
    for file, lines in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("\n".join(lines), encoding="utf-8")
    code, said = verify(name, tmp_path)
    assert code == 0, said

    source = engines()[name].model("Glm4MoeForCausalLM").tensors["expert_bias"][0].source
    path = tmp_path / source.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(source.quote[-2 if len(source.quote) > 1 else 0], "changed"), encoding="utf-8")
    code, said = verify(name, tmp_path)
    assert code == 1
    assert f"{name} (GLM-4.5, GLM-4.6): " in said
    assert "'changed'" in said

    path.write_text("\n" + before, encoding="utf-8")
    code, said = verify(name, tmp_path)
    assert (code, f"moved to line {(source.line or 0) + 1}" in said) == (1, True)

    path.unlink()
    code, said = verify(name, tmp_path)
    assert (code, f"no file {source.file}" in said) == (1, True)


def test_asking_imports_neither_numpy_nor_torch() -> None:
    program = (
        "import sys; from megatron_fp32_router.serving import contracts; contracts.engines(); "
        "print([name for name in ('numpy', 'torch', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_entry_asks_for_every_key_it_names() -> None:
    source = Source("a.py", ("x",), 1)
    entry = Entry("float32", source, {"a": 1, "b": None})
    assert entry.applies({"a": 1})
    assert not entry.applies({})
    assert not entry.applies({"a": 1, "b": 2})
    assert str(source) == "a.py:1"


def test_every_command_line_of_the_page_is_one_that_the_program_takes() -> None:
    from megatron_fp32_router import cli

    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    megatron-fp32-router (.*)$", page, re.MULTILINE)
    assert len(shown) == 4
    for line in shown:
        cli._parser(with_demo=False, with_serving=True).parse_args(line.split())
