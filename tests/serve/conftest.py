"""One live server for all tests of the HTTP API, and the same model offline to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cores
import pytest
from live import TEMPLATE, Live, serve

from headrace import LLM

one_thread = cores.one_thread


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """With a chat template that reads tools, and short patience for slow senders."""
    template: Path = tmp_path_factory.mktemp("serve") / "chat.jinja"
    template.write_text(TEMPLATE)
    with serve("--chat-template", str(template), "--body-timeout-s", "0.6", "--max-body-mib", "1") as live:
        yield live


@pytest.fixture(scope="package")
def offline(one_thread: None) -> LLM:
    """The model that the server serves."""
    return LLM(device="cpu", kv_cache_gib=0.1, max_num_batched_tokens=256)
