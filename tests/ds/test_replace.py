# SPDX-License-Identifier: GPL-3.0-or-later
"""Replacement of stock layers: weights, aliases, hooks, parameter lists, and a user's own initialisation."""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from flashfusemoe_ds import MoE, get_dense_params, initialize, replace_moe
from flashfusemoe_ds.ds.fused_experts import FusedExperts
from flashfusemoe_ds.ds.replace import as_lists, remap_groups, remap_optimizer
from flashfusemoe_ds.nn.experts import ModuleExperts
from tests.distributed import run_ranks

D = 8


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))


class Model(nn.Module):
    def __init__(self, moe_class: type[nn.Module] = StockMoE, expert: nn.Module | None = None) -> None:
        super().__init__()
        self.inp = nn.Linear(D, D)
        self.moe = moe_class(D, expert or mlp(), num_experts=4, k=2, use_residual=True, drop_tokens=False)
        self.again = self.moe  # one layer under two names
        self.out = nn.Linear(D, 1)

    def forward(self, x):
        x = self.moe(self.inp(x))[0]
        return self.out(self.again(x)[0])


def test_weights_aliases_flags_and_results() -> None:
    torch.manual_seed(0)
    stock = Model()
    stock.moe.eval()
    calls = []
    stock.moe.register_forward_hook(lambda *_: calls.append(1))
    stock.moe.deepspeed_moe.gate.wg.weight.requires_grad_(False)
    expected_state = {k: v.clone() for k, v in stock.state_dict().items()}
    x = torch.randn(5, D)
    torch.manual_seed(1)
    expected = stock(x)

    model = replace_moe(stock)
    assert model is stock and type(model.moe) is MoE and model.again is model.moe
    assert isinstance(model.moe.deepspeed_moe, MOELayer) and isinstance(model.moe.deepspeed_moe.gate, TopKGate)
    assert isinstance(model.moe.deepspeed_moe.experts, FusedExperts)
    assert not any(m.training for m in model.moe.modules()) and model.inp.training
    assert not model.moe.deepspeed_moe.gate.wg.weight.requires_grad
    assert list(model.state_dict()) == list(expected_state)
    assert all(torch.equal(v, expected_state[k]) for k, v in model.state_dict().items())
    torch.manual_seed(1)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-7)
    assert len(calls) == 4
    assert replace_moe(model).moe is model.moe


def test_a_model_that_is_itself_a_layer() -> None:
    layer = StockMoE(D, mlp(), 4)
    assert replace_moe(layer) is layer and type(layer) is MoE


def test_other_references_to_a_layer_run_the_fused_one() -> None:
    """A pipeline keeps layers in forward_funcs, users keep them in lists: the object must stay the same."""
    model = nn.Sequential(StockMoE(D, mlp(), 4, drop_tokens=False))
    model.forward_funcs = [model[0]]
    replace_moe(model)
    out, *_ = model.forward_funcs[0](torch.randn(9, D))
    out.sum().backward()
    assert torch.count_nonzero(model[0].deepspeed_moe.experts.up_proj.grad)


def test_layers_that_share_their_experts_go_on_sharing_them() -> None:
    stock = nn.Sequential(StockMoE(D, mlp(), 4), StockMoE(D, mlp(), 4))
    stock[1].deepspeed_moe.experts = stock[0].deepspeed_moe.experts
    replace_moe(stock)
    assert isinstance(stock[0].deepspeed_moe.experts, FusedExperts)
    assert stock[1].deepspeed_moe.experts is stock[0].deepspeed_moe.experts


def test_experts_tied_to_another_module_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(D, 16), StockMoE(D, mlp(), 4))
    model[0].weight = model[1].deepspeed_moe.experts.deepspeed_experts[2][0].weight
    replace_moe(model)
    experts = model[1].deepspeed_moe.experts
    assert isinstance(experts, ModuleExperts) and experts.deepspeed_experts[2][0].weight is model[0].weight


