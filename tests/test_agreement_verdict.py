"""The verdict on what ranks have said: far more ranks than a machine can start."""

from __future__ import annotations

import time

from statements import statements

from megatron_fp32_router.ranks.spans import ranks_text
from megatron_fp32_router.ranks.verdict import verdict_on


def test_a_verdict_on_4096_ranks_is_short_quick_and_names_ranks_and_hosts() -> None:
    said = statements(4096)
    assert verdict_on(range(4096), 4096, said, 1.0)["problems"] == []
    assert verdict_on(range(4096), 4096, said, 1.0)["line"].startswith(
        "all 4096 ranks on 512 hosts agree: 8192 routers with 24576 "
    )
    assert verdict_on(range(4096), 4096, said, 1.0)["line"].endswith(" replicas counted, 2 a rank")
    for rank in [7, *range(16, 24)]:
        del said[rank]
    said[4095]["says"]["the plugin's version"] = "1.1"
    started = time.monotonic()
    problems = verdict_on(range(4096), 4096, said, 300.0)["problems"]
    assert time.monotonic() - started < 1
    assert len(problems) == 3
    assert problems[0].startswith("nothing was heard for 300 s from rank 7 (host node0): ")
    assert "from ranks 16-23 (host unknown, no rank of that node runs the plugin): " in problems[1]
    assert problems[2].endswith("and 507 more), but '1.1' on rank 4095 (host node511)")


def test_what_only_some_ranks_mention_is_not_compared_and_a_late_optimizer_is_told() -> None:
    said = statements(4)
    said[3]["says"]["patch 'gating'"] = "applied"
    said[2]["at optimizer"] = False
    found = verdict_on(range(4), 4, said, 300.0)
    assert found["problems"] == []
    assert found["line"].endswith("; no optimizer yet on rank 2")
    assert found["says"]["patch 'gating'"] == "applied"
    said[2]["says"]["patch 'gating'"] = "displaced"
    assert verdict_on(range(4), 4, said, 300.0)["problems"] == [
        "patch 'gating' is 'displaced' on rank 2 (host node0), but 'applied' on rank 3 (host node0)"
    ]


def test_ranks_are_listed_as_spans() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([7, 0, 1, 2]) == "ranks 0-2, 7"
    assert ranks_text(list(range(0, 100, 2))).endswith("38 and 30 more spans")
