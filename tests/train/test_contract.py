"""What this package takes from DeepSpeed that DeepSpeed does not promise: each name, and what stands on it."""

import inspect
import os

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.module_inject import auto_ep_layer
from deepspeed.moe import utils as moe_utils
from deepspeed.moe.sharded_moe import MOELayer, topkgating
from deepspeed.runtime import bf16_optimizer, engine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups, mixed_precision_linkage, tensor_fragment

from mixtral import MixtralConfig
from train.config import ParallelConfig
from train.parallel.expert import TrainedExpertParallelBlock

NAMES = {
    "the layer that DeepSpeed's engine takes for its own": (auto_ep_layer, "AutoEPMoELayer"),
    "where a layer's experts lie": (auto_ep_layer, "legacy_uniform_autoep_placement_descriptor"),
    "the groups of expert and data parallelism": (groups, "_create_expert_and_data_parallel"),
    "the ranks that share a layer's experts out": (groups, "_get_expert_parallel_group"),
    "the ranks that hold the same experts": (groups, "_get_expert_data_parallel_group"),
    "optimizer groups of experts": (moe_utils, "split_params_into_different_moe_groups_for_optimizer"),
    "partitioning a parameter when it is filled": (Init, "_convert_to_zero_parameters"),
    "the end of an accumulation": (DeepSpeedEngine, "set_gradient_accumulation_boundary"),
    "the flat masters of ZeRO-1 and 2": (DeepSpeedZeroOptimizer, "update_lp_params"),
    "the flat masters of ZeRO-1 in bf16": (BF16_Optimizer, "update_lp_params"),
    "how ZeRO-1 adds gradients up in bf16": (BF16_Optimizer, "_update_hp_grad"),
    "how ZeRO-1 reduces them in bf16": (DeepSpeedEngine, "allreduce_and_copy"),
    "and one of them": (DeepSpeedEngine, "allreduce_bucket"),
    "whose part of a parameter ZeRO-3 keeps here": (DeepSpeedZeroOptimizer_Stage3, "_get_param_partition_rank"),
    "masters that were read at ZeRO-3": (DeepSpeedZeroOptimizer_Stage3, "_reassign_or_swap_out_partitioned_parameters"),
    "weights in parts before that": (DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_prologue"),
    "small weights whole again after it": (DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_epilogue"),
    "which weights are whole at ZeRO-3": (partition_parameters, "ZeroParamStatus"),
    "kernels that need no compiler": (deepspeed.ops, "__compatible_ops__"),
    "a timeout after the meeting": (dist.distributed_c10d, "_set_pg_timeout"),
    "the groups whose collectives the watchdog counts": (dist.distributed_c10d, "_world"),
    "how many collectives a process has begun": (dist.ProcessGroup, "_get_sequence_number_for_group"),
}


@pytest.mark.parametrize("use", NAMES)
def test_a_private_name_is_where_it_was(use):
    owner, name = NAMES[use]
    version = f"deepspeed {deepspeed.__version__}, torch {torch.__version__}"
    assert hasattr(owner, name), f"{name} is gone from {owner} ({version}): {use} needs another way"


READ = {  # what we set for DeepSpeed to read: where it does
    "ds_zero_partition_process_group": partition_parameters,
    "ds_zero_placement_family": stage3,
    '"autoep_expert"': stage3,
    "ds_zero_partition_group_name": stage3,
    "group_name": moe_utils,
    "set_deepspeed_parallelism": engine,
    "folding_group_handles": auto_ep_layer,
    "ep_group_name": auto_ep_layer,
    "ep_size": auto_ep_layer,
    "ep_rank": auto_ep_layer,
    "num_local_experts": auto_ep_layer,
    "expert_placement_descriptor": auto_ep_layer,
    "comm_backend": auto_ep_layer,
    "combine_impl": auto_ep_layer,
}


@pytest.mark.parametrize("name", READ)
def test_deepspeed_still_reads_what_we_set_for_it(name):
    where = READ[name]
    assert name in inspect.getsource(where), f"{where.__name__} of {deepspeed.__version__} does not know {name}"


WRITTEN = {  # what DeepSpeed sets and checkpoints read: where it does
    "self.single_partition_of_fp32_groups": stage_1_and_2,
    "self.fp32_groups_flat_partition": bf16_optimizer,
    "self.fp32_partitioned_groups_flat": stage3,
    "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]": stage3,
    "self.fp16_groups": stage3,
    "lp_param._hp_mapping = get_hp_fragment_mapping(": mixed_precision_linkage,
    "lp_fragment_address: fragment_address": tensor_fragment,
    "hp_fragment_address: fragment_address": tensor_fragment,
    "param_group_index: int": tensor_fragment,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_deepspeed_still_sets_what_checkpoints_read(name):
    where = WRITTEN[name]
    assert name in inspect.getsource(where), f"{where.__name__} of {deepspeed.__version__} does not set {name}"


def test_the_capacity_layer_is_called_as_we_stand_in_for_its_gate():
    call = inspect.getsource(MOELayer.forward)
    assert "self.gate(" in call
    assert "reshaped_input, input[1], True, self.use_tutel" in call
    assert {"drop_policy", "sparse_routes", "ep_group"} <= set(inspect.signature(topkgating).parameters)


def test_the_engine_knows_expert_parameters_by_the_marks_we_set():
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert not moe_utils.is_moe_param(parameter)
    parameter.allreduce = False
    assert moe_utils.is_moe_param(parameter)


@pytest.mark.parametrize("optimizer", [BF16_Optimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def test_an_optimizer_says_whether_it_skipped_a_step(optimizer):
    assert "self.overflow = True" in inspect.getsource(optimizer)


def test_our_block_is_deepspeeds_layer_with_the_models_parameters():
    config = MixtralConfig(hidden_size=16, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    block = TrainedExpertParallelBlock(config, ParallelConfig(expert=4, zero=1), 1)
    assert isinstance(block, auto_ep_layer.AutoEPMoELayer)
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    assert shapes == {"gate.weight": (8, 16), "experts.gate_up_proj": (2, 16, 16), "experts.down_proj": (2, 16, 8)}