def test_an_expert_that_another_module_holds_too_stays_shared() -> None:
    model = nn.Sequential(StockMoE(D, mlp(), 4))
    model.shared = model[0].deepspeed_moe.experts.deepspeed_experts[0]
    replace_moe(model)
    assert model[0].deepspeed_moe.experts.deepspeed_experts[0] is model.shared
    assert model.shared(torch.randn(3, D)).shape == (3, D)


def test_a_list_of_experts_in_two_containers_stays_shared() -> None:
    model = nn.Sequential(StockMoE(D, mlp(), 4), StockMoE(D, mlp(), 4))
    lists = [layer.deepspeed_moe.experts for layer in model]
    lists[1].deepspeed_experts = lists[0].deepspeed_experts
    replace_moe(model)
    first, second = (layer.deepspeed_moe.experts.deepspeed_experts for layer in model)
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_a_container_shared_with_a_layer_that_stays_is_not_emptied() -> None:
    model = nn.Sequential(StockMoE(D, mlp(), 4, drop_tokens=False), StockMoE(D, mlp(), 4, drop_tokens=False))
    model[1].deepspeed_moe.gate = OwnGate(D, 4, drop_tokens=False)
    model[1].deepspeed_moe.experts = model[0].deepspeed_moe.experts
    replace_moe(model)
    for layer in model:
        assert layer(torch.randn(9, D))[0].shape == (9, D)


def test_old_storage_is_freed() -> None:
    stock = StockMoE(D, mlp(), 4)
    old = list(stock.deepspeed_moe.experts.parameters())
    replace_moe(stock)
    assert all(p.numel() == 0 and p.fused_into.dim() in (2, 3) for p in old)


class OwnGate(TopKGate):
    def forward(self, *args):
        return super().forward(*args)


def test_classes_hooks_and_overrides_of_the_users_are_not_lost() -> None:
    layers = own_gate, hooked, *overridden = [StockMoE(D, mlp(), 4) for _ in range(5)]
    own_gate.deepspeed_moe.gate = OwnGate(D, 4)
    hooked.deepspeed_moe.experts.register_forward_hook(lambda *_: None)
    for moe, part in zip(overridden, ("", "gate", "experts"), strict=True):
        moe.deepspeed_moe.get_submodule(part).forward = lambda *args: args[0]
    for layer in layers:
        assert type(replace_moe(layer)) is StockMoE


def test_a_subclass_of_the_users_is_left_alone() -> None:
    class Own(StockMoE):
        pass

    assert type(replace_moe(nn.Sequential(Own(D, mlp(), 4)))[0]) is Own


def test_marks_on_parameters_follow() -> None:
    stock = StockMoE(D, mlp(), 4)
    for expert in stock.deepspeed_moe.experts.deepspeed_experts:
        expert[0].weight.my_mark = "kept"
    experts = replace_moe(stock).deepspeed_moe.experts
    assert experts.up_proj.my_mark == "kept"
    assert all(p.allreduce is False and p.group_name == "ep_size_1" for p in experts.parameters())


def test_parameter_lists_groups_and_optimizer_follow() -> None:
    model = Model()
    decay = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    rest = {n: p for n, p in model.named_parameters() if p.dim() == 1}
    groups = [{"params": list(decay.values()), "weight_decay": 0.1, "name": "decay"},
              {"params": list(rest.values()), "name": "rest"}]  # fmt: skip
    optimizer = torch.optim.AdamW([dict(g) for g in groups])
    named = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    plain = list(model.parameters())
    replace_moe(model)

    new = list(model.parameters())
    assert {id(p) for p in remap_groups(plain)} == {id(p) for p in new}
    remapped = remap_groups(groups)
    experts = model.moe.deepspeed_moe.experts
    in_decay, in_rest = ({id(p) for p in g["params"]} for g in remapped)
    assert id(experts.up_proj) in in_decay and id(experts.down_proj) in in_decay
    assert id(experts.up_proj_bias) in in_rest, "a stacked bias stays where the biases were"
    assert len(in_decay | in_rest) == len(new) and remapped[0]["weight_decay"] == 0.1
    first_group = optimizer.param_groups[0]
    remap_optimizer(optimizer)
    assert optimizer.param_groups[0] is first_group
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in remapped]
    remap_optimizer(named)
    assert len(named.param_groups[0]["param_names"]) == len(named.param_groups[0]["params"]) == len(new)
    model(torch.randn(5, D)).sum().backward()
    before = experts.up_proj.detach().clone()
    optimizer.step()
    assert not torch.equal(experts.up_proj, before)


