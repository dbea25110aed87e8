"""What an encoder is made of and starts from: one model, or one for each stream."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from fastssl.section import Section

from .streams import by_stream


class ModelConfig(Section):
    name: str = Field(
        "vit_small_patch16_224", description="Any timm model; masked methods need a vit_*."
    )
    kwargs: dict[str, Any] = Field({}, description="Arguments of the timm model (depth=4 ...).")
    weights: str = Field(
        "none",
        description="What it starts from: none, timm (its own), a file, also as DINO, DINOv2, "
        "DINOv3, MAE and I-JEPA publish theirs, the .index.json of several, or a run's directory, "
        "its primary encoder or another: RUN:NAME.",
    )
    partial: bool = Field(
        False, description="Start from weights that fill a part of the model, or are used in part."
    )
    frozen: bool = Field(
        False,
        description="It stays as model.weights has it, in evaluation mode.",
    )

    @model_validator(mode="after")
    def _frozen_weights_are_known(self) -> "ModelConfig":
        if self.frozen and self.weights == "none" and self.name != "given":
            raise ValueError(
                "model.frozen=true would keep random weights: give model.weights=timm, a file's "
                "path or a run's directory"
            )
        if self.frozen and self.partial:
            raise ValueError("model.frozen=true with model.partial=true would keep random weights")
        return self


class TeacherConfig(Section):
    """The frozen network that a method of `has_teacher` learns from."""

    name: str = Field("auto", description="Any timm model; auto: of weights=RUN, that run's own.")
    kwargs: dict[str, Any] = Field({}, description="Arguments of the timm model.")
    weights: str = Field(
        "none", description="What it holds, as model.weights: timm, a file, RUN or RUN:NAME."
    )


KINDS = ("of one", "of each stream")  # as pydantic tells the two apart


def _kind(value: Any) -> str:
    return KINDS[by_stream(value, ModelConfig.model_fields)]


Models = Annotated[
    Annotated[ModelConfig, Tag(KINDS[0])] | Annotated[dict[str, ModelConfig], Tag(KINDS[1])],
    Discriminator(_kind),
]
