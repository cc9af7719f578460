"""Text out of a model: an engine that batches continuously, sampling, and generation for a list of prompts."""

from kwaicoder_jax.inference import ahead
from kwaicoder_jax.inference.answers import Answers, Piece
from kwaicoder_jax.inference.engine import Engine
from kwaicoder_jax.inference.generation import generate
from kwaicoder_jax.inference.programs import Placement
from kwaicoder_jax.inference.requests import Generation, Request, Token
from kwaicoder_jax.inference.sampling import Settings, choose_tokens, highest, nucleus, row_keys
from kwaicoder_jax.inference.service import Full, Service, Ticket, Unavailable
from kwaicoder_jax.inference.text import Detokenizer, StopStrings, TextStream
from kwaicoder_jax.inference.weights import Form, Weights, prepare

__all__ = [
    "Answers",
    "Detokenizer",
    "Engine",
    "Form",
    "Full",
    "Generation",
    "Piece",
    "Placement",
    "Request",
    "Service",
    "Settings",
    "StopStrings",
    "TextStream",
    "Ticket",
    "Token",
    "Unavailable",
    "Weights",
    "ahead",
    "choose_tokens",
    "generate",
    "highest",
    "nucleus",
    "prepare",
    "row_keys",
]
