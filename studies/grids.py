"""The studies as data: which recipes are trained with which seeds, how each is swept, and what is compared with what.

A recipe is `sdpoint_jax.config.default_config()` with the changes of its study and its own. Recipes may name config
keys or nets that this version of the package does not have: such a cell is listed as not available, and passed over.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal

STATISTICS_BATCHES = 50  # That the statistics come from, where a study does not compare numbers of them.
CASCADE_COSTS = (50, 60, 70, 75, 80, 90)  # Mean costs that cascades are found for, in % of full resolution's MACs.


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One sweep of a trained net.

    Attributes:
        instances: names with commas between them, or `all` at the points and ratios of the recipe.
        images: `augmented` or `clean` training images, to re-estimate the BatchNorm statistics from.
        batches: how many batches of them, of `config.evaluation_batch_size` images each.
        cascades: whether cascades of these instances are searched for as well, on training images.
    """

    instances: str = "all"
    images: str = "augmented"
    batches: int = STATISTICS_BATCHES
    cascades: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train a net.

    Attributes:
        name: of the recipe within its study.
        changes: config keys, with dots where they are nested, and their values.
        length: how long to train, as a multiple of the study's epochs; 0 to sweep `config.init_from` as it is.
        sweeps: of the trained net.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    length: float = 1.0
    sweeps: tuple[Sweep, ...] = (Sweep(),)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One series of points in a study's figure.

    Attributes:
        label: in the legend.
        recipes: whose instances are the points.
        instances: `all`, `full` for full resolution alone, or `cascades`.
        statistics: the images that the BatchNorm statistics come from.
    """

    label: str
    recipes: tuple[str, ...]
    instances: Literal["all", "full", "cascades"] = "all"
    statistics: str = "augmented"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two recipes whose accuracies are set side by side, instance by instance.

    Attributes:
        recipe, baseline: their names; differences are the recipe's accuracy less that of the baseline.
        label, baseline_label: what a table calls them.
    """

    recipe: str
    baseline: str
    label: str
    baseline_label: str


