"""Generation: requests in, decoded text and speech out, many tasks in one batch.

results = generate(model, [GenerationRequest("a", "tts", text="one two")])
"""

from speechlm_ext.generation.generate import generate
from speechlm_ext.generation.live.chat import Chat
from speechlm_ext.generation.live.listen import Listener, PartialText
from speechlm_ext.generation.live.stream import StreamChunk
from speechlm_ext.generation.requests.request import GenerationRequest, GenerationResult
from speechlm_ext.generation.requests.settings import SamplingSettings

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
