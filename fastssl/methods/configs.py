"""What each method can be told, and the methods by name.

Apart from the methods, so that a configuration is read without their encoders (timm): a method is
imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from fastssl.registry import OneOf, Registry
from fastssl.schedules.config import (
    CosineSchedule,
    LinearSchedule,
    Moves,
    Moving,
    ScheduleConfig,
    Within,
    at,
)

if TYPE_CHECKING:
    from .base import Method

Ratio = Annotated[Moving, Within()]
Momentum = Annotated[Moving, Within(0, 1)]
Temperature = Annotated[Moving, Within(1e-3)]
Kind = Literal["random", "block", "grid", "noise"]


def ratio_field(default: float) -> Ratio:
    """The field `mask_ratio` of a method's options."""
    return Field(  # type: ignore[return-value]
        default,
        description="Share of patches hidden; a pair: at first and at the end, linear between.",
    )


def kind_field(default: Kind = "random") -> Kind:
    """The field `masking` of a method's options."""
    return Field(  # type: ignore[return-value]
        default, description="Which are hidden: single patches, blocks, a grid, filtered noise."
    )


class MethodConfig(Moves):
    """Base of the methods' options.  A subclass has `name`, a Literal with itself as default."""

    if TYPE_CHECKING:
        name: Any

    @property
    def decoder(self) -> dict[str, int]:
        """Width, depth and heads of the decoder, where there is one, as its class takes them."""
        options = {"width": "dim", "depth": "depth", "heads": "heads"}
        return {name: getattr(self, f"decoder_{key}") for name, key in options.items()}

    def fitted(self, items: int, classes: int | None) -> "MethodConfig":
        """These options with what they leave to the training data: how many, of how many classes.

        classes: None where there are no labels.  Raises ValueError for data that do not serve.
        """
        return self


class SimCLRConfig(MethodConfig):
    name: Literal["simclr"] = "simclr"
    temperature: float = Field(0.1, gt=0, description="Divides the cosine similarities.")
    hidden_dim: int = Field(2048, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(128, ge=1, description="Width of the embeddings the loss compares.")
    layers: int = Field(2, ge=1, description="Linear layers of the projection head.")


class GroCoConfig(SimCLRConfig):
    name: Literal["groco"] = "groco"  # type: ignore[assignment]
    negatives: int = Field(10, ge=1, description="Most alike views of others that are sorted.")
    steepness: float = Field(1.0, gt=0, description="Of an exchange: greater is harder.")


class ISogCLRConfig(SimCLRConfig):
    name: Literal["isogclr"] = "isogclr"  # type: ignore[assignment]
    temperature: float = Field(0.1, gt=0, description="Of each sample at first.")
    temperature_range: tuple[float, float] = Field(
        (0.05, 1.0), description="Least and greatest temperature of a sample."
    )
    rho: float = Field(0.4, ge=0, description="Greater: higher temperatures.")
    eta: float = Field(0.03, ge=0, description="Learning rate of the temperatures.")
    size: int | None = Field(
        None, ge=1, description="Samples that have a temperature; null: the training data's."
    )

    @model_validator(mode="after")
    def _check_temperatures(self) -> "ISogCLRConfig":
        low, high = self.temperature_range
        if not 0 < low <= self.temperature <= high < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must lie in temperature_range, above 0, "
                f"got {low} to {high}"
            )
        return self

    def fitted(self, items: int, classes: int | None) -> "MethodConfig":
        if self.size is None:
            return self.model_copy(update={"size": items})
        if self.size < items:
            raise ValueError(
                f"method.size={self.size} leaves some of the {items} training samples of this "
                "data.source without a temperature: give method.size=null"
            )
        return self


class MatryoshkaConfig(MethodConfig):
    name: Literal["matryoshka"] = "matryoshka"
    temperature: float = Field(0.1, gt=0, description="Divides the cosine similarities.")
    dims: tuple[int, ...] = Field(
        (), description="Prefixes of the features, rising; none: 8, 16, 32 ... and all of them."
    )
    weights: tuple[float, ...] = Field((), description="Of each prefix's loss; none: all 1.")