@dataclasses.dataclass(frozen=True)
class Headline:
    """A picture for readers who know none of the study's words: two curves and the difference between them.

    Attributes:
        recipe, baseline: their names.
        label, baseline_label: what stands beside their curves.
        instance: where the difference is written.
    """

    recipe: str
    baseline: str
    label: str
    baseline_label: str
    instance: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of recipes and seeds that answers one question.

    Attributes:
        name: one letter.
        question: in one sentence.
        base: config changes that all recipes share.
        epochs: of a recipe of length 1.
        recipes: the most telling first: with them in this order for one seed after the other, every prefix of the
            grid is a result.
        curves: of the figure.
        comparisons: of the tables.
        seeds: by default.
        x: what the figure's horizontal axis shows: MACs, or batches that the statistics come from.
        needs_init: whether training starts from a given checkpoint.
        headline: a simpler picture beside the figure; None for none.
    """

    name: str
    question: str
    base: Mapping[str, Any]
    epochs: float
    recipes: tuple[Recipe, ...]
    curves: tuple[Curve, ...]
    comparisons: tuple[Comparison, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    x: Literal["macs", "statistics_batches"] = "macs"
    needs_init: bool = False
    headline: Headline | None = None

    def recipe(self, name: str) -> Recipe:
        """Returns the recipe called `name`; raises ValueError, with those that there are, if there is none."""
        for recipe in self.recipes:
            if recipe.name == name:
                return recipe
        raise ValueError(f"study {self.name}: no recipe {name!r}; valid are {', '.join(r.name for r in self.recipes)}")


CIFAR: Mapping[str, Any] = types.MappingProxyType(
    {
        "model.name": "resnet20",
        "dataset.image_size": (32, 32),
        "dataset.augmentation": "pad_crop_flip",
        "dataset.mean": (0.4914, 0.4822, 0.4465),
        "dataset.std": (0.2470, 0.2435, 0.2616),
        "dataset.validation_split": "train[:500]",  # Nothing is chosen by it; what is reported is the test split.
        "dataset.test_split": "test",
        "batch_size": 128,
        "learning_rate": 0.1,
        "schedule": "cosine",
        "weight_decay": 5e-4,
        "validation_instances": "full",
        "validate_every_epochs": 1000.0,  # At the end alone, as short as can be.
        "reestimate_batches": 1,  # Of that validation; a sweep has its own.
        "checkpoint_every_steps": 200,
    }
)
PLAIN: Mapping[str, Any] = types.MappingProxyType({"instances": "full"})
_FULL = (Sweep("full"),)


def _small_input(side: int) -> Recipe:
    """A plain net for images that are resized to `side`, in training and in evaluation."""
    return Recipe(f"plain_{side}", {**PLAIN, "dataset.image_size": (side, side)}, sweeps=_FULL)


def _narrow(width: int) -> Recipe:
    """A plain ResNet-20 of fewer channels: `width` instead of 16 in its first stage."""
    return Recipe(f"plain_w{width}", {**PLAIN, "model.name": f"resnet20_w{width}"}, sweeps=_FULL)


STUDY_A = Study(
    "A",
    "How accurate is one net at each of its costs, against nets that were trained for one cost each?",
    CIFAR,
    epochs=12,
    recipes=(
        Recipe("sdpoint"),
        Recipe("plain", PLAIN),
        *map(_small_input, (24, 16, 20, 28)),
        *map(_narrow, (12, 8)),
    ),
    curves=(
        Curve("SDPoint: one net", ("sdpoint",)),
        Curve("plain: one net, downsampled at inference only", ("plain",)),
        Curve(
            "plain: a net for each cost, smaller input",
            ("plain", "plain_28", "plain_24", "plain_20", "plain_16"),
            "full",
        ),
        Curve("plain: a net for each cost, fewer channels", ("plain", "plain_w12", "plain_w8"), "full"),
    ),
    comparisons=(Comparison("sdpoint", "plain", "SDPoint", "plain, downsampled at inference only"),),
)

_STATISTICS = tuple(
    Sweep("full,p01_r0.50,p03_r0.75", images, batches)
    for images in ("augmented", "clean")
    for batches in (1, 2, 5, 20, STATISTICS_BATCHES)
)
_CLEAN = tuple(sweep for sweep in _STATISTICS if sweep.images == "clean")  # All there is without augmentation.


def _regularisation(length_name: str, length: float) -> tuple[Recipe, ...]:
    """SDPoint and plain, with and without augmentation, for one length of training."""
    none = {"dataset.augmentation": "none"}
    return (
        Recipe(f"sdpoint_{length_name}", length=length, sweeps=_STATISTICS),
        Recipe(f"plain_{length_name}", PLAIN, length, _STATISTICS),
        Recipe(f"sdpoint_bare_{length_name}", none, length, _CLEAN),
        Recipe(f"plain_bare_{length_name}", {**PLAIN, **none}, length, _CLEAN),
    )


STUDY_B = Study(
    "B",
    "Does training with SDPoint make the net more accurate at full resolution, and does that depend on the recipe?",
    CIFAR,
    epochs=12,
    recipes=(*_regularisation("short", 1.0), *_regularisation("long", 4.0)),
    curves=tuple(
        Curve(f"{recipe}, statistics from {images} images", (recipe,), "full", images)
        for recipe in ("sdpoint_short", "plain_short", "sdpoint_long", "plain_long")
        for images in ("augmented", "clean")
    ),
    comparisons=tuple(
        Comparison(f"sdpoint{kind}_{length}", f"plain{kind}_{length}", "SDPoint", "plain")
        for length in ("short", "long")
        for kind in ("", "_bare")
    ),
    x="statistics_batches",
)

_SANDWICH = {"instances_per_step": 3}  # Full resolution, the cheapest instance and a drawn one, from a shared prefix.
# Multiply-accumulates of a step, ResNet-20, full resolution alone being 1: the sandwich 1.38, the paper's draw 0.77.
_SANDWICH_COST = 1.8
_PAIR = {"instances_per_step": 2, "step_instances": "full"}  # Full resolution and a drawn one.
_WITH_CASCADES = (Sweep(cascades=True),)

STUDY_C = Study(
    "C",
    "What improves on the paper's draw, at the same number of steps and at the same compute?",
    CIFAR,
    epochs=12,
    recipes=(
        Recipe("paper", sweeps=_WITH_CASCADES),
        Recipe("sandwich", _SANDWICH),
        Recipe("sandwich_distilled", {**_SANDWICH, "distillation": 1.0}, sweeps=_WITH_CASCADES),
        Recipe("paper_same_compute", length=_SANDWICH_COST),
        Recipe("paper_averaged", {"ema_decay": 0.999}),
        Recipe("pair", _PAIR),
        Recipe("pair_distilled", {**_PAIR, "distillation": 1.0}),
        Recipe("paper_by_cost", {"sampling": "cost", "sampling_powers": (1.0, 1.0)}),  # The dear ones more often.
        Recipe("paper_slow", {"learning_rate": 0.05}),
        Recipe("sandwich_slow", {**_SANDWICH, "learning_rate": 0.05}),
        Recipe("paper_light", {"weight_decay": 1e-4}),
        Recipe("sandwich_light", {**_SANDWICH, "weight_decay": 1e-4}),
    ),
    curves=(
        Curve("the paper's draw", ("paper",)),
        Curve("the paper's draw, compute of the sandwich", ("paper_same_compute",)),
        Curve("sandwich", ("sandwich",)),
        Curve("sandwich, distilled", ("sandwich_distilled",)),
        Curve("cascades of the paper's draw", ("paper",), "cascades"),
    ),
    comparisons=(
        Comparison("sandwich", "paper", "sandwich", "the paper's draw, same steps"),
        Comparison("sandwich", "paper_same_compute", "sandwich", "the paper's draw, same compute"),
        Comparison("sandwich_distilled", "paper_same_compute", "sandwich, distilled", "the paper's draw, same compute"),
        Comparison("pair", "paper", "full resolution and a drawn one", "the paper's draw, same steps"),
        Comparison("pair_distilled", "paper", "pair, distilled", "the paper's draw, same steps"),
        Comparison("paper_averaged", "paper", "averaged parameters", "the paper's draw"),
        Comparison("paper_by_cost", "paper", "draw weighted by cost", "the paper's draw"),
        Comparison("paper_slow", "paper", "learning rate 0.05", "the paper's draw, 0.1"),
        Comparison("paper_light", "paper", "weight decay 1e-4", "the paper's draw, 5e-4"),
        Comparison("sandwich_slow", "sandwich", "sandwich, learning rate 0.05", "sandwich, 0.1"),
        Comparison("sandwich_light", "sandwich", "sandwich, weight decay 1e-4", "sandwich, 5e-4"),
    ),
)

_LENGTHS = {0: 0.0, 1: 0.05, 3: 0.15, 10: 0.5, 20: 1.0}
_FROM_TRAINED = {
    **CIFAR,
    "dataset.mean": (0.485, 0.456, 0.406),  # Those that the published net was trained with.
    "dataset.std": (0.229, 0.224, 0.225),
    "learning_rate": 0.05,
    "warmup_epochs": 0.5,
    "weight_decay": 1e-4,
    "weight_decay_on": "kernels",
}
ORIGINAL = "original"  # As a teacher: the net that the training starts from.
_TAUGHT = {**_SANDWICH, "teacher": ORIGINAL, "distillation": 0.9, "distillation_temperature": 2.0}

STUDY_D = Study(
    "D",
    "How many epochs of SDPoint training make a trained net adjustable?",
    _FROM_TRAINED,
    epochs=20,
    recipes=(
        Recipe("paper_0", length=0.0),
        *(
            recipe
            for epochs, length in sorted(_LENGTHS.items(), reverse=True)
            if epochs
            for recipe in (Recipe(f"taught_{epochs}", _TAUGHT, length), Recipe(f"paper_{epochs}", length=length))
        ),
        Recipe("taught_20_own_norms", {**_TAUGHT, "model.norm_parameters": "per_instance"}),
    ),
    curves=(
        Curve("as it was trained", ("paper_0",)),
        *(
            Curve(f"{epochs} {'epoch' if epochs == 1 else 'epochs'}, sandwich and teacher", (f"taught_{epochs}",))
            for epochs in _LENGTHS
            if epochs
        ),
        Curve("20 epochs, the paper's draw", ("paper_20",)),
    ),
    comparisons=(
        Comparison("taught_20", "paper_0", "20 epochs, sandwich and teacher", "as it was trained"),
        Comparison("taught_20", "paper_20", "20 epochs, sandwich and teacher", "20 epochs, the paper's draw"),
        Comparison("taught_3", "paper_0", "3 epochs, sandwich and teacher", "as it was trained"),
        Comparison("taught_20_own_norms", "taught_20", "with BatchNorm parameters of its own", "20 epochs, shared"),
    ),
    needs_init=True,
    headline=Headline("taught_20", "paper_0", "after 20 epochs of fine-tuning", "as published", "p01_r0.50"),
)

_RATIOS = {
    "quarters": (0.25, 0.5, 0.75),
    "eighths": (0.25, 0.375, 0.5, 0.625, 0.75, 0.875),
    "quarter": (0.25,),
    "half": (0.5,),
}
_POINTS = {"stage_ends": (0, 3, 6, 9), "early": (0, 1, 2, 3), "late": (0, 4, 5, 6, 7, 8, 9)}

STUDY_E = Study(
    "E",
    "Which instances should a net be trained for, and how far down in cost can one net go?",
    CIFAR,
    epochs=12,
    recipes=(
        Recipe("paper"),
        *(Recipe(f"ratios_{name}", {"ratios": ratios}) for name, ratios in _RATIOS.items()),
        *(Recipe(f"points_{name}", {"points": points}) for name, points in _POINTS.items()),
    ),
    curves=(
        Curve("ratios 1/2 and 3/4, all points: the paper's", ("paper",)),
        Curve("ratios 1/4, 1/2 and 3/4", ("ratios_quarters",)),
        Curve("ratios in eighths from 1/4 to 7/8", ("ratios_eighths",)),
        Curve("the ends of the stages alone", ("points_stage_ends",)),
    ),
    comparisons=(
        *(Comparison(f"ratios_{name}", "paper", f"ratios: {name}", "the paper's") for name in ("quarters", "eighths")),
        *(Comparison(f"points_{name}", "paper", f"points: {name}", "the paper's") for name in _POINTS),
    ),
)

# The whole of CIFAR-10 and a recipe that is long enough to be compared with published figures.
_WHOLE = {**CIFAR, "nesterov": True, "label_smoothing": 0.1, "warmup_epochs": 2.0, "checkpoint_every_steps": 390}
# Multiply-accumulates of `plain`, `plain_24` and `plain_20` together, over those of the paper's draw; `plain` is 1.
_SET_COST = 2.5

STUDY_F = Study(
    "F",
    "How accurate is one net at each of its costs, against nets for one cost each, when all are trained out?",
    _WHOLE,
    epochs=40,
    recipes=(
        Recipe("plain", PLAIN),
        Recipe("sdpoint", sweeps=_WITH_CASCADES),
        _small_input(24),
        _narrow(8),
        _small_input(20),
        _narrow(12),
        Recipe("sdpoint_set", length=_SET_COST, sweeps=_WITH_CASCADES),
    ),
    curves=(
        Curve("SDPoint: one net", ("sdpoint",)),
        Curve("SDPoint: one net, compute of the three nets for smaller input", ("sdpoint_set",)),
        Curve("plain: one net, downsampled at inference only", ("plain",)),
        Curve("plain: a net for each cost, smaller input", ("plain", "plain_24", "plain_20"), "full"),
        Curve("plain: a net for each cost, fewer channels", ("plain", "plain_w12", "plain_w8"), "full"),
    ),
    comparisons=(
        Comparison("sdpoint", "plain", "SDPoint", "plain, downsampled at inference only"),
        Comparison("sdpoint_set", "sdpoint", "SDPoint, compute of three nets", "SDPoint, as long as one net"),
    ),
    headline=Headline("sdpoint", "plain", "one network, trained with SDPoint", "trained as usual", "p01_r0.50"),
)

# In the time of the paper's draw. Soft targets beside the labels: half of the loss.
_SANDWICH_LENGTH = 1 / _SANDWICH_COST
_MEAN_TEACHES = {**_SANDWICH, "distillation": 0.5, "distillation_targets": "mean"}
_OWN_NORMS = {"model.norm_parameters": "per_instance"}
# Full resolution in half of the steps. The other 18 instances of ResNet-20 share the rest.
_HALF_FULL = {"sampling": "weighted", "sampling_weights": (18.0, *[1.0] * 18)}

STUDY_G = Study(
    "G",
    "Which changes to the paper's draw close the gap to plain training, at the same compute?",
    _WHOLE,
    epochs=12,
    recipes=(
        Recipe("plain", PLAIN),
        Recipe("sdpoint", sweeps=_WITH_CASCADES),
        Recipe("mean_own_norms", {**_MEAN_TEACHES, **_OWN_NORMS}, _SANDWICH_LENGTH),
        Recipe("half_full", _HALF_FULL, 0.88),
        Recipe("stage_ends", {"points": (0, 3, 6, 9)}, 0.89),
        Recipe("sandwich", _SANDWICH, _SANDWICH_LENGTH),
        Recipe("mean", _MEAN_TEACHES, _SANDWICH_LENGTH),
        Recipe("mean_late", {**_MEAN_TEACHES, "distillation_start": 1 / 3}, _SANDWICH_LENGTH),
        Recipe("own_norms", _OWN_NORMS),
        Recipe("annealed", {"sampling": "cost", "sampling_powers": (-1.0, 2.0)}),  # From the cheap to the dear.
        Recipe("light", {"weight_decay": 1e-4}),
        Recipe("averaged", {"ema_decay": 0.998}),  # A horizon of 500 steps, a ninth of the training.
    ),
    curves=(
        Curve("SDPoint: the paper's draw", ("sdpoint",)),
        Curve("plain: one net, downsampled at inference only", ("plain",)),
        Curve("sandwich, mean of all as the teacher, own BatchNorm", ("mean_own_norms",)),
        Curve("full resolution in half of the steps", ("half_full",)),
        Curve("the ends of the stages alone", ("stage_ends",)),
    ),
    comparisons=(
        Comparison("sdpoint", "plain", "SDPoint", "plain, downsampled at inference only"),
        *(
            Comparison(name, "sdpoint", label, "the paper's draw")
            for name, label in {
                "mean_own_norms": "mean of all as the teacher, own BatchNorm",
                "half_full": "full resolution in half of the steps",
                "stage_ends": "the ends of the stages alone",
                "sandwich": "sandwich",
                "mean": "sandwich, mean of all as the teacher",
                "mean_late": "the same, after a third of the steps",
                "own_norms": "own BatchNorm",
                "annealed": "draw from the cheap to the dear",
                "light": "weight decay 1e-4",
                "averaged": "averaged parameters",
            }.items()
        ),
    ),
)

STUDY_H = dataclasses.replace(
    STUDY_D,
    name="H",
    question="How many epochs of SDPoint training, on all the images that it saw, make a trained net adjustable?",
    recipes=tuple(
        dataclasses.replace(STUDY_D.recipe(name), sweeps=_WITH_CASCADES if name.startswith("taught") else (Sweep(),))
        for name in ("taught_3", "paper_0", "taught_20", "paper_20", "taught_10", "taught_1")
    ),
    curves=tuple(
        curve
        for curve in STUDY_D.curves
        if set(curve.recipes) <= {"paper_0", "taught_1", "taught_3", "taught_10", "taught_20", "paper_20"}
    ),
    comparisons=tuple(each for each in STUDY_D.comparisons if each.recipe != "taught_20_own_norms"),
)

# With augmentation, the trainings are those of study F.
STUDY_I = Study(
    "I",
    "Does training with SDPoint make the net more accurate at full resolution, when it is trained out?",
    _WHOLE,
    epochs=40,
    recipes=(
        Recipe("sdpoint", sweeps=_STATISTICS),
        Recipe("plain", PLAIN, sweeps=_STATISTICS),
        Recipe("sdpoint_bare", {"dataset.augmentation": "none"}, sweeps=_CLEAN),
        Recipe("plain_bare", {**PLAIN, "dataset.augmentation": "none"}, sweeps=_CLEAN),
    ),
    curves=tuple(
        Curve(f"{recipe}, statistics from {images} images", (recipe,), "full", images)
        for recipe in ("sdpoint", "plain")
        for images in ("augmented", "clean")
    ),
    comparisons=(
        Comparison("sdpoint", "plain", "SDPoint", "plain"),
        Comparison("sdpoint_bare", "plain_bare", "SDPoint", "plain"),
    ),
    x="statistics_batches",
)

STUDY_J = Study(
    "J",
    "Is it so for a larger net, ResNet-18?",
    {**_WHOLE, "model.name": "resnet18_cifar", "model.dtype": "bfloat16"},
    epochs=40,
    recipes=(Recipe("plain", PLAIN), Recipe("sdpoint", sweeps=_WITH_CASCADES)),
    curves=(
        Curve("SDPoint: one net", ("sdpoint",)),
        Curve("plain: one net, downsampled at inference only", ("plain",)),
    ),
    comparisons=(Comparison("sdpoint", "plain", "SDPoint", "plain, downsampled at inference only"),),
)

STUDY_K = dataclasses.replace(
    STUDY_J,
    name="K",
    question="Is it so for a net without residual blocks, DenseNet-BC-40-12?",
    base={**_WHOLE, "model.name": "densenet_bc_40_12"},
    epochs=12,
    seeds=(0,),
)

_ALL = (STUDY_A, STUDY_B, STUDY_C, STUDY_D, STUDY_E, STUDY_F, STUDY_G, STUDY_H, STUDY_I, STUDY_J, STUDY_K)
STUDIES = {study.name: study for study in _ALL}
