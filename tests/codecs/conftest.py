"""One thread for all tests."""

from __future__ import annotations

import cores

one_thread = cores.one_thread