class DCLConfig(SimCLRConfig):
    name: Literal["dcl"] = "dcl"  # type: ignore[assignment]
    weighted: bool = Field(False, description="Weigh positives by how unlike they are (DCLW).")


class MoCoV3Config(MethodConfig):
    name: Literal["mocov3"] = "mocov3"
    temperature: float = Field(0.2, gt=0, description="Divides the cosine similarities.")
    momentum: Momentum = Field(
        CosineSchedule(start=0.99, end=1.0), description="Of the teacher; a number: at first."
    )
    hidden_dim: int = Field(4096, ge=1, description="Width inside both heads.")
    projection_dim: int = Field(256, ge=1, description="Width of the embeddings compared.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")


class BYOLConfig(MethodConfig):
    name: Literal["byol"] = "byol"
    momentum: Momentum = Field(
        CosineSchedule(start=0.996, end=1.0), description="Of the teacher; a number: at first."
    )
    hidden_dim: int = Field(4096, ge=1, description="Width inside the heads.")
    projection_dim: int = Field(256, ge=1, description="Width of the embeddings compared.")
    layers: int = Field(2, ge=1, description="Linear layers of the projection head.")


class DirectPredConfig(BYOLConfig):
    name: Literal["directpred"] = "directpred"  # type: ignore[assignment]
    rho: float = Field(0.3, ge=0, lt=1, description="Of the correlation that stays at a step.")
    eps: float = Field(0.01, ge=0, description="Added to the predictor's eigenvalues, at most 1.")
    every: int = Field(1, ge=1, description="Steps from one predictor to the next.")


class SimSiamConfig(MethodConfig):
    name: Literal["simsiam"] = "simsiam"
    projection_dim: int = Field(
        2048, ge=1, description="Width of the embeddings compared, and inside the projection head."
    )
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")
    prediction_hidden_dim: int = Field(512, ge=1, description="Width inside the prediction head.")


class MoCoV2Config(MethodConfig):
    name: Literal["mocov2"] = "mocov2"
    temperature: float = Field(0.2, gt=0, description="Divides the cosine similarities.")
    momentum: Momentum = Field(0.999, description="Of the teacher.")
    queue_size: int = Field(65536, ge=1, description="Past keys kept as negatives.")
    hidden_dim: int = Field(2048, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(128, ge=1, description="Width of the embeddings compared.")


Assignment = Literal["center", "sinkhorn"]


class HeadConfig(MethodConfig):
    """Of a teacher and a student that score prototypes."""

    prototypes: int = Field(65536, ge=2, description="That the heads score, K.")
    hidden_dim: int = Field(2048, ge=1, description="Width inside the heads.")
    bottleneck_dim: int = Field(256, ge=1, description="Width of what prototypes are scored by.")
    layers: int = Field(3, ge=1, description="Linear layers of the heads, before the prototypes.")
    last_layer: Literal["normed", "scaled", "plain"] = Field(
        "normed", description="Prototypes of length 1, of a length that is learned, or free ones."
    )
    student_temp: float = Field(0.1, gt=0, description="Divides the student's scores.")
    teacher_temp: Temperature = Field(
        LinearSchedule(start=0.04, end=0.07, until=0.3),
        description="Divides the teacher's scores; a number: at first.",
    )
    momentum: Momentum = Field(
        CosineSchedule(start=0.996, end=1.0), description="Of the teacher; a number: at first."
    )
    center_momentum: float = Field(0.9, ge=0, le=1, description="Of the center of its scores.")
    assignment: Assignment = Field(
        "center", description="Its scores are centered, or by Sinkhorn: all prototypes used alike."
    )

    def head(self, dim: int) -> dict[str, Any]:
        """What DINOHead is made of, for features of width `dim`."""
        return {
            **{"dim": dim, "prototypes": self.prototypes, "hidden": self.hidden_dim},
            **{"bottleneck": self.bottleneck_dim, "layers": self.layers, "last": self.last_layer},
        }


class DINOConfig(HeadConfig):
    name: Literal["dino"] = "dino"


class DINOv2Config(HeadConfig):
    name: Literal["dinov2"] = "dinov2"
    last_layer: Literal["normed", "scaled", "plain"] = Field(
        "scaled", description="Prototypes of length 1, of a length that is learned, or free ones."
    )
    momentum: Momentum = Field(
        CosineSchedule(start=0.992, end=1.0), description="Of the teacher; a number: at first."
    )
    patch_prototypes: int | None = Field(
        None, ge=2, description="Of a head of the patches' own; null: the views' head is theirs."
    )
    patch_bottleneck_dim: int | None = Field(
        None, ge=1, description="Of that head; null: bottleneck_dim."
    )
    dino_weight: float = Field(1.0, ge=0, description="Of the views' cross-entropy.")
    ibot_weight: float = Field(1.0, ge=0, description="Of the hidden patches' cross-entropy.")
    koleo_weight: float = Field(0.1, ge=0, description="Of the spread of the global views.")
    mask_share: float = Field(0.5, gt=0, le=1, description="Of the global views have masks.")
    mask_range: tuple[float, float] = Field(
        (0.1, 0.5), description="Share of a masked view's patches hidden: uniform between the two."
    )
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="Share of samples that a block of the student's leaves out."
    )

    @model_validator(mode="after")
    def _masks_some(self) -> "DINOv2Config":
        low, high = self.mask_range
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_range={self.mask_range} must be 0 < low <= high < 1")
        if self.patch_bottleneck_dim is not None and self.patch_prototypes is None:
            raise ValueError(
                f"patch_bottleneck_dim={self.patch_bottleneck_dim} is of a head of the patches' "
                "own: give patch_prototypes"
            )
        return self


