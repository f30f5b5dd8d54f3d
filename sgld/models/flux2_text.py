"""Text encoders of FLUX.2: a chat model, some of whose hidden states the transformer reads."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import attrs
import torch
from torch import nn

from sgld.errors import ModelError
from sgld.models.base import EncodedText, EncodeRequest
from sgld.models.components import ComponentLoader
from sgld.models.hf_components import text_encoder, tokenizer


@attrs.frozen
class Reader:
    """How a pipeline reads prompts: with the first layers of a chat model, whose hidden states it joins."""

    model: str  # class of transformers
    body: str  # the submodule with the layers
    layers: tuple[int, int, int]  # hidden states after so many layers
    system: str | None = None

    def messages(self, prompt: str) -> list[dict[str, Any]]:
        """Return the chat about a prompt."""
        if self.system is None:
            return [{"role": "user", "content": prompt}]
        texts = {"system": self.system, "user": prompt.replace("[IMG]", "")}  # which stands for a picture
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]

    def part(self, whole: Any) -> nn.Module:
        """Cut a chat model down to the layers that are needed, without the norm after its last."""
        body = whole.get_submodule(self.body)
        if len(body.layers) < self.layers[-1]:
            raise ModelError(f"text_encoder: has {len(body.layers)} layers; at least {self.layers[-1]} are needed")
        body.layers, body.norm = body.layers[: self.layers[-1]], nn.Identity()
        return body  # type: ignore[no-any-return]


SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
READERS = {
    "Flux2Pipeline": Reader("Mistral3ForConditionalGeneration", "model.language_model", (10, 20, 30), SYSTEM),
    "Flux2KleinPipeline": Reader("Qwen3ForCausalLM", "model", (9, 18, 27)),
}


@attrs.frozen(slots=False)
class ChatText:
    """Hidden states [1, L, C] of a chat model. Nothing masks the padding: the transformer was trained to see it."""

    tokenizer: Any
    module: Any
    reader: Reader
    component = "text_encoder"

    @classmethod
    def load(cls, parts: ComponentLoader, reader: Reader) -> ChatText:
        """Load text_encoder and tokenizer. Raises `ModelError` for a tokenizer that has no chat template."""
        import transformers

        words = tokenizer(parts, "tokenizer")
        if not words.chat_template:
            raise ModelError(f"{parts.path('tokenizer')}: has no chat template")
        model = getattr(transformers, reader.model)
        return cls(words, text_encoder(parts, cls.component, model, "layers", reader.part), reader)

    @property
    def width(self) -> int:
        """Return the channels of the text."""
        return len(self.reader.layers) * int(self.module.config.hidden_size)

    def tokenize(self, prompt: str) -> list[int]:
        """Return the token ids of the chat about a prompt."""
        starts = self.reader.system is None
        chat = self.tokenizer.apply_chat_template(
            self.reader.messages(prompt), tokenize=False, add_generation_prompt=starts, enable_thinking=False
        )
        return list(self.tokenizer(chat, add_special_tokens=starts).input_ids)

    @cached_property
    def chat_tokens(self) -> int:
        """Count the tokens of a chat without its prompt."""
        return len(self.tokenize(""))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        ids, length = self.tokenize(prompt), request.params.max_sequence_length
        if len(ids) > length:
            words = name.replace("_", " ")
            request.notes.append(f"{words} cut from {len(ids)} to {length} tokens, the most this request allows")
        padded = self.tokenizer.pad(
            {"input_ids": [ids[:length]]}, padding="max_length", max_length=length, return_tensors="pt"
        ).to(self.module.device)
        states = self.module(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return EncodedText(torch.cat([states[i] for i in self.reader.layers], -1), len(ids) - self.chat_tokens)
