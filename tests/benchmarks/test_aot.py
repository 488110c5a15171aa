"""Programs for accelerators that are not here are traced and lowered for them, and the report reads them rightly."""

import aot
import pytest

from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.target import current
from sdpoint_jax.profiling.macs import list_operations


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["resnet20", "preresnet20", "wrn10_1", "resnext29_8x64d"])
def test_a_family_lowers_for_an_accelerator_in_bfloat16_and_with_convolutions_alone(name, platform):
    rows = aot.run(f"export:{platform}", f"{name}:32:2", "bfloat16", "3", "gradient,update,evaluate,inference")
    counts = {(row["program"], row["instance"]): (row["convolutions"], row["products"]) for row in rows}
    instances = list(dict.fromkeys(row["instance"] for row in rows))
    assert len(instances) == 3 and instances[0] == "full"
    model = create_model(name, 10)
    convolutions = sum(o.kind == "convolution" for o in list_operations(model, model.instances()[0], 32))
    for instance in instances:
        # A CPU's program computes 1x1 convolutions as matrix products. The images have no gradient.
        assert counts["inference", instance] == (convolutions, 1)
        assert counts["gradient", instance] == (3 * convolutions - 1, 3)
        assert counts["evaluate", instance][1] == 1
    assert counts["update", "full"] == (0, 0)
    assert not any(row["float32_convolutions"] for row in rows)
    assert current() is None


def test_a_program_for_the_cpu_at_hand_is_measured_and_compared_with_full_resolution():
    full, part = aot.run("cpu", "wrn10_1:8:2", "float32", "full,p01_r0.50", "inference")
    assert full["peak"] > full["arguments"] > 0 and full["flops"] > part["flops"]
    assert full["ratios"]["MACs"] == 1 > part["ratios"]["MACs"] == part["macs"] / full["macs"]
    assert full["cycles"] is None  # Only the TPU compiler estimates them.


def test_the_cycles_of_the_entry_are_summed_and_those_of_what_it_calls_are_not():
    text = """HloModule any
%fused { ROOT %x = f32[] add(%a, %b), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main {
  %y = f32[] fusion(%p), calls=%fused, backend_config={"window_config":{"estimated_cycles":"20"}}
  ROOT %z = f32[] custom-call(%y), backend_config={"estimated_cycles":"3"}
}

%after { ROOT %w = f32[] add(%a, %b), backend_config={"estimated_cycles":"4000"}
}
"""
    assert aot.estimated_cycles(text) == 23
    assert aot.estimated_cycles("HloModule any\n\nENTRY %main {\n}\n") is None


def test_the_rank_correlation_is_of_orders_not_of_values():
    assert aot.rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert aot.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert aot.rank_correlation([1, 1, 2], [5, 5, 9]) == pytest.approx(1)
    assert aot.rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["tpu", "export:rocm", "gpu:h100", "v5e:2x2", ""])
def test_an_unknown_target_is_an_error_that_names_the_valid_ones(text):
    with pytest.raises(ValueError, match=f"target '{text}': valid are cpu, export:tpu"):
        aot.parse_target(text)
