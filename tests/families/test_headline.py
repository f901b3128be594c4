"""The families that most people train, as they train them: TRL's trainer, a full fine-tune on disk, torch.compile."""

import copy
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

import expertune
from expertune.hosts.trl import GradientProof
from tests.families.found import families
from tests.families.proof import exactly, farthest, run, usual_names
from tests.families.tiny import SIZES, tiny_model
from tests.graphs.replayed import FakeCapture
from tests.hosts.models import tokenizer
from tests.hosts.recorded import recorder_of

HEADLINE = (
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "gpt_oss",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm_moe_dsa",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "mixtral",
    "olmoe",
    "llama4",
    "gemma4",
    "ernie4_5_moe",
    "granitemoe",
    "minimax_m2",
    "nemotron_h",
)


# TRL 1.16 adds the load-balancing loss and asks these configs for a `num_experts` that they do not have.
NO_AUX_LOSS = {"granitemoe", "glm4v_moe", "deepseek_v4", "llama4_text"}


# TRL 1.16 asks the class for the name of its decoder; this one names another than it has, so that stock fails too.
MISNAMED = {"llama4_text"}


# Stock fails too: a view of their linear attention's output does not fit its strides once it is compiled.
NOT_COMPILED = {"qwen3_next", "qwen3_5_moe_text"}
if version("transformers") < "5.24":
    NOT_COMPILED.add("glm_moe_dsa")  # its indexer chooses otherwise once it is compiled
# Its attention compresses more tokens at a time than these rows have, so the adapters there rightly learn nothing.
SHORT = {"deepseek_v4"}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param not in families():
        pytest.skip("this version of the host does not know it")
    return tiny_model(families()[request.param])


headline = pytest.mark.parametrize("model", HEADLINE, indirect=True)
newest = pytest.mark.skipif(version("transformers") < "5.24", reason="older hosts name some parts otherwise")


def rows() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 13, (8,), generator=draw).tolist()
    top = SIZES["image_token_id"]
    return Dataset.from_list([{"input_ids": torch.randint(3, top, (n,), generator=draw).tolist()} for n in lengths])


