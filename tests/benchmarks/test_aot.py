"""Programs for accelerators that are not here are traced and lowered for them, and the report reads them rightly."""

import aot
import pytest

from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.target import current
from sdpoint_jax.profiling.parts import list_operations


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


def test_a_pool_is_measured_by_itself_at_the_sizes_of_its_instance():
    stem, block = aot.run("cpu", "resnet18:64:2", "float32", "stem_r0.75,p03_r0.50", "pool")
    # The stem's convolution makes 32 x 32 of the images; the third block ends at 8 x 8 x 128.
    assert stem["arguments"] == 4 * 2 * 64 * (32**2 + 12**2)
    assert block["arguments"] == 4 * 2 * 128 * (8**2 + 4**2)
    assert block["outputs"] >= block["arguments"]  # The pooled values and the gradient of the input.


def test_blocks_that_are_alike_are_compiled_once_and_counted_each():
    full, part = aot.run("cpu", "resnet20:32:2", "float32", "full,p02_r0.50", "blocks")
    # Stem, head, one kind of block in the first stage and two in the others; and one more that pools its input.
    assert full["different"] == 2 + 1 + 2 + 2 and part["different"] == full["different"] + 1
    gradient, *_ = aot.run("cpu", "resnet20:32:2", "float32", "full", "gradient")
    assert full["flops"] == pytest.approx(gradient["flops"], rel=0.1)
    assert part["flops"] < full["flops"] and part["ratios"]["MACs"] < 1


def test_what_has_a_row_is_not_compiled_again_and_its_counts_are_new(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "aot.jsonl"
    what = "export:tpu", "wrn10_1:8:2", "bfloat16", "p01_r0.50", "inference,update"
    first = aot.run(*what, aot.Results(str(path)))
    assert [(row["program"], row["instance"]) for row in first] == [
        ("inference", "full"),
        ("inference", "p01_r0.50"),
        ("update", "full"),
    ]
    lines = path.read_text().splitlines()
    path.write_text("".join(line.replace('"macs"', '"old"') + "\n" for line in lines[:2]))
    compiled, measure = [], aot.measure

    def watch(programs, kind, instance):
        compiled.append(kind)
        return measure(programs, kind, instance)

    monkeypatch.setattr(aot, "measure", watch)
    results = aot.Results(str(path))
    assert [row["macs"] for row in results.rows] == [row["macs"] for row in first[:2]]
    again = aot.run(*what, results)
    assert compiled == ["update"] and [row["instance"] for row in again] == [row["instance"] for row in first]
    assert len(path.read_text().splitlines()) == 3 and again[0]["jax"] == first[0]["jax"]


def test_convolutions_of_a_compiled_program_are_told_apart_by_what_they_take():
    text = """%fused (p.1: bf16[8,4]) -> bf16[8,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %wide.2 = f32[8,4]{1,0} convert(%p.1)
  %a = bf16[8,4]{1,0} convolution(%p.1, %p.1), window={size=3x3}, dim_labels=b01f_01io->b01f
  %b = f32[8,4]{1,0} convolution(%wide.2, %wide.2), window={size=3x3}, dim_labels=b01f_01io->b01f
  %c = f32[8,4]{1,0} convolution(%wide.2, %wide.2), dim_labels=bf_io->bf, metadata={op_name="jit(f)/dot_general"}
  ROOT %d = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%p.1, %a), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$x"
}"""
    assert aot.count_compiled_convolutions(text) == {"bfloat16_convolutions": 2, "float32_convolutions": 1}


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
