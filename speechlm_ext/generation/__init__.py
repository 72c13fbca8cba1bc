"""Generation: requests in, decoded text and speech out, many tasks in one batch.

results = generate(model, [GenerationRequest("a", "tts", text="one two")])
"""

from speechlm_ext.generation.chat import Chat
from speechlm_ext.generation.listen import Listener, PartialText
from speechlm_ext.generation.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.run import generate
from speechlm_ext.generation.settings import SamplingSettings
from speechlm_ext.generation.stream import StreamChunk

__all__ = [
    "Chat",
    "GenerationRequest",
    "GenerationResult",
    "Listener",
    "PartialText",
    "SamplingSettings",
    "StreamChunk",
    "generate",
]