class IBOTConfig(DINOv2Config):
    name: Literal["ibot"] = "ibot"  # type: ignore[assignment]
    prototypes: int = Field(8192, ge=2, description="That the heads score, K.")
    last_layer: Literal["normed", "scaled", "plain"] = Field(
        "normed", description="Prototypes of length 1, of a length that is learned, or free ones."
    )
    momentum: Momentum = Field(
        CosineSchedule(start=0.996, end=1.0), description="Of the teacher; a number: at first."
    )
    koleo_weight: float = Field(0.0, ge=0, description="Of the spread of the global views.")


class DINOv3Config(DINOv2Config):
    name: Literal["dinov3"] = "dinov3"  # type: ignore[assignment]
    last_layer: Literal["normed", "scaled", "plain"] = Field(
        "plain", description="Prototypes of length 1, of a length that is learned, or free ones."
    )
    assignment: Assignment = Field(
        "sinkhorn", description="Scores are centered, or by Sinkhorn: all prototypes used alike."
    )
    patch_prototypes: int | None = Field(
        65536, ge=2, description="Of a head of the patches' own; null: the views' head is theirs."
    )
    local_weight: Annotated[Moving, Within(0)] = Field(
        1.0, description="Of the local views' part of the views' cross-entropy."
    )
    gram_weight: Annotated[Moving, Within(0)] = Field(
        0.0, description="Of the distance of the patches' similarities from a Gram teacher's."
    )
    gram_updates: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (), description="Shares of the run at which the Gram teacher becomes what the teacher is."
    )

    @property
    def has_gram(self) -> bool:
        """Whether the patches' similarities are ever anchored."""
        return isinstance(self.gram_weight, ScheduleConfig) or self.gram_weight > 0

    @model_validator(mode="after")
    def _updates_a_gram_teacher(self) -> "DINOv3Config":
        if self.gram_updates and not self.has_gram:
            raise ValueError(
                f"gram_updates={self.gram_updates} with gram_weight=0: there is no Gram teacher"
            )
        return self


