"""What the bodies of OpenAI's HTTP API mean, and what answers look like. No HTTP and no engine in here.

`parse` makes `Work` of a body, the caller has it done in whatever way, and `answer` makes the body of the answer of the
outputs. `Chunks` does the same piece by piece, for streams.
"""

from headrace.openai_api.answers import answer, error_body, status_of
from headrace.openai_api.bodies import parse, read_json
from headrace.openai_api.chunks import Chunks
from headrace.openai_api.work import Work

__all__ = ["Chunks", "Work", "answer", "error_body", "parse", "read_json", "status_of"]
