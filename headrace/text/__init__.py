"""Text in, text out: tokenizers, chat templates, streaming detokenisation, stop strings. Never imports torch."""

from headrace.text.chat import ChatTemplates
from headrace.text.detokenize import IncrementalDetokenizer
from headrace.text.stop import StopMatcher
from headrace.text.tokenizer import Tokenizer

__all__ = ["ChatTemplates", "IncrementalDetokenizer", "StopMatcher", "Tokenizer"]