@headline
def test_it_is_trained_through_trl(model: PreTrainedModel, tmp_path: Path) -> None:
    ours = expertune.add_lora(copy.deepcopy(model).float(), r=4, target_modules=usual_names(model))
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if model.config.model_type in NO_AUX_LOSS:
        settings.router_aux_loss_coef = 0.0  # older versions have no such setting, and add no such loss
    if model.config.model_type in MISNAMED:
        ours.get_base_model().base_model_prefix = "model"
    proofs = [] if model.config.model_type in SHORT else [GradientProof()]
    trainer = SFTTrainer(
        model=ours,
        args=settings,
        train_dataset=rows(),
        processing_class=tokenizer(SIZES["image_token_id"]),
        callbacks=proofs,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    changed = {name for name, p in ours.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_B" in name}
    assert changed <= {name for name in before if "lora_" in name}, "a frozen weight moved"
    assert {name for name in adapters if ".experts." in name} <= changed


@headline
def test_a_full_fine_tune_is_saved_as_the_hosts(model: PreTrainedModel, tmp_path: Path) -> None:
    ours = expertune.optimize(copy.deepcopy(model), backend="native_torch")
    run(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    ours.zero_grad(set_to_none=True)
    host = copy.deepcopy(model)
    host.load_state_dict(ours.state_dict())
    for name, one in (("ours", ours), ("host", host)):
        one.save_pretrained(tmp_path / name)
    saved, expected = (_tensors(tmp_path / name) for name in ("ours", "host"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    read, again = (
        type(model).from_pretrained(tmp_path / "ours", dtype=torch.float64, experts_implementation="eager")
        for _ in range(2)
    )
    with exactly():
        truth = run(read.train())["out"]
        assert not torch.equal(truth, run(model)["out"])
        difference, _ = farthest({"out": run(expertune.optimize(again.train()))["out"]}, {"out": truth})
    assert difference <= 1e-11


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@headline
def test_a_dispatched_model_runs_through_the_walk(model: PreTrainedModel) -> None:
    """As `device_map` does it: a hook around every module's forward."""
    with exactly():
        truth = run(model)
        hooked: Any = dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
        difference, name = farthest(run(expertune.optimize(hooked, backend="native_torch")), truth)
    assert difference <= 1e-11, f"{name}: {difference:.3g}"


@pytest.mark.parametrize("side", ["left", "right"])
@headline
def test_padding_changes_no_token(model: PreTrainedModel, side: str) -> None:
    """The logits of all that is no padding are the host's, whose attention is not ours for some."""
    ids = torch.randint(3, SIZES["image_token_id"], (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "use_cache": False}
    with exactly(), torch.no_grad():
        truth = model(**inputs).logits[mask.bool()]
        ours = expertune.optimize(copy.deepcopy(model), backend="native_torch")(**inputs).logits[mask.bool()]
    difference, _ = farthest({"out": ours}, {"out": truth})
    assert difference <= 1e-11


@pytest.mark.thorough  # minutes of the compiler; some with every gradient in tests/hosts/test_compile.py
@headline
def test_a_compiled_model_is_as_the_plain_one(model: PreTrainedModel) -> None:
    if model.config.model_type in NOT_COMPILED:
        pytest.skip("stock does not compile either")
    torch._dynamo.reset()
    ours = expertune.optimize(copy.deepcopy(model), backend="native_torch")
    plain = run(ours)
    result = run(cast(Any, torch.compile(ours, backend="aot_eager")))
    torch._dynamo.reset()
    # hosts compute their routers and norms in float32, and a compiler rounds those otherwise
    difference, name = farthest({"out": result["out"]}, {"out": plain["out"]})
    assert difference <= 1e-5, f"{name}: {difference:.3g}"


@headline
def test_a_layer_that_is_replayed_is_as_it_was(model: PreTrainedModel) -> None:
    """As CUDA graphs replay it: the work that was recorded, on the tensors it was recorded with."""
    # PEFT refuses some linears of Mamba
    targets = usual_names(model) if model.config.model_type == "nemotron_h" else "all-linear"
    # in float64, because linears that a recording joins are summed in another order
    ours = expertune.add_lora(copy.deepcopy(model), r=4, target_modules=targets, init_lora_weights=False)
    plain = copy.deepcopy(ours)
    expertune.optimize(plain, graphs=False)
    capture = FakeCapture()
    recorder = recorder_of(ours)
    recorder._pool_of = capture.pool
    for seed in range(5):
        with exactly():
            difference, name = farthest(run(ours, seed), run(plain, seed))
        assert difference <= 1e-11, f"{name}: {difference:.3g}"
    told = re.search(r"CUDA graphs: (\d+) of (\d+) layers.*, 1 kinds of calls$", str(expertune.explain(ours)))
    assert told is not None
    if model.config.model_type == "gemma4_text":  # its layers hand keys on to others, through an object
        assert told[1] == "0"
    else:
        assert told[1] == told[2]
    assert capture.replays


@pytest.mark.parametrize("names", [["gate_proj", "up_proj", "down_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("model", ["glm4v_moe"], indirect=True)
def test_the_vision_tower_is_left_alone_and_said_so(
    model: PreTrainedModel, names: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = expertune.add_lora(copy.deepcopy(model).float(), r=2, target_modules=names)
    assert not any("visual" in path for path in expertune.trained(ours).adapted)
    assert "left as it is: model.visual" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["glm4v_moe"], indirect=True)
def test_the_vision_tower_is_trained_by_its_path(model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["up_proj", "gate_proj", "visual.blocks.0.mlp.up_proj"]
    ours = expertune.add_lora(copy.deepcopy(model).float(), r=2, target_modules=names)
    seen = {path for path in expertune.trained(ours).adapted if "visual" in path}
    assert seen == {"model.visual.blocks.0.mlp.up_proj"}
    assert "left as it is" not in capsys.readouterr().out


@newest
@headline
def test_the_coverage_of_the_usual_names(model: PreTrainedModel) -> None:
    """`coverage.txt` was read and found right: what changes it changes what people train."""
    golden = (Path(__file__).parent / "coverage.txt").read_text(encoding="utf-8").splitlines()
    family = next(name for name in HEADLINE if families()[name].model_type == model.config.model_type)
    expected = [line for line in golden if line.startswith(f"{family}: ")]
    assert coverage_lines(family, model) == expected


def coverage_lines(family: str, model: PreTrainedModel) -> list[str]:
    """What `add_lora` trains by the usual names: part, path below the layer, number of layers."""
    held = {path.rpartition(".")[0].rpartition(".")[2] for path, _ in model.named_parameters()}
    attention = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in held]
    ours = expertune.add_lora(copy.deepcopy(model), r=2, target_modules=[*attention, *usual_names(model)])
    return [f"{family}: {row.kind}, {row.name}, {row.num_layers} layers" for row in expertune.trained(ours).rows]
