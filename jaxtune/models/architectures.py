"""The classes that transformers loads, by ``model_type``, and how each calls the modules of its language model.

A class that holds a language model beside other things (images) calls the same modules otherwise than a text-only one.
What is written for a base, such as an adapter, has the names of the class that the base's ``config.json`` loads.
"""

from __future__ import annotations

import dataclasses

_BODY = "model."


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the modules of a language model are called, by the names that a text-only model has for them.

    Attributes:
        body: Stands in the place of the leading ``model.``.
        head: Stands before ``lm_head``.
    """

    body: str = _BODY
    head: str = ""

    def spell(self, name: str) -> str:
        """A text-only model's name in this layout."""
        return self.body + name.removeprefix(_BODY) if name.startswith(_BODY) else self.head + name

    def canonical(self, name: str) -> str | None:
        """A name of this layout as a text-only model has it; None if it is none."""
        if name.startswith(self.body):
            return _BODY + name.removeprefix(self.body)
        head = f"{self.head}lm_head"
        return name.removeprefix(self.head) if name == head or name.startswith(f"{head}.") else None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What transformers loads for one ``model_type`` of ``config.json``.

    Attributes:
        name: The class.
        family: Of its language model, a key of :data:`~jaxtune.models.families.FAMILIES`.
        part: The field of ``config.json`` that describes the language model, where it is one part among others.
        layouts: The names of the language model's modules: of the class, then of files that older releases wrote.
    """

    name: str
    family: str
    part: str | None = None
    layouts: tuple[Layout, ...] = (Layout(),)

    @property
    def layout(self) -> Layout:
        """The names that the class has."""
        return self.layouts[0]


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama"),
    "mistral": Architecture("MistralForCausalLM", "mistral"),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2"),
    "gemma3_text": Architecture("Gemma3ForCausalLM", "gemma3_text"),
    "gemma3": Architecture(
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        part="text_config",
        layouts=(Layout("model.language_model."), Layout("language_model.model.", "language_model.")),
    ),
}
"""Every ``model_type`` that can be loaded. That of a text-only model is also the name of its family."""


def architectures_of(family: str) -> tuple[Architecture, ...]:
    """The classes whose language model is of a family."""
    return tuple(each for each in ARCHITECTURES.values() if each.family == family)
