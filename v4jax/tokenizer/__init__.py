"""Text on both sides of the model: messages to prompt, text to ids, ids to text, text to a message.

Read `chat.py` first; it shows what a prompt is.

    chat.py            messages → prompt; effort prefixes of each generation of checkpoints
    markup.py          the pieces of a prompt: control tokens, and text that only spells them
    conversation.py    messages checked, merged and sorted into turns
    tools.py           the tools block; tool calls written and read
    stream.py          completion → message, whole (parse_completion) or streaming (StreamSplitter)
    events.py          the parts of a completion, and the message that they make up
    scanner.py         reads text that arrives in pieces
    tokenizer.py       the V4 tokenizer, load_tokenizer, StreamDecoder
    byte_tokenizer.py  the 320 ids of the small packaged configurations
    vocabulary.py      the control tokens, and what all vocabularies share
"""

from v4jax.tokenizer.byte_tokenizer import BYTE_VOCAB_SIZE, ByteTokenizer
from v4jax.tokenizer.chat import PROFILES, PromptProfile, encode_messages, render_messages
from v4jax.tokenizer.events import (
    ContentText,
    Departure,
    Done,
    Event,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    assemble,
)
from v4jax.tokenizer.markup import Piece, encode_pieces
from v4jax.tokenizer.stream import COMPLETION_CONTROLS, StreamSplitter, parse_completion
from v4jax.tokenizer.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from v4jax.tokenizer.tools import ToolCall, render_tool_calls, render_tools
from v4jax.tokenizer.vocabulary import Vocabulary

__all__ = [
    "BYTE_VOCAB_SIZE",
    "COMPLETION_CONTROLS",
    "PROFILES",
    "ByteTokenizer",
    "ContentText",
    "Departure",
    "Done",
    "Event",
    "Piece",
    "PromptProfile",
    "ReasoningText",
    "StreamDecoder",
    "StreamSplitter",
    "Tokenizer",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "Vocabulary",
    "assemble",
    "encode_messages",
    "encode_pieces",
    "load_tokenizer",
    "parse_completion",
    "render_messages",
    "render_tool_calls",
    "render_tools",
]
