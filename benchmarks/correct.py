"""Does the device at hand compute what it should: known logits, and to the bit the end of a run that was killed?

    python benchmarks/correct.py --json=correct.json

First, a training is killed and started again, on the same device, and must end in the bits of one that was not. Then
logits, in float32 of the highest precision that XLA has and in bfloat16, of the instances in
`tests/models/golden/logits.json`, which a plain PyTorch formulation gave: the largest difference, relative to the
largest logit. Beyond 1e-4 in float32 or 2e-2 in bfloat16, or with another bit after the kill, the exit code is 1.
"""

import functools
import json
import os
import pathlib
import sys
import tempfile

import jax
import numpy as np
from common import report

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.interop.torch_import import import_torch_state_dict
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.programs.devices import Switch, on_device, shapes_of
from sdpoint_jax.programs.inference import classify

TESTS = pathlib.Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import soak  # noqa: E402
import torch_formulation as formulation  # noqa: E402

PRESETS = {
    "small": dict(nets="resnet20,preresnet20", kills=1),
    "gpu": dict(nets="resnet18,preresnet50,resnext50", kills=1),
}
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
# Of the run that is killed: a net with a stem, as those for large images have, whose max-pool is a part of its own.
RUN = {"model.name": "resnet18", "model.dtype": "bfloat16", "dataset.image_size": "32,32", "num_epochs": 1.0}


def deviations(name: str, dtype: str) -> dict[str, float]:
    """Computes, by instance, how far logits are from those of the file, relative to the largest one of an instance."""
    golden = json.loads((TESTS / "models" / "golden" / "logits.json").read_text())[name]
    expected = {SDPointInstance(point, ratio): np.array(logits) for point, ratio, logits in golden["rows"]}
    weights = formulation.named_state_dict(formulation.net_shapes(name, 10))
    model = create_model(name, 10, dtype=dtype)
    variables = import_torch_state_dict(weights, model)
    images = formulation.named_images(1, 3, *golden["image_size"]).transpose(0, 2, 3, 1)
    values = variables["params"], variables["batch_stats"], images

    def build(instance):
        function = functools.partial(classify, model=model, instance=instance, preprocess=lambda images: images)
        return on_device(function, jax.devices()[0])

    programs = Switch(build, lambda instance: shapes_of(values))
    list(programs.compile(expected))
    found = {}
    for instance, logits in expected.items():
        difference = np.abs(np.asarray(programs[instance](*values)) - logits).max()
        found[instance.name] = float(difference / np.abs(logits).max())
    return found


def check_run(kills: int) -> str:
    """Kills a training on this device, and lets it go on; returns what was wrong with its end, or nothing."""
    os.environ.setdefault("JAX_PLATFORMS", "")  # Whatever device JAX finds, as here.
    with tempfile.TemporaryDirectory() as folder:
        try:
            soak.soak(pathlib.Path(folder), kills, settings=RUN)
        except RuntimeError as error:
            return str(error)
    return ""


def main():
    """Checks, prints, and ends with code 1 where something is not as it should be."""
    options = report.parse(__doc__, PRESETS, nets=(str, "names, of the file"), kills=(int, "of the training; 0: none"))
    # First: a TPU is one process's alone, and this one takes it when it reads a checkpoint of the run that was killed.
    difference = check_run(options.kills) if options.kills else ""
    wrong = [difference] if difference else []
    results = {"killed run": difference or ("the same bits" if options.kills else "not tried")}
    print(report.heading())
    print(f"a killed run that went on: {results['killed run']}")
    jax.config.update("jax_default_matmul_precision", "highest")
    for name in options.nets.split(","):
        for dtype, limit in LIMITS.items():
            found = deviations(name, dtype)
            results.setdefault(name, {})[dtype] = found
            print(f"{name:<28}{dtype:<10}{max(found.values()):>10.1e} of at most {limit:g}", flush=True)
            wrong += [f"{name} {one} {dtype}: {value:.1e}" for one, value in found.items() if not value <= limit]
            report.write(options.json, options, **results)
    if wrong:
        sys.exit("wrong: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