def test_named_parameters_and_generators_follow() -> None:
    model = Model()
    named = list(model.named_parameters())
    groups = as_lists([{"params": (p for n, p in model.named_parameters() if "deepspeed_experts" in n), "lr": 0.1}])
    replace_moe(model)
    remapped = remap_groups(named)
    assert {id(p) for _, p in remapped} == {id(p) for p in model.parameters()}
    experts = {id(p) for p in model.moe.deepspeed_moe.experts.parameters()}
    assert {id(p) for p in remap_groups(groups)[0]["params"]} == experts
    assert remap_groups([{"params": model.inp.weight}])[0]["params"][0] is model.inp.weight


def test_a_scheduler_that_counts_groups_must_come_later() -> None:
    model = Model()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    replace_moe(model)
    with pytest.raises(ValueError, match="build the scheduler after replace_moe"):
        remap_optimizer(optimizer)


def test_copies_of_replaced_parameters_are_noticed() -> None:
    """copy.deepcopy loses what points from a replaced parameter to its successor."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_moe(model)
    with pytest.raises(ValueError, match="a listed parameter is empty"):
        remap_groups(copy.deepcopy(list(optimizer.param_groups)))


def test_groups_that_deepspeed_split_by_size_are_joined_again() -> None:
    model = Model()
    split = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all", "lr": 0.1}, max_group_size=200
    )
    assert sum(g.get("moe", False) for g in split) > 2
    replace_moe(model)
    remapped = remap_groups(split)
    listed = [id(p) for g in remapped for p in g["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in model.parameters()}
    experts = {id(p) for p in model.moe.deepspeed_moe.experts.parameters()}
    assert experts == {id(p) for g in remapped if g.get("moe") for p in g["params"]}


def test_dense_params_in_backward_order() -> None:
    model = replace_moe(Model())
    dense = get_dense_params(model)
    experts = {id(p) for p in model.moe.deepspeed_moe.experts.parameters()}
    assert not experts & {id(p) for p in dense}
    assert len(dense) + len(experts) == len(list(model.parameters()))
    assert dense[0] is model.out.bias and dense[-1] is model.inp.weight
    assert get_dense_params(model, backward_order=False) == dense[::-1]


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            module.bias.data = torch.full_like(module.bias, 0.5)


def init_matrices(module: nn.Module) -> None:
    """By dimension and not by class: on a stacked parameter the fan would be another."""
    for param in module.parameters(recurse=False):
        if param.dim() > 1:
            nn.init.xavier_uniform_(param)


def test_a_models_own_initialisation_reaches_the_experts_with_stock_draws() -> None:
    states, draws = [], []
    for moe_class in (StockMoE, MoE):
        torch.manual_seed(0)
        model = Model(moe_class)
        model.apply(init_weights)
        model.apply(init_matrices)
        states.append(model.state_dict())
        draws.append(torch.get_rng_state())
    assert torch.equal(*draws)
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    up = "moe.deepspeed_moe.experts.deepspeed_experts.{}.0.weight"
    assert not torch.equal(states[1][up.format(0)], states[1][up.format(1)])


def overlap_at_each_stage(rank: int, world: int) -> dict[str, bool]:
    found = {}
    for stage in (1, 2):
        for name, section in (("default", {}), ("off", {"overlap_dense_grads": False})):
            config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
                      "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
                      "flashfusemoe": section}  # fmt: skip
            model = nn.Sequential(MoE(D, mlp(), 4))
            engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)
            found[f"{stage}, {name}"] = engine.zero_overlap_comm()
            assert "overlap_comm" not in config["zero_optimization"], "the caller's config was changed"
    return found


def test_overlap_comm_is_set_where_the_config_leaves_it_out() -> None:
    found = run_ranks(1, overlap_at_each_stage)[0]
    assert found == {"1, default": True, "1, off": False, "2, default": True, "2, off": False}


def engine_over_a_layer_with_an_own_gate(rank: int, world: int) -> str:
    model = nn.Sequential(StockMoE(D, mlp(), 4))
    model[0].deepspeed_moe.gate = OwnGate(D, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "flashfusemoe": {"replace_moe": True},
              "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}  # fmt: skip
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)
    return type(engine.module[0]).__module__


def test_an_engine_is_built_over_layers_that_cannot_be_replaced() -> None:
    assert run_ranks(1, engine_over_a_layer_with_an_own_gate) == ["deepspeed.moe.layer"]


def freeze_linears(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.requires_grad_(False)


def test_apply_carries_requires_grad_and_respects_it() -> None:
    model = Model(MoE)
    model.apply(freeze_linears)
    assert not any(p.requires_grad for p in model.parameters())
    before = model.moe.deepspeed_moe.experts.up_proj.clone()
    model.apply(lambda m: init_weights(m) if isinstance(m, nn.Linear) and m.weight.requires_grad else None)
    assert torch.equal(model.moe.deepspeed_moe.experts.up_proj, before)


@pytest.mark.parametrize("weight", [0.0, float("nan")])
def test_apply_that_changes_nothing_writes_nothing(weight: float) -> None:
    """DeepSpeed's profiler applies functions between forward and backward."""
    model = Model(MoE)
    with torch.no_grad():
        model.moe.deepspeed_moe.experts.up_proj[0, 0, 0] = weight
    out = model(torch.randn(5, D)).sum()
    model.apply(lambda m: None)
    out.backward()


