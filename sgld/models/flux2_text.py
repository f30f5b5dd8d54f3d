"""Prompts of FLUX.2: a chat with a language model, some of whose hidden states are what the denoiser reads."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from sgld.errors import ModelError
from sgld.models.components import ComponentLoader
from sgld.models.hf_components import text_encoder, tokenizer


@attrs.frozen
class Reader:
    """How a pipeline reads prompts: with the first layers of a chat model, some of whose hidden states it joins."""

    model: str  # class of transformers
    body: str  # the submodule with the layers
    layers: tuple[int, int, int]  # hidden states after so many layers
    system: str | None = None

    def messages(self, prompt: str) -> list[dict[str, Any]]:
        """The chat."""
        if self.system is None:
            return [{"role": "user", "content": prompt}]
        texts = {"system": self.system, "user": prompt.replace("[IMG]", "")}  # which stands for a picture
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]

    def part(self, whole: Any) -> nn.Module:
        """Of the chat model the layers that are needed, without the norm after its last."""
        body: Any = whole.get_submodule(self.body)
        if len(body.layers) < self.layers[-1]:
            raise ModelError(f"text_encoder: has {len(body.layers)} layers; at least {self.layers[-1]} are needed")
        body.layers, body.norm = body.layers[: self.layers[-1]], nn.Identity()
        found: nn.Module = body
        return found


SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
READERS = {
    "Flux2Pipeline": Reader("Mistral3ForConditionalGeneration", "model.language_model", (10, 20, 30), SYSTEM),
    "Flux2KleinPipeline": Reader("Qwen3ForCausalLM", "model", (9, 18, 27)),
}


class PromptEncoder:
    """Prompts to hidden states of a chat model. Nothing masks the padding: it is part of what the denoiser sees."""

    def __init__(self, parts: ComponentLoader, reader: Reader):
        import transformers

        self.reader = reader
        self.tokenizer = tokenizer(parts, "tokenizer")
        if not self.tokenizer.chat_template:
            raise ModelError(f"{parts.path('tokenizer')}: has no chat template")
        self.model: Any = text_encoder(
            parts, "text_encoder", getattr(transformers, reader.model), "layers", part=reader.part
        )
        self.width = len(reader.layers) * self.model.config.hidden_size

    def encode(self, prompt: str, length: int) -> tuple[Tensor, str | None]:
        """Text [1, length, C], and a warning when the prompt was cut."""
        told = self.reader.messages(prompt)
        chat = self.tokenizer.apply_chat_template(
            told, tokenize=False, add_generation_prompt=self.reader.system is None, enable_thinking=False
        )
        tokenize = partial(self.tokenizer, chat, add_special_tokens=self.reader.system is None)
        count, note = len(tokenize()["input_ids"]), None
        if count > length:
            note = f"prompt cut from {count} to {length} tokens, the most this request allows"
        tokens = tokenize(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found = self.model(
            input_ids=tokens["input_ids"].to(self.model.device),
            attention_mask=tokens["attention_mask"].to(self.model.device),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return torch.cat([found[i] for i in self.reader.layers], -1), note

    def count(self, prompt: str) -> int:
        """Tokens of the prompt alone."""
        return len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
