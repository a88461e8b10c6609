"""A process of its own that starts an engine and draws one token: what `headrace bench gpu --workload start` times.

Arguments: a checkpoint directory, the prompt's length, and the engine's options as JSON. Prints when it had what, in
seconds of the machine's monotonic clock, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main(directory: str, prompt_tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """Start, generate one token, and say when the imports, the engine and the token were there."""
    from headrace import LLM, SamplingParams
    from headrace.bench.workload import fixed

    imported_s = time.monotonic()
    llm = LLM(directory, **options)
    built_s = time.monotonic()
    (work,) = fixed(1, prompt_tokens, 1, min(10_000, llm.engine.vocab_size))
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([work.prompt_ids], params)
    if len(output.outputs[0].token_ids) != 1:
        raise RuntimeError("no token came; the figure would mean nothing")
    marks = {"imported_s": imported_s, "built_s": built_s, "token_s": time.monotonic()}
    return {**marks, "stages": llm.engine.start_times_s}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))))