def test_apply_carries_dtype() -> None:
    model = MoE(D, mlp(), 2)
    model.apply(lambda m: m.to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert copy.deepcopy(model).to("meta").apply(lambda m: None).deepspeed_moe.experts.up_proj.is_meta


def test_apply_refuses_what_it_cannot_carry() -> None:
    def freeze_first(module: nn.Module, seen: list[int] = []) -> None:  # noqa: B006 -- a counter over calls
        if isinstance(module, nn.Linear) and not seen:
            seen.append(1)
            module.weight.requires_grad_(False)

    with pytest.raises(ValueError, match="on parts of the stacked up_proj"):
        MoE(D, mlp(), 4).deepspeed_moe.experts.apply(freeze_first)
    with pytest.raises(ValueError, match="changed an expert's parameters"):
        MoE(D, mlp(), 4).apply(lambda m: nn.utils.parametrizations.weight_norm(m) if type(m) is nn.Linear else None)


def test_the_constructor_draws_what_stock_draws() -> None:
    states = []
    for moe_class in (StockMoE, MoE):
        torch.manual_seed(0)
        Model(moe_class)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_copies_are_independent() -> None:
    model = Model(MoE)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.moe.deepspeed_moe.experts.up_proj.zero_()
    assert torch.count_nonzero(model.moe.deepspeed_moe.experts.up_proj)


def marks_of_a_copy(rank: int, world: int) -> list[bool]:
    moe = copy.deepcopy(MoE(D, mlp(), 4))
    moe.set_deepspeed_parallelism()
    marked = dict(moe.deepspeed_moe.experts.named_parameters())
    assert marked["up_proj_bias"].use_muon is False and not hasattr(marked["up_proj"], "use_muon")
    return [p.allreduce is False and p.group_name == "ep_size_1" for p in marked.values()]


def test_a_copied_model_trains_its_experts_as_experts() -> None:
    """copy.deepcopy loses the marks that tell DeepSpeed which parameters are experts'."""
    assert run_ranks(1, marks_of_a_copy) == [[True] * 4]


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        self.last_shape = x.shape
        return self.fc(self.norm(x)), None


def test_other_experts_keep_their_own_parameters_and_get_zero_gradients_without_tokens() -> None:
    model = Model(MoE, Custom())
    experts = model.moe.deepspeed_moe.experts
    assert isinstance(experts, ModuleExperts)
    with torch.no_grad():
        model.moe.deepspeed_moe.gate.wg.weight.zero_()  # equal logits: top-1 always picks expert 0
    model.moe.deepspeed_moe.gate.top2_2nd_expert_sampling = False
    model(torch.randn(6, D)).sum().backward()
    # DeepSpeed's experts see [groups, local experts, rows, D]; equal logits send every token to the first two, and the
    # others see two rows of zeros.
    assert [e.last_shape for e in experts.deepspeed_experts] == [(1, 1, n, D) for n in (6, 6, 2, 2)]
    grads = [[p.grad for p in e.parameters()] for e in experts.deepspeed_experts]
    assert all(g is not None for expert in grads for g in expert)
    assert all(torch.count_nonzero(g) == 0 for g in grads[3]) and any(torch.count_nonzero(g) for g in grads[0])


def test_load_state_dict_reports_missing_wrong_and_unknown_keys() -> None:
    moe = MoE(D, mlp(), 2)
    state = moe.state_dict()
    prefix = "deepspeed_moe.experts.deepspeed_experts."
    state["deepspeed_moe.experts.deepspeed_experts.7.0.weight"] = torch.zeros(1)
    del state[f"{prefix}1.2.bias"]
    result = moe.load_state_dict(state, strict=False)
    assert result.missing_keys == [f"{prefix}1.2.bias"]
    other = MoE(D, mlp(), 2)
    other.load_state_dict(state, strict=False)  # the rest of that expert is loaded
    assert torch.equal(other.state_dict()[f"{prefix}1.2.weight"], state[f"{prefix}1.2.weight"])
    state = moe.state_dict()
    state[f"{prefix}7.0.weight"] = torch.zeros(1)
    state[f"{prefix}0.0.weight"] = torch.zeros(3, 3)
    try:
        moe.load_state_dict(state)
        raise AssertionError("loaded")
    except RuntimeError as error:
        assert "size mismatch" in str(error) and f"{prefix}7.0.weight" in str(error)


def test_load_state_dict_can_assign() -> None:
    source, target = MoE(D, mlp(), 2).to(torch.bfloat16), MoE(D, mlp(), 2)
    target.deepspeed_moe.experts.up_proj_bias.requires_grad_(False)
    state = source.state_dict()
    from_meta = MoE(D, mlp(), 2).to("meta")
    from_meta.load_state_dict(state, assign=True)
    assert torch.equal(from_meta.deepspeed_moe.experts.up_proj, source.deepspeed_moe.experts.up_proj)
    target.load_state_dict(state, assign=True)
    experts = target.deepspeed_moe.experts
    for name, param in source.deepspeed_moe.experts.stacked().items():
        loaded = getattr(experts, name)
        assert isinstance(loaded, nn.Parameter) and loaded.dtype is torch.bfloat16 and torch.equal(loaded, param)
        assert loaded.allreduce is False and loaded.group_name == "ep_size_1"
        assert loaded.requires_grad == (name != "up_proj_bias")
    del state["deepspeed_moe.experts.deepspeed_experts.0.2.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        MoE(D, mlp(), 2).to("meta").load_state_dict(state, assign=True)