class MoCHiConfig(MethodConfig):
    name: Literal["mochi"] = "mochi"
    temperature: float = Field(0.2, gt=0, description="Divides the cosine similarities.")
    momentum: Momentum = Field(0.999, description="Of the teacher.")
    queue_size: int = Field(65536, ge=1, description="Past keys kept as negatives.")
    top_n: int = Field(1024, ge=1, description="Nearest keys of the queue that are mixed.")
    synthetic: int = Field(1024, ge=0, description="Negatives mixed of two keys; 0: none.")
    from_query: int = Field(128, ge=0, description="Negatives mixed of the query and a key.")
    hidden_dim: int = Field(2048, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(128, ge=1, description="Width of the embeddings compared.")


class NNCLRConfig(MethodConfig):
    name: Literal["nnclr"] = "nnclr"
    temperature: float = Field(0.1, gt=0, description="Divides the cosine similarities.")
    queue_size: int = Field(65536, ge=1, description="Past projections kept as neighbors.")
    hidden_dim: int = Field(2048, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(256, ge=1, description="Width of the embeddings compared.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")
    prediction_hidden_dim: int = Field(4096, ge=1, description="Width inside the prediction head.")


class SwAVConfig(MethodConfig):
    name: Literal["swav"] = "swav"
    prototypes: int = Field(3000, ge=2, description="Directions that views are assigned to.")
    temperature: float = Field(0.1, gt=0, description="Divides the scores of a prediction.")
    epsilon: float = Field(0.05, gt=0, description="Divides the scores of an assignment.")
    sinkhorn_iterations: int = Field(3, ge=1, description="Of an assignment.")
    queue_size: int = Field(
        0, ge=0, description="Past embeddings of each assigned view that join its assignment."
    )
    queue_from: float = Field(
        0.0, ge=0, lt=1, description="Share of training after which they do, once there are enough."
    )
    hidden_dim: int = Field(2048, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(128, ge=1, description="Width of the embeddings assigned.")


class MSNConfig(MethodConfig):
    name: Literal["msn"] = "msn"
    mask_ratio: float = Field(
        0.15, ge=0, lt=1, description="Share of patches hidden of each anchor of the largest size."
    )
    masking: Kind = kind_field()
    prototypes: int = Field(1024, ge=2, description="Directions that views are assigned to.")
    temperature: float = Field(0.1, gt=0, description="Divides the cosines of an anchor.")
    sharpening: float = Field(0.25, gt=0, description="Divides the target's cosines besides.")
    sinkhorn_iterations: int = Field(3, ge=0, description="Of the targets' assignment; 0: none.")
    regularization: float = Field(
        1.0, ge=0, description="Weight of how unevenly the mean anchor uses the prototypes."
    )
    momentum: Momentum = Field(
        LinearSchedule(start=0.996, end=1.0), description="Of the teacher; a number: at first."
    )
    hidden_dim: int = Field(2048, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(256, ge=1, description="Width of the embeddings assigned.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")


class CLIPConfig(MethodConfig):
    name: Literal["clip"] = "clip"
    captions: int = Field(10, ge=1, description="Captions known: at least as many as classes.")
    temperature: float = Field(0.07, gt=0, description="Of the learned scale, at first.")
    projection_dim: int = Field(128, ge=1, description="Width of the embeddings compared.")
    hidden_dim: int = Field(256, ge=1, description="Width inside the caption tower.")

    def fitted(self, items: int, classes: int | None) -> "MethodConfig":
        if classes is None:
            raise ValueError(
                "method.name=clip captions images with their classes, and this data.source has "
                "no labels: give it one with labels (of a folder, one folder a class)"
            )
        if classes > self.captions:
            raise ValueError(
                f"method.captions={self.captions} leaves some of the {classes} classes of "
                f"this data.source without a caption: give method.captions={classes}"
            )
        return self


class SLAConfig(MethodConfig):
    name: Literal["sla"] = "sla"
    classes: int = Field(10, ge=2, description="Classes known: at least as many as there are.")
    distill: bool = Field(False, description="Train a head that needs no turned images (SLA+SD).")
    beta: float = Field(1.0, ge=0, description="Weight of that head's own cross-entropy.")

    def fitted(self, items: int, classes: int | None) -> "MethodConfig":
        if classes is None:
            raise ValueError(
                "method.name=sla augments the images' labels, and this data.source has no "
                "labels: give it one with labels (of a folder, one folder a class)"
            )
        if classes > self.classes:
            raise ValueError(
                f"method.classes={self.classes} is less than the {classes} classes of this "
                f"data.source: give method.classes={classes}"
            )
        return self


class CMCConfig(MethodConfig):
    name: Literal["cmc"] = "cmc"
    temperature: float = Field(0.07, gt=0, description="Divides the cosine similarities.")
    hidden_dim: int = Field(2048, ge=1, description="Width inside each stream's projection head.")
    projection_dim: int = Field(128, ge=1, description="Width of the embeddings compared.")
    layers: int = Field(2, ge=1, description="Linear layers of each projection head.")


class BarlowTwinsConfig(MethodConfig):
    name: Literal["barlow_twins"] = "barlow_twins"
    lambda_param: float = Field(5e-3, gt=0, description="Weight of the off-diagonal terms.")
    hidden_dim: int = Field(8192, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(8192, ge=1, description="Width D of the embeddings correlated.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")


class MixedBarlowTwinsConfig(BarlowTwinsConfig):
    name: Literal["mixed_barlow_twins"] = "mixed_barlow_twins"  # pyright: ignore[reportIncompatibleVariableOverride]
    mixup: float = Field(5.0, ge=0, description="Weight of the mixture's terms, beside lambda.")


class VICRegConfig(MethodConfig):
    name: Literal["vicreg"] = "vicreg"
    lambda_param: float = Field(25.0, ge=0, description="Weight of the views' agreement.")
    mu_param: float = Field(25.0, ge=0, description="Weight of the variances' hinge.")
    nu_param: float = Field(1.0, ge=0, description="Weight of the squared covariances.")
    hidden_dim: int = Field(8192, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(8192, ge=1, description="Width D of the embeddings.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")


class SSLEYConfig(MethodConfig):
    name: Literal["ssl_ey"] = "ssl_ey"
    hidden_dim: int = Field(8192, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(8192, ge=1, description="Width D of the embeddings.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")


Followed = Literal["rotation", "geometry", "color"]


class SIEConfig(MethodConfig):
    name: Literal["sie"] = "sie"
    follows: tuple[Followed, ...] = Field(
        ("rotation",), min_length=1, description="What the equivariant part is to follow."
    )
    share: float = Field(0.5, gt=0, lt=1, description="Of the features that are equivariant.")
    lambda_inv: float = Field(10.0, ge=0, description="Weight of the invariant parts' agreement.")
    lambda_equi: float = Field(4.5, ge=0, description="Weight of the prediction's error.")
    lambda_var: float = Field(10.0, ge=0, description="Weight of the variances' hinge.")
    lambda_cov: float = Field(1.0, ge=0, description="Weight of the squared covariances.")
    hidden_dim: int = Field(2048, ge=2, description="Width inside both projection heads together.")
    projection_dim: int = Field(2048, ge=2, description="Width D of the whole embeddings.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection heads.")
    reader: tuple[int, ...] = Field(
        (), description="Hidden widths of the network that reads the relation; none: linear."
    )


class GlobalLocalConfig(MethodConfig):
    name: Literal["global_local"] = "global_local"
    temperature: float = Field(0.1, gt=0, description="Divides the cosine similarities.")
    local_weight: float = Field(1.0, ge=0, description="Weight of the contrast between places.")
    by_label: bool = Field(False, description="Images of one label attract as well.")
    upsampled: int = Field(2, ge=0, le=6, description="How often the local map's side is doubled.")
    local_dim: int = Field(64, ge=1, description="Width inside the decoder of the local map.")
    hidden_dim: int = Field(1024, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(128, ge=1, description="Width of the embeddings compared.")

    def fitted(self, items: int, classes: int | None) -> "MethodConfig":
        if self.by_label and classes is None:
            raise ValueError(
                "method.by_label=true draws images of one label together, and this data.source "
                "has no labels: give method.by_label=false"
            )
        return self


class MAEConfig(MethodConfig):
    name: Literal["mae"] = "mae"
    mask_ratio: Ratio = ratio_field(0.75)
    masking: Kind = kind_field()
    norm_pix: bool = Field(True, description="Predict each patch normalized by its own moments.")
    decoder_dim: int = Field(512, ge=1, description="Width of the decoder.")
    decoder_depth: int = Field(8, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(16, ge=1, description="Attention heads of the decoder.")


class SimMIMConfig(MethodConfig):
    name: Literal["simmim"] = "simmim"
    mask_ratio: Ratio = ratio_field(0.6)
    unit: int = Field(2, ge=1, description="Patches are hidden in squares of so many a side.")
    error: Literal["l1", "l2", "smooth_l1"] = Field("l1", description="Of a pixel's prediction.")


class GMMLConfig(MethodConfig):
    name: Literal["gmml"] = "gmml"
    mask_ratio: Ratio = ratio_field(0.7)
    groups: int = Field(4, ge=1, description="Places that the corrupted groups grow from.")
    corruption: Literal["noise", "zeros", "swap", "mixed"] = Field(
        "mixed", description="What replaces a patch: swap takes another image's, mixed draws."
    )
    everywhere: bool = Field(False, description="Take the error over all patches, not the hidden.")
    error: Literal["l1", "l2", "smooth_l1"] = Field("l1", description="Of a pixel's prediction.")


class SiTConfig(GMMLConfig):
    name: Literal["sit"] = "sit"  # type: ignore[assignment]
    everywhere: bool = Field(True, description="Restore all patches, not the replaced ones alone.")
    temperature: float = Field(0.5, gt=0, description="Divides the cosine similarities.")
    projection_dim: int = Field(512, ge=1, description="Width of the embeddings compared.")


class CAEConfig(MAEConfig):
    name: Literal["cae"] = "cae"  # type: ignore[assignment]
    mask_ratio: Ratio = ratio_field(0.5)
    masking: Kind = kind_field("block")
    alignment: float = Field(2.0, ge=0, description="Weight of the latents' squared error.")
    regressor_depth: int = Field(4, ge=1, description="Blocks of the regressor.")
    decoder_dim: int = Field(768, ge=1, description="Width of regressor and decoder.")
    decoder_depth: int = Field(4, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(12, ge=1, description="Attention heads of both.")


class SelfieConfig(MethodConfig):
    name: Literal["selfie"] = "selfie"
    mask_ratio: Ratio = ratio_field(0.25)
    masking: Kind = kind_field()
    hidden_dim: int = Field(2048, ge=1, description="Width inside the MLPs of place and patch.")


class CropMAEConfig(MethodConfig):
    name: Literal["cropmae"] = "cropmae"
    mask_ratio: Ratio = ratio_field(0.985)
    norm_pix: bool = Field(True, description="Predict each patch normalized by its own moments.")
    decoder_dim: int = Field(256, ge=1, description="Width of the decoder.")
    decoder_depth: int = Field(4, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(8, ge=1, description="Attention heads of the decoder.")


class IJEPAConfig(MethodConfig):
    name: Literal["ijepa"] = "ijepa"
    context: float = Field(0.3, gt=0, lt=1, description="Share of patches the student reads.")
    target: float = Field(0.175, gt=0, lt=1, description="Share of patches in a target block.")
    blocks: int = Field(4, ge=1, description="Target blocks of an image.")
    momentum: Momentum = Field(
        LinearSchedule(start=0.996, end=1.0), description="Of the teacher; a number: at first."
    )
    error: Literal["smooth_l1", "l2"] = Field("smooth_l1", description="Of a predicted feature.")
    decoder_dim: int = Field(384, ge=1, description="Width of the predictor.")
    decoder_depth: int = Field(6, ge=1, description="Blocks of the predictor.")
    decoder_heads: int = Field(12, ge=1, description="Attention heads of the predictor.")


class Data2VecConfig(MethodConfig):
    name: Literal["data2vec"] = "data2vec"
    mask_ratio: Ratio = ratio_field(0.8)
    masking: Kind = kind_field()
    masks: int = Field(1, ge=1, description="Masks of an image, for one pass of the teacher.")
    layers: int = Field(10, ge=1, description="Of the teacher's last blocks, so many averaged.")
    momentum: Momentum = Field(
        LinearSchedule(start=0.9998, end=0.99999, until=0.3),
        description="Of the teacher; a number: at first.",
    )
    error: Literal["l2", "smooth_l1"] = Field("l2", description="Of a predicted feature.")
    decoder_dim: int = Field(384, ge=1, description="Width of the decoder.")
    decoder_depth: int = Field(4, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(12, ge=1, description="Attention heads of the decoder.")

    @model_validator(mode="after")
    def _rises(self) -> "Data2VecConfig":
        first, last = (at(self.momentum, progress) for progress in (0.0, 1.0))
        if last < first:
            raise ValueError(
                f"the teacher's momentum may not fall, got method.momentum from {first} to {last}"
            )
        return self


class MaskDistillConfig(MethodConfig):
    name: Literal["mask_distill"] = "mask_distill"
    mask_ratio: Ratio = ratio_field(0.75)
    masking: Kind = kind_field()
    masks: int = Field(1, ge=1, description="Masks of an image, for one pass of the teacher.")
    layers: int = Field(1, ge=1, description="Of the teacher's last blocks, so many averaged.")
    error: Literal["smooth_l1", "l2"] = Field("smooth_l1", description="Of a predicted feature.")
    decoder_dim: int = Field(384, ge=1, description="Width of the decoder.")
    decoder_depth: int = Field(4, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(12, ge=1, description="Attention heads of the decoder.")


class DistillConfig(MethodConfig):
    name: Literal["distill"] = "distill"
    error: Literal["smooth_l1", "l2", "cosine"] = Field(
        "smooth_l1", description="Of a predicted feature; cosine: of all of them."
    )
    layers: int = Field(1, ge=1, description="Linear layers of the head.")
    hidden_dim: int = Field(2048, ge=1, description="Width inside the head, where it has several.")


class SEEDConfig(MethodConfig):
    name: Literal["seed"] = "seed"
    temperature: float = Field(0.2, gt=0, description="Divides the student's similarities.")
    teacher_temperature: float = Field(0.01, gt=0, description="Divides the teacher's.")
    queue_size: int = Field(65536, ge=1, description="Past features of the teacher kept.")
    hidden_dim: int = Field(2048, ge=1, description="Width inside the projection head.")
    layers: int = Field(2, ge=1, description="Linear layers of the projection head.")


class VideoMAEConfig(MethodConfig):
    name: Literal["videomae"] = "videomae"
    mask_ratio: float = Field(0.9, description="Share of a frame's tubelets hidden.")
    decode_ratio: float = Field(
        0.5, gt=0, le=1, description="Share of the hidden tubelets that are predicted."
    )
    norm_pix: bool = Field(True, description="Predict each tubelet normalized by its own moments.")
    decoder_dim: int = Field(192, ge=1, description="Width of the decoder.")
    decoder_depth: int = Field(4, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(3, ge=1, description="Attention heads of the decoder.")


class SignalMAEConfig(MAEConfig):
    name: Literal["signal_mae"] = "signal_mae"  # type: ignore[assignment]
    mask_ratio: Ratio = ratio_field(0.6)
    span: int = Field(4, ge=1, description="Neighboring patches hidden together; 1: single ones.")


class TJEPAConfig(MethodConfig):
    name: Literal["tjepa"] = "tjepa"
    context: float = Field(0.4, gt=0, lt=1, description="Share of columns the student reads.")
    target: float = Field(0.2, gt=0, lt=1, description="Share of columns in a target set.")
    blocks: int = Field(4, ge=1, description="Target sets of a row.")
    momentum: Momentum = Field(
        LinearSchedule(start=0.996, end=1.0), description="Of the teacher; a number: at first."
    )
    norm_targets: bool = Field(True, description="Layer-norm the teacher's features.")
    decoder_dim: int = Field(64, ge=1, description="Width of the predictor.")
    decoder_depth: int = Field(2, ge=1, description="Blocks of the predictor.")
    decoder_heads: int = Field(4, ge=1, description="Attention heads of the predictor.")


class PointMAEConfig(MethodConfig):
    name: Literal["point_mae"] = "point_mae"
    mask_ratio: Ratio = ratio_field(0.6)
    decoder_dim: int = Field(384, ge=1, description="Width of the decoder.")
    decoder_depth: int = Field(4, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(6, ge=1, description="Attention heads of the decoder.")


class PointCMAEConfig(PointMAEConfig):
    name: Literal["point_cmae"] = "point_cmae"  # type: ignore[assignment]
    contrast: float = Field(
        1e-3, ge=0, description="Weight of the descriptions' agreement, beside the points' errors."
    )


METHODS: Registry[type["Method"]] = Registry("method", "method.name")
for _config, _made in (
    (SimCLRConfig, "simclr:SimCLR"),
    (DCLConfig, "dcl:DCL"),
    (DINOConfig, "dino:DINO"),
    (DINOv2Config, "dinov2:DINOv2"),
    (DINOv3Config, "dinov3:DINOv3"),
    (IBOTConfig, "ibot:IBOT"),
    (GroCoConfig, "groco:GroCo"),
    (ISogCLRConfig, "isogclr:ISogCLR"),
    (MatryoshkaConfig, "matryoshka:Matryoshka"),
    (BYOLConfig, "byol:BYOL"),
    (DirectPredConfig, "directpred:DirectPred"),
    (SimSiamConfig, "simsiam:SimSiam"),
    (MoCHiConfig, "mochi:MoCHi"),
    (MoCoV2Config, "mocov2:MoCoV2"),
    (MoCoV3Config, "mocov3:MoCoV3"),
    (NNCLRConfig, "nnclr:NNCLR"),
    (SwAVConfig, "swav:SwAV"),
    (MSNConfig, "msn:MSN"),
    (CLIPConfig, "clip:CLIP"),
    (SLAConfig, "sla:SLA"),
    (CMCConfig, "cmc:CMC"),
    (BarlowTwinsConfig, "barlow_twins:BarlowTwins"),
    (MixedBarlowTwinsConfig, "mixed_barlow_twins:MixedBarlowTwins"),
    (VICRegConfig, "vicreg:VICReg"),
    (SSLEYConfig, "ssl_ey:SSLEY"),
    (SIEConfig, "sie:SIE"),
    (GlobalLocalConfig, "global_local:GlobalLocal"),
    (MAEConfig, "mae:MAE"),
    (SimMIMConfig, "simmim:SimMIM"),
    (GMMLConfig, "gmml:GMML"),
    (SiTConfig, "sit:SiT"),
    (CAEConfig, "cae:CAE"),
    (SelfieConfig, "selfie:Selfie"),
    (CropMAEConfig, "cropmae:CropMAE"),
    (IJEPAConfig, "ijepa:IJEPA"),
    (Data2VecConfig, "data2vec:Data2Vec"),
    (DistillConfig, "distill:Distill"),
    (MaskDistillConfig, "mask_distill:MaskDistill"),
    (SEEDConfig, "seed:SEED"),
    (VideoMAEConfig, "videomae:VideoMAE"),
    (SignalMAEConfig, "signal_mae:SignalMAE"),
    (TJEPAConfig, "tjepa:TJEPA"),
    (PointMAEConfig, "point_mae:PointMAE"),
    (PointCMAEConfig, "point_cmae:PointCMAE"),
):
    METHODS.add(_config.model_fields["name"].default, f"fastssl.methods.{_made}", _config)
AnyMethodConfig = Annotated[MethodConfig, OneOf(METHODS)]
